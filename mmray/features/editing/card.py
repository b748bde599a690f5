"""An edit's model card: the README.md of its folder, with what it is for, what it changes, and how to apply it."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import yaml

from mmray.features.editing.bounds import verdict
from mmray.features.editing.files import ROWS_FILE

if TYPE_CHECKING:
    from mmray.features.editing.edit import WeightEdit


def edit_card(edit: WeightEdit) -> str:
    """Return the text of the card; it names no path of the machine that made the edit."""
    front = {"library_name": "mmray", "tags": ["interpretability", "mmray", "model-editing"]}
    purposes = "; ".join(purpose.summary for purpose in edit.purposes)
    layers = ", ".join(f"L{layer} ({count:,})" for layer, count in sorted(Counter(edit.layer.tolist()).items()))
    requests = edit.settings.get("wishes", [])
    facts = {
        "purpose": purposes,
        "model": f"the checkpoint with digest `{edit.model}`; others are refused",
        "method": ", ".join(dict.fromkeys(request["method"] for request in requests)) or "a sum of edits",
        "rows of W_out by layer": layers,
        "L2 norm of the change": f"{float(edit.delta.norm()):.4g}",
    }
    lines = ["---", yaml.safe_dump(front, sort_keys=False).strip(), "---", "", f"# {purposes}", ""]
    lines += ["An edit of a language model, as rows to add to the projections of its MLPs.", ""]
    lines += ["| | |", "|---|---|", *(f"| {name} | {text} |" for name, text in facts.items()), ""]
    if validation := edit.facts.get("validation"):
        lines += ["On answers that it was not learned from: " + verdict(validation)["words"] + ".", ""]
        lines += [
            "| measure | value |",
            "|---|---|",
            *(f"| {name} | {value:g} |" for name, value in validation.items()),
            "",
        ]
    lines += [
        f"`{ROWS_FILE}` has the tensors `layer`, `unit` and `delta`: row *i* of `delta` is added to the row of W_out "
        "of neuron `unit[i]` in layer `layer[i]`."
        + (" `inputs[i]` is added to the rows that the neuron reads, the gate's first." * (edit.inputs is not None)),
        "",
        "```python",
        "import mmray",
        "",
        'model, edit = mmray.load_model("MODEL"), mmray.open_edit("EDIT")',
        "with edit.applied(model):  # undone to the byte at the end of the block",
        '    model.caption("image.jpg")  # or, without an image: model.generate([None], "PROMPT")',
        "```",
        "",
    ]
    return "\n".join(lines)

"""An edit's card says what it is for and how it was measured, and nothing of the machine that made it."""

import ast
import re

import torch
import yaml

from mmray.features.editing.card import edit_card
from mmray.features.editing.edit import Purpose, WeightEdit

VALIDATION = {"reliability": 1.0, "image_generality": 0.95, "image_locality": 0.5}


def test_a_card_has_the_purpose_measures_and_an_example_that_parses():
    rows = torch.tensor([7, 7, 6]), torch.tensor([1, 2, 3])
    settings = {"wishes": [{"method": "learned", "keep_text": "/home/me/secret.json"}], "run": "/home/me/run"}
    purpose = Purpose("swap", "dog", "cat", samples=("s1",))
    edit = WeightEdit(*rows, torch.ones(3, 4), (purpose,), "0123abcd", settings, {"validation": VALIDATION})
    card = edit_card(edit)
    _, front, text = card.split("---\n", 2)
    assert yaml.safe_load(front)["library_name"] == "mmray"
    assert "# dog → cat" in text
    assert "L6 (1), L7 (2)" in text
    assert "0123abcd" in text
    assert "| image_locality | 0.5 |" in text
    assert "changes captions" in text
    assert "/home" not in card
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    ast.parse(code)
    # An edit with neither settings nor measures, such as one made by hand.
    assert "On answers" not in edit_card(WeightEdit(*rows, torch.ones(3, 4), (purpose,), "0123abcd"))

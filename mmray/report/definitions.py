"""Definitions of the report's numbers."""

from __future__ import annotations

from mmray.neurons.scores import FOLDED, SCORES, unit_of
from mmray.runs.run import Run

HELD = " (with the final norm's scale held: ablating a high neuron takes about half of it)"


def definitions(run: Run) -> list[dict[str, str]]:
    """Return name and meaning of each number, for this run's settings."""
    settings = run.info["settings"]
    unit = unit_of(settings["score"], folded=settings["fold_norm"])
    captions = "the data's captions" if settings["captions"] == "dataset" else "the model's own captions"
    words = {
        "concept": f"a noun of {captions}, in lower case, as the caption's language writes it",
        "occurrence": "a position in a caption where a concept's first token is predicted, from the image, the "
        "prompt and the caption up to there",
        "neuron": "an input of an MLP output projection in the language decoder; L7.u89 is unit 89 of layer 7, layers "
        "counted from 0",
        "score": f"mean over the concept's occurrences of the {settings['score']}{f', in {unit}' if unit else ''}: "
        f"{SCORES[settings['score']].definition}{HELD if unit == FOLDED else ''}. The interval holds the mean at 95 %, "
        "from the scatter over occurrences",
        "specific": "score minus max(0, the neuron's mean score for the noun at all other nouns' occurrences): what it "
        "gives this noun and no other",
        "share": f"fraction of the occurrences at which the neuron is among the {settings['top_k']} highest of all",
        "P(noun)": "mean probability of the concept's first token at its occurrences",
        "read": "one of the concept's ten highest neurons has the concept's own token among the ten it writes",
        "promotes, suppresses": "the ten tokens whose logits the neuron's row of W_out raises, or lowers, most",
        "writes": "what the neuron promotes; after a minus what it suppresses, because its mean activation at the "
        "concept is negative and it adds activation × its row of W_out",
        "open": "fraction of the tokens at which the neuron's gate is open (in a plain MLP: its activation positive)",
    }
    return [{"name": name, "text": text} for name, text in words.items()]

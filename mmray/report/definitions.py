"""What each number of a report is, in words."""

from __future__ import annotations

from mmray.neurons.scores import FOLDED, SCORES, unit_of
from mmray.runs.run import Run

HELD = " (with the final norm's scale held: ablating a high neuron takes about half of it)"


def definitions(run: Run) -> list[dict[str, str]]:
    """Return name and meaning of the report's numbers, with this run's settings."""
    settings = run.info["settings"]
    unit = unit_of(settings["score"], folded=settings["fold_norm"])
    said = "the data's captions" if settings["captions"] == "dataset" else "the model's own captions"
    words = {
        "concept": f"a noun of {said}, in lower case, as the caption's language writes it",
        "occurrence": "a place in a caption where a concept's first token is predicted; the model has seen the image, "
        "the prompt and the caption up to there",
        "neuron": "an input of an MLP output projection in the language decoder; L7.u89 is unit 89 of layer 7, layers "
        "counted from 0",
        "score": f"mean over the concept's occurrences of the {settings['score']}{f', in {unit}' if unit else ''}: "
        f"{SCORES[settings['score']].definition}{HELD if unit == FOLDED else ''}. The interval holds the mean at 95 %, "
        "from the scatter over occurrences",
        "specific": "score minus max(0, the neuron's mean score for the noun at all other nouns' occurrences): what it "
        "gives this noun and no other",
        "share": f"part of the occurrences at which the neuron is among the {settings['top_k']} highest of all",
        "P(noun)": "mean probability of the concept's first token at its occurrences",
        "read": "the concept's own token is among the ten that one of its ten highest neurons writes",
        "promotes, suppresses": "the ten tokens whose logits the neuron's row of W_out raises, or lowers, most",
        "writes": "what the neuron promotes, or behind a minus what it suppresses: its mean activation at the concept "
        "is negative, and it adds activation × its row of W_out",
        "open": "part of the tokens at which the neuron's gate is open (in a plain MLP: its activation positive)",
    }
    return [{"name": name, "text": text} for name, text in words.items()]

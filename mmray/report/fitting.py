"""What of a run fits into a report of one file: pages of the most frequent concepts, then pictures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from mmray.report.content import Content, samples_of
from mmray.report.pages import embedded, write_whole

LARGEST = 15_000_000
"""Bytes of a report of one file, which people mail and keep."""
FOR_PAGES = 0.6
"""Fraction for pages of concepts and neurons, of the bytes that scripts, index and the features' pages leave."""
SMALLEST_PICTURE = 2_000
"""Bytes that a picture takes at least, about; bounds how many are read to choose from."""


def concepts_that_fit(content: Content) -> int:
    """Return how many of the concepts, the most frequent first, fit with the pages of their neurons."""
    left, told = FOR_PAGES * _room(replace(content, concepts={}, neurons={})), set[str]()
    for number, (name, page) in enumerate(content.concepts.items()):
        neurons = {f"n:{row['neuron']}": content.neurons[row["neuron"]] for row in page["neurons"]}
        pages = {key: part for key, part in ({f"c:{name}": page} | neurons).items() if key not in told}
        told |= pages.keys()
        captions = {sample: content.captions.get(sample) for part in pages.values() for sample in samples_of(part)}
        left -= len(embedded([pages, captions]).encode())
        if left < 0:
            return number
    return len(content.concepts)


def pictures_wanted(content: Content) -> list[str]:
    """Return the samples whose pictures may fit, the most important first."""
    return content.samples()[: max(0, _room(content)) // SMALLEST_PICTURE]


def pictures_that_fit(content: Content, pictures: Mapping[str, bytes]) -> dict[str, bytes]:
    """Return the pictures that fit, the most important first."""
    left, kept = _room(content), dict[str, bytes]()
    elsewhere = [name for names in content.elsewhere().values() for name in sorted(names)]
    for name in dict.fromkeys([*elsewhere, *content.samples()]):
        if name in pictures:
            # In base64, with its name and type.
            left -= 4 * -(-len(pictures[name]) // 3) + len(name.encode()) + 40
            if left < 0:
                break
            kept[name] = pictures[name]
    return kept


def _room(content: Content) -> int:
    """Return the bytes that a report of this content leaves for more."""
    return LARGEST - len(write_whole(content, {}))

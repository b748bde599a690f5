"""Samples in several languages, and the totals of a pass over them."""

from mmray.features.selectivity.replicates import draw
from mmray.features.selectivity.selection import add_up
from mmray.features.selectivity.settings import selectivity_settings
from mmray.features.selectivity.sums import LabelSums
from mmray.features.selectivity.texts import captions_of, in_batches
from tests.support.samples import samples
from tests.support.samples import settings as told

LANGUAGES = ("en", "es", "en", "fr", "es", "en", "fr", "en")


def labelled(count=8, **facts):
    found = samples(count, **facts)
    return [
        type(sample)(**(vars(sample) | {"language": language}))
        for sample, language in zip(found, LANGUAGES, strict=False)
    ]


def totals_of(model, found, permutations=2, bootstraps=2, size=3, census=None, **values):
    settings = selectivity_settings({"run": "none", **values})
    replicates = draw({s.sample_id: s.language for s in found}, permutations, bootstraps, 0)
    added = LabelSums(model, settings, replicates)
    in_batches(model, captions_of(model, found, "language", census or told()), size, added.add)
    return add_up([added.table()], replicates.labels), replicates

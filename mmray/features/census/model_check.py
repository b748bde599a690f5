"""Checks of a model: every claim that loading verifies, and a census of two samples."""

from __future__ import annotations

import io

from mmray.data.samples import Sample
from mmray.features.census.settings import census_settings
from mmray.features.census.shard import ShardAnalysis
from mmray.models.loading import LoadedModel
from mmray.neurons.validation import CAPTIONS, CHECKS, NOUNS, Check, check_parts, picture


def check_model(model: LoadedModel) -> list[Check]:
    """Check every claim about a model."""
    return check_parts(model, CHECKS | {"a census of two samples": small_census})


def small_census(model: LoadedModel) -> tuple[bool, str]:
    """Run two samples through all steps of a census worker."""
    buffer = io.BytesIO()
    picture().save(buffer, "PNG")
    samples = [Sample(str(number), "check", buffer.getvalue(), text, "en") for number, text in enumerate(CAPTIONS)]
    settings = census_settings({"model": model.name, "data": "check", "out": "check"})
    tables = ShardAnalysis(model, settings, NOUNS, 0).run(samples)
    found, failed = len(tables["occurrences"]), tables["errors"]["message"].to_pylist()
    return found == 4 and not failed, f"{found} occurrences in 2 captions" + (f"; {failed[0]}" if failed else "")

"""Hallucination as a job: what the model claims to see, sample by sample, and what a detector says of it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any, ClassVar

import pyarrow as pa
from PIL.Image import Image

from mmray.data.columns import Columns
from mmray.data.samples import Sample
from mmray.data.source import Source
from mmray.detector.joint import JointModel
from mmray.engine import Output, Parts, Plan
from mmray.errors import InputError
from mmray.features.census.inputs import columns_of
from mmray.features.census.settings import census_settings
from mmray.features.hallucination.claims import Claimant
from mmray.features.hallucination.inputs import Asked, JointContext, JointJob, Look, Rows, open_cut, schemas_of
from mmray.features.hallucination.measures import judged
from mmray.features.hallucination.mistakes import picture
from mmray.features.hallucination.settings import OpinionSettings
from mmray.features.hallucination.tables import PARTS, TABLES
from mmray.objects.ground_truth import survey, with_ground_truth
from mmray.objects.naming import object_naming
from mmray.objects.words import open_words
from mmray.runs.run import open_run

PICTURES, MOST_MISTAKES = 8, 60
"""Pictures of mistakes that a unit keeps, and that a run keeps."""


class HallucinationJob(JointJob[OpinionSettings]):
    """Has a run's model say what it sees, and a detector judge that."""

    name = "hallucination"
    parts: ClassVar[dict[str, pa.Schema]] = schemas_of(PARTS, "claims", "mistakes")

    @property
    def target(self) -> str:
        """The run."""
        return self.settings.run

    def plan(self) -> Plan[JointContext]:
        """Settle the data, and what is in its images."""
        settings, run = self.settings, open_run(self.settings.run)
        census = census_settings(run.info["settings"])
        data = settings.data or census.data
        columns = Columns() if settings.data else columns_of(census)
        source, manifest = open_cut(settings, data, columns)
        found = survey(source, settings.ground_truth, settings.synonyms)
        if not found.facts.vocabulary:
            raise InputError(f"{data}: no column of objects, without which no claim can be judged")
        asked = Asked(census.dtype, census.trust_remote_code, census.prompt, census.prefix)
        words = open_words(found.synonyms, found.facts.vocabulary)
        return self.planned(
            JointContext(census.model, data, columns, asked, manifest, found.facts, found.ground_truth, words)
        )

    def look(self, context: JointContext, joint: JointModel, source: Source) -> Look:
        """Return what asks the model about a unit's samples, and the detector about its claims."""
        settings, facts, asked = self.settings, context.facts, context.asked
        naming = object_naming(facts.vocabulary, facts.translations, context.words)
        claimant = Claimant(
            joint,
            facts,
            naming,
            asked.prompt,
            asked.prefix,
            settings.questions,
            settings.seed,
            settings.batch_size,
            settings.longest,
        )

        def look(samples: Sequence[Sample], images: Sequence[Image]) -> Rows:
            truths = [with_ground_truth(sample, context.ground_truth, naming, facts.references) for sample in samples]
            known = [place for place, sample in enumerate(truths) if sample.objects is not None]
            if not known:
                return {}
            seen = [images[place] for place in known]
            claims = claimant.claims([truths[place] for place in known], seen)
            shown = dict(zip((truths[place].sample_id for place in known), seen, strict=True))
            return {"claims": claims, "mistakes": _mistakes(claims, shown)}

        return look

    def merge(self, plan: Plan[JointContext], parts: Parts, output: Output) -> dict[str, Any]:
        """Write the claims, how well both judges do, and pictures of mistakes."""
        claims = parts.table("claims")
        measures = judged(claims, self.settings.draws, self.settings.seed)
        output.table("claims", claims)
        output.table("opinions", pa.Table.from_pylist(measures, TABLES["opinions"]))
        output.table("mistakes", parts.table("mistakes")[:MOST_MISTAKES])
        return {"rows": len(claims), "measures": measures}


def _mistakes(claims: Sequence[dict[str, Any]], shown: dict[str, Image]) -> list[dict[str, Any]]:
    """Return the first claims that are wrong, with pictures: what is claimed of an image counts once."""
    wrong: dict[tuple[str, str, str], dict[str, Any]] = {}
    for claim in claims:
        if claim["claimed"] and not claim["present"]:
            wrong.setdefault((claim["image"], claim["kind"], claim["word"]), claim)
    return [
        claim | {"picture": picture(shown[claim["sample_id"]], claim["box"], claim["mistaken_box"])}
        for claim in islice(wrong.values(), PICTURES)
    ]

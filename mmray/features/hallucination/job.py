"""Hallucination as a job: collect a model's claims sample by sample, and have a detector judge them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any, ClassVar

import pyarrow as pa
from PIL.Image import Image

from mmray.data.samples import Sample
from mmray.data.source import Source
from mmray.detector.joint import JointModel
from mmray.engine import Output, Parts, Plan
from mmray.errors import InputError
from mmray.features.hallucination.claims import Claim, ClaimCollector
from mmray.features.hallucination.inputs import Analysis, JointContext, JointJob, Rows, open_claims
from mmray.features.hallucination.measures import judged
from mmray.features.hallucination.mistakes import picture
from mmray.features.hallucination.settings import HallucinationSettings
from mmray.features.hallucination.tables import TABLES
from mmray.objects.ground_truth import with_ground_truth
from mmray.objects.lexicon import ObjectLexicon
from mmray.objects.pope_files import read_pope

PICTURES, MAX_MISTAKES = 8, 60
"""Pictures of mistakes that a unit keeps, and that a run keeps."""


class HallucinationJob(JointJob[HallucinationSettings]):
    """Collects the claims of a run's model, and has a detector judge them."""

    name = "hallucination"
    parts: ClassVar[dict[str, pa.Schema]] = {name: TABLES[name] for name in ("claims", "mistakes")}

    @property
    def target(self) -> str:
        """The run."""
        return self.settings.run

    def plan(self) -> Plan[JointContext]:
        """Open the data, and settle what counts as being in its images."""
        return self.planned(open_claims(self.settings))

    def digests(self, context: JointContext) -> dict[str, str]:
        """Return what the rows depend on besides settings, released questions included."""
        found = super().digests(context)
        return found | {"pope": read_pope(self.settings.pope).digest} if self.settings.pope else found

    def analysis(self, context: JointContext, joint: JointModel, source: Source) -> Analysis:
        """Return the function that collects and judges the claims about a unit's samples."""
        settings, statistics = self.settings, context.statistics
        lexicon = ObjectLexicon(statistics.vocabulary, statistics.translations, context.words)
        released = read_pope(settings.pope).by_key() if settings.pope else None
        collector = ClaimCollector(
            joint,
            statistics,
            lexicon,
            context.options.prompt,
            context.options.prefix,
            settings.questions,
            settings.seed,
            settings.batch_size,
            settings.longest,
            released,
        )

        def analyse(samples: Sequence[Sample], images: Sequence[Image]) -> Rows:
            truth, references = context.ground_truth, statistics.references
            annotated = (with_ground_truth(sample, truth, lexicon, references) for sample in samples)
            # Without known objects no claim can be judged; released questions are about the images that they name.
            known = [
                pair
                for pair in zip(annotated, images, strict=True)
                if pair[0].objects is not None and (released is None or pair[0].sample_id in released)
            ]
            if not known:
                return {}
            claims = collector.claims([sample for sample, _ in known], [image for _, image in known])
            return {"claims": claims, "mistakes": _mistakes(claims, {s.sample_id: image for s, image in known})}

        return analyse

    def merge(self, plan: Plan[JointContext], parts: Parts, output: Output) -> dict[str, Any]:
        """Write the claims, measures of both judges, and pictures of mistakes.

        Raises InputError where released questions are about none of the data's images.
        """
        claims = parts.table("claims")
        # The images that the files name may be in units or samples that failed.
        complete = len(parts.receipts) == len(plan.units) and not any(r.failures for r in parts.receipts.values())
        if self.settings.pope and not len(claims) and complete:
            raise InputError(f"--pope {self.settings.pope[0]}: names no image of the data by its file or COCO number")
        measures = judged(claims, self.settings.draws, self.settings.seed)
        output.table("claims", claims)
        output.table("opinions", pa.Table.from_pylist(measures, TABLES["opinions"]))
        # Pictures are large, and a page shows few of them.
        output.table("mistakes", parts.table("mistakes")[:MAX_MISTAKES])
        return {"rows": len(claims), "measures": measures}


def _mistakes(claims: Sequence[Claim], images: dict[str, Image]) -> list[dict[str, Any]]:
    """Return the first wrong claims with pictures. Samples of one image that repeat a claim count once."""
    wrong: dict[tuple[str, str, str], Claim] = {}
    for claim in claims:
        if claim["claimed"] and not claim["present"]:
            wrong.setdefault((claim["image"], claim["kind"], claim["word"]), claim)
    return [
        claim | {"picture": picture(images[claim["sample_id"]], claim["box"], claim["mistaken_box"])}
        for claim in islice(wrong.values(), PICTURES)
    ]

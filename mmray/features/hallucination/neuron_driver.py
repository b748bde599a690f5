"""The driver of `mmray hallucination --neurons`: moments, candidates with the probe, and interventions, in this order.

RUN/hallucination_contrast/FINGERPRINT/    mentions in the model's captions, moments of all neurons
RUN/hallucination_neurons/FINGERPRINT/     shares of the candidates at every mention
RUN/hallucination_doses/FINGERPRINT/       what captions are under each intervention
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from mmray.data.image_keys import one_per_image
from mmray.engine import Job, JobResult
from mmray.engine import run as run_job
from mmray.engine.driver import Follow
from mmray.features.hallucination.contrast import Moments, merged
from mmray.features.hallucination.doses import conditions, doubt_of
from mmray.features.hallucination.inputs import JointContext, open_claims
from mmray.features.hallucination.mentions import TEST, fold_of
from mmray.features.hallucination.neuron_jobs import (
    CandidateContext,
    CandidateJob,
    ContrastJob,
    DoseContext,
    DoseJob,
    choose_candidates,
)
from mmray.features.hallucination.settings import NeuronSettings
from mmray.models.decodings import Decoding, decoding_of
from mmray.neurons.controls import layer_matched
from mmray.runs.run import Run, open_run


@dataclass(frozen=True)
class NeuronResult:
    """A finished analysis."""

    passes: tuple[JobResult, ...]

    @property
    def complete(self) -> bool:
        """Whether nothing failed in any pass."""
        return all(one.complete for one in self.passes)

    @property
    def headline(self) -> dict[str, Any]:
        """What the passes found."""
        return {name: value for one in self.passes for name, value in one.headline.items()}


def run_neurons(settings: NeuronSettings, follow: Follow = lambda _: None) -> NeuronResult:
    """Find the neurons that predict hallucination, test them, and write the tables. Finished work is not repeated.

    Raises InputError for anything wrong with the set-up, for too few mentions of either class, or if another call is
    working on the run.
    """
    passes: list[JobResult] = []

    def done(job: Job[Any, Any]) -> JobResult:
        passes.append(run_job(job, follow=follow))
        return passes[-1]

    # First, so that a wrong name costs no pass.
    decodings = [decoding_of(name) for name in settings.decoding]
    doubts = [doubt_of(given) for given in settings.ban_below]
    run = open_run(settings.run)
    context = open_claims(settings.claims())
    widths = run.info["model"]["widths"]
    first = done(ContrastJob(settings.claims(), context))
    sums = merged(first.parts.each("sums"))
    candidates, controls = choose_candidates(sums, widths, settings.candidates, settings.seed)
    mentions = first.parts.table("mentions")
    chosen = CandidateContext.above(
        context,
        candidates=tuple(candidates),
        controls=tuple(controls),
        mentions=mentions,
        sums=sums,
        widths=tuple(widths),
        names=run.names,
    )
    found = done(CandidateJob(settings.probe(), chosen)).headline["neurons"]
    if settings.interventions and found:
        done(DoseJob(settings.dose(), _doses(settings, decodings, doubts, run, context, sums, mentions)))
    return NeuronResult(tuple(passes))


def _doses(
    settings: NeuronSettings,
    decodings: Sequence[Decoding],
    doubts: Sequence[tuple[float, Decoding]],
    run: Run,
    context: JointContext,
    sums: Mapping[tuple[bool, str], Moments],
    mentions: pa.Table,
) -> DoseContext:
    """Return the context of interventions on the neurons that the probe uses, and of their rivals at decoding."""
    widths = run.info["model"]["widths"]
    # Opened anew, because the pass before has just written this table.
    rows = open_run(settings.run).table("hallucination_neurons").to_pylist()
    controls = layer_matched(widths, [(row["layer"], row["unit"]) for row in rows], f"{settings.seed} doses")
    # Each control is set to its own mean at true mentions, as the neurons of the probe are to theirs.
    starts, true = np.cumsum([0, *widths]), sums[False, "activation"].mean
    means = [float(true[int(starts[layer]) + unit]) for layer, unit in controls]
    names = [run.names.name(*one) for one in controls]
    every = conditions(rows, names, means, settings.doses, decodings, doubts)
    columns = (mentions[name].to_pylist() for name in ("sample_id", "image"))
    images = dict(zip(*columns, strict=True))
    tested = [name for name in images if fold_of(images[name], settings.seed) == TEST]
    # Images without a mention are left out: they have nothing to lose, and recall counts what others gain.
    kept = one_per_image(tested, images)[: settings.tested]
    return DoseContext.above(context, conditions=tuple(every), images=frozenset(kept))

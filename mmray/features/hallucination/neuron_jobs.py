"""The passes of `mmray hallucination --neurons`, one unit per shard: moments of all neurons, shares of candidates."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, TypeVar

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float
from numpy import ndarray
from PIL.Image import Image

from mmray.data.samples import Failure, Sample
from mmray.data.sources import open_source
from mmray.detector.alignment import alignment_digest
from mmray.detector.joint import JointModel, detector_digest, detector_or_demo, join
from mmray.engine import Job, Output, Parts, Plan, Unit, UnitResult, Worker
from mmray.errors import InputError
from mmray.features.census.ranking import locate_index
from mmray.features.hallucination.contrast import SUMS, ClassSums, Moments, effect
from mmray.features.hallucination.doses import Condition, dose_rows, observe
from mmray.features.hallucination.inputs import JointContext, context_digests, read_images
from mmray.features.hallucination.mentions import FIT, QUANTITIES, Mentioned, MentionReader, WrittenCaption, quantities
from mmray.features.hallucination.neuron_tables import PARTS, TABLES
from mmray.features.hallucination.probe import Mentions, SparseProbe, judge_all
from mmray.features.hallucination.settings import ClaimSettings, DoseSettings, ProbeSettings
from mmray.models.generation import check_decoding
from mmray.neuron_names import NeuronNames
from mmray.neurons.controls import layer_matched
from mmray.neurons.model import load_model
from mmray.runs.tables import ERRORS, vector_column, vectors
from mmray.statistics.bootstrap import Measured, measure, totals_by_image

S = TypeVar("S", bound=ClaimSettings)
C = TypeVar("C", bound=JointContext)
Neuron = tuple[int, int]
Images = Iterator[tuple[list[Sample], list[Image]]]
"""A unit's samples with their images, in parts that fit into memory."""
Observe = Callable[[Images], dict[str, pa.Table]]


class MentionJob(Job[S, C]):
    """A pass over images whose captions the model writes; the driver hands what one pass finds to the next."""

    def __init__(self, settings: S, context: C) -> None:
        super().__init__(settings)
        self.context = context

    @property
    def target(self) -> str:
        """The run."""
        return self.settings.run

    def plan(self) -> Plan[C]:
        """Return a plan with one unit per shard."""
        shards = self.context.manifest.shards
        digests = {**context_digests(self.context, self.parts), **self.digests()}
        return Plan([Unit(shard.samples, shard) for shard in shards], digests, self.context)

    def worker(self, context: C) -> Worker:
        """Load the model, and return the function that reads a shard's images."""
        options, settings = context.options, self.settings
        model = load_model(context.model, options.dtype, trust_remote_code=options.trust_remote_code)
        source = open_source(context.data, context.columns, captions=False)
        reader = MentionReader(model, context, settings.batch_size, settings.longest, settings.seed)
        observe = self.observer(reader, context)

        def work(unit: Unit) -> UnitResult:
            failures: list[Failure] = []
            found = observe(read_images(model, source, unit.payload, failures))
            errors = pa.Table.from_pylist([vars(failure) for failure in failures], ERRORS)
            return UnitResult({**found, "errors": errors})

        return work

    def merge(self, plan: Plan[C], parts: Parts, output: Output) -> dict[str, Any]:
        """Write nothing, because the next pass needs the parts; the last pass writes the tables."""
        return {}

    def digests(self) -> Mapping[str, str]:
        """Return digests of what the pass depends on in addition to its settings and the data."""
        return {}

    @abstractmethod
    def observer(self, reader: MentionReader, context: C) -> Observe:
        """Return the function that makes the parts of a unit."""


class ContrastJob(MentionJob[ClaimSettings, JointContext]):
    """Captions all images, and sums up what neurons do at hallucinated and at true mentions of the fit images."""

    name = "hallucination_contrast"
    parts: ClassVar[dict[str, pa.Schema]] = {"mentions": PARTS["mentions"], "sums": SUMS}

    def digests(self) -> Mapping[str, str]:
        """Return digests of the detector, if there is one."""
        detector, alignment = detector_or_demo(self.settings.detector, self.context.model), self.settings.alignment
        return {
            "detector": detector_digest(detector) if detector else "",
            "alignment": alignment_digest(alignment) if detector and alignment else "",
        }

    def observer(self, reader: MentionReader, context: JointContext) -> Observe:
        """Load the detector, if there is one, and return the function that captions and reads a unit's images."""
        model, name = reader.model, detector_or_demo(self.settings.detector, context.model)
        detector = join(model, name, self.settings.alignment) if name else None

        def observe(images: Images) -> dict[str, pa.Table]:
            sums, rows = ClassSums(model.widths), []
            for samples, pictures in images:
                captions = reader.captions(reader.known(samples, pictures))
                confidence = _confidences(detector, captions)
                tokens = {caption.sample.sample_id: caption.tokens for caption in captions}
                for mentioned in reader.read(captions):
                    _add_fit(sums, reader, mentioned)
                    rows += [
                        row
                        | {"tokens": tokens[row["sample_id"]]}
                        | {"confidence": confidence.get((row["sample_id"], row["word"]))}
                        for row in mentioned.rows
                    ]
            return {"mentions": pa.Table.from_pylist(rows, PARTS["mentions"]), "sums": sums.table()}

        return observe


@dataclass(frozen=True)
class CandidateContext(JointContext):
    """What the second pass needs in addition: neurons, and the mentions in the captions that the first one wrote."""

    candidates: tuple[Neuron, ...]
    controls: tuple[Neuron, ...]
    """As many random neurons of the same layers."""
    mentions: pa.Table
    sums: Mapping[tuple[bool, str], Moments]
    """Moments of all neurons over the fit images."""
    widths: tuple[int, ...]
    names: NeuronNames

    @classmethod
    def above(cls, context: JointContext, **more: Any) -> CandidateContext:
        """Return a context with everything of the first pass."""
        return cls(**{one.name: getattr(context, one.name) for one in fields(JointContext)}, **more)


class CandidateJob(MentionJob[ProbeSettings, CandidateContext]):
    """Reads the candidates at every mention, fits the probe, and writes the tables."""

    name = "hallucination_neurons"
    parts: ClassVar[dict[str, pa.Schema]] = {"features": PARTS["features"]}

    def plan(self) -> Plan[CandidateContext]:
        """Return a plan whose workers get captions and neurons, but no moments, which are large."""
        made = super().plan()
        return replace(made, context=replace(made.context, sums={}))

    def digests(self) -> Mapping[str, str]:
        """Return a digest of the neurons and the captions."""
        context = self.context
        captions = context.mentions.select(["sample_id", "tokens"]).to_pylist()
        known = (context.candidates, context.controls, captions)
        return {"candidates": hashlib.sha256(repr(known).encode()).hexdigest()[:16]}

    def observer(self, reader: MentionReader, context: CandidateContext) -> Observe:
        """Return the function that reads the neurons at every mention in the captions of a unit's images."""
        chosen = _by_layer([*context.candidates, *context.controls])
        columns = context.mentions.select(["sample_id", "tokens"]).to_pylist()
        captions: dict[str, list[int]] = {row["sample_id"]: row["tokens"] for row in columns}
        width = len(context.candidates) + len(context.controls)

        def observe(images: Images) -> dict[str, pa.Table]:
            rows: list[dict[str, Any]] = []
            found = [np.zeros((0, width), np.float32)]
            for samples, pictures in images:
                pairs = [pair for pair in reader.known(samples, pictures) if pair[0].sample_id in captions]
                written = [captions[sample.sample_id] for sample, _ in pairs]
                for mentioned in reader.read(reader.as_written(pairs, written)):
                    shares = np.zeros((len(mentioned.rows), width), np.float32)
                    for layer, values in enumerate(quantities(reader.model, mentioned.cache)):
                        if layer in chosen:
                            places, units = chosen[layer]
                            shares[:, places] = values["share"][:, units].cpu().numpy()
                    found.append(shares)
                    rows += mentioned.rows
            arrays = [
                pa.array([row["sample_id"] for row in rows], pa.string()),
                pa.array([row["mention"] for row in rows], pa.int32()),
                vector_column(np.concatenate(found), np.ones(len(rows), dtype=bool)),
            ]
            return {"features": pa.Table.from_arrays(arrays, schema=PARTS["features"])}

        return observe

    def merge(self, plan: Plan[CandidateContext], parts: Parts, output: Output) -> dict[str, Any]:
        """Fit the probe, and write its neurons, what it is worth, and its score of every mention.

        Raises InputError for too few mentions of either class.
        """
        context, settings, features = self.context, self.settings, parts.table("features")
        # Units commit only the shares; everything else about a mention is in the parts of the first pass.
        known = {(row["sample_id"], row["mention"]): row for row in context.mentions.to_pylist()}
        keys = zip(features["sample_id"].to_pylist(), features["mention"].to_pylist(), strict=True)
        rows = [known[key] for key in keys]
        mentions = Mentions.of(rows)
        if lacking := mentions.missing():
            if len(parts.receipts) == len(plan.units):
                raise InputError(f"{context.data}: {lacking}; give more images by --data or --limit")
            # The tables are written once the quarantined units are there.
            return {"rows": len(rows), "neurons": 0, "measures": []}
        values = np.stack(vectors(features["shares"], np.float32))
        shares, controls = np.split(values, [len(context.candidates)], axis=1)
        most = max(1, int(settings.most * sum(context.widths)))
        probe, scores, measures = judge_all(mentions, shares, controls, most, settings.draws, settings.seed)
        neurons = neuron_rows(context, probe, mentions, shares, settings)
        scored = [row | {"score": float(score)} for row, score in zip(rows, scores, strict=True)]
        for name, found in (
            ("hallucination_neurons", neurons),
            ("hallucination_probe", measures),
            ("hallucination_mentions", scored),
        ):
            schema = TABLES[name]
            output.table(name, pa.Table.from_pylist([{one: row[one] for one in schema.names} for row in found], schema))
        return {"rows": len(rows), "neurons": len(neurons), "measures": measures}


def neuron_rows(
    context: CandidateContext,
    probe: SparseProbe,
    mentions: Mentions,
    shares: Float[ndarray, "mention candidate"],
    settings: ProbeSettings,
) -> list[dict[str, Any]]:
    """Return the rows of the table `hallucination_neurons`: the probe's neurons, by layer and unit."""
    starts = np.cumsum([0, *context.widths])
    effects = {name: effect(context.sums[True, name], context.sums[False, name]) for name in QUANTITIES}
    test = ~mentions.fit
    images = [image for image, own in zip(mentions.images, test, strict=True) if own]
    rows = []
    for column in probe.columns:
        layer, unit = context.candidates[column]
        index = int(starts[layer]) + unit
        held_out = _held_out_effect(images, shares[test, column], mentions.hallucinated[test], settings)
        rows.append(
            {"layer": layer, "unit": unit, "neuron": context.names.name(layer, unit)}
            | {"weight": float(probe.model.weights[column]), "effect": float(effects["share"][index])}
            | {"held_out_effect": held_out.after, "low": held_out.low, "high": held_out.high}
            | {f"{name}_effect": float(effects[name][index]) for name in ("activation", "contribution")}
            | {
                f"{kind}_activation": float(context.sums[kind == "hallucinated", "activation"].mean[index])
                for kind in ("true", "hallucinated")
            }
        )
    return sorted(rows, key=lambda row: (row["layer"], row["unit"]))


def _held_out_effect(
    images: Sequence[str],
    values: Float[ndarray, " mention"],
    hallucinated: Bool[ndarray, " mention"],
    settings: ProbeSettings,
) -> Measured:
    """Return Cohen's d over test images, with its interval."""
    # Sums of squares of centred values: a difference of large sums would lose digits.
    centred = (values - values.mean()).astype(float)
    columns = [
        one * own for own in (hallucinated, ~hallucinated) for one in (np.ones_like(centred), centred, centred**2)
    ]
    totals = totals_by_image(images, *columns)
    return measure(totals, totals, _difference, settings.draws, settings.seed)


def _difference(totals: Float[ndarray, "draw sum"]) -> Float[ndarray, " draw"]:
    first, second = totals[:, :3].T, totals[:, 3:].T
    with np.errstate(divide="ignore", invalid="ignore"):
        # Σ(x − x̄)² = Σx² − (Σx)²/n: both sums add up over the images of a bootstrap draw.
        squares = sum(square - total**2 / n for n, total, square in (first, second))
        pooled = np.sqrt(squares / (first[0] + second[0] - 2))
        found: Float[ndarray, " draw"] = (first[1] / first[0] - second[1] / second[0]) / pooled
    return found


def choose_candidates(
    sums: Mapping[tuple[bool, str], Moments], widths: Sequence[int], count: int, seed: int
) -> tuple[list[Neuron], list[Neuron]]:
    """Return the neurons of the largest effect on the share, and as many random others of the same layers.

    Raises InputError without mentions of either class.
    """
    if not sums or min(sums[kind, "share"].n for kind in (True, False)) < 2:
        raise InputError("fewer than two hallucinated or true mentions on the fit images; give more images by --data")
    # Of either sign: a neuron that falls silent at hallucinated mentions tells as much as one that fires.
    size = np.abs(effect(sums[True, "share"], sums[False, "share"]))
    # Stable, so that of equal neurons the first counts.
    best = np.argsort(-size, kind="stable")[:count]
    layers, units = locate_index(widths, best)
    chosen = list(zip(layers.tolist(), units.tolist(), strict=True))
    return chosen, layer_matched(widths, chosen, f"{seed}")


def _add_fit(sums: ClassSums, reader: MentionReader, mentioned: Mentioned) -> None:
    fit = np.array([row["fold"] == FIT for row in mentioned.rows])
    truth = np.array([row["hallucinated"] for row in mentioned.rows])[fit]
    sums.add(
        truth,
        (
            {name: values.cpu().numpy()[fit] for name, values in layer.items()}
            for layer in quantities(reader.model, mentioned.cache)
        ),
    )


def _confidences(detector: JointModel | None, captions: Sequence[WrittenCaption]) -> dict[tuple[str, str], float]:
    """Return the detector's confidence in each object that a caption mentions, by sample and word."""
    if detector is None:
        return {}
    return {
        (caption.sample.sample_id, word): value
        for caption in captions
        for word, value in detector.confidence(caption.image, {one.concept for one in caption.mentions}).items()
    }


def _by_layer(neurons: Sequence[Neuron]) -> dict[int, tuple[list[int], list[int]]]:
    """Return layer → the places of its neurons in the list, and their units."""
    found: dict[int, tuple[list[int], list[int]]] = {}
    for place, (layer, unit) in enumerate(neurons):
        places, units = found.setdefault(layer, ([], []))
        places.append(place)
        units.append(unit)
    return found


@dataclass(frozen=True)
class DoseContext(JointContext):
    """What interventions need in addition."""

    conditions: tuple[Condition, ...]
    images: frozenset[str]
    """Samples to caption, one per image."""

    @classmethod
    def above(cls, context: JointContext, **more: Any) -> DoseContext:
        """Return a context with everything of the first pass."""
        return cls(**{one.name: getattr(context, one.name) for one in fields(JointContext)}, **more)


class DoseJob(MentionJob[DoseSettings, DoseContext]):
    """Captions test images with the probe's neurons changed, and writes the table of doses and responses."""

    name = "hallucination_doses"
    parts: ClassVar[dict[str, pa.Schema]] = {"dosed": PARTS["dosed"]}

    def digests(self) -> Mapping[str, str]:
        """Return a digest of the interventions and the samples."""
        known = (self.context.conditions, sorted(self.context.images))
        return {"conditions": hashlib.sha256(repr(known).encode()).hexdigest()[:16]}

    def observer(self, reader: MentionReader, context: DoseContext) -> Observe:
        """Return the function that captions a unit's test images under every condition."""
        questions = self.settings.questions
        for condition in context.conditions:
            # Before any work: in a batch, what a family can't have would fail image by image.
            check_decoding(reader.model, condition.decoding)

        def dosed(images: Images) -> dict[str, pa.Table]:
            found = [PARTS["dosed"].empty_table()]
            for samples, pictures in images:
                pairs = [pair for pair in reader.known(samples, pictures) if pair[0].sample_id in context.images]
                found += [observe(reader, pairs, context.conditions, questions)] if pairs else []
            return {"dosed": pa.concat_tables(found)}

        return dosed

    def merge(self, plan: Plan[DoseContext], parts: Parts, output: Output) -> dict[str, Any]:
        """Write what each dose does."""
        settings, schema = self.settings, TABLES["hallucination_doses"]
        rows = dose_rows(parts.table("dosed"), plan.context.conditions, settings.draws, settings.seed)
        kept = [{name: row[name] for name in schema.names} for row in rows]
        output.table("hallucination_doses", pa.Table.from_pylist(kept, schema))
        return {"doses": kept}

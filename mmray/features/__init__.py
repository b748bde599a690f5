"""The registry of features: one entry per feature, from which tables, status, sweep, checks and the report derive.

Modules are named, not imported, because reading results needs neither torch nor ray.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pyarrow as pa

ROOM = "mmray.features"


@dataclass(frozen=True)
class Feature:
    """A feature; its name is also its folder in a run, and that of its snapshots."""

    name: str
    jobs: tuple[str, ...]
    """MODULE:CLASS of each job; selectivity, for example, has two."""
    command: str
    """Command that renews its tables."""
    tables: tuple[str, ...] = ()
    noun: str = "samples"
    """What its units consist of, for progress and status."""
    part_of: str = ""
    """Feature that it is part of. Status shows it under that name unless something is wrong with it."""
    schemas: str = ""
    """Module whose TABLES has the schemas of its tables by name."""
    report: str = ""
    """MODULE:FUNCTION of its section of the report. The section's script is `report.js` in the module's folder."""
    settings: str = ""
    """MODULE:CLASS of its job's settings, if its command is made from this entry; the class's docstring is the
    command's help. Empty for a feature with a `command.py` in its room."""


FEATURES: dict[str, Feature] = {
    feature.name: feature
    for feature in (
        Feature(
            "census",
            (f"{ROOM}.census.job:CensusJob",),
            "mmray census --model MODEL --data DATA --out RUN",
            (
                "captions",
                "occurrences",
                "rankings",
                "neurons",
                "activity",
                "examples",
                "errors",
                "concepts",
                "neuron_concepts",
            ),
            schemas=f"{ROOM}.census.tables",
        ),
        Feature(
            "decoding",
            (f"{ROOM}.census.job:DecodingJob",),
            "mmray census --model MODEL --data DATA --out RUN",
            part_of="census",
        ),
        Feature(
            "properties",
            (f"{ROOM}.properties.job:PropertiesJob",),
            "mmray properties RUN",
            ("properties", "heatmaps"),
            "concepts",
            schemas=f"{ROOM}.properties.tables",
            report=f"{ROOM}.properties.report:section",
        ),
        Feature("select", (f"{ROOM}.select.job:SelectionJob",), "mmray select RUN CONCEPT..."),
        Feature(
            "selectivity",
            (f"{ROOM}.selectivity.job:SumsJob", f"{ROOM}.selectivity.job:TestsJob"),
            "mmray selectivity RUN --by COLUMN",
            ("selectivity", "selective_labels", "interventions", "masked_answers", "steering", "stages"),
            schemas=f"{ROOM}.selectivity.tables",
            report=f"{ROOM}.selectivity.report:section",
        ),
        Feature(
            "saliency",
            (f"{ROOM}.saliency.job:SaliencyJob",),
            "mmray saliency RUN",
            ("saliency", "saliency_maps"),
            "images",
            schemas=f"{ROOM}.saliency.tables",
            report=f"{ROOM}.saliency.report:section",
        ),
        Feature(
            "hallucination",
            (f"{ROOM}.hallucination.job:HallucinationJob",),
            "mmray hallucination RUN",
            ("claims", "opinions", "mistakes"),
            schemas=f"{ROOM}.hallucination.tables",
            report=f"{ROOM}.hallucination.report:section",
        ),
        Feature(
            "hallucination_neurons",
            (f"{ROOM}.hallucination.neuron_jobs:CandidateJob",),
            "mmray hallucination RUN --neurons",
            ("hallucination_neurons", "hallucination_probe", "hallucination_mentions"),
            schemas=f"{ROOM}.hallucination.neuron_tables",
        ),
        Feature(
            "hallucination_contrast",
            (f"{ROOM}.hallucination.neuron_jobs:ContrastJob",),
            "mmray hallucination RUN --neurons",
            part_of="hallucination_neurons",
        ),
        Feature(
            "hallucination_doses",
            (f"{ROOM}.hallucination.neuron_jobs:DoseJob",),
            "mmray hallucination RUN --neurons --interventions",
            ("hallucination_doses",),
            schemas=f"{ROOM}.hallucination.neuron_tables",
            part_of="hallucination_neurons",
        ),
        Feature(
            "perturb",
            (f"{ROOM}.hallucination.perturb_job:PerturbJob",),
            "mmray perturb --out OUT",
            ("answers", "changes"),
            schemas=f"{ROOM}.hallucination.tables",
        ),
        Feature(
            "bias",
            (f"{ROOM}.hallucination.bias_job:BiasJob",),
            "mmray bias RUN --pair SOURCE:TARGET",
            ("bias", "bias_answers"),
            schemas=f"{ROOM}.hallucination.tables",
        ),
        Feature(
            "editing",
            (f"{ROOM}.editing.job:EditJob",),
            "mmray pipeline FILE",
            noun="edits",
            report=f"{ROOM}.editing.report:section",
        ),
        Feature("evaluation", (f"{ROOM}.evaluation.job:EvaluationJob",), "mmray evaluate RUN --edit EDIT"),
        Feature(
            "mmedit",
            (f"{ROOM}.mmedit.job:MmeditJob",),
            "mmray mmedit RUN --vqa FILE --captioning FILE",
            ("mmedit", "mmedit_edits"),
            "records",
            schemas=f"{ROOM}.mmedit.tables",
            report=f"{ROOM}.mmedit.report:section",
        ),
        Feature(
            "pipeline",
            (),
            "mmray pipeline FILE",
            ("edits", "evaluations", "edit_captions"),
            "edits",
            schemas=f"{ROOM}.pipeline.tables",
        ),
        Feature("validation", (f"{ROOM}.alignment.validation:ValidationJob",), "mmray align --out OUT"),
    )
}
"""By name, in the order in which status shows them."""


def table_schemas() -> dict[str, pa.Schema]:
    """Return the schema of every table that a run may have, by name."""
    return {
        name: import_module(feature.schemas).TABLES[name]
        for feature in FEATURES.values()
        if feature.schemas
        for name in feature.tables
    }


def command_for(table: str) -> str:
    """Return the command that writes a table of a run."""
    return next(feature.command for feature in FEATURES.values() if table in feature.tables)

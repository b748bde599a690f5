"""Every feature that runs as a job, one line each: what commands, status, sweep, checks and tables derive from.

Jobs are named, not imported: reading results needs neither torch nor ray.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Feature:
    """A job under its name, which is also its folder in a run and that of its snapshots."""

    name: str
    jobs: tuple[str, ...]
    """MODULE:CLASS of each job; a selection and its tests, for example, are two."""
    command: str
    """Renews its tables."""
    tables: tuple[str, ...] = ()
    noun: str = "samples"
    """What sizes of its units count."""
    part_of: str = ""
    """The feature that it is a part of, which status names it by unless something is wrong with it."""
    settings: str = ""
    """MODULE:CLASS of its job's settings, where its command is made from this entry; the class's docstring is the
    command's help. Empty for a feature whose command is a function of `mmray.cli`."""


FEATURES: dict[str, Feature] = {
    feature.name: feature
    for feature in (
        Feature(
            "census",
            ("mmray.features.census.job:CensusJob",),
            "mmray census --model MODEL --data DATA --out RUN",
            ("captions", "occurrences", "rankings", "neurons", "activity", "examples", "errors"),
        ),
        Feature(
            "decoding",
            ("mmray.features.census.job:DecodingJob",),
            "mmray census --model MODEL --data DATA --out RUN",
            part_of="census",
        ),
        Feature(
            "properties",
            ("mmray.features.properties.job:PropertiesJob",),
            "mmray properties RUN",
            ("properties", "heatmaps"),
            "concepts",
        ),
        Feature("select", ("mmray.features.select.job:SelectionJob",), "mmray select RUN CONCEPT..."),
        Feature(
            "selectivity",
            ("mmray.features.selectivity.job:SumsJob", "mmray.features.selectivity.job:TestsJob"),
            "mmray selectivity RUN --by COLUMN",
            ("selectivity", "selective_labels", "interventions", "steering", "stages"),
        ),
        Feature(
            "saliency",
            ("mmray.features.saliency.job:SaliencyJob",),
            "mmray saliency RUN",
            ("saliency", "saliency_maps"),
            "images",
        ),
        Feature(
            "hallucination",
            ("mmray.features.hallucination.job:HallucinationJob",),
            "mmray hallucination RUN",
            ("claims", "opinions", "mistakes"),
        ),
        Feature(
            "perturb",
            ("mmray.features.hallucination.perturb_job:PerturbJob",),
            "mmray perturb --out OUT",
            ("answers", "changes"),
        ),
        Feature("making", ("mmray.features.editing.job:EditJob",), "mmray pipeline FILE", noun="edits"),
        Feature("evaluations", ("mmray.features.evaluation.job:EvaluationJob",), "mmray evaluate RUN --edit EDIT"),
        Feature("pipeline", (), "mmray pipeline FILE", ("edits", "evaluations", "edit_captions"), "edits"),
        Feature("validation", ("mmray.features.alignment.validation:ValidationJob",), "mmray align --out OUT"),
    )
}
"""By name, in the order in which status shows them."""

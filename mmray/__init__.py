"""mmray: multi-modal neurons of vision-language models, found and ranked as distributed Ray jobs.

Public names are imported on first use, so that reading a run needs neither torch nor ray.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from mmray.version import VERSION

__version__ = VERSION

_MODULES = {
    "load_model": "mmray.features.saliency.model",
    "census": "mmray.api",
    "run_census": "mmray.api",
    "edit": "mmray.api",
    "evaluate": "mmray.api",
    "properties": "mmray.api",
    "saliency": "mmray.api",
    "load_joint": "mmray.detector.joint",
    "write_report": "mmray.report.writing",
    "selectivity": "mmray.api",
    "align": "mmray.api",
    "hallucination": "mmray.api",
    "perturb": "mmray.api",
    "bias": "mmray.api",
    "open_edit": "mmray.features.editing.edit",
    "open_run": "mmray.runs.run",
    "select": "mmray.api",
    "ablate": "mmray.models.interventions",
    "scale": "mmray.models.interventions",
    "set_to": "mmray.models.interventions",
    "add_noise": "mmray.models.interventions",
}

__all__ = ["__version__", *_MODULES]


# Lazy attributes of a module (PEP 562).
def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'mmray' has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)

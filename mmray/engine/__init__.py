"""One engine for every distributed job: units are handed out, committed once and merged, on Ray or in this process.

A feature declares a `Job`: its settings (`JobSettings`), how it is cut into units, what a worker computes for a unit,
and how the committed parts become tables. `run` does the rest: lease, fingerprint, begin or resume, three attempts and
then quarantine, receipts, merge. Only `mmray.engine.ray` and `mmray.engine.session` import Ray.
"""

from mmray.engine.driver import run, run_side_by_side, run_together
from mmray.engine.executors import Executor, LocalExecutor, executor_for
from mmray.engine.job import Job, JobResult, Output, Parts, Plan, Progress, Unit, UnitRefusedError, UnitResult, Worker
from mmray.engine.settings import JobSettings, after_work, checked, execution, known_by_digest

__all__ = [
    "Executor",
    "Job",
    "JobResult",
    "JobSettings",
    "LocalExecutor",
    "Output",
    "Parts",
    "Plan",
    "Progress",
    "Unit",
    "UnitRefusedError",
    "UnitResult",
    "Worker",
    "after_work",
    "checked",
    "execution",
    "executor_for",
    "known_by_digest",
    "run",
    "run_side_by_side",
    "run_together",
]

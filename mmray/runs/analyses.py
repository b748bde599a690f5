"""Find the analyses in a run's folder: every folder in which a job has begun.

saliency/872f33d1080408c6/run.json             an analysis of the run, under the fingerprint of its settings
selectivity/0b1c…/tests/run.json               a step of an analysis
edits/NAME/evaluation/51aa…/run.json           an analysis of one of the run's edits
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from mmray.features import FEATURES, Feature
from mmray.runs.folder import RunFolder
from mmray.runs.snapshots import snapshots
from mmray.storage import Entry, Store


@dataclass(frozen=True)
class Analysis:
    """A folder inside a run's in which a job has begun."""

    feature: Feature
    root: str
    """The run's folder."""
    target: str
    """What the job writes tables for, relative to the run: empty for the run itself, or `edits/NAME`."""
    step: str
    key: str
    """Folder of its units, relative to the run."""
    begun: float
    """Time in seconds since 1970 by the store's clock."""

    @property
    def title(self) -> str:
        """Its name for users: the feature, the step, and the edit."""
        edit = self.target.removeprefix("edits/")
        return " ".join(filter(None, (self.feature.name, self.step, edit and f"of {edit}")))

    @property
    def command(self) -> str:
        """The command that resumes it or makes its tables again."""
        return _filled(self.feature.command, {"RUN": self.root, "EDIT": f"{self.root}/{self.target}"})

    def folder(self) -> RunFolder:
        """Return the folder of its units."""
        return RunFolder.at(_joined(self.root, self.key))

    def lease(self) -> Store:
        """Return the store of its lease."""
        return RunFolder.at(_joined(self.root, self.target, self.feature.name)).store

    def tables(self) -> Store:
        """Return the store of its tables."""
        return RunFolder.at(_joined(self.root, self.target)).store


def find_analyses(store: Store) -> list[Analysis]:
    """Return the analyses that have begun: the run's, then its edits'; of each feature the latest first.

    The folder may also be that of a single analysis, such as the OUT of `mmray perturb`.
    """
    # One listing per feature, in parallel. Listing the whole run would list every shard of the census, too.
    names = [name for name in FEATURES if name != "census"]
    prefixes = [*(f"{name}/" for name in names), "edits/"]
    with ThreadPoolExecutor(len(prefixes)) as pool:
        entries = [entry for found in pool.map(store.list, prefixes) for entry in found]
    return sorted(
        [*_analysis_at_root(store), *_analyses_below(store.uri, names, entries)],
        key=lambda found: (found.target, names.index(found.feature.name), -found.begun, found.key),
    )


def is_run(folder: RunFolder) -> bool:
    """Return whether a folder holds a run: a run.json that belongs to a census."""
    return folder.store.exists("run.json") and _job_name(folder.store) == "census"


def _job_name(store: Store) -> str:
    """Return the job that a folder's run.json names; the census if it names none, as in earlier versions."""
    try:
        content = json.loads(store.read("run.json"))
    except (FileNotFoundError, ValueError):
        return "census"
    name = content.get("job") if isinstance(content, dict) else None
    return name if isinstance(name, str) and name in FEATURES else "census"


def _analysis_at_root(store: Store) -> Iterable[Analysis]:
    entry, name = store.entry("run.json"), _job_name(store)
    if entry and name != "census":
        yield Analysis(FEATURES[name], store.uri, "", "", "", entry.modified)


def _analyses_below(root: str, names: Sequence[str], entries: Iterable[Entry]) -> Iterable[Analysis]:
    folder = rf"(?P<key>(?:(?P<target>.+)/)?(?P<name>{'|'.join(names)})/[0-9a-f]{{16}}(?:/(?P<step>[^/]+))?)"
    # The optional suffix is that of `NamedCommits`.
    begun = re.compile(rf"{folder}/run\.json(?:~[^/]+)?")
    for entry in entries:
        if match := begun.fullmatch(entry.key):
            feature = FEATURES[match["name"]]
            yield Analysis(feature, root, match["target"] or "", match["step"] or "", match["key"], entry.modified)


@dataclass(frozen=True)
class RunJob:
    """A job of a run; one lease covers all its folders."""

    feature: Feature
    command: str
    """Resumes it or makes its tables again."""
    lease: Store
    tables: Store
    """Store of its tables and snapshots."""
    folders: list[RunFolder]
    """Folders of its units, the latest first."""


def census_of(run: RunFolder) -> RunJob:
    """Return a run's census as a job."""
    command = _filled(FEATURES["census"].command, {"OUT": run.store.uri})
    return RunJob(FEATURES["census"], command, run.store, run.store, [run])


def jobs_of(run: RunFolder) -> list[RunJob]:
    """Return a run's census and all analyses of it."""
    store = run.store
    jobs = {("", "census"): census_of(run)} if is_run(run) else {}
    for name in snapshots(store):
        if name in FEATURES and name != "census":
            # A pipeline, for example, has tables but no units of its own.
            command = _filled(FEATURES[name].command, {"RUN": store.uri})
            jobs["", name] = RunJob(FEATURES[name], command, RunFolder.at(f"{store.uri}/{name}").store, store, [])
    for analysis in find_analyses(store):
        job = RunJob(analysis.feature, analysis.command, analysis.lease(), analysis.tables(), [])
        jobs.setdefault((analysis.target, analysis.feature.name), job).folders.append(analysis.folder())
    return list(jobs.values())


def _joined(*parts: str) -> str:
    return "/".join(filter(None, parts))


def _filled(command: str, places: Mapping[str, str]) -> str:
    """Return a command with placeholders such as RUN replaced."""
    return " ".join(places.get(word, word) for word in command.split())

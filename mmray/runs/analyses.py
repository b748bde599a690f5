"""The analyses that a run's folder holds, found by what lies there: every folder that a job has begun.

saliency/872f33d1080408c6/run.json             an analysis of the run, under the fingerprint of its settings
selectivity/0b1c…/tests/run.json               a step of one
edits/NAME/evaluation/51aa…/run.json          an analysis of one of the run's edits
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
    """A folder that a job has begun, below that of a run."""

    feature: Feature
    root: str
    """Where the run lies."""
    target: str
    """Below it, what the job writes tables for: empty for the run itself, or an edit."""
    step: str
    key: str
    """Below it, where units are committed."""
    begun: float
    """When, in seconds since 1970 by the store's clock."""

    @property
    def title(self) -> str:
        """What people call it: the feature, with its step, and the edit that it is of."""
        edit = self.target.removeprefix("edits/")
        return " ".join(filter(None, (self.feature.name, self.step, edit and f"of {edit}")))

    @property
    def command(self) -> str:
        """What renews it."""
        return _filled(self.feature.command, {"RUN": self.root, "EDIT": f"{self.root}/{self.target}"})

    def folder(self) -> RunFolder:
        """Return where units are committed."""
        return RunFolder.at(_joined(self.root, self.key))

    def lease(self) -> Store:
        """Return the store of the lease that whoever drives it holds."""
        return RunFolder.at(_joined(self.root, self.target, self.feature.name)).store

    def tables(self) -> Store:
        """Return the store of its tables."""
        return RunFolder.at(_joined(self.root, self.target)).store


def find_analyses(store: Store) -> list[Analysis]:
    """Return all that have begun: those of the run, then those of its edits; of each the last begun first.

    Such a folder may itself be that of an analysis, as the OUT of `mmray perturb` is.
    """
    names = [name for name in FEATURES if name != "census"]
    prefixes = [*(f"{name}/" for name in names), "edits/"]
    with ThreadPoolExecutor(len(prefixes)) as pool:
        entries = [entry for found in pool.map(store.list, prefixes) for entry in found]
    return sorted(
        [*_itself(store), *_analyses(store.uri, names, entries)],
        key=lambda found: (found.target, names.index(found.feature.name), -found.begun, found.key),
    )


def is_run(folder: RunFolder) -> bool:
    """Return whether a folder holds a run: its run.json names no job but the census."""
    return folder.store.exists("run.json") and _begun_as(folder.store) == "census"


def _begun_as(store: Store) -> str:
    """Return the job that a folder's run.json names; the census where it names none."""
    try:
        content = json.loads(store.read("run.json"))
    except (FileNotFoundError, ValueError):
        return "census"
    name = content.get("job") if isinstance(content, dict) else None
    return name if isinstance(name, str) and name in FEATURES else "census"


def _itself(store: Store) -> Iterable[Analysis]:
    entry, name = store.entry("run.json"), _begun_as(store)
    if entry and name != "census":
        yield Analysis(FEATURES[name], store.uri, "", "", "", entry.modified)


def _analyses(root: str, names: Sequence[str], entries: Iterable[Entry]) -> Iterable[Analysis]:
    place = rf"(?P<key>(?:(?P<target>.+)/)?(?P<name>{'|'.join(names)})/[0-9a-f]{{16}}(?:/(?P<step>[^/]+))?)"
    # The end is that of a commit on a store without conditions.
    begun = re.compile(rf"{place}/run\.json(?:~[^/]+)?")
    for entry in entries:
        if match := begun.fullmatch(entry.key):
            feature = FEATURES[match["name"]]
            yield Analysis(feature, root, match["target"] or "", match["step"] or "", match["key"], entry.modified)


@dataclass(frozen=True)
class RunJob:
    """A job of a run: who drives it holds the lease of all its folders."""

    feature: Feature
    command: str
    """What renews it."""
    lease: Store
    tables: Store
    """Where its tables and snapshots lie."""
    folders: list[RunFolder]
    """Where its units are committed, the last begun first."""


def census_of(run: RunFolder) -> RunJob:
    """Return the job that every run begins with."""
    command = _filled(FEATURES["census"].command, {"OUT": run.store.uri})
    return RunJob(FEATURES["census"], command, run.store, run.store, [run])


def jobs_of(run: RunFolder) -> list[RunJob]:
    """Return the census and all that has been made of it."""
    store = run.store
    found = {("", "census"): census_of(run)} if is_run(run) else {}
    for name in snapshots(store):
        if name in FEATURES and name != "census":
            # Such as a pipeline, which has tables and no units of its own.
            command = _filled(FEATURES[name].command, {"RUN": store.uri})
            found["", name] = RunJob(FEATURES[name], command, RunFolder.at(f"{store.uri}/{name}").store, store, [])
    for analysis in find_analyses(store):
        job = RunJob(analysis.feature, analysis.command, analysis.lease(), analysis.tables(), [])
        found.setdefault((analysis.target, analysis.feature.name), job).folders.append(analysis.folder())
    return list(found.values())


def _joined(*parts: str) -> str:
    return "/".join(filter(None, parts))


def _filled(command: str, places: Mapping[str, str]) -> str:
    """Return a command with its words in capitals replaced."""
    return " ".join(places.get(word, word) for word in command.split())

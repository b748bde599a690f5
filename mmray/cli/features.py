"""The commands of features: those in a room's `command.py`, and those generated from settings in `mmray.features`."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pkgutil import iter_modules, resolve_name
from typing import Any

import mmray.features
from mmray.engine.settings import JobSettings, checked
from mmray.features import FEATURES, Feature
from mmray.terminal.options import AsJson, app, finish, run_with_progress, say, say_json, with_settings


def add_command(feature: Feature) -> None:
    """Add a feature's command; settings in capitals in its `command`, such as RUN, become arguments."""
    _, name, *words = feature.command.split()
    kind: type[JobSettings] = resolve_name(feature.settings)
    # A word in capitals after an option, such as OUT in `--out OUT`, is that option's value.
    arguments = [word.lower() for word, before in zip(words, [name, *words], strict=False) if before[0] != "-"]
    app.command(name, group="Understand", help=kind.__doc__)(with_settings(kind, arguments)(_command(feature, kind)))


def _command(feature: Feature, kind: type[JobSettings]) -> Callable[..., None]:
    def command(as_json: AsJson = False, **settings: Any) -> None:
        job = resolve_name(feature.jobs[0])(checked(kind, settings))
        done = run_with_progress(job)
        if as_json:
            say_json(done.summary())
        else:
            for name, value in done.headline.items():
                say(f"{name}: {value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}")
            took = "already finished" if done.already_done else f"in {done.seconds:.0f} s"
            say(f"{done.done:,} {feature.noun} {took} → {job.target}")
        finish(done, feature.noun.removesuffix("s"), quiet=as_json)

    return command


# At import, so that the commands exist before the command line is parsed.
for room in iter_modules(mmray.features.__path__, "mmray.features."):
    if find_spec(f"{room.name}.command"):
        import_module(f"{room.name}.command")
for listed in FEATURES.values():
    if listed.settings:
        add_command(listed)

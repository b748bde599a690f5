"""Read a job's settings from a YAML file, with dotted overrides for single values."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from mmray.errors import InputError

PLAIN = {
    "bool": r"(?i:true|false)",
    "int": r"[-+]?(0|[1-9][0-9]*)",
    "float": r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*)([eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+|[-+]?\.inf|\.nan",
}
"""Unquoted values that YAML 1.2 does not read as text."""


class _Loader(yaml.SafeLoader):
    """Reads scalars as YAML 1.2 does. In PyYAML's 1.1, `1:8` is the number 68, `no` is false, 2026-01-01 a date."""


# Keep only the rules for null and `<<`; PLAIN defines the other types.
_Loader.yaml_implicit_resolvers = {
    first: [(tag, form) for tag, form in forms if tag.endswith((":null", ":merge"))]
    for first, forms in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _name, _form in PLAIN.items():
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(rf"(?:{_form})\Z"), None)


def read_config(path: Path | str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Return the mapping in a YAML file, changed by overrides such as `limit=100` or `census.out=s3://bucket/run`.

    An override's value is YAML, too (`2.5`, `true`, `null`, `[a, b]`); a dotted name addresses nested mappings, which
    are created if missing. A number in it is an item of a list, from 0: `steps.0.selectivity.rate=0.05`. Raises
    InputError for a missing file, one that is no mapping, or a malformed override.
    """
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a text file"
        raise InputError(f"{path}: {reason}; give a YAML file such as jobs/configs/demo.yaml") from error
    config = _parse(text, str(path))
    if not isinstance(config, dict) or not all(isinstance(name, str) for name in config):
        raise InputError(f"{path}: settings are lines such as 'model: demo'")
    for override in overrides:
        _override(config, override)
    return config


def _override(config: Any, override: str) -> None:
    name, equals, value = override.partition("=")
    # With dashes too: whoever knows the command's option may write --limit=100.
    *parents, last = name.removeprefix("--").split(".")
    if not equals or not all([*parents, last]):
        raise InputError(f"override {override!r}: write NAME=VALUE, such as limit=100 or census.limit=100")
    for parent in parents:
        if isinstance(config, list):
            if not parent.isdecimal() or int(parent) >= len(config):
                raise InputError(f"override {override!r}: {parent} is no item of the list, which has {len(config)}")
            config = config[int(parent)]
        else:
            config = config.setdefault(parent, {})
        if not isinstance(config, (dict, list)):
            raise InputError(f"override {override!r}: {parent} is a single value, and has no settings inside")
    if isinstance(config, list):
        raise InputError(f"override {override!r}: {parents[-1]} is a list; name an item of it, and its setting")
    config[last] = _parse(value, f"override {override!r}")


def _parse(text: str, where: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise InputError(f"{where}: not YAML{line} ({getattr(error, 'problem', None) or error})") from error

"""The flags of a stage as its manifest records them, and how those of two commands differ."""

import json
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints


def config_record(config: Any) -> dict[str, Any]:
    """All flags of a stage as JSON, without what must not reach a manifest: paths, and flags marked as machine-bound.

    A string that reads as a place on this machine (`/data/llama`, `./texts`, `~/texts`) is recorded by its last name alone;
    hashes identify what lies there.
    """
    assert is_dataclass(config)
    hints = get_type_hints(type(config))
    record = {
        item.name: _portable(getattr(config, item.name))
        for item in fields(config)
        if not item.metadata.get("machine") and not _is_path(hints[item.name])
    }
    return json.loads(json.dumps(record))  # type: ignore[no-any-return]


def _is_path(hint: Any) -> bool:
    return hint is Path or any(_is_path(part) for part in get_args(hint))


def _portable(value: Any) -> Any:
    if is_dataclass(value):
        return config_record(value)
    if isinstance(value, tuple | list):
        return [_portable(item) for item in value]
    if isinstance(value, str) and value.startswith(("/", "./", "../", "~")):
        return Path(value).name
    return value


def changed_flags(recorded: Mapping[str, Any], config: Any) -> list[str]:
    """Every flag in which `config` differs from the record of an earlier command, such as `--k 64, now 32 (the default)`.

    A flag that is not in the record counts as its default: the version that wrote it worked so, and had no such flag.
    """
    now, defaults = config_record(config), _defaults(config)
    before = {name: defaults[name] for name in now.keys() & defaults} | dict(recorded)
    return [
        f"--{name.replace('_', '-')} {_shown(before.get(name))}, now {_shown(now.get(name))}"
        f"{' (the default)' if name in now and now[name] == defaults.get(name) else ''}"
        for name in sorted(before.keys() | now)
        if json.dumps(before.get(name)) != json.dumps(now.get(name))
    ]


def _defaults(config: Any) -> dict[str, Any]:
    """The flags of `config` that need not be given, as JSON, with what they then are."""
    unset = {item.name: item.default for item in fields(config) if item.default is not MISSING}
    unset |= {item.name: item.default_factory() for item in fields(config) if item.default_factory is not MISSING}
    return json.loads(json.dumps({name: _portable(value) for name, value in unset.items()}, default=str))  # type: ignore[no-any-return]


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) or "(none)" if isinstance(value, list) else str(value)

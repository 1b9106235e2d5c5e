"""Reads, validates and writes a run's configuration, a single yaml file.

    config = load_config("configs/scenes_stage1.yaml", ["optim.lr=3e-4", "zero_stage=2"])

Unknown keys and values of the wrong type are refused; for an unknown key the closest known one is
suggested. Whether the run can start on this machine is checked in `blip2fast.training.preflight`.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from blip2fast._imports import needs
from blip2fast.training.config import RunConfig
from blip2fast.training.config_faults import contradictions

with needs("read a configuration", "pydantic", "yaml"):
    import yaml
    from pydantic import TypeAdapter, ValidationError


# the folder configs/ of a checkout, which the wheel holds too
SHIPPED = Path(__file__).parents[1] / "configs"
# A few lines of yaml with aliases in aliases stand for billions of values.
MOST_VALUES = 10_000


class _Loader(yaml.SafeLoader):
    """A safe yaml loader that reads `1e-4` as a number (yaml 1.1 requires `1.0e-4`)."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read and validate a configuration.

    Args:
        path: a yaml file, or the bare name of a shipped one, such as `vitg_stage1`.
        overrides: `section.key=value`, values as in yaml; later ones win.

    Raises:
        ValueError: the file is missing or not yaml; a key is unknown, missing or of the wrong
            type; or keys contradict one another. All errors are listed.
    """
    path = _found(Path(path))
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a text file in UTF-8 ({error.reason})") from None
    values = parse_text(text, str(path))
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected keys and values, got {type(values).__name__}")
    if path.resolve().parent == SHIPPED.resolve():
        values = _installed(values)
    for override in overrides:
        _override(values, override)
    return parse_config(values, str(path))


def _found(path: Path) -> Path:
    """`path`, or the shipped configuration of that name."""
    if path.is_file():
        return path
    names = sorted(file.stem for file in SHIPPED.glob("*.yaml"))
    name = path.name.removesuffix(".yaml")
    if str(path) in names or (path.parent == Path("configs") and name in names):
        return SHIPPED / f"{name}.yaml"
    near = difflib.get_close_matches(name, names, n=1)
    shipped = f"; did you mean {near[0]}?" if near else ""
    raise ValueError(f"no configuration at {path}: not a file{shipped}")


def _installed(values: Any) -> Any:
    """Values with the paths of files in this package, which are as in the root of a checkout."""
    if isinstance(values, dict):
        return {key: _installed(value) for key, value in values.items()}
    if isinstance(values, str) and values.startswith("blip2fast/") and not Path(values).exists():
        return str(SHIPPED.parents[1] / values)
    return values


def parse_config(values: Mapping[str, Any], source: str = "configuration") -> RunConfig:
    """Validate nested keys and values; `source` is named in errors. See `load_config`."""
    try:
        # Through JSON: strict about types, but accepts a list for a tuple, as yaml has no tuples.
        config = TypeAdapter(RunConfig).validate_json(json.dumps(values, default=str), strict=True)
    except ValidationError as error:
        faults = "\n  ".join(_explain(fault) for fault in error.errors())
        raise ValueError(f"{source}:\n  {faults}") from None
    faults = "\n  ".join(contradictions(config))
    if faults:
        raise ValueError(f"{source}:\n  {faults}")
    return config


def config_values(config: RunConfig) -> dict[str, Any]:
    """The configuration as nested plain values, with all defaults filled in."""
    values: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    return values


def save_config(config: RunConfig, path: Path) -> None:
    """Write `config` with all defaults filled in; `load_config` reads it back."""
    path.write_text(yaml.safe_dump(config_values(config), sort_keys=False), encoding="utf-8")


def parse_text(text: str, source: str) -> Any:
    """The values of a yaml text; `source` is named in errors.

    Raises:
        ValueError: not yaml, or more than `MOST_VALUES` values.
    """
    try:
        values = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"{source}: not valid YAML: {error}") from None
    except RecursionError:
        raise ValueError(f"{source}: keys in keys, deeper than a configuration has") from None
    except ValueError as error:  # a date that is none
        raise ValueError(f"{source}: not valid YAML: {error}") from None
    if not _is_small(values):
        raise ValueError(
            f"{source}: more than {MOST_VALUES} values, with its aliases (*name) written out"
        )
    return values


def _is_small(values: Any) -> bool:
    """Whether values have at most `MOST_VALUES` parts; those of aliases count each time."""
    waiting, count = [values], 0
    while waiting:
        count += 1
        if count > MOST_VALUES:
            return False
        value = waiting.pop()
        if isinstance(value, dict):
            waiting += [*value.keys(), *value.values()]
        elif isinstance(value, list | tuple | set):
            waiting += value
    return True


def _override(values: dict[str, Any], override: str) -> None:
    name, equals, text = override.partition("=")
    if not equals or not name.strip():
        raise ValueError(f"--set {override!r}: expected key=value, such as optim.lr=1e-4")
    *sections, key = name.strip().split(".")
    place = values
    for section in sections:
        inner = place.get(section)
        if inner is None:
            inner = place[section] = {}
        if not isinstance(inner, dict):
            raise ValueError(f"--set {override!r}: {section} holds {inner!r}, not keys")
        place = inner
    place[key] = parse_text(text, f"--set {override!r}")


def known_keys(section: type = RunConfig, prefix: str = "") -> list[str]:
    """All keys of the configuration as dotted names, such as `optim.lr`."""
    names: list[str] = []
    hints = typing.get_type_hints(section)
    for each in dataclasses.fields(section):
        hint = hints[each.name]
        inner = _section_of(hint)
        name = f"{prefix}{each.name}"
        names.append(name)
        if inner is not None:
            names += known_keys(inner, f"{name}.")
    return names


def _section_of(hint: Any) -> type | None:
    """The dataclass in a type, such as that of the entries of a list; None without one."""
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return hint
    return next(filter(None, map(_section_of, typing.get_args(hint))), None)


def nearest_key(name: str) -> str:
    """The known key closest to `name` by spelling and initials; the section has less weight."""
    last = name.rpartition(".")[2]
    initials = "".join(part[:1] for part in last.split("_"))

    def likeness(candidate: str) -> float:
        word = candidate.rpartition(".")[2]
        if word in (last, initials):
            return 2 + difflib.SequenceMatcher(None, name, candidate).ratio()
        return sum(
            difflib.SequenceMatcher(None, *p).ratio() for p in ((name, candidate), (last, word))
        )

    return max(known_keys(), key=likeness)


def _explain(fault: Any) -> str:
    # `loc` may contain tuple positions, which are integers, and the names of union members.
    where = ".".join(str(part) for part in fault["loc"])
    if fault["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        return f"{where}: no such key; the nearest is {nearest_key(where)}"
    if fault["type"] in ("missing", "missing_argument"):
        return f"{where}: missing"
    return f"{where}: {fault['msg']}, got {fault['input']!r}"

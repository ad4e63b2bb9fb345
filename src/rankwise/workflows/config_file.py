"""A YAML file read with the line of every key, so that a fault can be shown where it was written.

YAML 1.1, which PyYAML reads, takes `2e-4` for text and `no` for false; here scalars follow the core schema of YAML 1.2:
`true` and `false` alone are booleans, and every usual way to write a number is a number.
"""

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from rankwise.errors import ConfigError

__all__ = ["KeyPath", "Source", "nearest", "read_config", "read_overrides"]

KeyPath = tuple[str, ...]


class _CoreLoader(yaml.SafeLoader):
    """PyYAML's safe loader with the scalars of YAML 1.2's core schema."""

    yaml_implicit_resolvers = {}  # noqa: RUF012  (PyYAML types it as an instance attribute)


for _tag, _pattern, _first in (
    ("null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    ("int", r"^(?:[-+]?[0-9]+|0x[0-9a-fA-F]+)$", list("-+0123456789")),
    ("float", r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$", list("-+.0123456789")),
    ("float", r"^[-+]?\.(?:inf|Inf|INF)$|^\.(?:nan|NaN|NAN)$", list("-+.")),
):
    _CoreLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), _first)


def _construct_int(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    """An integer without YAML 1.1's octal and base-60 readings (`010` is ten)."""
    text = loader.construct_scalar(node)
    return int(text, 16) if "x" in text else int(text)


def _construct_float(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> float:
    """A float in any usual spelling, `2e-4` included."""
    return float(loader.construct_scalar(node).lower().replace(".inf", "inf").replace(".nan", "nan"))


_CoreLoader.add_constructor("tag:yaml.org,2002:int", _construct_int)
_CoreLoader.add_constructor("tag:yaml.org,2002:float", _construct_float)


@dataclass(slots=True)
class Source:
    """What was read, and where each key was written.

    Args:
        name: how to call the place in a message, normally the file as given.
        values: the nested values.
        places: key path -> `file:line` or `--set`.
        faults: what could not be read, each with its place.
    """

    name: str
    values: dict[str, Any]
    places: dict[KeyPath, str] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)

    def place(self, path: Sequence[str | int]) -> str:
        """The place of a key, or of the nearest key above it, or the file."""
        keys = tuple(str(part) for part in path)
        for end in range(len(keys), 0, -1):
            if keys[:end] in self.places:
                return self.places[keys[:end]]
        return self.name


def read_config(path: Path | str) -> Source:
    """Reads a YAML mapping with the line of every key; a repeated key is a fault.

    Raises:
        ConfigError: the file is missing, is not YAML, or is not a mapping.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, IsADirectoryError) as error:
        what = "is a folder" if path.is_dir() else "does not exist"
        raise ConfigError(f"{path}: the run file {what}; give the path of a YAML file") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not a text file in UTF-8 (byte {error.start})") from error
    try:
        node = yaml.compose(text, Loader=_CoreLoader)
    except yaml.YAMLError as error:
        raise ConfigError(_yaml_fault(str(path), error)) from error
    source = Source(str(path), {})
    if node is None:
        return source
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(f"{path}:{node.start_mark.line + 1}: a run file is a list of `key: value` lines")
    source.values = _mapping(node, (), source)
    return source


def _yaml_fault(name: str, error: yaml.YAMLError) -> str:
    """One line for a syntax error, with its line number where PyYAML knows it."""
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error)
    place = f"{name}:{mark.line + 1}" if mark is not None else name
    return f"{place}: not valid YAML: {problem}"


def _mapping(node: yaml.MappingNode, prefix: KeyPath, source: Source) -> dict[str, Any]:
    """The values of one mapping; fills in the places and the faults of `source`."""
    values: dict[str, Any] = {}
    for key_node, value_node in node.value:
        place = f"{source.name}:{key_node.start_mark.line + 1}"
        if not isinstance(key_node, yaml.ScalarNode):
            source.faults.append(f"{place}: a key must be a plain word")
            continue
        key = str(key_node.value)
        path = (*prefix, key)
        if key in values:
            source.faults.append(f"{place}: key '{'.'.join(path)}' is repeated; it is already at {source.places[path]}")
            continue
        source.places[path] = place
        values[key] = (
            _mapping(value_node, path, source) if isinstance(value_node, yaml.MappingNode) else _value(value_node)
        )
    return values


def _value(node: yaml.Node) -> Any:
    """The Python value of a scalar or a list."""
    loader = _CoreLoader("")
    try:
        return loader.construct_object(node, deep=True)
    finally:
        loader.dispose()


def read_overrides(source: Source, overrides: Iterable[str]) -> None:
    """Lays `key.sub=value` settings over what was read; their place is `--set`."""
    for override in overrides:
        key, equals, text = override.partition("=")
        path = tuple(part.strip() for part in key.split("."))
        if not equals or not all(path):
            source.faults.append(f"--set {override}: write it as key=value or key.sub=value")
            continue
        try:
            value = yaml.load(text, Loader=_CoreLoader)  # noqa: S506  (a SafeLoader)
        except yaml.YAMLError as error:
            source.faults.append(_yaml_fault(f"--set {override}", error))
            continue
        _lay(source, path, value, override)


def _lay(source: Source, path: KeyPath, value: Any, override: str) -> None:
    """Sets one value in the nested mapping and records its place."""
    target = source.values
    for part in path[:-1]:
        inner = target.get(part)
        if inner is None:
            inner = target[part] = {}
        elif not isinstance(inner, dict):
            source.faults.append(f"--set {override}: '{part}' holds a value, not keys of its own")
            return
        target = inner
    target[path[-1]] = value
    for known in [known for known in source.places if known[: len(path)] == path]:
        del source.places[known]
    source.places.update({(*path, *inner): "--set" for inner in _paths(value)})


def _paths(value: Any) -> Iterator[KeyPath]:
    """The empty path, and those of all keys within a mapping."""
    yield ()
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from ((str(key), *path) for path in _paths(inner))


def nearest(word: str, known: Iterable[str]) -> str:
    """` (did you mean 'x'?)`, or nothing where no known name is near."""
    matches = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" (did you mean '{matches[0]}'?)" if matches else ""

"""Read a YAML file and command-line overrides into a typed configuration; report every mistake at once."""

from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from megatron_vespo.config.section import Section
from megatron_vespo.errors import ConfigError

C = TypeVar("C", bound=Section)


def load_config(kind: type[C], path: str | Path, overrides: list[str] | None = None) -> C:
    """Read `path`, apply `overrides` ("algorithm.staleness=8"; values are YAML), and validate as `kind`.

    Raises:
        ConfigError: one line per mistake, each with the key's path.
    """
    path = Path(path)
    try:
        values = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such configuration file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not readable as YAML: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a mapping of settings at the top, found {type(values).__name__}")
    for override in overrides or []:
        apply_override(values, override)
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise ConfigError(describe(error, str(path))) from None


def apply_override(values: dict[str, Any], override: str) -> None:
    """Set one `a.b.c=value` in nested mappings, in place; list items by number (`data.sources.0.task=...`)."""
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"override '{override}' is not of the form key.path=value")
    *parents, last = key.split(".")
    node: Any = values
    for name in parents:
        node = _child(node, name, override)
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"override '{override}': the value is not YAML: {error}") from None
    if isinstance(node, list):
        node[_index(node, last, override)] = value
    elif isinstance(node, dict):
        node[last] = value
    else:
        raise ConfigError(f"override '{override}': what stands before .{last} is not a group of settings")


def _child(node: Any, name: str, override: str) -> Any:
    if isinstance(node, list):
        return node[_index(node, name, override)]
    if not isinstance(node, dict):
        raise ConfigError(f"override '{override}': what stands before .{name} is not a group of settings")
    if node.get(name) is None:
        node[name] = {}
    return node[name]


def _index(node: list, name: str, override: str) -> int:
    if not name.isdigit() or int(name) >= len(node):
        raise ConfigError(f"override '{override}': '{name}' is not one of the {len(node)} list positions")
    return int(name)


def describe(error: ValidationError, origin: str) -> str:
    """One line per mistake: where, what, what was given."""
    lines = []
    for item in error.errors():
        where = ".".join(str(part) for part in item["loc"]) or "(whole configuration)"
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            message = "unknown key"
        elif item["type"] == "missing":
            message = "required, and missing"
        elif item["type"] != "value_error":
            message += f", found {item['input']!r}"
        lines.append(f"  {where}: {message}")
    count = f"{len(lines)} mistake{'s' if len(lines) > 1 else ''}"
    return f"{origin}: {count}\n" + "\n".join(lines)

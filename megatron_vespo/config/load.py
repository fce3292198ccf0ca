"""Read a YAML file and command-line overrides into a typed configuration; report every mistake at once."""

from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from megatron_vespo.config.section import Section
from megatron_vespo.errors import ConfigError

SOURCE_TYPES = ("reasoning_gym", "file", "custom")

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
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not readable as YAML: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a mapping of settings at the top, found {type(values).__name__}")
    values = without_aliases(values)
    for override in overrides or []:
        apply_override(values, override)
    try:
        config = kind.model_validate(values)
    except ValidationError as error:
        raise ConfigError(listed(path, [describe(item) for item in error.errors()])) from None
    if problems := [f"{key}: {message}" for key, message in config.problems()]:
        raise ConfigError(listed(path, problems))
    return config


def without_aliases(node: Any) -> Any:
    """A copy in which nothing occurs twice: YAML's anchors (&, *) are one object, and an override would change both."""
    if isinstance(node, dict):
        return {key: without_aliases(value) for key, value in node.items()}
    return [without_aliases(item) for item in node] if isinstance(node, list) else node


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


def describe(item: ErrorDetails) -> str:
    """One mistake: where (in the form that overrides take), what, and what was given."""
    steps = [str(step) for step in item["loc"]]
    where = ".".join(step for number, step in enumerate(steps) if not _is_tag(steps, number)) or "(whole configuration)"
    if item["type"] == "extra_forbidden":
        return f"{where}: unknown key"
    if item["type"] == "missing":
        return f"{where}: required, and missing"
    return f"{where}: {item['msg']}, found {item['input']!r}"


def _is_tag(steps: list[str], number: int) -> bool:
    """pydantic puts a source's `type` into the path, behind its position or its key."""
    return (
        steps[number] in SOURCE_TYPES and number > 0 and (steps[number - 1].isdigit() or steps[number - 1] == "source")
    )


def listed(path: Path, mistakes: list[str]) -> str:
    count = f"{len(mistakes)} mistake{'s' if len(mistakes) > 1 else ''}"
    return f"{path}: {count}\n" + "\n".join(f"  {mistake}" for mistake in mistakes)

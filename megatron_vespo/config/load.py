"""Read a YAML file and command-line overrides into a typed configuration; report every mistake at once."""

from copy import deepcopy
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from megatron_vespo.config.data import Source
from megatron_vespo.config.objective import EngineCorrection, Kernel
from megatron_vespo.config.run import EvaluateConfig, TrainConfig
from megatron_vespo.config.section import Section
from megatron_vespo.errors import ConfigError

BASE = "base"
TAGS = ("name", "type")
"""Keys that say which kind of settings a mapping holds."""


def kinds(union: Any) -> tuple[str, ...]:
    """Every value of the discriminator of an annotated union of sections."""
    fields = [member.model_fields for member in get_args(get_args(union)[0])]
    return tuple(kind for field in fields for tag in TAGS if tag in field for kind in get_args(field[tag].annotation))


UNIONS = {"sources": Source, "source": Source, "kernel": Kernel, "engine_correction": EngineCorrection}
KINDS = {key: kinds(union) for key, union in UNIONS.items()}

C = TypeVar("C", bound=Section)


def load_config(
    kind: type[C],
    path: str | Path,
    overrides: list[str] | None = None,
    settings: dict[str, Any] | None = None,
    over: Path | None = None,
) -> C:
    """Read `path` and the files it is based on, lay the file `over` over them, change what `settings` ({"algorithm.staleness": 8}) and then `overrides`
    ("algorithm.staleness=8"; values are YAML) say, and validate as `kind`.

    Raises:
        ConfigError: one line per mistake, each with the key's path.
    """
    path = Path(path)
    values = with_base(path, ())
    if over is not None:
        values = merged(values, with_base(over, ()))
    values = without_aliases(values)
    for key, value in (settings or {}).items():
        apply_setting(values, key, deepcopy(value))  # a later setting may change what is in it
    for override in overrides or []:
        apply_override(values, override)
    try:
        config = kind.model_validate(values)
    except ValidationError as error:
        raise ConfigError(listed(path, [describe(item) for item in error.errors()])) from None
    if problems := [f"{key}: {message}" for key, message in config.problems()]:
        raise ConfigError(listed(path, problems))
    return config


def load_tasks(path: str | Path, overrides: list[str] | None = None) -> EvaluateConfig:
    """What `megatron-vespo eval` shall ask: a file of its own kind, or the configuration of a training run.

    Raises:
        ConfigError: as `load_config`.
    """
    if "algorithm" in with_base(Path(path), ()):
        return EvaluateConfig.of_training(load_config(TrainConfig, path, overrides))
    return load_config(EvaluateConfig, path, overrides)


def with_base(path: Path, above: tuple[Path, ...]) -> dict[str, Any]:
    """The mapping in `path`, laid over that of the file that its `base` names (relative to `path`), and so on."""
    values = read_mapping(path, above)
    if BASE not in values:
        return values
    base = values.pop(BASE)
    if not isinstance(base, str):
        raise ConfigError(f"{path}: {BASE}: expected the path of a configuration file, found {base!r}")
    chain = (*above, path)
    target = path.parent / base
    if any(target.resolve() == seen.resolve() for seen in chain):
        raise ConfigError(f"{path}: {BASE}: {base} is based on this file: " + " -> ".join(map(str, (*chain, target))))
    return merged(with_base(target, chain), values)


def read_mapping(path: Path, above: tuple[Path, ...]) -> dict[str, Any]:
    where = f" ({BASE} of {above[-1]})" if above else ""
    try:
        values = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such configuration file{where}") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}){where}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not readable as YAML: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a mapping of settings at the top, found {type(values).__name__}")
    return values


def merged(base: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """`own` over `base`, key by key; a list, and a mapping of another kind (see TAGS), replaces that of the base."""
    result = dict(base)
    for key, value in own.items():
        below = base.get(key)
        if isinstance(below, dict) and isinstance(value, dict) and _same_kind(below, value):
            value = merged(below, value)
        result[key] = value
    return result


def _same_kind(base: dict[str, Any], own: dict[str, Any]) -> bool:
    return all(own[tag] == base[tag] for tag in TAGS if tag in base and tag in own)


def without_aliases(node: Any) -> Any:
    """A copy in which nothing occurs twice: YAML's anchors (&, *) are one object, and an override would change both."""
    if isinstance(node, dict):
        return {key: without_aliases(value) for key, value in node.items()}
    return [without_aliases(item) for item in node] if isinstance(node, list) else node


def apply_override(values: dict[str, Any], override: str) -> None:
    """Set one `a.b.c=value`, in place."""
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"override '{override}' is not of the form key.path=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"override '{override}': the value is not YAML: {error}") from None
    apply_setting(values, key, value)


def apply_setting(values: dict[str, Any], key: str, value: Any) -> None:
    """Set `a.b.c` in nested mappings, in place; list items by number (`data.sources.0.task`)."""
    *parents, last = key.split(".")
    node: Any = values
    for name in parents:
        node = _child(node, name, key)
    if isinstance(node, list):
        node[_index(node, last, key)] = value
    elif isinstance(node, dict):
        node[last] = value
    else:
        raise ConfigError(f"override '{key}': what stands before .{last} is not a group of settings")


def _child(node: Any, name: str, key: str) -> Any:
    if isinstance(node, list):
        return node[_index(node, name, key)]
    if not isinstance(node, dict):
        raise ConfigError(f"override '{key}': what stands before .{name} is not a group of settings")
    if node.get(name) is None:
        node[name] = {}
    return node[name]


def _index(node: list, name: str, key: str) -> int:
    if not name.isdigit() or int(name) >= len(node):
        raise ConfigError(f"override '{key}': '{name}' is not one of the {len(node)} list positions")
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
    """pydantic puts the kind (a source's `type`, a kernel's `name`) into the path, behind its position or its key."""
    if number == 0:
        return False
    before, step = steps[number - 1], steps[number]
    return step in KINDS.get("sources" if before.isdigit() else before, ())


def listed(path: Path, mistakes: list[str]) -> str:
    count = f"{len(mistakes)} mistake{'s' if len(mistakes) > 1 else ''}"
    return f"{path}: {count}\n" + "\n".join(f"  {mistake}" for mistake in mistakes)

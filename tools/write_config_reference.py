"""Write docs/configuration.md from the typed configuration: every key, its type, its default, what it means.

python tools/write_config_reference.py
"""

import inspect
import re
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from megatron_vespo.config import AblationConfig, EvaluateConfig, SFTConfig, TrainConfig

TARGET = Path(__file__).parents[1] / "docs" / "configuration.md"
ROOTS = {"train": TrainConfig, "sft": SFTConfig, "eval": EvaluateConfig, "ablate": AblationConfig}
HEAD = """# Configuration

Made by `python tools/write_config_reference.py` from `megatron_vespo/config`; a test compares the two. Every key of a
YAML file, and of `key.path=value` on a command line, with its default. Unknown keys are refused, and all mistakes are
reported at once, before anything starts. `megatron-vespo train CONFIG --dry-run` prints a configuration with all of its
defaults, and what they amount to. A default of none is written `null` in YAML.

A file may begin with `base: other.yaml` (relative to its own folder), over which it is laid key by key; a list replaces
that of the base, and so does a mapping of another kind (`name`, `type`).
"""


def sections_of(annotation: Any) -> list[type[BaseModel]]:
    """All sections that a key of this type may hold."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [section for part in typing.get_args(annotation) for section in sections_of(part)]


def type_of(annotation: Any) -> str:
    """In words of the field."""
    origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return type_of(parts[0])
    if origin in (types.UnionType, typing.Union):
        names = dict.fromkeys(type_of(part) for part in parts if part is not types.NoneType)
        return " or ".join(names)
    if origin is typing.Literal:
        return ", ".join(f"`{part}`" for part in parts)
    if origin in (tuple, list):
        return f"list of {type_of(parts[0])}"
    if origin is dict:
        return f"mapping of {type_of(parts[0])} to {type_of(parts[1])}"
    if sections_of(annotation):
        return "section"
    return {"str": "text", "bool": "true, false", "Any": "anything"}.get(
        getattr(annotation, "__name__", ""), getattr(annotation, "__name__", str(annotation))
    )


def types_of(field: FieldInfo) -> str:
    """`null` is named where the default does not show already that it is allowed."""
    optional = types.NoneType in typing.get_args(field.annotation)
    shown = field.get_default(call_default_factory=True) is None
    return type_of(field.annotation) + (", null" if optional and not shown else "")


def default_of(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True) if not field.is_required() else PydanticUndefined
    if value is PydanticUndefined:
        return "**required**"
    if isinstance(value, BaseModel):
        name = getattr(value, "name", None) or getattr(value, "type", None)
        return f"`{name}`" if isinstance(name, str) else "as below"
    if value is None:
        return "none"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{value}`" if value not in ((), "") else "empty"


def meaning_of(section: type[BaseModel], name: str, field: FieldInfo) -> str:
    """Of the field, or of the one that it takes the place of, or where it is explained."""
    if field.description:
        return in_cell(field.description)
    for base in section.__mro__[1:]:
        inherited = getattr(base, "model_fields", {}).get(name)
        if inherited is not None and inherited.description:
            return in_cell(inherited.description)
    if name in ("name", "type"):
        return "chooses this one"
    return "see above" if re.search(rf"\b{name}\b", section.__doc__ or "") else ""


def in_cell(text: str) -> str:
    return re.sub(r"\s+", " ", text).replace("|", "\\|").strip()


def title_of(path: str, section: type[BaseModel], alone: bool) -> str:
    """`alone`: the key may hold no other section."""
    if alone:
        return path
    kinds = [
        typing.get_args(field.annotation)[0]
        for name, field in section.model_fields.items()
        if name in ("name", "type") and typing.get_origin(field.annotation) is typing.Literal
    ]
    return f"{path}: {kinds[0] if kinds else section.__name__.removesuffix('Config')}"


def write_section(path: str, section: type[BaseModel], level: int, done: dict[type[BaseModel], str]) -> Iterator[str]:
    """A table of its keys, then its sections. A section that was written before is only named."""
    doc = inspect.getdoc(section) if section.__doc__ and not section.__doc__.startswith("!!!") else ""
    if path and doc and doc != inspect.getdoc(BaseModel):
        yield in_cell(doc) + "\n"
    yield "| key | | default | |\n|---|---|---|---|"
    nested: list[tuple[str, type[BaseModel], bool]] = []
    for name, field in section.model_fields.items():
        sections = list(dict.fromkeys(sections_of(field.annotation)))
        yield f"| `{name}` | {types_of(field)} | {default_of(field)} | {meaning_of(section, name, field)} |"
        whole = f"{path}.{name}" if path else name
        nested += [(whole, one, len(sections) == 1) for one in sections]
    yield ""
    for whole, one, alone in nested:
        title = title_of(whole, one, alone)
        yield f"{'#' * min(level, 5)} {title}\n"
        if one in done:
            yield f"As `{done[one]}`.\n"
            continue
        done[one] = title
        yield from write_section(whole, one, level + 1, done)


def reference() -> str:
    parts, done = [HEAD], {}
    for command, root in ROOTS.items():
        parts.append(f"## megatron-vespo {command}\n")
        parts += write_section("", root, 3, done)
    return "\n".join(parts).rstrip() + "\n"


if __name__ == "__main__":
    TARGET.write_text(reference())
    print(TARGET)

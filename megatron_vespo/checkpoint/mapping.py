"""The form of an architecture's mapping table: Megatron-Core parameters <-> Hugging Face tensors.

A table is a tuple of entries, written once per architecture (`qwen3_moe.py`) and read in both directions: by loading,
by gathering for weight sync and export, by conversion, and, for names and shapes alone, by the check of a folder
before anything is started. Hence no torch here: what is done to the tensors of an entry is in `forms.py`.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from functools import cached_property

from megatron_vespo.checkpoint.hf_config import Architecture

Shape = tuple[int, ...]


class Form(Enum):
    """How the Hugging Face tensors of an entry make up its Megatron tensor (always along dimension 0)."""

    WHOLE = "one tensor, unchanged"
    STACKED = "the tensors one after the other"
    QKV = "query, key, value, interleaved by query group"


@dataclass(frozen=True)
class Entry:
    """One kind of Megatron parameter and the Hugging Face tensors that it consists of.

    Names hold `{layer}` and, of experts, `{expert}`: both count over the whole model, from 0.
    """

    megatron: tuple[str, ...]
    """Its names in Megatron's model: one for each layer spec (local, Transformer Engine) that spells it differently."""
    form: Form
    hf: dict[str, Shape]
    """Name -> shape of the full tensor, in the order in which `form` puts them together."""

    @property
    def in_layer(self) -> bool:
        return "{layer}" in self.megatron[0]

    @property
    def in_expert(self) -> bool:
        return "{expert}" in self.megatron[0]

    @property
    def megatron_shape(self) -> Shape:
        """Of the full, unsharded parameter."""
        shapes = list(self.hf.values())
        return (sum(shape[0] for shape in shapes), *shapes[0][1:])

    def hf_names(self, layer: int | None = None, expert: int | None = None) -> list[str]:
        return [name.format(layer=layer, expert=expert) for name in self.hf]

    def match(self, name: str) -> tuple[int | None, int | None] | None:
        """(layer, expert) as they stand in a Megatron parameter name, or None if it is another entry's."""
        for pattern in self._patterns:
            if found := pattern.fullmatch(name):
                places = found.groupdict()
                return tuple(int(places[key]) if key in places else None for key in ("layer", "expert"))  # type: ignore
        return None

    @cached_property
    def _patterns(self) -> list[re.Pattern[str]]:
        escaped = [re.escape(name) for name in self.megatron]
        for key in ("layer", "expert"):
            escaped = [name.replace(rf"\{{{key}\}}", rf"(?P<{key}>\d+)") for name in escaped]
        return [re.compile(name) for name in escaped]


@dataclass(frozen=True)
class Table:
    """An architecture's entries. Every parameter of the Megatron model and every tensor of the folder is in one."""

    entries: tuple[Entry, ...]
    duplicates: dict[str, str]
    """Tensor that a folder may hold as well -> tensor of `entries` that it must equal (a tied output layer)."""

    def places(self, architecture: Architecture) -> Iterator[tuple[Entry, int | None, int | None]]:
        """Every (entry, layer, expert) of the model in the fixed order of gathering and export:
        what is outside the layers, then layer by layer, first what is outside the experts, then expert by expert."""
        for entry in self.entries:
            if not entry.in_layer:
                yield entry, None, None
        for layer in range(architecture.num_layers):
            for entry in self.entries:
                if entry.in_layer and not entry.in_expert:
                    yield entry, layer, None
            for expert in range(architecture.num_experts):
                for entry in self.entries:
                    if entry.in_expert:
                        yield entry, layer, expert

    def hf_shapes(self, architecture: Architecture) -> dict[str, Shape]:
        """Name -> shape of every Hugging Face tensor of the model, in the fixed order."""
        return {
            name: shape
            for entry, layer, expert in self.places(architecture)
            for name, shape in zip(entry.hf_names(layer, expert), entry.hf.values(), strict=True)
        }

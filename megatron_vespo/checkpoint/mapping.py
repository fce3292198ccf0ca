"""The form of an architecture's mapping table: Megatron-Core parameters <-> Hugging Face tensors.

A table is a tuple of entries, written once per architecture (`qwen3_moe.py`) and read in both directions: by loading,
by gathering for weight sync and export, by conversion, and, for names and shapes alone, by the check of a folder
before anything is started. Hence no torch here: what is done to the tensors of an entry is in `forms.py`.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import Enum
from functools import cached_property
from typing import NamedTuple

from megatron_vespo.architecture.hf_config import Architecture

Shape = tuple[int, ...]
Cut = tuple[slice, ...]
"""Index of a tensor, one slice for each dimension that is cut."""


class Form(Enum):
    """How the Hugging Face tensors of an entry make up its Megatron tensor (always along dimension 0)."""

    WHOLE = "one tensor, unchanged"
    STACKED = "the tensors one after the other"
    QKV = "query, key, value, interleaved by query group"


class Sharding(Enum):
    """How the tensor-parallel ranks share an entry: those of the experts' group if it is an expert's, else of all."""

    REPLICATED = "each rank has the whole"
    ROWS = "each rank has as many rows of each Hugging Face tensor"
    COLUMNS = "each rank has as many columns of each Hugging Face tensor"
    VOCABULARY = "rows, after zero rows at the end that make them divide"


class Layers(Enum):
    """Which layers have an entry."""

    ALL = "all"
    MOE = "those with experts"
    DENSE = "those without"


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
    sharding: Sharding
    layers: Layers = Layers.ALL
    checkpoint: tuple[str, ...] = ()
    """Its keys in Megatron's distributed checkpoints, where they are not `megatron[0]`: written under all, read from any.
    A key without `{expert}` is one tensor in which all experts of a layer are stacked."""

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

    def is_on(self, moe_layer: bool) -> bool:
        return self.layers is Layers.ALL or self.layers is (Layers.MOE if moe_layer else Layers.DENSE)

    def hf_names(self, layer: int | None = None, expert: int | None = None) -> list[str]:
        return [name.format(layer=layer, expert=expert) for name in self.hf]

    def of_one_rank(self, size: int) -> "Entry":
        """The entry that one of `size` tensor-parallel ranks has, if they share evenly (not for VOCABULARY).

        Raises:
            ValueError: they can't.
        """
        if size == 1 or self.sharding is Sharding.REPLICATED:
            return self
        axis = self.cut_axis
        for name, shape in self.hf.items():
            if shape[axis] % size:
                raise ValueError(f"{name}: {shape[axis]} {self.sharding.name.lower()} don't divide by {size} ranks")
        shares = {name: (*shape[:axis], shape[axis] // size, *shape[axis + 1 :]) for name, shape in self.hf.items()}
        return replace(self, hf=shares, sharding=Sharding.REPLICATED)

    def cuts(self, index: int, size: int) -> list[Cut]:
        """What rank `index` of `size` has of each Hugging Face tensor. Raises as `of_one_rank`."""
        if size == 1 or self.sharding is Sharding.REPLICATED:
            return [() for _ in self.hf]
        axis = self.cut_axis
        lengths = [shape[axis] for shape in self.of_one_rank(size).hf.values()]
        return [(slice(None),) * axis + (slice(index * length, (index + 1) * length),) for length in lengths]

    @property
    def cut_axis(self) -> int:
        return 1 if self.sharding is Sharding.COLUMNS else 0

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


class Place(NamedTuple):
    """One parameter of the whole model."""

    entry: Entry
    layer: int | None
    """Counted over the whole model, from 0, as `expert`."""
    expert: int | None

    @property
    def name(self) -> str:
        """Megatron's name in a model that is in one piece; unique."""
        return self.entry.megatron[0].format(layer=self.layer, expert=self.expert)

    @property
    def hf_names(self) -> list[str]:
        return self.entry.hf_names(self.layer, self.expert)


@dataclass(frozen=True)
class Table:
    """An architecture's entries. Every parameter of the Megatron model and every tensor of the folder is in one."""

    entries: tuple[Entry, ...]
    duplicates: dict[str, str]
    """Tensor that a folder may hold as well -> tensor of `entries` that it must equal (a tied output layer)."""

    def places(self, architecture: Architecture) -> Iterator[Place]:
        """Every parameter of the model in the fixed order of gathering and export:
        what is outside the layers, then layer by layer, first what is outside the experts, then expert by expert."""
        for entry in self.entries:
            if not entry.in_layer:
                yield Place(entry, None, None)
        for layer, moe_layer in enumerate(architecture.moe_layers):
            entries = [entry for entry in self.entries if entry.in_layer and entry.is_on(moe_layer)]
            for entry in entries:
                if not entry.in_expert:
                    yield Place(entry, layer, None)
            for expert in range(architecture.num_experts):
                for entry in entries:
                    if entry.in_expert:
                        yield Place(entry, layer, expert)

    def hf_shapes(self, architecture: Architecture) -> dict[str, Shape]:
        """Name -> shape of every Hugging Face tensor of the model, in the fixed order."""
        return {
            name: shape
            for place in self.places(architecture)
            for name, shape in zip(place.hf_names, place.entry.hf.values(), strict=True)
        }

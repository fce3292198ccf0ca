"""Which parameters of the model this rank holds, by entry of the mapping table and global layer and expert."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron.core import parallel_state
from megatron.core.utils import unwrap_model
from torch.nn import Parameter

from megatron_vespo.checkpoint.hf_config import Architecture
from megatron_vespo.checkpoint.mapping import Entry, Table


@dataclass(frozen=True)
class LocalParameter:
    name: str
    """As this rank's model spells it: layers and experts count from this rank's first."""
    entry: Entry
    layer: int | None
    """Counted over the whole model, from 0, as `expert`."""
    expert: int | None
    parameter: Parameter

    @property
    def hf_names(self) -> list[str]:
        return self.entry.hf_names(self.layer, self.expert)


def local_parameters(model_chunks: Sequence[Any], table: Table, architecture: Architecture) -> list[LocalParameter]:
    """Every parameter of this rank's `model_chunks` (GPTModels, wrapped or not), each with its place in the table.

    Raises:
        RuntimeError: lists parameters without an entry or of another shape than the entry's, and entries of this
            rank's layers and experts without a parameter. Then the model was built from another architecture, or
            with tensor parallelism, which splits parameters and is not handled here.
    """
    found: list[LocalParameter] = []
    problems: list[str] = []
    experts = local_experts(architecture)
    for chunk in unwrap_model(list(model_chunks)):
        for name, parameter in chunk.named_parameters():
            placed = _place(name, parameter, chunk, table, experts.start)
            if placed is None or (placed.layer is not None and placed.layer >= architecture.num_layers):
                problems.append(f"{name}: no entry of the mapping table has this parameter")
            elif tuple(parameter.shape) != placed.entry.megatron_shape:
                expected = list(placed.entry.megatron_shape)
                problems.append(f"{name}: shape {list(parameter.shape)}, the mapping table has {expected}")
            else:
                found.append(placed)
        problems += _absent(chunk, found, table, _layers_of(chunk, architecture), experts)
    if problems:
        raise RuntimeError(f"this model is not {architecture}:\n" + "\n".join(problems))
    return found


def local_experts(architecture: Architecture) -> range:
    """Experts of each layer that this rank holds."""
    count, rest = divmod(architecture.num_experts, parallel_state.get_expert_model_parallel_world_size())
    if rest:
        raise RuntimeError(f"{architecture.num_experts} experts do not divide into expert-parallel ranks")
    first = parallel_state.get_expert_model_parallel_rank() * count
    return range(first, first + count)


def _place(name: str, parameter: Parameter, chunk: Any, table: Table, first_expert: int) -> LocalParameter | None:
    for entry in table.entries:
        if (numbers := entry.match(name)) is None:
            continue
        layer, expert = numbers
        return LocalParameter(
            name=name,
            entry=entry,
            layer=None if layer is None else chunk.decoder.layers[layer].layer_number - 1,
            expert=None if expert is None else first_expert + expert,
            parameter=parameter,
        )
    return None


def _layers_of(chunk: Any, architecture: Architecture) -> list[int]:
    """Layers that this chunk should have: a chunk that is the whole model has all, a pipeline stage has what it has."""
    if chunk.pre_process and chunk.post_process:
        return list(range(architecture.num_layers))
    return [layer.layer_number - 1 for layer in chunk.decoder.layers]


def _absent(
    chunk: Any, found: list[LocalParameter], table: Table, chunk_layers: list[int], experts: range
) -> list[str]:
    """Entries that this chunk should have and has not."""
    held = {(item.entry.megatron[0], item.layer, item.expert) for item in found}
    needed: list[tuple[str, int | None, int | None]] = []
    for entry in table.entries:
        name = entry.megatron[0]
        layers = chunk_layers if entry.in_layer else []
        if entry.in_expert:
            needed += [(name, layer, expert) for layer in layers for expert in experts]
        elif entry.in_layer:
            needed += [(name, layer, None) for layer in layers]
        elif chunk.pre_process and chunk.post_process:
            needed.append((name, None, None))
    return [
        name.format(layer=layer, expert=expert)
        + ": the model has no such parameter (layer and expert of the whole model)"
        for name, layer, expert in needed
        if (name, layer, expert) not in held
    ]

"""Which parameters of the model this rank holds: each one's place in the mapping table, and which shard it is."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from megatron.core import parallel_state
from megatron.core.utils import unwrap_model
from torch.nn import Parameter

from megatron_vespo.architecture.hf_config import Architecture
from megatron_vespo.checkpoint.mapping import Entry, Form, Place, Sharding, Table


@dataclass(frozen=True)
class Share:
    """What one rank holds of the model; with the table it gives every parameter. Small: ranks tell it each other."""

    outside_layers: tuple[str, ...]
    """Names (`Place.name`) of what it holds outside the layers: a pipeline stage may have nothing of it."""
    layers: tuple[int, ...]
    experts: range
    """Of each of its MoE layers."""
    tensor: tuple[int, int]
    """Its rank among the tensor-parallel ranks, and their number."""
    expert_tensor: tuple[int, int]
    """The same for experts."""
    vocabulary_rows: int
    """Rows of its shard of the vocabulary, filled up; 0 if it holds none."""

    def places(self, table: Table, architecture: Architecture) -> Iterator[Place]:
        for place in table.places(architecture):
            if place.layer is None:
                if place.name in self.outside_layers:
                    yield place
            elif place.layer in self.layers and (place.expert is None or place.expert in self.experts):
                yield place

    def shard_of(self, entry: Entry) -> tuple[int, int]:
        """(index, size) of its shard of an entry."""
        if entry.sharding is Sharding.REPLICATED:
            return 0, 1
        return self.expert_tensor if entry.in_expert else self.tensor

    def shard_shape(self, entry: Entry) -> tuple[int, ...]:
        """Of its shard of an entry. Raises ValueError if it can't be shared by so many ranks."""
        _, size = self.shard_of(entry)
        if entry.sharding is Sharding.VOCABULARY:
            return (self.vocabulary_rows, *entry.megatron_shape[1:])
        return entry.of_one_rank(size).megatron_shape


@dataclass(frozen=True)
class LocalParameter:
    name: str
    """As this rank's model spells it: layers and experts count from this rank's first."""
    place: Place
    index: int
    """It is shard `index` of `size` of its place's tensor."""
    size: int
    parameter: Parameter


def local_parameters(model_chunks: Sequence[Any], table: Table, architecture: Architecture) -> list[LocalParameter]:
    """Every parameter of this rank's `model_chunks` (GPTModels, wrapped or not), each with its place in the table.

    Raises:
        RuntimeError: lists parameters without an entry or of another shape than the entry's shard, and entries of this
            rank's stage, layers and experts without a parameter. Then the model was built from another architecture.
    """
    chunks = unwrap_model(list(model_chunks))
    share = share_of(chunks, table, architecture)
    expected = {place.name: place for place in share.places(table, architecture)}
    found: list[LocalParameter] = []
    problems: list[str] = []
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            place = expected.pop(_whole_model_name(name, chunk, table, share) or "", None)
            if place is None:
                problems.append(f"{name}: no entry of the mapping table has this parameter")
            elif problem := _shape_problem(parameter, place.entry, share, architecture):
                problems.append(f"{name}: {problem}")
            else:
                found.append(LocalParameter(name, place, *share.shard_of(place.entry), parameter))
    problems += [f"{name}: the model has no such parameter (layer and expert of the whole model)" for name in expected]
    if problems:
        raise RuntimeError(f"this model is not {architecture}:\n" + "\n".join(problems))
    return found


def share_of(chunks: Sequence[Any], table: Table, architecture: Architecture) -> Share:
    """What this rank has to hold, by its place in Megatron's groups and the stages of its (unwrapped) chunks.

    Raises RuntimeError if the experts don't divide.
    """
    first, last = any(chunk.pre_process for chunk in chunks), any(chunk.post_process for chunk in chunks)
    outside = [
        place.name
        for place in table.places(architecture)
        if place.layer is None
        and any(first if name.startswith("embedding.") else last for name in place.entry.megatron)
    ]
    # a rank that is the first and the last stage has all layers; of other stages Megatron alone knows
    layers = [layer.layer_number - 1 for chunk in chunks for layer in chunk.decoder.layers]
    vocabulary = [
        parameter.shape[0]
        for chunk in chunks
        for name, parameter in chunk.named_parameters()
        if name.startswith(("embedding.", "output_layer."))
    ]
    return Share(
        outside_layers=tuple(outside),
        layers=tuple(range(architecture.num_layers) if first and last else layers),
        experts=_local_experts(architecture),
        tensor=_rank_and_size(parallel_state.get_tensor_model_parallel_group()),
        expert_tensor=_rank_and_size(parallel_state.get_expert_tensor_parallel_group()),
        vocabulary_rows=max(vocabulary, default=0),
    )


def _rank_and_size(group: Any) -> tuple[int, int]:
    return group.rank(), group.size()


def _local_experts(architecture: Architecture) -> range:
    """Experts of each MoE layer that this rank holds."""
    count, rest = divmod(architecture.num_experts, parallel_state.get_expert_model_parallel_world_size())
    if rest:
        raise RuntimeError(f"{architecture.num_experts} experts do not divide into expert-parallel ranks")
    first = parallel_state.get_expert_model_parallel_rank() * count
    return range(first, first + count)


def _whole_model_name(name: str, chunk: Any, table: Table, share: Share) -> str | None:
    """`Place.name` of the parameter that `chunk` calls `name`; None if no entry has such a name."""
    for entry in table.entries:
        if (numbers := entry.match(name)) is None:
            continue
        layer, expert = numbers
        if layer is not None:
            layer = chunk.decoder.layers[layer].layer_number - 1
        if expert is not None:
            expert += share.experts.start
        return Place(entry, layer, expert).name
    return None


def _shape_problem(parameter: Parameter, entry: Entry, share: Share, architecture: Architecture) -> str | None:
    _, size = share.shard_of(entry)
    if entry.form is Form.QKV and architecture.num_query_groups % size:
        return f"{architecture.num_query_groups} query groups don't divide by {size} tensor-parallel ranks"
    try:
        expected = share.shard_shape(entry)
    except ValueError as error:
        return str(error)
    rows = entry.megatron_shape[0]
    if entry.sharding is Sharding.VOCABULARY and parameter.shape[0] * size < rows:
        return f"{size} ranks with {parameter.shape[0]} rows each have no room for the mapping table's {rows}"
    if tuple(parameter.shape) != expected:
        return f"shape {list(parameter.shape)}, the mapping table has {list(expected)}"
    return None

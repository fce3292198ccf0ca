"""SGLang's wire form of routed experts -> compact arrays; what is wrong with a payload is refused by its kind.

On the wire (SGLang's `meta_info.routed_experts`): base64 of contiguous little-endian int32 [rows, layers, topk]. Dense
layers take a slot of it too; whatever stands there is dropped.
"""

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np
import pybase64
from numpy.typing import NDArray

from megatron_vespo.routing.routes import Experts, expert_dtype
from megatron_vespo.routing.runs import runs

RoutesFault = Literal["truncated", "layers", "range", "zero_layer", "duplicates"]

ID_BYTES = 4
BLOCK_BYTES = 2**18
"""Of ids that are decoded at once: they stay in a core's cache from one step to the next."""
SUSPICIOUS_ROWS = 8
"""With one expert per token, so many rows of nothing but expert 0 are taken for a layer that was never filled in. A
router that did collapse onto expert 0 chooses it natively too, so nothing is lost by not replaying it."""


class RoutesError(ValueError):
    """A payload that must not be replayed.

    Attributes:
        kind: what is wrong with it; where several things are, the first of
            "truncated": not base64, or fewer rows than asked for, or bytes that end within a row;
            "layers": not the asked number of layers (whole rows of another number of layers), or too many rows. Where a
            shorter payload could be either fewer rows or fewer layers, it is "truncated", and the message has both;
            "range": an id of a MoE layer is no expert's;
            "zero_layer": a MoE layer has expert 0 everywhere, as a buffer that was never filled in;
            "duplicates": an expert twice among those of one row and layer.
    """

    def __init__(self, kind: RoutesFault, message: str):
        super().__init__(kind, message)
        self.kind: RoutesFault = kind
        self.message = message

    def __str__(self) -> str:
        return f"{self.kind}: {self.message}"


class _Wire(NamedTuple):
    rows: int
    layers: int
    topk: int

    @property
    def row_bytes(self) -> int:
        return self.layers * self.topk * ID_BYTES


def decode(payload: str | bytes, *, rows: int, moe_layers: Sequence[bool], topk: int, num_experts: int) -> Experts:
    """The experts of a segment's rows, all of them checked.

    Args:
        payload: base64, see above.
        rows: so many the payload must have.
        moe_layers: of each layer of the model, whether it has experts.

    Returns:
        [rows, MoE layers, topk] uint8, or uint16 with more than 256 experts, C-contiguous.

    Raises:
        RoutesError: the payload is something else.
    """
    wire = _Wire(rows, len(moe_layers), topk)
    _check_size(payload, wire)
    kept = runs(number for number, is_moe in enumerate(moe_layers) if is_moe)
    experts = np.empty((rows, sum(moe_layers), topk), dtype=expert_dtype(num_experts))
    repeated = False
    for first, ids in _blocks(payload, wire):
        block = experts[first : first + len(ids)]
        for place, layers in kept:
            chosen = ids[:, layers]
            # Seen as unsigned, negative ids are too large as well.
            if chosen.view(np.uint32).max(initial=0) >= num_experts:
                raise _out_of_range(chosen, num_experts, first, layers.start)
            block[:, place : place + chosen.shape[1]] = chosen
        repeated = repeated or _has_repeats(block)
    if repeated or (topk == 1 and num_experts > 1 and rows >= SUSPICIOUS_ROWS):
        _check_zero_layers(experts, np.flatnonzero(moe_layers))
    if repeated:
        raise _first_repeat(experts, np.flatnonzero(moe_layers))
    return experts


def _check_size(payload: str | bytes, wire: _Wire) -> None:
    """By the payload's length alone."""
    if len(payload) % 4:
        raise RoutesError("truncated", f"{len(payload)} characters are no base64, which comes in fours")
    padding = payload[-2:].count("=") if isinstance(payload, str) else payload[-2:].count(b"=")
    found = len(payload) // 4 * 3 - padding
    asked = wire.rows * wire.row_bytes
    if found == asked:
        return
    layer_bytes = wire.rows * wire.topk * ID_BYTES
    message = (
        f"{found} bytes for {asked}: {found / wire.row_bytes:.6g} rows of {wire.layers} layers"
        + (f", or {found / layer_bytes:.6g} layers" if layer_bytes else "")
        + f", where {wire.rows} rows of {wire.layers} layers of {wire.topk} experts were asked for"
    )
    whole_rows = found % wire.row_bytes == 0
    other_layers = layer_bytes > 0 and found % layer_bytes == 0 and not whole_rows
    raise RoutesError("layers" if found > asked or other_layers else "truncated", message)


def _blocks(payload: str | bytes, wire: _Wire) -> Iterator[tuple[int, NDArray[np.int32]]]:
    """(number of the first row, [rows of a block, layers, topk] int32), until the payload's end."""
    # A multiple of 3 rows fills whole groups of 4 characters.
    block = 3 * max(1, BLOCK_BYTES // (3 * wire.row_bytes))
    characters = block * wire.row_bytes // 3 * 4
    for first in range(0, wire.rows, block):
        start = first // block * characters
        try:
            raw = pybase64.b64decode(payload[start : start + characters], validate=True)
        except ValueError as error:
            raise RoutesError("truncated", f"not base64: {error}, in rows {first} to {first + block}") from error
        count = min(block, wire.rows - first)
        if len(raw) != count * wire.row_bytes:
            raise RoutesError("truncated", f"base64 ends in rows {first} to {first + count}")
        yield first, np.frombuffer(raw, dtype="<i4").reshape(count, wire.layers, wire.topk)


def _has_repeats(experts: Experts) -> bool:
    """Whether an expert stands twice in some row and layer."""
    topk = experts.shape[-1]
    # One contiguous plane for each of the topk places, so that they are compared many at once.
    planes = np.ascontiguousarray(experts.reshape(-1, topk).T)
    return any(bool((planes[apart:] == planes[:-apart]).any()) for apart in range(1, topk))


def _out_of_range(chosen: NDArray[np.int32], num_experts: int, first_row: int, first_layer: int) -> RoutesError:
    row, layer, place = np.argwhere((chosen < 0) | (chosen >= num_experts))[0]
    return RoutesError(
        "range",
        f"row {first_row + row}, layer {first_layer + layer}: expert {chosen[row, layer, place]} of {num_experts}",
    )


def _check_zero_layers(experts: Experts, layer_numbers: NDArray[np.intp]) -> None:
    empty = layer_numbers[~experts.any(axis=(0, 2))]
    if len(empty):
        raise RoutesError("zero_layer", f"nothing but expert 0 in {len(experts)} rows of layers {empty.tolist()}")


def _first_repeat(experts: Experts, layer_numbers: NDArray[np.intp]) -> RoutesError:
    in_order = np.sort(experts, axis=-1)
    row, layer = np.argwhere((in_order[..., 1:] == in_order[..., :-1]).any(-1))[0]
    return RoutesError("duplicates", f"row {row}, layer {layer_numbers[layer]}: experts {experts[row, layer].tolist()}")

"""What autograd keeps of a forward pass until the backward pass, from sizes alone.

The tensors are those that the modules save: Megatron-Core's local layers with this package's attention and experts (what
runs on a CPU; measured there), and Transformer Engine's layers (read from its source, not measured).
"""

from dataclasses import dataclass

from megatron_vespo.architecture.hf_config import Architecture
from megatron_vespo.config import PolicyConfig
from megatron_vespo.planning.amount import Amount, total
from megatron_vespo.planning.parameters import chunk_layers
from megatron_vespo.planning.state_bytes import DTYPE_BYTES, FLOAT32

INT64 = 8
ROPE_TENSORS = 4
"""Cosine and sine, of queries and of keys: Megatron computes them in each layer."""


@dataclass(frozen=True)
class Pass:
    """One micro-batch on one rank.

    Attributes:
        positions: that the rank's attention sees.
        dtype: of parameters and activations.
        transformer_engine: whose layers, else Megatron's local ones.
        imbalance: rows of the rank's experts over what an even spread would give them.
        sequences: packed in it.
    """

    architecture: Architecture
    policy: PolicyConfig
    dtype: str
    positions: int
    transformer_engine: bool
    imbalance: float = 1.0
    sequences: int = 2

    @property
    def width(self) -> int:
        return DTYPE_BYTES[self.dtype]

    @property
    def split_positions(self) -> int:
        """Of this rank between its tensor-parallel regions."""
        layout = self.policy.layout
        return self.positions // layout.tp if layout.sequence_parallel else self.positions

    @property
    def expert_rows(self) -> int:
        """Rows that the rank's experts compute: with an even spread each rank's share of the ranks that exchange them."""
        layout = self.policy.layout
        rows = self.split_positions * self.architecture.experts_per_token * layout.etp
        return round(rows * (self.imbalance if layout.ep > 1 else 1.0))

    @property
    def recomputed(self) -> frozenset[str]:
        recompute = self.policy.recompute
        return frozenset(recompute.modules) if recompute.granularity == "selective" else frozenset()


def layer_tensors(p: Pass, moe: bool) -> list[Amount]:
    """What one layer keeps, by part, if nothing of it is computed again."""
    return [*_attention(p), *(_moe(p) if moe else _dense(p))]


def kept_of_layer(p: Pass, moe: bool) -> list[Amount]:
    """What one layer keeps until its backward pass, with `policy.recompute`."""
    if p.policy.recompute.granularity == "full":
        of_unit = p.policy.recompute.layers
        inputs = p.split_positions * p.architecture.hidden_size * p.width
        return [
            Amount(
                "layer inputs", inputs / of_unit, f"{_rows(p)} x {p.architecture.hidden_size} x {p.width} / {of_unit}"
            )
        ]
    dropped = _dropped(p, moe)
    return [amount for amount in layer_tensors(p, moe) if amount.name not in dropped]


def recomputed_at_once(p: Pass, layers: list[bool]) -> float:
    """Bytes that recomputation adds at most: of a unit of whole layers, or of a module, while the layers before still keep
    theirs and those behind are done."""
    recompute = p.policy.recompute
    if recompute.granularity == "none":
        return 0.0
    size, back = 1, []
    if recompute.granularity == "full":
        size = recompute.layers
        of_kind = {moe: total(layer_tensors(p, moe)) for moe in set(layers)}
        whole = [of_kind[moe] for moe in layers]
        # The first norm's input is the unit's, unless the norm keeps a float32 copy of it.
        shared = p.transformer_engine or p.width == FLOAT32
        inputs = p.split_positions * p.architecture.hidden_size * p.width if shared else 0
        back = [sum(whole[i : i + size]) - inputs for i in range(0, len(whole), size)]
    else:
        of_kind = {moe: max(_module_at_once(p, moe, module) for module in recompute.modules) for moe in set(layers)}
        back = [of_kind[moe] for moe in layers]
    kept_of = {moe: total(kept_of_layer(p, moe)) for moe in set(layers)}
    kept = [kept_of[moe] for moe in layers]
    return max(brought - sum(kept[(number + 1) * size :]) for number, brought in enumerate(back))


def _module_at_once(p: Pass, moe: bool, module: str) -> float:
    back = sum(amount.value for amount in layer_tensors(p, moe) if amount.name in _names_of(p, moe, module))
    # By then the backward pass has gone through the same layer's feed-forward part.
    feed_forward = {amount.name for amount in (_moe(p) if moe else _dense(p))}
    gone = sum(amount.value for amount in kept_of_layer(p, moe) if amount.name in feed_forward)
    return back - (gone if module == "core_attn" else 0)


def ends(p: Pass, first: bool, last: bool) -> list[Amount]:
    """Outside the layers: token ids, the last norm, the head's inputs and results."""
    a, amounts = p.architecture, []
    if first:
        amounts.append(Amount("token ids", p.positions * INT64, f"{p.positions:,} x {INT64}"))
    if last:
        amounts += _norms(p, p.split_positions, a.hidden_size, prefix="last ")
        hidden = p.positions * a.hidden_size * p.width
        amounts.append(Amount("head inputs", hidden, f"{p.positions:,} x {a.hidden_size} x {p.width}"))
        amounts.append(Amount("scores", p.positions * (INT64 + 3 * FLOAT32), f"{p.positions:,} x (8 + 3 x 4)"))
    return amounts


def in_flight(policy: PolicyConfig, stage: int, micro_batches: int) -> int:
    """Passes of one chunk of layers that a pipeline stage keeps at most at a time (1F1B, interleaved 1F1B)."""
    layout = policy.layout
    if layout.pp == 1:
        return 1
    if layout.vpp == 1:
        return min(layout.pp - stage, micro_batches)
    return min(2 * (layout.pp - stage - 1) + (layout.vpp - 1) * layout.pp + 1, micro_batches * layout.vpp)


def peak(p: Pass, stage: int, micro_batches: int) -> list[Amount]:
    """Most that autograd keeps at a time on a rank of the stage, by part."""
    layout, a = p.policy.layout, p.architecture
    chunks = [[a.moe_layers[i] for i in chunk_layers(a, p.policy, stage, c)] for c in range(layout.vpp)]
    layers = [moe for chunk in chunks for moe in chunk]
    passes = in_flight(p.policy, stage, micro_batches)
    share = passes / layout.vpp
    parts: dict[str, float] = {}
    for moe in sorted(set(layers)):
        for amount in kept_of_layer(p, moe):
            parts[amount.name] = parts.get(amount.name, 0.0) + amount.value * share * layers.count(moe)
    held = f"{len(layers)} layers" + (f" x {share:g} passes in flight" if share != 1 else "")
    amounts = [Amount(name, value, f"{held}: {_formula(p, name)}") for name, value in parts.items()]
    outside = ends(p, stage == 0, stage == layout.pp - 1)
    again = recomputed_at_once(p, layers)
    behind = sum(amount.value for amount in outside if amount.name != "token ids")
    # The head and the last norm are done when the first layer is computed again.
    if again > behind:
        unit = "a unit of layers" if p.policy.recompute.granularity == "full" else "one layer's modules"
        amounts += [amount for amount in outside if amount.name == "token ids"]
        amounts.append(Amount("computed again", again, f"{unit}: what it keeps without recomputation"))
    else:
        amounts += outside
    return amounts


def _formula(p: Pass, name: str) -> str:
    for moe in set(p.architecture.moe_layers):
        for amount in kept_of_layer(p, moe):
            if amount.name == name:
                return amount.formula
    raise KeyError(name)


def _dropped(p: Pass, moe: bool) -> frozenset[str]:
    """Parts that the selected modules compute again."""
    return frozenset(name for module in p.recomputed for name in _names_of(p, moe, module))


def _names_of(p: Pass, moe: bool, module: str) -> tuple[str, ...]:
    match module:
        case "core_attn":
            return ("attention results",)
        case "layernorm":
            # Transformer Engine's other norms are one module with the matrix that follows.
            of_local = () if p.transformer_engine else ("attention norm output", "norm products")
            return ("feed-forward norm output", *of_local) if moe or not p.transformer_engine else ()
        case "moe" if moe:
            return ("router", "expert inputs", "expert weights", "expert inner", "expert products")
        case "moe_act" if moe:
            return ("expert products",)
        case "mlp" if not moe:
            return ("dense inner",)
    return ()


def _attention(p: Pass) -> list[Amount]:
    a, tp, t, b = p.architecture, p.policy.layout.tp, p.positions, p.width
    heads, groups, d = a.num_attention_heads // tp, a.num_query_groups // tp, a.head_dim
    amounts = [
        *_norms(p, p.split_positions, a.hidden_size, count=2),
        Amount("attention norm output", p.split_positions * a.hidden_size * b, f"{_rows(p)} x {a.hidden_size} x {b}"),
        Amount(
            "feed-forward norm output", p.split_positions * a.hidden_size * b, f"{_rows(p)} x {a.hidden_size} x {b}"
        ),
        Amount(
            "queries, keys, values", t * (heads + 2 * groups) * d * b, f"{t:,} x ({heads} + 2 x {groups}) x {d} x {b}"
        ),
    ]
    if a.qk_norm:
        amounts.append(_qk_norms(p, heads, groups))
    amounts += [
        Amount("rotary cosines", ROPE_TENSORS * t * d * b, f"{ROPE_TENSORS} x {t:,} x {d} x {b}"),
        Amount("rotated queries, keys", t * (heads + groups) * d * b, f"{t:,} x ({heads} + {groups}) x {d} x {b}"),
        Amount("attention output", t * heads * d * b, f"{t:,} x {heads} x {d} x {b}"),
    ]
    # Several sequences' results are put together into a tensor of their own by the local attention.
    copy = 0 if p.transformer_engine or p.sequences == 1 else d * b
    results = t * heads * (copy + FLOAT32)
    amounts.append(Amount("attention results", results, f"{t:,} x {heads} x ({copy} + 4)"))
    return amounts


def _norms(p: Pass, rows: int, size: int, count: int = 1, prefix: str = "") -> list[Amount]:
    """RMS norms' inputs, and the inverse root mean square of each row. torch's, without Transformer Engine, is made of
    single operations: its input is kept in float32, and a float32 product."""
    kept = size * (p.width if p.transformer_engine else FLOAT32)
    inputs = Amount(f"{prefix}norm inputs", count * rows * kept, f"{count} x {rows:,} x {kept}")
    product = FLOAT32 * (1 if p.transformer_engine else size + 1)
    return [inputs, Amount(f"{prefix}norm products", count * rows * product, f"{count} x {rows:,} x {product}")]


def _qk_norms(p: Pass, heads: int, groups: int) -> Amount:
    d, t = p.architecture.head_dim, p.positions
    # With one query a group, or one group, queries are a view of what attention keeps for its values anyway.
    copied = heads * d if heads > groups > 1 else 0
    if p.transformer_engine:
        of_row = copied * p.width + FLOAT32 * (heads + groups)
        return Amount("query, key norms", t * of_row, f"{t:,} x ({copied} x {p.width} + 4 x ({heads} + {groups}))")
    inputs = copied if p.width == FLOAT32 else (heads + groups) * d
    of_row = FLOAT32 * (inputs + (heads + groups) * (d + 1))
    return Amount("query, key norms", t * of_row, f"{t:,} x 4 x ({inputs} + ({heads} + {groups}) x ({d} + 1))")


def _dense(p: Pass) -> list[Amount]:
    inner, b = p.architecture.ffn_hidden_size // p.policy.layout.tp, p.width
    tensors = 3 if p.transformer_engine else 5
    return [Amount("dense inner", p.positions * tensors * inner * b, f"{p.positions:,} x {tensors} x {inner} x {b}")]


def _moe(p: Pass) -> list[Amount]:
    a, layout, b, rows = p.architecture, p.policy.layout, p.width, p.expert_rows
    inner, local = a.moe_ffn_hidden_size // layout.etp, a.num_experts // layout.ep
    choices = p.split_positions * a.experts_per_token
    router = p.split_positions * a.num_experts * (FLOAT32 + 1) + choices * (2 * INT64 + FLOAT32)
    amounts = [
        Amount("router", router, f"{_rows(p)} x ({a.num_experts} x 5 + {a.experts_per_token} x 20)"),
        Amount("expert inputs", rows * (a.hidden_size * b + FLOAT32), f"{rows:,} x ({a.hidden_size} x {b} + 4)"),
    ]
    before = 2 if p.transformer_engine else 4
    amounts.append(Amount("expert inner", rows * before * inner * b, f"{rows:,} x {before} x {inner} x {b}"))
    amounts.append(Amount("expert products", rows * inner * b, f"{rows:,} x {inner} x {b}"))
    if not p.transformer_engine:
        weights = local * 3 * a.hidden_size * inner * b
        amounts.append(
            Amount("expert weights", weights, f"copies on a CPU: {local} x 3 x {a.hidden_size} x {inner} x {b}")
        )
    return amounts


def _rows(p: Pass) -> str:
    return f"{p.split_positions:,}"

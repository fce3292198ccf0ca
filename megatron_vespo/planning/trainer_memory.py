"""Memory of one trainer rank, by phase: what is always there, and what comes with each of its tasks."""

from dataclasses import dataclass
from functools import cached_property

from megatron_vespo.architecture.hf_config import Architecture
from megatron_vespo.architecture.layout_fit import padded_vocabulary
from megatron_vespo.config import TrainConfig
from megatron_vespo.packing.rules import round_up
from megatron_vespo.planning import activations
from megatron_vespo.planning.activations import Pass
from megatron_vespo.planning.amount import Amount, total
from megatron_vespo.planning.hardware import FRAGMENTATION, RUNTIME_BYTES
from megatron_vespo.planning.state_bytes import DTYPE_BYTES, FLOAT32, RankPlace, StateBytes, state_bytes

IMBALANCE = 1.25
"""Rows of the busiest rank's experts over the mean, with expert parallelism; an assumption."""
MIB = 2**20
HEAD_BLOCK = 4096
"""Rows of the output layer whose logits exist at a time (`policy/head.py`)."""


@dataclass(frozen=True)
class TrainerMemory:
    """Of a rank of one pipeline stage.

    Attributes:
        positions: of the largest micro-batch, on this rank.
        micro_batches: of a step, on each rank, about.
    """

    config: TrainConfig
    architecture: Architecture
    stage: int
    positions: int
    micro_batches: int

    @cached_property
    def one_pass(self) -> Pass:
        model, policy = self.config.model, self.config.policy
        return Pass(self.architecture, policy, model.dtype, self.positions, model.dtype == "bfloat16", IMBALANCE)

    @cached_property
    def state(self) -> StateBytes:
        """Of the data-parallel rank that holds most."""
        model, policy = self.config.model, self.config.policy
        expert_ranks = policy.ranks // policy.layout.expert_model_ranks
        of_data, of_experts = policy.ranks // (policy.layout.tp * policy.layout.pp), expert_ranks
        places = [RankPlace(self.stage, rank, min(rank, of_experts - 1)) for rank in {0, of_data - 1}]
        found = [
            state_bytes(self.architecture, policy, model.dtype, p, self.one_pass.transformer_engine) for p in places
        ]
        return max(found, key=lambda state: state.total)

    @cached_property
    def always(self) -> list[Amount]:
        state, width = self.state, DTYPE_BYTES[self.config.model.dtype]
        per_element = FLOAT32 * (2 + (width < FLOAT32))
        kept = state.stepped - round(state.stepped * self.config.policy.optimizer_cpu_offload)
        masters = "masters and moments" if width < FLOAT32 else "moments"
        amounts = [
            Amount("parameters", state.parameters, f"{state.parameters // width:,} with padding x {width}"),
            Amount("gradients", state.gradients, f"{state.gradients // FLOAT32:,} with padding x 4"),
            Amount("optimizer", state.optimizer, f"{kept:,} of {state.elements:,} x {per_element} ({masters})"),
        ]
        reference = self.config.policy.reference
        if reference is not None and not reference.offload:
            amounts.append(Amount("reference", state.elements * width, f"{state.elements:,} x {width}"))
        return [*amounts, Amount("CUDA, NCCL, cuBLAS", RUNTIME_BYTES, "assumed")]

    @cached_property
    def phases(self) -> dict[str, list[Amount]]:
        """Device memory of each phase; all of it at once."""
        phases = {"train": self._train(), "log-probs": self._scoring(), "weight sync": self._sync(), "generation": []}
        return {name: [*self.always, *_with_fragmentation(amounts)] for name, amounts in phases.items()}

    @property
    def peak(self) -> float:
        return max(total(amounts) for amounts in self.phases.values())

    def _train(self) -> list[Amount]:
        kept = activations.peak(self.one_pass, self.stage, self.micro_batches)
        parts = [
            Amount(
                "activations",
                total(kept),
                "; ".join(f"{a.name} {a.value / 1e9:.3f} GB ({a.formula})" for a in kept),
            )
        ]
        # The head's backward pass ends before that of the layers begins.
        parts.append(max(self._head(backward=True), self._layer(backward=True), key=lambda amount: amount.value))
        return [*parts, *self._exchange()]

    def _scoring(self) -> list[Amount]:
        parts = [max(self._head(backward=False), self._layer(backward=False), key=lambda amount: amount.value)]
        reference, width = self.config.policy.reference, self.one_pass.width
        if reference is not None and reference.offload:
            parts.append(Amount("reference", self.state.elements * width, f"{self.state.elements:,} x {width}"))
        return [*parts, *self._exchange()]

    def _sync(self) -> list[Amount]:
        slot, formula = bucket_bytes(self.config, self.architecture)
        return [
            Amount("sync buckets", 2 * slot, f"2 x {formula}"),
            Amount("gathered pieces", slot, f"about a bucket, on rank 0: {formula}"),
        ]

    def _head(self, backward: bool) -> Amount:
        """Logits of a chunk, and in the backward pass gradients of hidden states and of the output layer."""
        policy, a, b = self.config.policy, self.architecture, self.one_pass.width
        if self.stage != policy.layout.pp - 1:
            return Amount("logits chunk", 0, "on the last stage only")
        chunk, block = min(policy.head_chunk_tokens, self.positions), min(HEAD_BLOCK, a.vocab_size // policy.layout.tp)
        logits, formula = chunk * block * (FLOAT32 + b) * 2, f"2 x {chunk} x {block} x (4 + {b})"
        if not backward:
            hidden = self.positions * a.hidden_size * b
            return Amount(
                "logits chunk", logits + hidden, f"{formula} + hidden {self.positions:,} x {a.hidden_size} x {b}"
            )
        rows = padded_vocabulary(a, policy) // policy.layout.tp
        gradients = self.positions * a.hidden_size * (FLOAT32 + b) + rows * a.hidden_size * b
        text = f"{formula} + {self.positions:,} x {a.hidden_size} x (4 + {b}) + {rows:,} x {a.hidden_size} x {b}"
        return Amount("logits chunk, head gradients", logits + gradients, text)

    def _layer(self, backward: bool) -> Amount:
        """Tensors of one layer that nobody keeps: results on their way, and in the backward pass their gradients."""
        p, a, layout, b = self.one_pass, self.architecture, self.config.policy.layout, self.one_pass.width
        inner = a.ffn_hidden_size // layout.tp
        rows, width = p.positions, 2 * inner + 2 * a.hidden_size
        weights = 3 * inner * a.hidden_size * b
        if a.is_moe:
            inner = a.moe_ffn_hidden_size // layout.etp
            rows, width = p.expert_rows, 2 * inner + 2 * a.hidden_size
            weights = 3 * a.num_experts // layout.ep * inner * a.hidden_size * b
        value, formula = rows * width * b, f"{rows:,} x {width} x {b}"
        if not backward:
            return Amount("one layer's results", value, formula)
        return Amount("one layer's gradients", value + weights, f"{formula} + its weights' gradients {weights:,}")

    def _exchange(self) -> list[Amount]:
        """Buffers of collectives. DDP reduces in the gradient buffers themselves."""
        p, a, layout, b = self.one_pass, self.architecture, self.config.policy.layout, self.one_pass.width
        amounts = []
        if layout.ep * layout.etp > 1 and a.is_moe:
            value = 2 * p.expert_rows * a.hidden_size * b
            amounts.append(Amount("expert all-to-all", value, f"2 x {p.expert_rows:,} x {a.hidden_size} x {b}"))
        if layout.tp > 1:
            value = p.positions * a.hidden_size * b
            amounts.append(Amount("tensor-parallel gather", value, f"{p.positions:,} x {a.hidden_size} x {b}"))
        if layout.pp > 1:
            value = 2 * p.split_positions * a.hidden_size * b
            amounts.append(Amount("pipeline messages", value, f"2 x {p.split_positions:,} x {a.hidden_size} x {b}"))
        return amounts


def stages(config: TrainConfig, architecture: Architecture) -> list[TrainerMemory]:
    """The first and the last pipeline stage: those between hold no more than the first."""
    layout, longest = config.policy.layout, longest_sequence(config)
    multiple = 2 * layout.tp
    positions = round_up(max(config.policy.micro_batch_tokens, -(-longest // layout.cp)), multiple)
    count = micro_batches(config)
    return [TrainerMemory(config, architecture, s, positions, count) for s in sorted({0, layout.pp - 1})]


def longest_sequence(config: TrainConfig) -> int:
    return config.data.max_prompt_tokens + config.rollout.max_response_tokens - 1


def micro_batches(config: TrainConfig) -> int:
    """Of a step on each rank, with responses half as long as they may be."""
    policy = config.policy
    sequences = config.algorithm.prompts_per_step * config.rollout.group_size
    tokens = sequences * (config.data.max_prompt_tokens + config.rollout.max_response_tokens) / 2
    return max(1, round(tokens / policy.data_parallel_size / (policy.micro_batch_tokens * policy.layout.cp)))


def bucket_bytes(config: TrainConfig, architecture: Architecture) -> tuple[float, str]:
    """Of a weight update: the setting, or the largest tensor where that is larger."""
    width = DTYPE_BYTES[config.model.dtype]
    largest = architecture.vocab_size * architecture.hidden_size * width
    setting = config.weight_sync.bucket_mb * MIB
    if largest > setting:
        return largest, f"{architecture.vocab_size} x {architecture.hidden_size} x {width} (the embedding)"
    return setting, f"{config.weight_sync.bucket_mb:g} MiB"


def _with_fragmentation(amounts: list[Amount]) -> list[Amount]:
    if not amounts:
        return []
    lost = FRAGMENTATION * total(amounts)
    return [*amounts, Amount("fragmentation", lost, f"assumed: {FRAGMENTATION:.0%} of what comes and goes")]

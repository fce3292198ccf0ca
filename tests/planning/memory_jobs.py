"""What ranks of a pool measure of a built policy: bytes of its state, and what autograd keeps."""

import gc
import weakref
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_vespo.architecture.hf_config import Architecture
from megatron_vespo.architecture.layout_fit import packing_rules
from megatron_vespo.config import ModelConfig, ObjectiveConfig, OptimizerConfig, PolicyConfig
from megatron_vespo.packing.batch import TrainingSequence
from megatron_vespo.packing.steps import pack_step
from megatron_vespo.policy.losses import loss_function
from megatron_vespo.policy.policy import MegatronPolicy
from megatron_vespo.rendezvous import listen


@dataclass(frozen=True)
class State:
    """Bytes of one rank, after a step."""

    parameters: int
    gradients: int
    optimizer: int


def joined(
    rank: int, world_size: int, port: int, architecture: Architecture, policy: PolicyConfig, dtype: str
) -> MegatronPolicy:
    return MegatronPolicy(
        architecture,
        ModelConfig(path="unused", initialization="random", dtype=dtype),  # type: ignore[arg-type]
        policy,
        OptimizerConfig(learning_rate=1e-5),
        total_steps=4,
        seed=0,
        rank=rank,
        world_size=world_size,
        master=listen("127.0.0.1", port) if rank == 0 else ("127.0.0.1", port),
        temperature=1.0,
    )


def sequences(lengths: list[int], vocabulary: int) -> list[TrainingSequence]:
    """Random tokens, of `lengths` + 1, so that so many positions are trained."""
    random = np.random.default_rng(0)
    return [
        TrainingSequence(
            token_ids=random.integers(0, vocabulary, length + 1).astype(np.int32),
            label_mask=np.ones(length, dtype=np.bool_),
            old_log_probs=np.full(length, -4.0, dtype=np.float32),
            advantage=1.0,
            key=key,
        )
        for key, length in enumerate(lengths)
    ]


def storage_bytes(tensors: list[Tensor]) -> int:
    """Of the distinct storages that the tensors are in."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def state(rank: int, world_size: int, port: int, architecture: Architecture, policy: PolicyConfig, dtype: str) -> State:
    """Takes one step, since AdamW's moments come into being with it."""
    trainer = joined(rank, world_size, port, architecture, policy, dtype)
    try:
        rules = packing_rules(architecture, policy)
        step = pack_step(sequences([8] * max(2 * rules.ranks, 4), architecture.vocab_size), rules)
        trainer.train_step(step[trainer.place.share], loss_function(ObjectiveConfig(), trainer.context_parallel_group))
        trainer.settle_parameters()
        parameters = [p for chunk in trainer.model for p in chunk.parameters()]
        own = {parameter.untyped_storage().data_ptr() for parameter in parameters}
        kept = []
        for optimizer in trainer.optimizer.chained_optimizers:  # type: ignore[attr-defined]
            inner = optimizer.optimizer
            for group in inner.param_groups:
                for main in group["params"]:
                    kept += [main, inner.state[main]["exp_avg"], inner.state[main]["exp_avg_sq"]]
        return State(
            parameters=storage_bytes(parameters),
            gradients=storage_bytes([p.main_grad for p in parameters]),  # type: ignore[attr-defined]
            optimizer=storage_bytes([t for t in kept if t.untyped_storage().data_ptr() not in own]),
        )
    finally:
        trainer.close()


class Ledger:
    """Live bytes of the storages that autograd holds, without those in `excluded`."""

    def __init__(self, excluded: set[int]) -> None:
        self.excluded = excluded
        self.uses: dict[int, int] = {}
        self.live = self.peak = 0
        self.seen: list[tuple[tuple[int, ...], str, int]] = []

    def pack(self, tensor: Tensor) -> "Held":
        return Held(tensor, self)

    def add(self, storage: torch.UntypedStorage) -> None:
        pointer = storage.data_ptr()
        if pointer in self.excluded or pointer == 0:
            return
        if pointer not in self.uses:
            self.live += storage.nbytes()
        self.uses[pointer] = self.uses.get(pointer, 0) + 1
        self.peak = max(self.peak, self.live)

    def remove(self, pointer: int, nbytes: int) -> None:
        if pointer in self.excluded or pointer == 0:
            return
        self.uses[pointer] -= 1
        if not self.uses[pointer]:
            del self.uses[pointer]
            self.live -= nbytes


class Held:
    """What a graph keeps in a tensor's place: the ledger is told when the graph lets it go."""

    def __init__(self, tensor: Tensor, ledger: Ledger) -> None:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in ledger.uses and storage.data_ptr() not in ledger.excluded:
            ledger.seen.append((tuple(tensor.shape), str(tensor.dtype), storage.nbytes()))
        ledger.add(storage)
        self.tensor = tensor
        weakref.finalize(self, ledger.remove, storage.data_ptr(), storage.nbytes())


@dataclass(frozen=True)
class Activations:
    """Bytes that autograd keeps at most at a time, in a forward and backward pass over one micro-batch."""

    peak: int
    positions: int
    seen: list[tuple[tuple[int, ...], str, int]]


def activations(
    rank: int,
    world_size: int,
    port: int,
    architecture: Architecture,
    policy: PolicyConfig,
    dtype: str,
    lengths: list[int],
) -> Activations:
    """`lengths` make up one micro-batch of each data-parallel rank."""
    trainer = joined(rank, world_size, port, architecture, policy, dtype)
    try:
        rules = packing_rules(architecture, policy)
        step = pack_step(sequences(lengths * rules.ranks, architecture.vocab_size), rules)
        own = step[trainer.place.share]
        assert len(own) == 1, "one micro-batch is to be measured"
        parameters = [p for chunk in trainer.model for p in chunk.parameters()]
        ledger = Ledger(
            {p.untyped_storage().data_ptr() for p in parameters}
            | {p.main_grad.untyped_storage().data_ptr() for p in parameters}  # type: ignore[attr-defined]
        )
        loss = loss_function(ObjectiveConfig(), trainer.context_parallel_group)
        gc.collect()
        with torch.autograd.graph.saved_tensors_hooks(ledger.pack, lambda held: held.tensor):
            trainer.gradient_norm(own, loss)
        return Activations(ledger.peak, len(own[0].input_ids) // policy.layout.cp, ledger.seen)
    finally:
        trainer.close()

"""One trainer process as a Ray actor."""

import os
import socket
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray

from megatron_vespo.config import DiskSyncConfig, ObjectiveConfig, SFTConfig, TrainConfig
from megatron_vespo.packing.batch import MicroBatch
from megatron_vespo.policy.result import StepResult, TokenScores
from megatron_vespo.presence import announce
from megatron_vespo.rendezvous import listen, port_of
from megatron_vespo.routing.slices import RankPlace, RouteSlice, StepRoutes
from megatron_vespo.weights.buckets import Bucket

if TYPE_CHECKING:  # Megatron is imported in the actor alone
    from megatron_vespo.policy.schedule import LossFunction
    from megatron_vespo.weights.filling import Filling
    from megatron_vespo.weights.sender import SendTimes

PIECES_OF_A_BUCKET = 8
"""What rank 0 receives from others at once is so small a part of a bucket."""
BOOT_ID = "/proc/sys/kernel/random/boot_id"
"""Of the host, the same in all its containers."""


CONCURRENT = {"sentinel": 1, "answer": 1, "weights": 2}
"""Calls that a rank takes beside its work."""


@ray.remote(max_restarts=0, concurrency_groups=CONCURRENT)  # pyright: ignore[reportCallIssue]
class PolicyRank:
    """Rank `rank` of `policy.ranks`. Methods that talk to other ranks must be called on all of them."""

    def __init__(self, rank: int, parts: str, address: str) -> None:
        """`parts`: the folder where processes of the run make themselves known. `address`: where rank 0 listens."""
        self._address = address
        announce(Path(parts), f"policy rank {rank}")
        self._rank = rank
        self._listener: socket.socket | None = None
        self._sender: Any = None
        self._gathering: Any = None
        self._buckets: list[Bucket] = []
        self._on_one_host = False
        self._slots: list[Any] = []
        self._policy: Any = None
        self._saving: Any = None
        self._exporting: Any = None

    def process(self) -> int:
        """Its number on this host."""
        return os.getpid()

    def listen_for_ranks(self) -> int:
        """Rank 0 only. Returns the port where the other ranks meet it."""
        self._listener = listen(self._address)
        return port_of(self._listener)

    def build(self, port: int, config: TrainConfig | SFTConfig, total_steps: int, temperature: float) -> RankPlace:
        """Join the other ranks, build the model and load its weights; what was built before is let go.

        Returns which part of a step, and of its routes, is this rank's.
        """
        from megatron_vespo.architecture.hf_config import read_architecture
        from megatron_vespo.checkpoint.load import load_hf_weights
        from megatron_vespo.policy.policy import MegatronPolicy

        if self._policy is not None:
            self._policy.close()
        self._gathering = None  # it holds the model
        folder, policy = Path(config.model.path), config.policy
        self._model_path = config.model.path
        self._architecture = read_architecture(folder)
        self._policy = MegatronPolicy(
            architecture=self._architecture,
            model=config.model,
            policy=policy,
            optimizer=config.optimizer,
            total_steps=total_steps,
            seed=config.seed,
            rank=self._rank,
            world_size=policy.ranks,
            master=self._listener or (self._address, port),
            temperature=temperature,
        )
        reference = policy.reference
        if reference is not None and reference.path is not None:
            load_hf_weights(self._policy.model, self._architecture, reference.path)
            self._policy.freeze_reference(reference.offload)
        if config.model.initialization == "pretrained":
            load_hf_weights(self._policy.model, self._architecture, folder)
            self._policy.weights_were_loaded()
        if reference is not None and reference.path is None:
            self._policy.freeze_reference(reference.offload)
        return self._policy.place

    def train_step(
        self, micro_batches: list[MicroBatch], routes: StepRoutes | None, objective: ObjectiveConfig | None
    ) -> StepResult:
        """One optimizer step; `objective` None is supervised training."""
        return self._policy.train_step(micro_batches, *self._loss(objective), routes)

    def begin_save(self, folder: str) -> None:
        """Copy the training state; a thread writes it into `folder` from now on."""
        self._saving = self._policy.begin_save(Path(folder))

    def saved(self) -> bool:
        """Whether this rank has written its part."""
        return self._saving.done()

    def finish_save(self) -> None:
        """Wait until it has, and let all ranks together write what belongs to the whole."""
        saving, self._saving = self._saving, None  # it holds a copy of the state
        saving.finish()

    def load_saved(self, folder: str, step: int) -> None:
        self._policy.load_saved(Path(folder), step)

    def gradient_norm(
        self, micro_batches: list[MicroBatch], routes: StepRoutes | None, objective: ObjectiveConfig
    ) -> tuple[float, int]:
        """Of a step that is not taken, and the denominator of its loss."""
        return self._policy.gradient_norm(micro_batches, *self._loss(objective), routes)

    def _loss(self, objective: ObjectiveConfig | None) -> "tuple[LossFunction, bool]":
        """And whether it needs entropies."""
        from megatron_vespo.policy.losses import loss_function

        loss = loss_function(objective, self._policy.context_parallel_group)
        return loss, objective is not None and objective.entropy_coefficient > 0

    def score(
        self, micro_batches: list[MicroBatch], routes: StepRoutes | None, with_entropy: bool, reference: bool
    ) -> dict[int, TokenScores]:
        """Scores of labels by key, of this rank's share on one of the share's ranks."""
        return self._policy.score(micro_batches, with_entropy=with_entropy, reference=reference, routes=routes)

    def score_and_record(
        self, micro_batches: list[MicroBatch], routes: StepRoutes | None
    ) -> tuple[dict[int, TokenScores], list[RouteSlice]]:
        """And which experts were used, of this rank's positions and layers."""
        return self._policy.score_and_record(micro_batches, routes=routes)

    def _tensors(self, piece_bytes: int | None = None):
        """All tensors on rank 0. What each rank sends is settled once for a model, here and by `plan_sync`."""
        from megatron_vespo.checkpoint.gather import GatherPlan

        self._policy.settle_parameters()
        if self._gathering is None:
            elements = None if piece_bytes is None else piece_bytes // next(self._policy.model[0].parameters()).itemsize
            self._gathering = GatherPlan(self._policy.model, self._architecture, elements)
        return self._gathering.tensors()

    def plan_sync(self, bucket_bytes: int) -> list[Bucket]:
        """All ranks: into which buckets the tensors go. They are gathered in pieces of a part of one."""
        import torch.distributed as dist

        from megatron_vespo.weights.buckets import plan_buckets, specs_of

        self._gathering, self._slots = None, []
        plan = [plan_buckets(specs_of(self._tensors(bucket_bytes // PIECES_OF_A_BUCKET)), bucket_bytes)]
        dist.broadcast_object_list(plan, src=0)
        self._buckets = plan[0]
        hosts: list[Any] = [None] * dist.get_world_size()
        # Nodes of a job may be containers of one host, each with shared memory of its own.
        dist.all_gather_object(hosts, (Path(BOOT_ID).read_text(), ray.get_runtime_context().get_node_id()))
        self._on_one_host = len(set(hosts)) == 1
        return self._buckets

    def _filling(self) -> "Filling":
        from megatron_vespo.weights.filling import Gathered, Placed

        if self._on_one_host and not next(self._policy.model[0].parameters()).is_cuda:
            self._policy.settle_parameters()
            return Placed(self._buckets, self._gathering.own_parts(), self._slots)
        return Gathered(self._tensors())

    def open_sender(self, transport: str, groups: list[str], disk: DiskSyncConfig) -> list[int]:
        """Rank 0 only, after `plan_sync`. `groups`: names of process groups, of a collective transport; returns the
        ports where they meet."""
        from megatron_vespo.weights.collective import CollectiveSender
        from megatron_vespo.weights.disk import DiskSender
        from megatron_vespo.weights.shared_memory import SharedMemorySender

        device = next(self._policy.model[0].parameters()).device
        if transport == "collective":
            self._sender = CollectiveSender(self._buckets, device, self._address, groups)
            return self._sender.ports
        if transport == "disk":
            assert disk.folder is not None
            self._sender = DiskSender(self._buckets, device, Path(disk.folder), disk.changed_only)
        else:
            self._sender = SharedMemorySender(self._buckets, device)
        return []

    def connect_groups(self, world_sizes: list[int], backend: str, timeout_seconds: float) -> dict[str, str]:
        """Rank 0 only: wait for the engines of each of the sender's groups; returns the names of those without, and why."""
        return self._sender.connect(world_sizes, backend, timeout_seconds)

    def close_sender(self) -> None:
        """Rank 0 only."""
        sender, self._sender = self._sender, None
        sender.close()

    def send_weights(self, weight_version: int, since: int | None) -> "SendTimes | None":
        """All ranks fill buckets; rank 0 sends them. `since`: the weight version that all engines have, if it is known."""
        filling = self._filling()
        if self._rank == 0:
            return self._sender.send(filling, weight_version, since)
        filling.follow()
        return None

    @ray.method(concurrency_group="weights")
    def take_bucket(self, index: int, copies: int, released: int) -> Any:
        """Rank 0 only, while it sends: wait until a bucket is ready, and return what engines are told of it."""
        return self._sender.take(index, copies, released)

    @ray.method(concurrency_group="weights")
    def abandon_sync(self) -> None:
        """Rank 0 only: let `send_weights` and `connect_groups` return."""
        self._sender.abandon()

    def engine_checksums(self, dtype: str, ranks: int) -> list[dict[str, str]]:
        """What each tensor of an engine of so many ranks must hash to, by rank; empty on ranks other than 0."""
        from megatron_vespo.rollout.fused_checksums import expected_checksums

        if self._rank == 0:
            architecture = self._architecture
            return expected_checksums(
                self._tensors(),
                dtype=dtype,
                num_experts=architecture.num_experts,
                kv_heads=architecture.num_query_groups,
                ranks=ranks,
            )
        for _ in self._tensors():
            pass
        return []

    def export(self, folder: str, overwrite: bool) -> None:
        """Write a Hugging Face folder; tokenizer and config come from the model that was loaded."""
        from megatron_vespo.checkpoint.export import export_hf_folder

        self._policy.settle_parameters()
        export_hf_folder(
            self._policy.model, self._architecture, source=self._model_path, target=folder, overwrite=overwrite
        )

    def begin_export(self, folder: str) -> None:
        """As `export`, but rank 0 writes in the background, a copy of the weights of now."""
        from megatron_vespo.checkpoint.export import BackgroundExport

        self._policy.settle_parameters()
        self._exporting = BackgroundExport(self._policy.model, self._architecture, self._model_path, folder)

    def exported(self) -> bool:
        return self._exporting.done()

    def finish_export(self) -> None:
        exporting, self._exporting = self._exporting, None  # it holds a copy of the model
        exporting.finish()

    @ray.method(concurrency_group="answer")
    def answer(self) -> None:
        """Returns at once, whatever else is going on, unless this process is dead or stands still."""

    @ray.method(concurrency_group="sentinel")
    def hold(self) -> None:
        """Never returns: its failure tells that this process died."""
        threading.Event().wait()

"""Routing replay in Megatron-Core: routers that can use recorded experts, and the pass that hands them out.

Built on Megatron's RouterReplay, which gives a router one target and leaves everything else to its user: here each router
knows which micro-batch it works on, which of its rows are recorded, and whether it runs forward or is being recomputed.
Nothing is global: a model's routers are found by walking through it.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction
from megatron.core.transformer.transformer_config import TransformerConfig
from numpy.typing import NDArray
from torch import Tensor

from megatron_vespo.errors import ConfigError, RunError
from megatron_vespo.routing.agreement import LayerSums
from megatron_vespo.routing.routes import Experts
from megatron_vespo.routing.slices import RouteSlice


class ReplayError(RunError):
    """Recorded routes were not used exactly once."""


@dataclass(frozen=True)
class OwnPositions:
    """Those of one micro-batch that this rank's routers see.

    Attributes:
        count: how many.
        padding: [count] bool on the device, True where a position belongs to no sequence; None: there are none of these.
        nobody: the whole micro-batch is padding, on all ranks that have a part of it.
    """

    count: int
    padding: Tensor | None = None
    nobody: bool = False


@dataclass
class LayerRoutes:
    """What one router is told of one micro-batch.

    Attributes:
        number: of the micro-batch in its pass.
        positions: the rows that the router will see.
        experts: [positions, topk] recorded choice on the device, while the micro-batch runs forward; or None: the router
            chooses by itself.
        recorded: [positions] bool, which rows of `experts` to use.
        keep: remember the choice, for a recomputation or for whoever asked for a recording.
        chosen: [positions, topk] what the forward pass used, if `keep`.
    """

    number: int
    positions: OwnPositions
    experts: Tensor | None = None
    recorded: Tensor | None = None
    keep: bool = False
    chosen: Tensor | None = None


class LayerReplay(RouterReplay):
    """Megatron's replay of one router, with rows that are left to the router.

    Attributes:
        layer: of the router, counted over the MoE layers of the whole model, from 0.
        uses: how often each micro-batch's routes were used, by (action, number).
        sums: filled with how recorded and own choice agree; None: not measured.
    """

    def __init__(self, num_experts: int):
        super().__init__()
        # Megatron lists the routers of all models of a process and acts on all at once.
        RouterReplay.global_router_replay_instances.remove(self)
        self.layer = -1
        self.uses: Counter[tuple[RouterReplayAction, int]] = Counter()
        self.sums: LayerSums | None = None
        self._routes: LayerRoutes | None = None
        self._kept_dtype = torch.uint8 if num_experts <= 2**8 else torch.int32

    def set(self, action: RouterReplayAction | None, routes: LayerRoutes | None) -> None:
        """What the next call of the router is for."""
        self.router_replay_action = action
        self._routes = routes

    @property
    def positions(self) -> OwnPositions | None:
        """That the router sees now; None outside a pass."""
        return None if self._routes is None else self._routes.positions

    def get_replay_topk(
        self,
        scores: Tensor,
        topk: int,
        num_groups: int | None = None,
        group_topk: int | None = None,
        default_compute_topk: Callable[..., tuple[Tensor, Tensor]] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """As in RouterReplay. Megatron calls it with scores [positions, experts].

        Raises:
            ReplayError: the router sees another number of rows than there are routes.
        """
        assert default_compute_topk is not None
        action, routes = self.router_replay_action, self._routes
        if action is None or routes is None:
            return default_compute_topk(scores, topk, num_groups, group_topk)
        if len(scores) != routes.positions.count:
            raise ReplayError(
                f"MoE layer {self.layer}, micro-batch {routes.number}: the router sees {len(scores)} positions, but "
                f"there are routes for {routes.positions.count}"
            )
        self.uses[action, routes.number] += 1
        if action is RouterReplayAction.REPLAY_FORWARD:
            own = default_compute_topk(scores.detach(), topk, num_groups, group_topk)[1]
            self.target_topk_idx = self._merged(own, routes, scores)
        elif action is RouterReplayAction.REPLAY_BACKWARD:
            assert routes.chosen is not None
            self.replay_backward_list = [routes.chosen.long()]
            routes.chosen = None
        probs, indices = super().get_replay_topk(scores, topk, num_groups, group_topk, default_compute_topk)
        if action is RouterReplayAction.RECORD and routes.experts is not None:
            self._compare(indices, routes, scores)
        if routes.keep and action is not RouterReplayAction.REPLAY_BACKWARD:
            routes.chosen = indices.to(self._kept_dtype)
        self.clear_indices()
        return probs, indices

    def _merged(self, own: Tensor, routes: LayerRoutes, scores: Tensor) -> Tensor:
        """[positions, topk]: recorded rows as recorded, the others as the router would have it."""
        recorded, rows = self._compare(own, routes, scores)
        return torch.where(rows[:, None], recorded, own)

    def _compare(self, own: Tensor, routes: LayerRoutes, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Measure, if asked to. Returns the recorded experts and which rows they are recorded in."""
        assert routes.experts is not None and routes.recorded is not None
        recorded = routes.experts.long()
        if self.sums is not None:
            self.sums.add(recorded, own, routes.recorded, scores.detach())
        return recorded, routes.recorded


class ReplayRouter(TopKRouter):
    """Megatron's router with a `LayerReplay`, which keeps padding away from the experts."""

    def __init__(self, config: TransformerConfig, pg_collection: Any = None):
        super().__init__(config=config, pg_collection=pg_collection)
        if config.moe_router_fusion or self.routing_type == "sinkhorn":
            raise ConfigError(
                "routing replay: moe_router_fusion and sinkhorn routing choose experts where nothing can be replayed; "
                "switch them off"
            )
        assert config.num_moe_experts is not None
        self.router_replay = LayerReplay(config.num_moe_experts)

    def forward(self, input: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """As in TopKRouter; padding gets no expert, and counts in no auxiliary loss."""
        positions = self.router_replay.positions
        if positions is None or positions.padding is None:
            return super().forward(input, padding_mask)
        padding = positions.padding
        # Megatron's docstrings say True for valid tokens, its code takes True for padding.
        probs, routing_map = super().forward(input, padding[:, None])
        return probs.masked_fill(padding[:, None], 0.0), routing_map & ~padding[:, None]

    def is_aux_loss_enabled(self) -> bool:
        """Megatron would divide by the number of real positions."""
        positions = self.router_replay.positions
        return super().is_aux_loss_enabled() and not (positions is not None and positions.nobody)


class RoutingReplay:
    """The routers of one model on this rank.

    Attributes:
        moe_layers: which of the model's MoE layers are here, in the order of the chunks.
    """

    def __init__(self, chunks: Sequence[torch.nn.Module], moe_layers: Sequence[bool], config: TransformerConfig):
        """`chunks`: as Megatron's schedule gets them. `moe_layers`: of the whole model, whether each layer has experts."""
        self._chunks = list(chunks)
        self._config = config
        self._routers: list[list[LayerReplay]] = []
        for chunk in chunks:
            routers = [module for module in chunk.modules() if isinstance(module, ReplayRouter)]
            for router in routers:
                assert router.layer_number is not None
                router.router_replay.layer = sum(moe_layers[: router.layer_number - 1])
            self._routers.append([router.router_replay for router in routers])
        self.moe_layers = tuple(replay.layer for routers in self._routers for replay in routers)
        modules = config.recompute_modules or []
        self._recomputed = config.recompute_granularity == "full" or (
            config.recompute_granularity == "selective" and "moe" in modules
        )

    @contextmanager
    def passing(
        self,
        positions: Sequence[OwnPositions],
        *,
        routes: Sequence[RouteSlice] | None = None,
        replay: bool = True,
        backward: bool = False,
        record: bool = False,
        measure: bool = False,
    ) -> Iterator["RoutingPass"]:
        """Around one pass over micro-batches. On leaving, every route has been used exactly once.

        Args:
            positions: of each micro-batch.
            routes: recorded, one of each micro-batch; None: there are none.
            replay: use them; else routers choose by themselves, and are only compared with them.
            backward: the pass has a backward pass.
            record: keep what was chosen, for `RoutingPass.recorded`.
            measure: compare `routes` with the routers' own choice, for `sums`.

        Raises:
            ReplayError: on leaving, or from a router; the message names layer and micro-batch.
        """
        current = RoutingPass(
            self._chunks,
            self._routers,
            positions,
            routes,
            replay=replay,
            recomputed=backward and self._recomputed,
            record=record,
        )
        experts = self._config.num_moe_experts or 0
        for router in self._all():
            router.uses.clear()
            router.sums = LayerSums(experts) if measure and routes is not None else None
        try:
            yield current
            current.require_used_once()
        finally:
            for router in self._all():
                router.set(None, None)

    def sums(self, layers: int) -> Tensor | None:
        """Of the last pass, if it was measured: `LayerSums.values` of every MoE layer of the model, [layers, n] float64
        on the CPU, 0 for those that are on other ranks."""
        measured = [replay for replay in self._all() if replay.sums is not None]
        if not measured:
            return None
        values = torch.stack([replay.sums.values for replay in measured]).cpu()  # type: ignore[union-attr]
        total = torch.zeros(layers, values.shape[1], dtype=torch.float64)
        return total.index_add_(0, torch.tensor([replay.layer for replay in measured]), values)

    def _all(self) -> Iterator[LayerReplay]:
        return (replay for routers in self._routers for replay in routers)


class RoutingPass:
    """Tells each router, before it runs, which micro-batch it works on and what is recorded of it."""

    def __init__(
        self,
        chunks: Sequence[torch.nn.Module],
        routers: Sequence[Sequence[LayerReplay]],
        positions: Sequence[OwnPositions],
        routes: Sequence[RouteSlice] | None,
        *,
        replay: bool,
        recomputed: bool,
        record: bool,
    ):
        self._chunks = chunks
        self._routers = routers
        self._recomputed = recomputed
        if routes is not None:
            _require_fit(positions, routes)
        self._recorded = routes
        keep = recomputed or record
        self._routes = [
            [[LayerRoutes(number, own, keep=keep) for number, own in enumerate(positions)] for _ in of_chunk]
            for of_chunk in routers
        ]
        self._given: dict[int, int] = {}
        """By chunk: the micro-batch whose recorded experts its routers have."""
        replays = routes is not None and replay
        self._forward = RouterReplayAction.REPLAY_FORWARD if replays else RouterReplayAction.RECORD
        self._idle = routes is None and not (recomputed or record)

    def begin_forward(self, chunk: torch.nn.Module, number: int) -> None:
        """Call before `chunk` runs forward on micro-batch `number`."""
        index = self._index(chunk)
        if self._recorded is not None and self._routers[index]:
            self._give(index, number, self._recorded[number])
        self._switch(index, number, None if self._idle else self._forward)

    def watch_backward(self, chunk: torch.nn.Module, number: int, output: Tensor) -> None:
        """Call with what `chunk` gave for that micro-batch: when its gradient arrives, its backward pass begins, and with
        it recomputation, before the next forward pass of any micro-batch."""
        if self._recomputed and output.requires_grad:
            index = self._index(chunk)
            output.register_hook(lambda _: self._switch(index, number, RouterReplayAction.REPLAY_BACKWARD))

    def recorded(self) -> list[RouteSlice]:
        """What was chosen, of each micro-batch."""
        layers = [layer for chunk in self._routes for layer in chunk]
        return [
            RouteSlice(
                experts=_on_cpu(torch.stack([_chosen(layer[number]) for layer in layers], dim=1)),
                recorded=_real(layers[0][number].positions),
            )
            for number in range(len(layers[0]) if layers else 0)
        ]

    def require_used_once(self) -> None:
        """Raises ReplayError."""
        if self._idle:
            return
        expected = {self._forward: 1, RouterReplayAction.REPLAY_BACKWARD: int(self._recomputed)}
        for routers, layers in zip(self._routers, self._routes, strict=True):
            for replay, routes in zip(routers, layers, strict=True):
                for number in range(len(routes)):
                    for action, wanted in expected.items():
                        found = replay.uses[action, number]
                        if found != wanted:
                            raise ReplayError(
                                f"MoE layer {replay.layer}, micro-batch {number}: its routes were used {found} times in "
                                f"{action.value}, not {wanted}"
                            )

    def _give(self, index: int, number: int, recorded: RouteSlice) -> None:
        """Bring a micro-batch's recorded experts to the routers of a chunk, all layers at once: on CUDA each copy waits for
        the device. Those of the micro-batch before it, which is through, are let go."""
        device = next(self._chunks[index].parameters()).device
        first = sum(len(routers) for routers in self._routers[:index])
        # Copied in any case: what Ray hands out can't be written to, which PyTorch's tensors must.
        experts = torch.tensor(recorded.experts[:, first : first + len(self._routers[index])], device=device)
        rows = torch.tensor(recorded.recorded, device=device)
        before = self._given.get(index)
        for place, of_layer in enumerate(self._routes[index]):
            if before is not None:
                of_layer[before].experts = of_layer[before].recorded = None
            of_layer[number].experts, of_layer[number].recorded = experts[:, place], rows
        self._given[index] = number

    def _switch(self, index: int, number: int, action: RouterReplayAction | None) -> None:
        for replay, routes in zip(self._routers[index], self._routes[index], strict=True):
            replay.set(action, routes[number])

    def _index(self, chunk: torch.nn.Module) -> int:
        return next(index for index, one in enumerate(self._chunks) if one is chunk)


def _require_fit(positions: Sequence[OwnPositions], routes: Sequence[RouteSlice]) -> None:
    for number, (own, recorded) in enumerate(zip(positions, routes, strict=True)):
        if len(recorded.recorded) != own.count:
            raise ReplayError(
                f"micro-batch {number}: this rank has {own.count} positions of it, and routes of {len(recorded.recorded)}"
            )


def _chosen(routes: LayerRoutes) -> Tensor:
    assert routes.chosen is not None
    return routes.chosen


def _on_cpu(experts: Tensor) -> Experts:
    """In the dtype of recorded routes."""
    values = experts.cpu().numpy()
    return values if values.dtype == np.uint8 else values.astype(np.uint16)


def _real(positions: OwnPositions) -> NDArray[np.bool_]:
    if positions.padding is None:
        return np.ones(positions.count, dtype=np.bool_)
    return (~positions.padding).cpu().numpy()

"""Requests to one SGLang server. Token ids in, token ids out; every call has a deadline."""

import asyncio
from collections.abc import Coroutine
from typing import Any, Literal, TypeVar

from megatron_vespo.rollout.engine_http import EngineError, EngineHttp
from megatron_vespo.rollout.engine_output import EngineOutput, read_output
from megatron_vespo.rollout.gate import Gate

T = TypeVar("T")

DEFAULT_NEW_TOKENS = 128
"""SGLang's."""


class EngineClient(EngineHttp):
    """One server. Made inside or outside an event loop; used in one. Close it, or use it as a context.

    Args:
        url: of the server, without a slash at the end.
        token: what the server asks for (`EngineServer.token`).
        name: what messages call the engine.
        ranks: its processes that hold weights (tensor parallel size).
        timeout_seconds: deadline of `generate`.
        weights_timeout_seconds: deadline of everything that moves or hashes weights.
        control_timeout_seconds: deadline of all other requests.
    """

    def __init__(
        self,
        url: str,
        *,
        token: str | None = None,
        name: str = "engine",
        ranks: int = 1,
        timeout_seconds: float = 1800.0,
        weights_timeout_seconds: float = 600.0,
        control_timeout_seconds: float = 60.0,
    ) -> None:
        super().__init__(
            url,
            token,
            {
                "generate": timeout_seconds,
                "weights": weights_timeout_seconds,
                "control": control_timeout_seconds,
            },
        )
        self.name = name
        self.ranks = ranks
        self.gate = Gate()
        self.given_version: int | None = None
        """That the engine holds, as far as whoever brought it there noted it here."""
        self.outstanding_tokens = 0
        """Of requests that wait or run: their inputs, and the most that they may sample."""
        self._lost: asyncio.Future[str] | None = None

    def lose(self, reason: str) -> None:
        """Take the engine for gone: whoever waits for it gets an error now, and everybody else at once."""
        if not self._loss.done():
            self._loss.set_result(reason)

    @property
    def _loss(self) -> "asyncio.Future[str]":
        if self._lost is None:
            self._lost = asyncio.get_running_loop().create_future()
        return self._lost

    async def _unless_lost(self, endpoint: str, work: Coroutine[Any, Any, T]) -> T:
        task = asyncio.ensure_future(work)
        try:
            await asyncio.wait({task, self._loss}, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            raise EngineError(self.url, endpoint, None, f"given up: {self._loss.result()}")
        finally:
            if not task.done():
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)

    async def generate(
        self,
        input_ids: list[list[int]],
        sampling_params: list[dict[str, Any]],
        request_ids: list[str],
        *,
        return_routed_experts: bool = False,
        routed_experts_start_len: int = 0,
        cache_key: str | None = None,
    ) -> list[EngineOutput]:
        """Sample one response to each input, in one request; SGLang's own sampling parameters for each.

        A caller that is cancelled closes its connection, and the engine then drops the work.

        Args:
            return_routed_experts: ask for the experts of every input position but the last sampled token's. The server
                must have been started for it.
            routed_experts_start_len: the first position to return, of all inputs of this request.
            cache_key: use only those cached prefixes that requests with this key computed (SGLang's `extra_key`).
        """
        body: dict[str, Any] = {
            "input_ids": input_ids,
            "sampling_params": sampling_params,
            "rid": request_ids,
            "return_logprob": True,
        }
        if return_routed_experts:
            body |= {"return_routed_experts": True, "routed_experts_start_len": routed_experts_start_len}
        if cache_key is not None:
            body["extra_key"] = cache_key
        tokens = sum(map(len, input_ids)) + sum(p.get("max_new_tokens", DEFAULT_NEW_TOKENS) for p in sampling_params)
        self.outstanding_tokens += tokens
        try:
            answer = await self._unless_lost("/generate", self._pass_through("/generate", body))
        finally:
            self.outstanding_tokens -= tokens
        if not isinstance(answer, list) or len(answer) != len(input_ids):
            raise self._nonsense("/generate", f"expected a list of {len(input_ids)} responses", answer)
        try:
            return [read_output(item) for item in answer]
        except (LookupError, TypeError, ValueError, OverflowError, AttributeError) as error:
            raise self._nonsense("/generate", f"unreadable response ({error!r})", answer) from error

    async def _pass_through(self, endpoint: str, body: dict[str, Any]) -> Any:
        async with self.gate.through():
            return await self._request("POST", endpoint, body, deadline="generate")

    async def health(self, seconds: float) -> None:
        """Returns once the engine has computed something, no matter for which request.

        Raises:
            EngineError: it has not within `seconds`.
        """
        try:
            async with asyncio.timeout(seconds):
                await self._request("GET", "/health", None, parse=False)
        except TimeoutError:
            raise EngineError(self.url, "/health", None, f"nothing computed within {seconds:.0f} s") from None

    async def flush_cache(self) -> None:
        """Empty the KV and prefix caches, as soon as no request runs."""
        try:
            await self._request("POST", "/flush_cache", None, parse=False)
        except EngineError as error:
            if error.status != 400:  # which says that requests run
                raise
            # Asked to wait, the engine looks again only now and then, so this is not the first thing to try.
            seconds = self._deadlines["control"] / 2
            await self._request("POST", f"/flush_cache?timeout={seconds}", None, parse=False)

    async def abort_all(self) -> None:
        """End every request that the engine knows of; each returns what it has."""
        await self._request("POST", "/abort_request", {"rid": "", "abort_all": True}, parse=False)

    async def pause_generation(self, mode: Literal["abort", "in_place", "retract"]) -> None:
        """Hold new requests, and stop those that run, until `continue_generation`.

        `abort` ends the running ones, which return what they have, and waits until they have ended. `in_place` leaves
        them with their cache; after a weight update they go on over keys and values of the old weights. `retract` takes
        their cache away, to be computed again.
        """
        await self._request("POST", "/pause_generation", {"mode": mode}, deadline="weights", parse=False)

    async def continue_generation(self) -> None:
        await self._request("POST", "/continue_generation", {}, parse=False)

    async def begin_weight_update(self) -> None:
        await self._succeed("/begin_weight_update", {"selector": "all"})

    async def end_weight_update(self) -> None:
        await self._succeed("/end_weight_update", {})

    async def init_weights_update_group(
        self,
        *,
        master_address: str,
        master_port: int,
        rank_offset: int,
        world_size: int,
        group_name: str,
        backend: str,
    ) -> None:
        """Join a process group as ranks `rank_offset` and on. Returns when all `world_size` ranks have come."""
        body = {
            "master_address": master_address,
            "master_port": master_port,
            "rank_offset": rank_offset,
            "world_size": world_size,
            "group_name": group_name,
            "backend": backend,
        }
        await self._succeed("/init_weights_update_group", body)

    async def update_weights_from_distributed(
        self,
        *,
        names: list[str],
        dtypes: list[str],
        shapes: list[list[int]],
        group_name: str,
        weight_version: int | str | None = None,
        flush_cache: bool = False,
    ) -> None:
        """Receive one flattened bucket, broadcast as uint8 by rank 0 of the group, between begin and end of an update.

        Waits for running requests unless generation is paused. An unknown name is ignored by the engine without an
        error: compare checksums.

        Args:
            names: of tensors in Hugging Face form, in the order of their bytes in the bucket.
            dtypes: as in torch, e.g. "float32".
            shapes: of each tensor.
            weight_version: what the engine's weights are called from now on; None keeps the name.
        """
        body = {
            "names": names,
            "dtypes": dtypes,
            "shapes": shapes,
            "group_name": group_name,
            "load_format": "flattened_bucket",
            "flush_cache": flush_cache,
            "weight_version": None if weight_version is None else str(weight_version),
        }
        await self._succeed("/update_weights_from_distributed", body)

    async def update_weights_from_tensor(
        self, payloads: list[str], weight_version: int | str | None = None, flush_cache: bool = False
    ) -> None:
        """Load one flattened bucket out of memory that the engine's processes open, between begin and end of an update.

        Args:
            payloads: for each rank of the engine, where the memory is (`weights.shared_memory`).
            weight_version: as of `update_weights_from_distributed`.
        """
        body = {
            "serialized_named_tensors": payloads,
            "load_format": "flattened_bucket",
            "flush_cache": flush_cache,
            "weight_version": None if weight_version is None else str(weight_version),
        }
        await self._succeed("/update_weights_from_tensor", body)

    async def update_weights_from_disk(
        self, folder: str, weight_version: int | str | None = None, flush_cache: bool = False
    ) -> None:
        """Load the safetensors files of `folder`, all of a model or some tensors of it.

        Args:
            weight_version: as of `update_weights_from_distributed`.
        """
        body = {
            "model_path": folder,
            "load_format": "auto",  # however the engine was started
            "flush_cache": flush_cache,
            "weight_version": None if weight_version is None else str(weight_version),
        }
        await self._succeed("/update_weights_from_disk", body)

    async def destroy_weights_update_group(self, group_name: str) -> None:
        await self._succeed("/destroy_weights_update_group", {"group_name": group_name})

    async def weights_checksum(self) -> list[dict[str, str]]:
        """Hash of each tensor as each of the engine's ranks holds it, by the engine's names, in the order of ranks."""
        answer = await self._succeed("/weights_checker", {"action": "checksum"})
        ranks = answer.get("ranks") or []
        if len(ranks) != self.ranks:
            complaint = f"expected the checksums of {self.ranks} ranks, found {len(ranks)}"
            raise self._nonsense("/weights_checker", complaint, answer)
        return [rank["checksums"] for rank in ranks]

    async def model_info(self) -> dict[str, Any]:
        return await self._request("GET", "/model_info", None)

    async def weight_version(self) -> str:
        return (await self.model_info())["weight_version"]

"""Requests to one SGLang server. Token ids in, token ids out; every call has a deadline."""

import asyncio
import contextlib
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import aiohttp
import msgspec
import numpy as np
from numpy.typing import NDArray

from megatron_vespo.errors import RunError
from megatron_vespo.rollout.gate import Gate

T = TypeVar("T")

DEFAULT_NEW_TOKENS = 128
"""SGLang's."""


class EngineError(RunError):
    """A request that the engine refused, did not answer in time, or answered with nonsense."""

    def __init__(self, url: str, endpoint: str, status: int | None, reason: str) -> None:
        answer = f"status {status}: " if status is not None else ""
        super().__init__(f"engine {url}{endpoint}: {answer}{reason}")
        self.url = url
        self.endpoint = endpoint
        self.status = status
        """Of HTTP; None where there was no answer."""
        self.reason = reason

    @property
    def refused(self) -> bool:
        """The engine works, and does not accept this request."""
        return self.status is not None and 400 <= self.status < 500

    def __reduce__(self):
        return type(self), (self.url, self.endpoint, self.status, self.reason)


@dataclass(frozen=True)
class WeightSpan:
    """Response tokens [start, end) that were sampled under one weight version."""

    version: str
    start: int
    end: int


@dataclass(frozen=True)
class EngineOutput:
    """What the engine sampled for one input.

    Attributes:
        token_ids: [response tokens] int32, the stop token included.
        log_probs: [response tokens] float32, natural logarithm, of the distribution with the temperature applied.
        finish_reason: "stop", "length" or "abort".
        finish_detail: the engine's message of an abort, else "".
        finish_status: of HTTP, which the engine gives to an abort that is an error; None for all others.
        cached_tokens: first tokens of the input that were found in the prefix cache.
        retractions: how often the engine ran out of cache and computed the request's tokens again.
        routed_experts: as it came (see `routing.codec`); None where it was not asked for or did not come.
    """

    request_id: str
    token_ids: NDArray[np.int32]
    log_probs: NDArray[np.float32]
    finish_reason: str
    finish_detail: str
    weight_spans: tuple[WeightSpan, ...]
    cached_tokens: int
    retractions: int
    finish_status: int | None = None
    routed_experts: str | None = None


class EngineClient:
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
        self.url = url
        self._headers = {"Content-Type": "application/json", **authorization(token)}
        self.name = name
        self.ranks = ranks
        self._deadlines = {
            "generate": timeout_seconds,
            "weights": weights_timeout_seconds,
            "control": control_timeout_seconds,
        }
        self._session: aiohttp.ClientSession | None = None
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

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def __aenter__(self) -> "EngineClient":
        return self

    async def __aexit__(self, *_) -> None:
        await self.close()

    async def generate(
        self,
        input_ids: list[list[int]],
        sampling_params: list[dict[str, Any]],
        request_ids: list[str],
        *,
        return_routed_experts: bool = False,
        routed_experts_start_len: int = 0,
    ) -> list[EngineOutput]:
        """Sample one response to each input, in one request; SGLang's own sampling parameters for each.

        A caller that is cancelled closes its connection, and the engine then drops the work.

        Args:
            return_routed_experts: ask for the experts of every input position but the last sampled token's. The server
                must have been started for it.
            routed_experts_start_len: the first position to return, of all inputs of this request.
        """
        body: dict[str, Any] = {
            "input_ids": input_ids,
            "sampling_params": sampling_params,
            "rid": request_ids,
            "return_logprob": True,
        }
        if return_routed_experts:
            body |= {"return_routed_experts": True, "routed_experts_start_len": routed_experts_start_len}
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
        except (KeyError, TypeError, ValueError) as error:
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

    async def _succeed(self, endpoint: str, body: dict[str, Any]) -> dict[str, Any]:
        answer = await self._request("POST", endpoint, body, deadline="weights")
        if not isinstance(answer, dict) or not answer.get("success"):
            raise self._nonsense(endpoint, "not successful", answer)
        return answer

    async def _request(
        self, method: str, endpoint: str, body: dict[str, Any] | None, *, deadline: str = "control", parse: bool = True
    ) -> Any:
        if self._session is None:
            # The server closes a connection that was idle for some seconds; a request sent at that moment would be lost.
            connector = aiohttp.TCPConnector(limit=0, force_close=True)
            self._session = aiohttp.ClientSession(connector=connector)
        seconds = self._deadlines[deadline]
        try:
            async with self._session.request(
                method,
                self.url + endpoint,
                data=None if body is None else msgspec.json.encode(body),
                headers=self._headers,
                timeout=aiohttp.ClientTimeout(total=seconds),
            ) as response:
                content = await response.read()
                status = response.status
        except TimeoutError as error:
            reason = f"no answer within {seconds:.0f} s (deadline of '{deadline}' requests)"
            raise EngineError(self.url, endpoint, None, reason) from error
        except aiohttp.ClientError as error:
            raise EngineError(self.url, endpoint, None, f"{type(error).__name__}: {error}") from error
        if status != 200:
            raise EngineError(self.url, endpoint, status, first_line(content))
        if not parse:
            return None
        try:
            return await _parse(content)
        except msgspec.DecodeError as error:
            raise EngineError(self.url, endpoint, status, f"not JSON: {first_line(content)}") from error

    def _nonsense(self, endpoint: str, complaint: str, answer: Any) -> EngineError:
        return EngineError(self.url, endpoint, 200, f"{complaint}: {first_line(msgspec.json.encode(answer))}")


def authorization(token: str | None) -> dict[str, str]:
    """The header of a request to a server with this token."""
    return {} if token is None else {"Authorization": f"Bearer {token}"}


LARGE_BODY = 4 * 2**20


async def _parse(content: bytes) -> Any:
    """A large body is parsed in a thread, so that other requests go on."""
    if len(content) > LARGE_BODY:
        return await asyncio.to_thread(msgspec.json.decode, content)
    return msgspec.json.decode(content)


def first_line(content: bytes) -> str:
    """The message in an error's body, or the beginning of the body."""
    with contextlib.suppress(msgspec.DecodeError):
        answer = msgspec.json.decode(content)
        if isinstance(answer, dict):
            message = answer.get("error") or answer.get("message") or answer
            message = message.get("message", message) if isinstance(message, dict) else message
            return str(message).splitlines()[0][:500] if str(message) else "no message"
    text = content.decode(errors="replace").strip()
    return text.splitlines()[0][:500] if text else "an empty answer"


def read_output(item: dict[str, Any]) -> EngineOutput:
    """One response out of the body of /generate."""
    meta = item["meta_info"]
    finish = meta["finish_reason"]
    log_probs = meta["output_token_logprobs"]
    return EngineOutput(
        request_id=meta["id"],
        token_ids=np.array(item["output_ids"], dtype=np.int32),
        log_probs=np.array([entry[0] for entry in log_probs], dtype=np.float32),
        finish_reason=finish["type"],
        finish_detail=str(finish.get("message") or ""),
        weight_spans=tuple(
            WeightSpan(span["version"], span["start"], span["end"]) for span in meta.get("weight_versions") or ()
        ),
        cached_tokens=meta.get("cached_tokens", 0),
        retractions=meta.get("num_retractions") or 0,
        finish_status=finish.get("status_code"),
        routed_experts=meta.get("routed_experts"),
    )

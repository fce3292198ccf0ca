"""HTTP to one SGLang server: every request has a deadline, and every failure says of which endpoint it is."""

import asyncio
import contextlib
from typing import Any, Self

import aiohttp
import msgspec

from megatron_vespo.errors import RunError


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


class EngineHttp:
    """Made inside or outside an event loop; used in one. Close it, or use it as a context.

    Args:
        url: of the server, without a slash at the end.
        token: what the server asks for (`EngineServer.token`).
        deadlines: seconds, by kind of request.
    """

    def __init__(self, url: str, token: str | None, deadlines: dict[str, float]) -> None:
        self.url = url
        self._headers = {"Content-Type": "application/json", **authorization(token)}
        self._deadlines = deadlines
        self._session: aiohttp.ClientSession | None = None

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_) -> None:
        await self.close()

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

"""Which prompts were drawn and are not done: what a run that goes on must draw again."""

from collections import deque
from collections.abc import Container, Iterable
from dataclasses import dataclass
from typing import Any

from megatron_vespo.data.prompt import Prompt
from megatron_vespo.data.prompts import PromptStream


@dataclass(frozen=True)
class Draw:
    number: int
    """Of the group that was started with it."""
    identity: str
    before: dict[str, Any]
    """The stream's state before it."""


class DrawnPrompts:
    """The prompt stream of a run whose groups are not finished in the order in which they were started.

    Its state is where the stream was before the oldest prompt that is not done, and the prompts behind that place that
    are: the stream is drawn again from there, and these are passed over.
    """

    def __init__(self, stream: PromptStream, done_before: Iterable[str]):
        """`done_before`: of a state that `stream` was set to."""
        self._stream = stream
        self._pass_over = set(done_before)
        self._draws: deque[Draw] = deque()

    def take(self, number: int) -> Prompt:
        """The next prompt, for group `number`."""
        while True:
            before = self._stream.state_dict()
            (prompt,) = self._stream.take(1)
            if prompt.identity not in self._pass_over:
                self._draws.append(Draw(number, prompt.identity, before))
                return prompt
            # If a prompt before it is still not done, it is to be passed over again.
            self._pass_over.remove(prompt.identity)
            self._draws.append(Draw(-1, prompt.identity, before))

    def state(self, running: Container[int]) -> tuple[dict[str, Any], list[str]]:
        """Of the stream, and the prompts to be passed over. `running`: the groups that are not done."""
        while self._draws and self._draws[0].number not in running:
            self._draws.popleft()
        not_reached = sorted(self._pass_over)
        if not self._draws:
            return self._stream.state_dict(), not_reached
        return self._draws[0].before, [d.identity for d in self._draws if d.number not in running] + not_reached

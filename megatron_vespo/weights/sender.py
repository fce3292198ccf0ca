"""The trainer's end of every transport: one bucket is filled while another one is on its way."""

import contextlib
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megatron_vespo.weights.buckets import Bucket
from megatron_vespo.weights.filling import Filling
from megatron_vespo.weights.slots import new_slot

SLOTS = 2


@dataclass(frozen=True)
class SendTimes:
    """Seconds of one sending, on the trainer's rank 0."""

    gather: float
    """Filling buckets, together with the other ranks."""
    wait: float
    """Waiting for a bucket that was still on its way: 0 where engines are faster than gathering."""


class Sender(ABC):
    """Of the trainer's rank 0.

    `send` runs in one thread and blocks; meanwhile `take` tells another which buckets are ready, and is told which ones
    engines are done with: their memory is used again.
    """

    released_by_take = True
    """False: the transport itself knows when engines have a bucket."""

    def __init__(self, buckets: Sequence[Bucket], device: torch.device) -> None:
        self.buckets = buckets
        self.device = device
        self._changed = threading.Condition()
        self._filled = self._released = 0
        self._abandoned = False
        self._failure: BaseException | None = None
        self._slots: list[torch.Tensor] = []

    def send(self, filling: Filling, weight_version: int, since: int | None) -> SendTimes:
        """Bring all weights on their way, bucket by bucket; returns once every bucket was released, or after `abandon`.

        Args:
            since: the weight version that all engines hold; None: it is not known.

        Raises:
            ValueError: the tensors are not those of the plan.
        """
        self._failure, complete = None, False
        waited, started, largest = 0.0, time.monotonic(), max(bucket.num_bytes for bucket in self.buckets)
        try:
            self._slots = slots = self._slots or [new_slot(largest, self.device) for _ in range(SLOTS)]
            filling.begin(slots)
            for index, bucket in enumerate(self.buckets):
                waiting = time.monotonic()
                if not self._wait(lambda index=index: self._released > index - SLOTS):
                    break
                waited += time.monotonic() - waiting
                filling.fill(index, bucket, slots)
                self._settle_device()
                self.publish(index, slots[index % SLOTS][: bucket.num_bytes], weight_version, since)
                self._set(filled=index + 1)
            else:
                complete = True
            gathered = time.monotonic()
        except BaseException as error:
            self._set(failure=error)
            raise
        finally:
            filling.finish(complete)
        self._wait(lambda: self._released == len(self.buckets))
        if self.device.type == "cuda":  # elsewhere the first use of memory costs as much as filling it
            self._slots = []
        with self._changed:  # now, for `take` may be called before the next sending begins
            self._filled = self._released = 0
            self.forget_sent()
        return SendTimes(gathered - started - waited, waited)

    def take(self, index: int, copies: int, released: int) -> Any:
        """Wait until bucket `index` is ready; returns what engines are told of it (`describe`), None for no bucket.

        The index behind the last only tells what was released.

        Args:
            copies: how many processes will open it.
            released: so many buckets from the first were loaded by all engines.

        Raises:
            RuntimeError: sending failed or was abandoned.
        """
        if self.released_by_take:
            self._set(released=released)
        if index == len(self.buckets):
            return None
        if not self._wait(lambda: self._filled > index):
            raise RuntimeError("the weight sync was abandoned")
        return self.describe(index, copies)

    def abandon(self) -> None:
        """Let `send` return soon, whatever engines do. This sender can only be closed then."""
        self._abandoned = True
        self._set()

    def forget_sent(self) -> None:
        """A sending ended: what a transport counts of it counts from 0 again. Called while the lock is held."""
        return

    @abstractmethod
    def publish(self, index: int, slot: torch.Tensor, weight_version: int, since: int | None) -> None:
        """`slot` holds bucket `index`, and stays as it is until that bucket is released."""

    @abstractmethod
    def describe(self, index: int, copies: int) -> Any:
        """What engines need to know to load bucket `index`; a plain value. None: nothing of it has to be loaded."""

    @abstractmethod
    def close(self) -> None:
        """Let go of connections and files. Does not wait for engines."""

    def _wait(self, condition) -> bool:
        """Until `condition`; False if sending was abandoned first. Raises RuntimeError if it failed."""
        with self._changed:
            self._changed.wait_for(lambda: condition() or self._abandoned or self._failure is not None)
            if self._failure is not None:
                raise RuntimeError(f"sending weights failed: {self._failure}") from self._failure
            return not self._abandoned

    def _set(
        self, filled: int | None = None, released: int | None = None, failure: BaseException | None = None
    ) -> None:
        with self._changed:
            self._filled = self._filled if filled is None else filled
            self._released = self._released if released is None else max(released, self._released)
            self._failure = self._failure or failure
            self._changed.notify_all()

    def _settle_device(self) -> None:
        """What other threads and processes read next has to be there."""
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()


@contextlib.contextmanager
def stream_of_its_own(device: torch.device) -> Iterator[None]:
    """Inside, this thread's work on a GPU does not wait for what others do there; done when the context ends."""
    if device.type != "cuda":
        yield
        return
    with torch.cuda.device(device):
        stream = torch.cuda.Stream(device)
        with torch.cuda.stream(stream):
            yield
        stream.synchronize()

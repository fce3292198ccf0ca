"""Writes large files past the page cache, where the file system can.

Through the cache a file is copied once more, into pages that are claimed one by one and then wait for the disk: that took
three times as long on the disk where it was measured (docs/checkpoints.md).
"""

import errno
import fcntl
import mmap
import os
from pathlib import Path
from types import TracebackType

BLOCK_BYTES = 8 * 1024**2
"""A multiple of every disk's block; the unit of writing."""


class DirectFile:
    """A new file, written from its beginning to its end. Closing it without an error waits until the disk has it."""

    def __init__(self, path: Path):
        self._file = _open(path)
        self._block = mmap.mmap(-1, BLOCK_BYTES)  # aligned to pages, as direct writes want it
        self._filled = 0
        self._written = 0

    def tell(self) -> int:
        return self._written + self._filled

    def write(self, data: memoryview | bytes) -> int:
        """Raises OSError if the file system refuses."""
        rest = memoryview(data).cast("B")
        while rest:
            count = min(len(rest), BLOCK_BYTES - self._filled)
            self._block[self._filled : self._filled + count] = rest[:count]
            self._filled += count
            rest = rest[count:]
            if self._filled == BLOCK_BYTES:
                self._write_block()
        return len(data)

    def flush(self) -> None:
        """`torch.save` calls it after each tensor; whole blocks are written as they fill."""

    def _write_block(self) -> None:
        with memoryview(self._block) as block:
            done = 0
            while done < self._filled:
                try:
                    count = os.write(self._file, block[done : self._filled])
                except OSError as error:
                    if error.errno != errno.EINVAL or not self._is_direct:
                        raise
                    count = 0  # not on this file system after all
                done += count
                if done < self._filled:  # the rest may begin or end within a disk's block
                    self._go_through_the_cache()
        self._written += self._filled
        self._filled = 0

    def _go_through_the_cache(self) -> None:
        fcntl.fcntl(self._file, fcntl.F_SETFL, fcntl.fcntl(self._file, fcntl.F_GETFL) & ~os.O_DIRECT)

    @property
    def _is_direct(self) -> bool:
        return bool(fcntl.fcntl(self._file, fcntl.F_GETFL) & os.O_DIRECT)

    def __enter__(self) -> "DirectFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._go_through_the_cache()  # the end is no whole block
                self._write_block()
                os.fsync(self._file)
        finally:
            os.close(self._file)


def _open(path: Path) -> int:
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    try:
        return os.open(path, flags | os.O_DIRECT, 0o666)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return os.open(path, flags, 0o666)

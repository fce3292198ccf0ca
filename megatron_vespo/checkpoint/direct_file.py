"""Reads and writes large files past the page cache, where the file system can.

Through the cache each byte is copied once more, into pages that are claimed one by one: that took most of a conversion's
time where it was measured, and threw out of memory what other programs had read.
"""

import errno
import fcntl
import mmap
import os
from pathlib import Path
from types import TracebackType

BLOCK_BYTES = 8 * 1024**2
"""The unit of reading and writing."""
ALIGNMENT = 4096
"""A multiple of every disk's block: where a direct read or write may begin."""


class DirectReader:
    """Reads parts of files. Keeps them open until it is closed; needs one block of memory."""

    def __init__(self) -> None:
        self._files: dict[Path, int] = {}
        self._block = memoryview(mmap.mmap(-1, BLOCK_BYTES))  # aligned to pages, as direct reads want it

    def read_into(self, path: Path, start: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes from `start` on. Raises EOFError if there are not so many, OSError."""
        if path not in self._files:
            self._files[path] = _open(path, os.O_RDONLY)
        done = 0
        while done < len(buffer):
            skipped = (start + done) % ALIGNMENT
            wanted = min(-(-(skipped + len(buffer) - done) // ALIGNMENT) * ALIGNMENT, BLOCK_BYTES)
            found = self._read(self._files[path], start + done - skipped, wanted) - skipped
            if found <= 0:
                raise EOFError(f"{start + len(buffer)} bytes expected, {start + done} found")
            count = min(found, len(buffer) - done)
            buffer[done : done + count] = self._block[skipped : skipped + count]
            done += count

    def _read(self, file: int, start: int, count: int) -> int:
        try:
            return os.preadv(file, [self._block[:count]], start)
        except OSError as error:
            if error.errno != errno.EINVAL or not _is_direct(file):
                raise
            _go_through_the_cache(file)  # not on this file system after all
            return os.preadv(file, [self._block[:count]], start)

    def __enter__(self) -> "DirectReader":
        return self

    def __exit__(self, *exception: object) -> None:
        for file in self._files.values():
            os.close(file)
        self._files.clear()


class DirectWriter:
    """A new file, written from its beginning to its end. Closing it without an error waits until the disk has it."""

    def __init__(self, path: Path):
        self._file = _open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
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
                    if error.errno != errno.EINVAL or not _is_direct(self._file):
                        raise
                    count = 0  # not on this file system after all
                done += count
                if done < self._filled:  # the rest may begin or end within a disk's block
                    _go_through_the_cache(self._file)
        self._written += self._filled
        self._filled = 0

    def __enter__(self) -> "DirectWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                _go_through_the_cache(self._file)  # the end is no whole block
                self._write_block()
                os.fsync(self._file)
        finally:
            os.close(self._file)


def _open(path: Path, flags: int) -> int:
    try:
        return os.open(path, flags | os.O_DIRECT, 0o666)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return os.open(path, flags, 0o666)


def _is_direct(file: int) -> bool:
    return bool(fcntl.fcntl(file, fcntl.F_GETFL) & os.O_DIRECT)


def _go_through_the_cache(file: int) -> None:
    fcntl.fcntl(file, fcntl.F_SETFL, fcntl.fcntl(file, fcntl.F_GETFL) & ~os.O_DIRECT)

"""How a conversion runs: file by file, resumable, into a hidden folder that gets the output's name once it is complete.

    .OUT.incomplete/data    becomes OUT
    .OUT.incomplete/state   plan.json (what is converted, how), and a part for each finished file: what it holds

A file is finished when it is on the disk under its name and its part is too. A run that finds the same plan goes on with
the files that are not.
"""

import fcntl
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError

from megatron_vespo.checkpoint.manifest import TensorRecord, read_plan, write_manifest
from megatron_vespo.checkpoint.mapping import Place
from megatron_vespo.checkpoint.output_folder import give_name, require_replaceable, require_room
from megatron_vespo.conversion.progress import Bar
from megatron_vespo.conversion.workers import Advance, Ranks, run_tasks
from megatron_vespo.errors import ConfigError, RunError

MOST_PROCESSES = 8
BYTES_THAT_PAY = 256 * 1024**2
"""A process starts in the time in which one converts about this much."""
SPARE_BYTES, SPARE_SHARE = 4 * 1024**2, 0.01
"""Room for what stands beside the tensors: so many bytes, and this share of theirs."""


@dataclass(frozen=True)
class OutputFile:
    name: str
    places: tuple[Place, ...]
    nbytes: int
    """Of the tensors in it."""


@dataclass
class Part:
    """What one finished file holds, and of which tensors it was made."""

    file: str
    size: int = 0
    source: list[TensorRecord] = field(default_factory=list)
    target: list[TensorRecord] = field(default_factory=list)
    spans: list[tuple[int, int]] = field(default_factory=list)
    """Of a torch_dist file: (first byte, length) of each of `target`."""
    not_finite: list[str] = field(default_factory=list)
    """Source tensors with NaN or Inf, as they are or once cast."""

    @staticmethod
    def read(path: Path) -> "Part":
        values = json.loads(path.read_text(encoding="utf-8"))
        for side in ("source", "target"):
            values[side] = [_record(record) for record in values[side]]
        return Part(**values | {"spans": [tuple(span) for span in values["spans"]]})


def _record(values: dict[str, Any]) -> TensorRecord:
    offset = values["offset"]
    return TensorRecord(
        **values | {"shape": tuple(values["shape"]), "offset": None if offset is None else tuple(offset)}
    )


class Conversion(Protocol):
    """One direction. Workers get it pickled."""

    marker: str
    """A file that is in every output of this direction."""

    @property
    def source(self) -> Path: ...

    def output_files(self) -> Sequence[OutputFile]:
        """Raises ConfigError: lists all that is wrong with the source and can be told without reading its tensors."""
        ...

    def plan(self) -> dict[str, Any]:
        """Everything that decides what is written, as JSON."""
        ...

    def write(self, file: OutputFile, path: Path, advance: Advance) -> Part: ...

    def finish(self, folder: Path, parts: Sequence[Part]) -> None:
        """Write what stands beside the files."""
        ...

    def verifier(self, folder: Path) -> Callable[[OutputFile, Advance], list[str]]:
        """Gives the names of a written file's tensors that are not the source's, bit for bit."""
        ...


@dataclass(frozen=True)
class RunSettings:
    processes: int | None = None
    """Of this machine; None takes as many as pay, or one for each of torchrun's ranks."""
    strict: bool = False
    """NaN or Inf is an error."""
    verify_bytes: bool = False
    overwrite: bool = False


def convert(conversion: Conversion, target: Path, settings: RunSettings, ranks: Ranks) -> None:
    """Write `target`. Every rank calls it.

    Raises:
        ConfigError: the source is damaged, or `target` can't be written. Nothing of it is left.
    """
    with _reported(target):
        if ranks.on_first(lambda: _finished_before(conversion, target)):
            return
        workshop = target.parent / f".{target.name}.incomplete"
        with _lock(workshop, conversion, target, settings, ranks):
            try:
                _convert(conversion, target, workshop, settings, ranks)
            except Exception:  # a kill or Ctrl-C leaves what is done, for the next run
                if ranks.rank == 0:
                    shutil.rmtree(workshop, ignore_errors=True)
                raise


@contextmanager
def _reported(target: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{target}: can't be written: {error}") from error


def _finished_before(conversion: Conversion, target: Path) -> bool:
    """Whether a run that was killed had given the output its name already, and only left its workshop behind."""
    workshop = target.parent / f".{target.name}.incomplete"
    if not (workshop / "state").is_dir() or (workshop / "data").exists() or read_plan(target) != conversion.plan():
        return False
    shutil.rmtree(workshop)
    return True


@contextmanager
def _lock(workshop: Path, conversion: Conversion, target: Path, settings: RunSettings, ranks: Ranks) -> Iterator[None]:
    """Rank 0 makes or takes over the workshop, and holds it against other runs until it is done or dead."""
    locks: list[int] = []

    def prepare() -> None:
        require_replaceable(target, conversion.source, conversion.marker, settings.overwrite)
        (workshop / "state").mkdir(parents=True, exist_ok=True)
        locks.append(os.open(workshop / "state", os.O_RDONLY))
        try:
            fcntl.flock(locks[0], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"{target}: another conversion is writing it ({workshop})") from None

    try:
        ranks.on_first(prepare)
        yield
    finally:
        for lock in locks:
            os.close(lock)


def _convert(conversion: Conversion, target: Path, workshop: Path, settings: RunSettings, ranks: Ranks) -> None:
    data, state = workshop / "data", workshop / "state"
    processes = settings.processes or _processes_that_pay(conversion, ranks)
    todo = ranks.on_first(lambda: _resume_or_begin(conversion, target, data, state))
    mine = ranks.share([file for file in conversion.output_files() if file.name in todo])
    with Bar("writing", sum(file.nbytes for file in mine), shown=ranks.rank == 0) as bar:
        writer = _FileWriter(conversion, data, state, settings.strict)
        ranks.together(lambda: run_tasks(writer, mine, processes=processes, progress=bar.advance))
    ranks.on_first(lambda: _finish(conversion, data, state, settings.strict))
    if settings.verify_bytes:
        _verify(conversion, data, processes, ranks)
    ranks.on_first(lambda: _publish(target, workshop))


def _processes_that_pay(conversion: Conversion, ranks: Ranks) -> int:
    if ranks.size > 1:
        return 1
    work = sum(file.nbytes for file in conversion.output_files())
    return min(MOST_PROCESSES, len(os.sched_getaffinity(0)), max(1, work // BYTES_THAT_PAY))


def _resume_or_begin(conversion: Conversion, target: Path, data: Path, state: Path) -> set[str]:
    """Names of the files that are still to be written."""
    plan = conversion.plan()
    names = {file.name for file in conversion.output_files()}
    if (state / "plan.json").exists():
        if data.is_dir() and json.loads((state / "plan.json").read_text(encoding="utf-8")) == plan:
            finished = {name for name in names if _is_finished(name, data, state)}
            print(f"resuming: {len(finished)} of {len(names)} files are finished", file=sys.stderr)
            return names - finished
        print("an unfinished conversion of another source, or with other options, is discarded", file=sys.stderr)
    for path in state.iterdir():
        path.unlink()
    shutil.rmtree(data, ignore_errors=True)
    tensor_bytes = sum(file.nbytes for file in conversion.output_files())
    require_room(target, int(tensor_bytes * (1 + SPARE_SHARE)) + SPARE_BYTES)
    data.mkdir()
    _write_durably(state / "plan.json", json.dumps(plan))
    return names


def _part_of(name: str, state: Path) -> Path:
    return state / f"{name}.json"


def _is_finished(name: str, data: Path, state: Path) -> bool:
    part, written = _part_of(name, state), data / name
    return part.exists() and written.exists() and written.stat().st_size == Part.read(part).size


@dataclass(frozen=True)
class _FileWriter:
    conversion: Conversion
    data: Path
    state: Path
    strict: bool

    def __call__(self, file: OutputFile, advance: Advance) -> None:
        """The part is written last, and after the file has reached the disk: it vouches for it."""
        with _reported(self.data / file.name):
            coming = self.data / f"{file.name}.{os.getpid()}.coming"
            part = self.conversion.write(file, coming, advance)
            if self.strict and part.not_finite:
                raise ConfigError(not_finite_message(part.not_finite))
            coming.replace(self.data / file.name)
            _write_durably(_part_of(file.name, self.state), json.dumps(asdict(part)))


def _write_durably(path: Path, content: str) -> None:
    coming = path.with_name(f"{path.name}.{os.getpid()}.coming")
    with coming.open("w", encoding="utf-8") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    coming.replace(path)


def not_finite_message(names: Sequence[str]) -> str:
    listed = "\n".join(f"  {name}" for name in names)
    return f"{len(names)} tensor{'s hold' if len(names) > 1 else ' holds'} NaN or Inf\n{listed}"


def _finish(conversion: Conversion, data: Path, state: Path, strict: bool) -> None:
    parts = [Part.read(_part_of(file.name, state)) for file in conversion.output_files()]
    if names := [name for part in parts for name in part.not_finite]:
        if strict:  # in files that a run without it had finished
            raise ConfigError(not_finite_message(names))
        print(f"warning: {not_finite_message(names)}", file=sys.stderr)
    for path in data.glob("*.coming"):  # of a run that was killed
        path.unlink()
    conversion.finish(data, parts)
    source = [record for part in parts for record in part.source]
    write_manifest(data, conversion.plan(), source, [record for part in parts for record in part.target])
    for path in data.rglob("*"):
        if path.is_file():
            _sync(path)


def _sync(path: Path) -> None:
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def _verify(conversion: Conversion, data: Path, processes: int, ranks: Ranks) -> None:
    mine = ranks.share(conversion.output_files())
    with Bar("verifying", sum(file.nbytes for file in mine), shown=ranks.rank == 0) as bar:
        verifier = conversion.verifier(data)
        found = ranks.together(lambda: run_tasks(verifier, mine, processes=processes, progress=bar.advance))
    if different := [name for rank in found for names in rank for name in names]:
        listed = "\n".join(f"  {name}" for name in different)
        raise RunError(f"{conversion.source}: {len(different)} tensors do not come back bit for bit\n{listed}")


def _publish(target: Path, workshop: Path) -> None:
    give_name(workshop / "data", target)
    shutil.rmtree(workshop)

"""Killed at any moment, a conversion leaves nothing that is taken for complete, and a rerun finishes it."""

import fcntl
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from conversion_folders import TINY_BASE, assert_bitwise_equal, tensors_of
from safetensors.torch import save_file
from tiny_models import write_tiny_model

from megatron_vespo.config import ConfigError
from megatron_vespo.conversion.commands import hf_to_megatron, megatron_to_hf

KILLS = 20
SMALL = 20_000
TOOL = TINY_BASE.parents[1] / "tools" / "convert_hf_to_megatron.py"


@pytest.fixture
def hf(tmp_path) -> Path:
    write_tiny_model(tmp_path / "hf", kind="mixed")
    return tmp_path / "hf"


def there(source: Path, target: Path) -> None:
    hf_to_megatron(source, target, tp=2, ep=2, file_bytes=SMALL)


def back(source: Path, target: Path) -> None:
    megatron_to_hf(source, target, file_bytes=SMALL)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def killed_after(seconds: float, work: Callable[[], None]) -> None:
    """`work` in a process of its own, ended by SIGKILL unless it is done before."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


@pytest.mark.parametrize("direction", ["there", "back"])
def test_a_rerun_succeeds_after_a_kill_at_any_moment(hf, tmp_path, direction):
    source, convert = hf, there
    if direction == "back":
        there(hf, tmp_path / "megatron")
        source, convert = tmp_path / "megatron", back
    begin = time.monotonic()
    convert(source, tmp_path / "reference")
    duration = time.monotonic() - begin
    reference = contents(tmp_path / "reference")
    moments = random.Random(0)
    resumed = 0
    for number in range(3 * KILLS):
        if number >= KILLS and resumed > KILLS // 4:  # a busy machine may need more: moments are of an idle one's time
            break
        target = tmp_path / f"out-{number}"
        workshop = tmp_path / f".out-{number}.incomplete"
        killed_after(moments.uniform(0, duration), lambda target=target: convert(source, target))
        resumed += any((workshop / "state").glob("*.distcp.json")) or any(
            (workshop / "state").glob("*.safetensors.json")
        )
        if target.exists():
            assert contents(target) == reference
        if not target.exists() or workshop.exists():
            convert(source, target)
        assert contents(target) == reference
        assert not workshop.exists()
    assert resumed > KILLS // 4  # the moments lie in the conversion, not before it


def test_a_kill_between_renaming_and_cleaning_up_is_completed(hf, tmp_path):
    there(hf, tmp_path / "out")
    (tmp_path / ".out.incomplete" / "state").mkdir(parents=True)
    there(hf, tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["hf", "out"]


def interrupted(source: Path, target: Path) -> Path:
    """The workshop of a conversion that was killed with some of its files finished."""
    workshop = target.parent / f".{target.name}.incomplete"
    for attempt in range(1, 50):
        killed_after(0.02 * attempt, lambda: there(source, target))
        if not target.exists() and any((workshop / "state").glob("*.distcp.json")):
            return workshop
    raise AssertionError("the conversion was never caught in the middle")


def test_finished_files_are_not_written_again(hf, tmp_path):
    workshop = interrupted(hf, tmp_path / "out")
    finished = [path.name.removesuffix(".json") for path in (workshop / "state").glob("*.distcp.json")]
    times = {name: (workshop / "data" / name).stat().st_mtime_ns for name in finished}
    there(hf, tmp_path / "out")
    assert {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in finished} == times


@pytest.mark.parametrize("change", ["source", "options"])
def test_what_another_source_or_other_options_left_is_discarded(hf, tmp_path, change):
    interrupted(hf, tmp_path / "out")
    if change == "source":
        write_tiny_model(hf, kind="mixed", seed=1)
    hf_to_megatron(hf, tmp_path / "out", tp=2, ep=2, dtype="bfloat16", file_bytes=SMALL)
    megatron_to_hf(tmp_path / "out", tmp_path / "back")
    expected = {name: tensor.to(torch.bfloat16) for name, tensor in tensors_of(hf).items()}
    assert_bitwise_equal(tensors_of(tmp_path / "back"), expected)


def test_a_finished_file_that_was_cut_off_is_written_again(hf, tmp_path):
    workshop = interrupted(hf, tmp_path / "out")
    name = next((workshop / "state").glob("*.distcp.json")).name.removesuffix(".json")
    os.truncate(workshop / "data" / name, 1000)
    there(hf, tmp_path / "out")
    back(tmp_path / "out", tmp_path / "back")
    assert_bitwise_equal(tensors_of(tmp_path / "back"), tensors_of(hf))


def test_strictness_holds_for_files_that_a_lenient_run_finished(hf, tmp_path):
    tensors = tensors_of(hf)
    for tensor in tensors.values():
        tensor.view(-1)[0] = float("nan")
    save_file(tensors, hf / "model.safetensors", metadata={"format": "pt"})
    workshop = interrupted(hf, tmp_path / "out")
    for path in (workshop / "state").glob("*.distcp.json"):  # as if all had been finished
        assert json.loads(path.read_text())["not_finite"]
    with pytest.raises(ConfigError, match="NaN or Inf"):
        hf_to_megatron(hf, tmp_path / "out", tp=2, ep=2, file_bytes=SMALL, strict=True)
    assert os.listdir(tmp_path) == ["hf"]


def test_two_conversions_of_one_output_do_not_meet(hf, tmp_path):
    workshop = interrupted(hf, tmp_path / "out")
    other = os.open(workshop / "state", os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    with pytest.raises(ConfigError, match="another conversion is writing it"):
        there(hf, tmp_path / "out")
    os.close(other)
    there(hf, tmp_path / "out")


@pytest.mark.slow
def test_worker_processes_die_with_their_parent(tmp_path):
    command = [
        sys.executable,
        TOOL,
        "--hf",
        TINY_BASE,
        "--out",
        tmp_path / "out",
        "--workers",
        "2",
        "--file-mb",
        "0.02",
    ]
    process = subprocess.Popen(command)
    deadline = time.monotonic() + 120
    children: list[psutil.Process] = []
    while len(children) < 2 and process.poll() is None and time.monotonic() < deadline:
        children = [
            child for child in psutil.Process(process.pid).children() if "spawn_main" in "".join(child.cmdline())
        ]
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert len(children) == 2
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

"""An export that cannot be finished leaves nothing under its name or beside it, and says why."""

import errno
import os
import resource
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import write_tiny_model

from megatron_vespo.architecture.hf_config import Architecture
from megatron_vespo.checkpoint.check import check_folder
from megatron_vespo.checkpoint.export import write_hf_folder
from megatron_vespo.checkpoint.shards import plan_shards
from megatron_vespo.checkpoint.tables import table_of
from megatron_vespo.config import ConfigError


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    write_tiny_model(folder)
    return folder


def tensors_in_order(source: Path) -> tuple[list[tuple[str, torch.Tensor]], Architecture]:
    architecture = check_folder(source)
    stored = load_file(source / "model.safetensors")
    return [(name, stored[name]) for name in table_of(architecture).hf_shapes(architecture)], architecture


def write(source: Path, target: Path, tensors=None, **options) -> None:
    given, architecture = tensors_in_order(source)
    write_hf_folder(given if tensors is None else tensors, architecture, source, target, dtype=torch.float32, **options)


def refusal(source: Path, target: Path, tensors=None, **options) -> str:
    with pytest.raises(ConfigError) as caught:
        write(source, target, tensors, **options)
    assert str(target) in str(caught.value)
    return str(caught.value)


def test_existing_target_is_refused_and_replaced_only_when_told(source, tmp_path):
    target = tmp_path / "out"
    write(source, target)
    (target / "stale").write_text("from before")
    assert "exists already" in refusal(source, target)
    assert (target / "stale").exists()
    write(source, target, overwrite=True)
    assert not (target / "stale").exists()
    assert os.listdir(tmp_path) == ["out"]
    check_folder(target)


def test_overwriting_spares_what_is_no_model_and_the_source(source, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "only_copy.tex").write_text("")
    assert "is not a model folder" in refusal(source, tmp_path / "thesis", overwrite=True)
    assert (tmp_path / "thesis" / "only_copy.tex").exists()
    copy = shutil.copytree(source, tmp_path / "copy")
    assert "is the source" in refusal(copy, copy, overwrite=True)


def test_full_disk_is_seen_before_writing(source, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    assert "not enough disk space" in refusal(source, tmp_path / "out")
    assert os.listdir(tmp_path) == []


def test_failure_in_the_middle_leaves_nothing(source, tmp_path):
    """A real refusal by the operating system: files may not grow beyond 30 kB, the last tensors' shard does."""
    tensors, _ = tensors_in_order(source)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, limits[1]))
    try:
        message = refusal(source, tmp_path / "out", tensors, shard_bytes=40_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.strerror(errno.EFBIG) in message
    assert os.listdir(tmp_path) == []


def test_missing_permission_is_told(source):
    tensors, architecture = tensors_in_order(source)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        readable = shutil.copytree(source, folder / "source")
        (folder / "locked").mkdir(mode=0o555)
        with as_nobody_if_root(folder):
            with pytest.raises(ConfigError, match=r"locked/out: the model can't be written: .*Permission denied"):
                write_hf_folder(tensors, architecture, readable, folder / "locked" / "out", dtype=torch.float32)
            assert os.listdir(folder / "locked") == []
            readable.chmod(0)
            with pytest.raises(ConfigError, match=r"config\.json: can't be read: .*Permission denied"):
                check_folder(readable)
            readable.chmod(0o755)


@contextmanager
def as_nobody_if_root(folder: Path) -> Iterator[None]:
    """root may read and write anywhere: give the folder to nobody and become nobody for a while."""
    root = os.geteuid() == 0
    if root:
        for path in (folder, *folder.rglob("*")):
            os.chown(path, 65534, 65534)
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


def test_leftovers_of_a_killed_export_are_replaced(source, tmp_path):
    partial = tmp_path / ".out.incomplete"
    partial.mkdir()
    (partial / "model.safetensors").write_bytes(b"half")
    write(source, tmp_path / "out")
    assert os.listdir(tmp_path) == ["out"]
    check_folder(tmp_path / "out")


@pytest.mark.parametrize("fault", ["one less", "one more", "swapped", "reshaped"])
def test_wrong_tensors_are_never_written(source, tmp_path, fault):
    tensors, _ = tensors_in_order(source)
    name, tensor = tensors[5]
    wrong = {
        "one less": tensors[:-1],
        "one more": [*tensors, ("surplus", torch.zeros(1))],
        "swapped": [*tensors[:5], tensors[6], tensors[5], *tensors[7:]],
        "reshaped": [*tensors[:5], (name, tensor[:-1]), *tensors[6:]],
    }[fault]
    with pytest.raises(RuntimeError):
        write(source, tmp_path / "out", wrong)
    assert os.listdir(tmp_path) == []


def test_shards_keep_their_order_and_their_limit():
    sizes = {"a": 4, "b": 4, "c": 3, "d": 20, "e": 1, "f": 9, "g": 1}
    assert plan_shards(sizes, 10) == [["a", "b"], ["c"], ["d"], ["e", "f"], ["g"]]

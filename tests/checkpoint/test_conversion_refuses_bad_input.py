"""Whatever is wrong with a source or an output is said in one clear message, with exit code 2 and nothing left behind."""

import errno
import json
import os
import pickle
import resource
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from conversion_folders import reshard, tensors_of
from safetensors.torch import load_file, save_file
from test_export_is_complete_or_absent import as_nobody_if_root
from tiny_models import write_tiny_model

from megatron_vespo.cli import exit_code
from megatron_vespo.config import ConfigError
from megatron_vespo.conversion.commands import hf_to_megatron, megatron_to_hf

NORM = "model.layers.1.input_layernorm.weight"
SMALL = 20_000


@pytest.fixture
def hf(tmp_path) -> Path:
    write_tiny_model(tmp_path / "hf", kind="mixed")
    return tmp_path / "hf"


@pytest.fixture
def sharded(hf) -> Path:
    reshard(hf, 7)
    return hf


@pytest.fixture
def megatron(hf, tmp_path) -> Path:
    hf_to_megatron(hf, tmp_path / "megatron", tp=2, ep=2, file_bytes=SMALL)
    return tmp_path / "megatron"


def refusal(convert: Callable[..., None], source: Path, target: Path | None = None, **options) -> str:
    """The message, once nothing is left of the output."""
    target = target or source.parent / "out"
    before = {path for path in source.parent.rglob("*") if path != target}
    with pytest.raises(ConfigError) as caught:
        convert(source, target, **options)
    assert {path for path in source.parent.rglob("*") if path != target} == before
    return str(caught.value)


def change_tensors(folder: Path, **changes: torch.Tensor) -> None:
    tensors = load_file(folder / "model.safetensors") | changes
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_exit_code_of_a_refusal_is_2(hf, capsys):
    shutil.rmtree(hf)
    assert exit_code(lambda: hf_to_megatron(hf, hf.parent / "out")) == 2
    assert f"error: {hf}: no such folder" in capsys.readouterr().err


def test_truncated_and_missing_shards_and_a_wrong_index_are_all_listed(sharded):
    files = sorted(sharded.glob("*.safetensors"))
    files[0].unlink()
    files[1].write_bytes(files[1].read_bytes()[:-100])
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.norm.weight"] = files[3].name
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    message = refusal(hf_to_megatron, sharded)
    assert f"{files[0].name}: missing" in message
    assert f"{files[1].name}: truncated or damaged" in message
    assert f"{files[3].name}: does not hold model.norm.weight" in message


def test_a_config_that_contradicts_the_tensors(hf):
    config = json.loads((hf / "config.json").read_text())
    (hf / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2, "moe_intermediate_size": 25}))
    message = refusal(hf_to_megatron, hf)
    assert "model.layers.2.self_attn.q_proj.weight: extra" in message
    assert "model.layers.1.mlp.experts.0.up_proj.weight: has shape [24, 32], expected [25, 32]" in message


def test_a_layout_that_does_not_fit(hf):
    assert "tp (4) does not divide the model's 6 attention heads" in refusal(hf_to_megatron, hf, tp=4)


def test_mixed_dtypes_within_one_of_megatrons_tensors(hf):
    change_tensors(hf, **{"model.layers.1.mlp.experts.2.up_proj.weight": torch.zeros(24, 32, dtype=torch.bfloat16)})
    message = refusal(hf_to_megatron, hf)
    assert "decoder.layers.1.mlp.experts.experts.linear_fc1.weight: BF16, F32" in message
    assert "--dtype" in message
    hf_to_megatron(hf, hf.parent / "out", dtype="float32")


def test_a_tied_output_layer_that_is_another(tmp_path):
    write_tiny_model(tmp_path / "hf", tied=True)
    change_tensors(tmp_path / "hf", **{"lm_head.weight": torch.zeros(131, 32)})
    assert "lm_head.weight differs from model.embed_tokens.weight" in refusal(hf_to_megatron, tmp_path / "hf")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_told_and_kept_or_refused(hf, capsys, value):
    tensor = load_file(hf / "model.safetensors")[NORM]
    tensor[3] = value
    change_tensors(hf, **{NORM: tensor})
    assert f"1 tensor holds NaN or Inf\n  {NORM}" in refusal(hf_to_megatron, hf, strict=True)
    hf_to_megatron(hf, hf.parent / "there")
    assert f"warning: 1 tensor holds NaN or Inf\n  {NORM}" in capsys.readouterr().err
    assert NORM in refusal(megatron_to_hf, hf.parent / "there", strict=True)
    megatron_to_hf(hf.parent / "there", hf.parent / "back")
    assert torch.equal(tensors_of(hf.parent / "back")[NORM].view(torch.uint8), tensor.view(torch.uint8))


def test_values_that_a_cast_makes_infinite(hf):
    change_tensors(hf, **{NORM: torch.full((32,), 1e6)})
    hf_to_megatron(hf, hf.parent / "there", strict=True)
    assert NORM in refusal(hf_to_megatron, hf, strict=True, dtype="float16")


def test_output_that_exists_stays(hf):
    (hf.parent / "out").mkdir()
    (hf.parent / "out" / "precious").write_text("")
    assert "out: exists already" in refusal(hf_to_megatron, hf)
    assert "is not a model folder" in refusal(hf_to_megatron, hf, overwrite=True)
    assert (hf.parent / "out" / "precious").exists()


def test_overwriting_replaces_only_by_what_is_complete(hf):
    out = hf.parent / "out"
    hf_to_megatron(hf, out)
    before = (out / "manifest.json").read_bytes()
    change_tensors(hf, **{NORM: torch.full((32,), torch.nan)})
    with pytest.raises(ConfigError):
        hf_to_megatron(hf, out, overwrite=True, strict=True)
    assert (out / "manifest.json").read_bytes() == before
    hf_to_megatron(hf, out, overwrite=True)
    assert (out / "manifest.json").read_bytes() != before
    assert sorted(os.listdir(hf.parent)) == ["hf", "out"]


@pytest.mark.parametrize("direction", ["there", "back"])
def test_a_disk_that_is_full_before_and_in_between(hf, megatron, direction, monkeypatch):
    convert, source = {"there": (hf_to_megatron, hf), "back": (megatron_to_hf, megatron)}[direction]
    with monkeypatch.context() as patch:
        usage = shutil.disk_usage(hf)
        patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
        assert "not enough disk space" in refusal(convert, source)
    for processes in (1, 2):  # a real refusal by the operating system: files may not grow beyond 30 kB
        with largest_file(30_000):
            assert os.strerror(errno.EFBIG) in refusal(convert, source, file_bytes=40_000, processes=processes)


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_no_permission_to_write_or_read(hf):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = shutil.copytree(hf, folder / "source")
        (folder / "locked").mkdir(mode=0o555)
        with as_nobody_if_root(folder):
            assert "Permission denied" in refusal(hf_to_megatron, source, folder / "locked" / "out")
            (source / "model.safetensors").chmod(0)
            assert "Permission denied" in refusal(hf_to_megatron, source)
            (source / "model.safetensors").chmod(0o644)


def test_what_is_no_checkpoint(hf):
    assert "no metadata.json in this folder" in refusal(megatron_to_hf, hf, config_folder=hf)
    assert "no hf/config.json inside" in refusal(megatron_to_hf, hf)


def test_missing_and_misshaped_tensors_of_a_checkpoint_are_all_listed(hf, megatron):
    config = json.loads((hf / "config.json").read_text())
    (hf / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 4, "head_dim": 8}))
    message = refusal(megatron_to_hf, megatron, config_folder=hf)
    assert "decoder.layers.3.mlp.router.weight: missing, expected shape [4, 32]" in message
    assert "decoder.layers.0.self_attention.linear_proj.weight: has shape [32, 96], expected [32, 48]" in message


def test_extra_tensors_of_a_checkpoint(hf, megatron):
    config = json.loads((hf / "config.json").read_text())
    (hf / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    message = refusal(megatron_to_hf, megatron, config_folder=hf)
    assert "decoder.layers.2.mlp.router.weight: extra, shape [4, 32]" in message


def test_missing_truncated_and_damaged_files_of_a_checkpoint(megatron):
    first, second, third = sorted(megatron.glob("__[01]_*.distcp"), key=lambda path: path.stat().st_size)[-3:]
    content = third.read_bytes()
    middle = len(content) // 2
    third.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    message = refusal(megatron_to_hf, megatron)
    assert f"{third.name}: damaged" in message
    first.unlink()
    second.write_bytes(second.read_bytes()[:-100])
    message = refusal(megatron_to_hf, megatron)
    assert f"{first.name}: missing" in message
    assert f"{second.name}: truncated" in message


class Trap:
    def __reduce__(self):
        return os.mkdir, ("sprung",)


def test_metadata_are_never_executed(megatron, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (megatron / ".metadata").write_bytes(pickle.dumps(Trap()))
    message = refusal(megatron_to_hf, megatron)
    assert ".metadata: damaged" in message
    assert "posix.mkdir" in message
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("content", [b"", b"no pickle", pickle.dumps({"a": 1})])
def test_metadata_that_are_no_metadata(megatron, content):
    (megatron / ".metadata").write_bytes(content)
    assert ".metadata: damaged" in refusal(megatron_to_hf, megatron)

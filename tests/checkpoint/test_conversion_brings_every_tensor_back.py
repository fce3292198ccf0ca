"""Hugging Face to Megatron and back gives every tensor bit for bit, whatever the model, the files and the pieces."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import xxhash
from conversion_folders import TINY_BASE, assert_bitwise_equal, reshard, tensors_of
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import KINDS, write_tiny_model

from megatron_vespo.conversion.commands import Verification, hf_to_megatron, megatron_to_hf

TOOLS = TINY_BASE.parents[1] / "tools"
SMALL = 20_000
"""Bytes of an output file, so that a tiny model has several."""


def there_and_back(source: Path, folder: Path, **options) -> Path:
    hf_to_megatron(source, folder / "megatron", verify=[Verification.BYTES], file_bytes=SMALL, **options)
    megatron_to_hf(folder / "megatron", folder / "back", verify=[Verification.BYTES], file_bytes=3 * SMALL)
    return folder / "back"


def companions(folder: Path) -> dict[str, bytes]:
    ours = ("model", "manifest.json", "config.json")
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(ours)}


def test_commands_convert_the_shipped_base_there_and_back(tmp_path):
    for tool, *arguments in [
        ["convert_hf_to_megatron.py", "--hf", TINY_BASE, "--out", "there", *["--tp", "2", "--pp", "2", "--ep", "2"]],
        ["convert_megatron_to_hf.py", "--megatron", "there", "--out", "back"],
    ]:
        command = [sys.executable, TOOLS / tool, *arguments, "--verify", "bytes"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert_bitwise_equal(tensors_of(tmp_path / "back"), tensors_of(TINY_BASE))
    assert companions(tmp_path / "back") == companions(TINY_BASE)
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == json.loads(
        (TINY_BASE / "config.json").read_text()
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tied", [False, True])
def test_every_architecture_in_seven_files(tmp_path, kind, tied):
    """The vocabulary is odd, so both tensor-parallel halves differ in padding."""
    dtype = torch.bfloat16 if tied else torch.float32
    source = tmp_path / "source"
    write_tiny_model(source, kind=kind, tied=tied, layers=4, dtype=dtype)
    expected = tensors_of(source)
    reshard(source, 7)
    parallel = {"tp": 2, "pp": 2} | ({"ep": 2} if kind in ("moe", "mixed") else {})
    back = there_and_back(source, tmp_path, **parallel)
    assert_bitwise_equal(tensors_of(back), expected)
    assert len(list(back.glob("*.safetensors"))) > 1


def test_cutting_experts_and_padding_the_vocabulary_loses_nothing(tmp_path):
    write_tiny_model(tmp_path / "source", kind="mixed", layers=2)
    back = there_and_back(tmp_path / "source", tmp_path, tp=2, etp=2, vocabulary_multiple=50)
    assert_bitwise_equal(tensors_of(back), tensors_of(tmp_path / "source"))


def test_large_tensors_go_in_blocks_of_rows(tmp_path, monkeypatch):
    monkeypatch.setattr("megatron_vespo.conversion.plan.BLOCK_BYTES", 1000)
    write_tiny_model(tmp_path / "source", kind="mixed", layers=2)
    back = there_and_back(tmp_path / "source", tmp_path, tp=2, ep=2)
    assert_bitwise_equal(tensors_of(back), tensors_of(tmp_path / "source"))


def test_each_tensor_keeps_its_dtype(tmp_path):
    source = tmp_path / "source"
    write_tiny_model(source, dtype=torch.bfloat16)
    tensors = load_file(source / "model.safetensors")
    tensors |= {name: tensor.float() for name, tensor in tensors.items() if name.endswith("mlp.gate.weight")}
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    assert_bitwise_equal(tensors_of(there_and_back(source, tmp_path)), tensors)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_casts_are_torchs_and_config_follows(tmp_path, dtype):
    source = tmp_path / "source"
    write_tiny_model(source, kind="mixed")
    back = there_and_back(source, tmp_path, dtype=dtype)
    assert_bitwise_equal(
        tensors_of(back), {name: x.to(getattr(torch, dtype)) for name, x in tensors_of(source).items()}
    )
    config = json.loads((source / "config.json").read_text())
    assert json.loads((back / "config.json").read_text()) == config | {"dtype": dtype}


def test_a_cast_on_the_way_back(tmp_path):
    write_tiny_model(tmp_path / "source")
    hf_to_megatron(tmp_path / "source", tmp_path / "megatron")
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back", dtype="bfloat16", verify=[Verification.BYTES])
    expected = {name: tensor.bfloat16() for name, tensor in tensors_of(tmp_path / "source").items()}
    assert_bitwise_equal(tensors_of(tmp_path / "back"), expected)


def test_a_second_copy_of_a_tied_embedding_is_left_out(tmp_path):
    source = tmp_path / "source"
    write_tiny_model(source, tied=True)
    tensors = tensors_of(source)
    copy = tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    save_file(copy, source / "model.safetensors", metadata={"format": "pt"})
    assert_bitwise_equal(tensors_of(there_and_back(source, tmp_path)), tensors)


def test_several_processes_write_the_same_files(tmp_path):
    write_tiny_model(tmp_path / "source", kind="mixed", layers=2)
    for processes in (1, 2):
        there, back = tmp_path / f"there-{processes}", tmp_path / f"back-{processes}"
        hf_to_megatron(tmp_path / "source", there, ep=2, processes=processes, file_bytes=SMALL)
        megatron_to_hf(there, back, processes=processes, file_bytes=SMALL)
    assert contents_of_files(tmp_path / "there-1") == contents_of_files(tmp_path / "there-2")
    alone, together = (contents_of_files(tmp_path / f"back-{processes}") for processes in (1, 2))
    del alone["manifest.json"], together["manifest.json"]  # they name their sources
    assert alone == together


def torchrun(tool: str, *arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", TOOLS / tool]
    return subprocess.run([*command, *arguments], capture_output=True, text=True)


@pytest.mark.slow
def test_ranks_of_torchrun_share_the_files(tmp_path):
    hf_to_megatron(TINY_BASE, tmp_path / "alone", tp=2, file_bytes=200_000)
    sizes = ["--file-mb", "0.2", "--verify", "bytes"]
    there = torchrun("convert_hf_to_megatron.py", "--hf", TINY_BASE, "--out", tmp_path / "there", "--tp", "2", *sizes)
    assert there.returncode == 0, there.stderr
    assert contents_of_files(tmp_path / "there") == contents_of_files(tmp_path / "alone")
    again = torchrun("convert_hf_to_megatron.py", "--hf", TINY_BASE, "--out", tmp_path / "there")
    assert again.returncode != 0
    assert "exists already" in again.stderr


def contents_of_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_manifest_names_and_hashes_what_was_read_and_written(tmp_path):
    source = tmp_path / "source"
    write_tiny_model(source, kind="mixed", tied=True)
    back = there_and_back(source, tmp_path, tp=2, ep=2, dtype="bfloat16")
    expected, written = tensors_of(source), tensors_of(back)
    there = json.loads((tmp_path / "megatron" / "manifest.json").read_text())
    assert records(there["source"]) == described(expected)
    pieces = {(record["name"], tuple(record["offset"])) for record in there["target"]}
    assert len(pieces) == len(there["target"])
    assert {record["dtype"] for record in there["target"]} == {"bfloat16"}
    again = json.loads((back / "manifest.json").read_text())
    assert records(again["target"]) == described(written)
    for record in again["target"]:
        with safe_open(back / record["file"], framework="pt") as file:
            assert record["name"] in file.keys()  # noqa: SIM118


def records(entries: list[dict]) -> dict:
    return {entry["name"]: (tuple(entry["shape"]), entry["dtype"], entry["hash"]) for entry in entries}


def described(tensors: dict[str, torch.Tensor]) -> dict:
    return {
        name: (
            tuple(x.shape),
            str(x.dtype).removeprefix("torch."),
            xxhash.xxh3_128_hexdigest(x.contiguous().view(torch.uint8).numpy().tobytes()),
        )
        for name, x in tensors.items()
    }

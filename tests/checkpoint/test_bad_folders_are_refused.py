"""A damaged or contradictory folder is refused from its headers alone, every fault listed, nothing heavy imported."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import write_tiny_model

from megatron_vespo.checkpoint.check import check_folder
from megatron_vespo.config import ConfigError

GATE = "model.layers.1.mlp.gate.weight"
EXPERT = "model.layers.2.mlp.experts.3.up_proj.weight"


@pytest.fixture
def single(tmp_path) -> Path:
    write_tiny_model(tmp_path)
    return tmp_path


@pytest.fixture
def sharded(tmp_path) -> Path:
    write_tiny_model(tmp_path, shard_size="40KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) >= 5
    return tmp_path


def refusal(folder: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        check_folder(folder)
    assert str(folder) in str(caught.value)
    return str(caught.value)


def rewrite(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_good_folders_pass(tmp_path):
    for name, options in {
        "single": {},
        "sharded": {"shard_size": "40KB"},
        "tied": {"tied": True},
        "bf16": {"dtype": torch.bfloat16},
    }.items():
        write_tiny_model(tmp_path / name, **options)
        assert check_folder(tmp_path / name).num_layers == 3


def test_check_imports_neither_torch_nor_megatron(single):
    program = (
        "import sys; from megatron_vespo.checkpoint.check import check_folder; check_folder(sys.argv[1]); "
        "print([name for name in ('torch', 'megatron', 'transformers', 'ray') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program, str(single)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_missing_extra_and_misshaped_tensors_are_all_listed(single):
    def change(tensors):
        del tensors[GATE], tensors[EXPERT]
        tensors["model.layers.3.mlp.gate.weight"] = torch.zeros(4, 32)
        tensors["model.norm.weight"] = torch.zeros(33)
        tensors["model.layers.0.self_attn.q_proj.weight"] = torch.zeros(96, 32, dtype=torch.int8)

    rewrite(single, change)
    message = refusal(single)
    assert "5 problems" in message
    assert f"{GATE}: missing, expected shape [4, 32]" in message
    assert f"{EXPERT}: missing, expected shape [24, 32]" in message
    assert "model.layers.3.mlp.gate.weight: extra, shape [4, 32]" in message
    assert "model.norm.weight: has shape [33], expected [32]" in message
    assert "model.layers.0.self_attn.q_proj.weight: has dtype I8, expected one of F32, BF16, F16" in message


def test_output_layer_may_be_absent_only_if_tied(single):
    rewrite(single, lambda tensors: tensors.pop("lm_head.weight"))
    assert "lm_head.weight: missing" in refusal(single)
    config = json.loads((single / "config.json").read_text())
    (single / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    assert check_folder(single).tied_embeddings


def test_config_that_contradicts_the_tensors_is_refused(single):
    config = json.loads((single / "config.json").read_text())
    (single / "config.json").write_text(json.dumps(config | {"moe_intermediate_size": 25}))
    assert f"{EXPERT}: has shape [24, 32], expected [25, 32] from config.json" in refusal(single)


def test_truncated_file_is_named(single):
    path = single / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    assert "model.safetensors: truncated or damaged" in refusal(single)
    path.write_bytes(b"123")
    assert "model.safetensors: truncated or damaged" in refusal(single)


def test_missing_and_truncated_shards_are_named_once_each(sharded):
    first, second, *_ = sorted(sharded.glob("model-*.safetensors"))
    first.unlink()
    second.write_bytes(second.read_bytes()[:-8])
    message = refusal(sharded)
    assert "2 problems" in message
    assert f"{first.name}: missing" in message
    assert f"{second.name}: truncated or damaged" in message


def test_index_that_contradicts_the_shards_is_refused(sharded):
    path = sharded / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    right = index["weight_map"][GATE]
    wrong = next(file for file in index["weight_map"].values() if file != right)
    index["weight_map"][GATE] = wrong
    path.write_text(json.dumps(index))
    message = refusal(sharded)
    assert f"{wrong}: does not hold {GATE}, which model.safetensors.index.json puts there" in message
    assert f"{right}: holds {GATE}, which model.safetensors.index.json does not name" in message


def test_tensor_in_two_shards_is_refused(sharded):
    first, second, *_ = sorted(sharded.glob("model-*.safetensors"))
    twice = next(iter(load_file(first)))
    save_file(load_file(second) | {twice: load_file(first)[twice]}, second)
    assert f"holds {twice}, which {first.name} holds too" in refusal(sharded)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not readable as JSON"),
        ("{}", "has no weight_map"),
        ('{"weight_map": {"a": "../b.safetensors"}}', "'../b.safetensors', which is not the name of a file"),
    ],
)
def test_bad_index_is_refused(sharded, content, message):
    (sharded / "model.safetensors.index.json").write_text(content)
    assert message in refusal(sharded)


def test_no_weights_and_two_sets_of_weights_are_refused(single):
    (single / "model.safetensors.index.json").write_text("{}")
    assert "remove the one that is out of date" in refusal(single)
    (single / "model.safetensors").unlink()
    (single / "model.safetensors.index.json").unlink()
    (single / "pytorch_model.bin").write_bytes(b"")
    assert "only safetensors are read" in refusal(single)

"""Folders that tests of the conversion start from, and their comparison."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

TINY_BASE = Path(__file__).resolve().parents[2] / "examples" / "tiny_base"


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def reshard(folder: Path, files: int) -> None:
    """Spread a folder's tensors over `files` files, in an order of no meaning, with an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    placed = {}
    for number in range(files):
        name = f"model-{number + 1:05d}-of-{files:05d}.safetensors"
        shard = {key: tensors[key] for key in sorted(tensors)[number::files]}
        save_file(shard, folder / name, metadata={"format": "pt"})
        placed |= dict.fromkeys(shard, name)
    index = {"metadata": {}, "weight_map": placed}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def assert_bitwise_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].shape == tensor.shape, name
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), name

"""Megatron-Core's own load takes a converted checkpoint in every layout, and what it saves is converted back."""

import pytest
import torch
from conversion_folders import assert_bitwise_equal, tensors_of
from conversion_jobs import asked_for, differing_after_load, save_training_state, save_with_megatron
from tiny_models import write_tiny_model
from transformers import AutoModelForCausalLM

from megatron_vespo.architecture.hf_config import read_architecture
from megatron_vespo.checkpoint.torch_dist_format import read_index
from megatron_vespo.checkpoint.torch_dist_names import CONTENT_METADATA, extra_state_keys
from megatron_vespo.config import LayoutConfig, PolicyConfig
from megatron_vespo.conversion.commands import hf_to_megatron, megatron_to_hf
from megatron_vespo.conversion.verify_logits import megatron_logits, tokens
from megatron_vespo.parity.case import build_case

KINDS = ("moe", "mixed", "qwen3", "llama")
LAYOUTS = [
    (1, {}),
    (2, {"pp": 2}),
    (4, {"tp": 2, "ep": 2, "etp": 2}),
    (4, {"tp": 2, "pp": 2, "ep": 2}),
]
DENSE_LAYOUTS = [(1, {}), (2, {"tp": 2}), (2, {"pp": 2}), (4, {"tp": 2, "pp": 2})]


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """kind -> folder with `hf` and `megatron`; cut for another layout than most that load it."""
    root = tmp_path_factory.mktemp("converted")
    for kind in KINDS:
        write_tiny_model(root / kind / "hf", kind=kind, tied=kind in ("mixed", "qwen3"), layers=4, spread=0.1)
        cut = {"ep": 2} if kind in ("moe", "mixed") else {}
        hf_to_megatron(root / kind / "hf", root / kind / "megatron", tp=2, pp=2, **cut, file_bytes=30_000)
    return root


@pytest.mark.parametrize("kind", KINDS)
def test_keys_shapes_and_dtypes_are_those_of_megatrons_model(converted, ranks, tmp_path, kind):
    write_tiny_model(tmp_path / "hf", kind=kind, dtype=torch.bfloat16)
    hf_to_megatron(tmp_path / "hf", tmp_path / "megatron", tp=2)
    (asked,) = ranks.run(1, asked_for, str(tmp_path / "hf"), CONTENT_METADATA)
    stored = {key: (tensor.shape, tensor.dtype) for key, tensor in read_index(tmp_path / "megatron").items()}
    vocabulary = {key for key in asked.tensors if key.startswith(("embedding.", "output_layer."))}
    for key in vocabulary:  # filled up for two ranks
        assert stored.pop(key)[0] == (132, asked.tensors.pop(key)[0][1])
    other_specs = stored.keys() - asked.tensors.keys()
    assert all(key.endswith("pre_mlp_layernorm.weight") for key in other_specs)
    assert {key: stored[key] for key in asked.tensors} == asked.tensors
    assert asked.objects <= set(extra_state_keys(read_architecture(tmp_path / "hf")))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("number", range(4))
def test_logits_equal_transformers_in_four_layouts(converted, ranks, kind, number):
    world_size, layout = (LAYOUTS if kind in ("moe", "mixed") else DENSE_LAYOUTS)[number]
    folder = converted / kind
    model = AutoModelForCausalLM.from_pretrained(folder / "hf", dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        expected = model(tokens(folder / "hf")[None]).logits[0]
    answers = ranks.run(
        world_size, megatron_logits, str(folder / "hf"), str(folder / "megatron"), LayoutConfig(**layout)
    )
    (found,) = (answer for answer in answers if answer is not None)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("world_size", "layout", "multiple"),
    [(1, {}, 1), (2, {"ep": 2}, 16), (4, {"tp": 2, "ep": 2, "pp": 2}, 1), (2, {"pp": 2, "vpp": 2}, 1)],
)
def test_every_layout_loads_every_weight(converted, ranks, world_size, layout, multiple):
    folder = converted / "mixed"
    found = ranks.run(world_size, differing_after_load, layout, str(folder / "hf"), str(folder / "megatron"), multiple)
    assert found == [[]] * world_size


@pytest.mark.parametrize(
    ("kind", "world_size", "layout", "metadata"),
    [
        ("moe", 4, {"tp": 2, "ep": 2, "pp": 2}, CONTENT_METADATA),
        ("mixed", 2, {"tp": 2, "etp": 2}, {}),
        ("llama", 2, {"pp": 2}, {}),  # layers stacked along an axis of one tensor
    ],
)
def test_what_training_saved_is_converted_back(converted, ranks, tmp_path, kind, world_size, layout, metadata):
    source = converted / kind / "hf"
    ranks.run(world_size, save_with_megatron, layout, str(source), str(tmp_path / "saved"), metadata)
    stacked = "decoder.layers.self_attention.linear_qkv.weight" in read_index(tmp_path / "saved")
    assert stacked == (kind == "llama")
    megatron_to_hf(tmp_path / "saved", tmp_path / "back", config_folder=source)
    assert_bitwise_equal(tensors_of(tmp_path / "back"), tensors_of(source))


@pytest.mark.parametrize("kind", ["mixed", "dense"])
def test_a_runs_own_checkpoint_is_converted(ranks, tmp_path, kind):
    case = build_case(tmp_path / "source", kind, seed=0)
    layout = LayoutConfig(tp=2, etp=2) if kind == "mixed" else LayoutConfig(pp=2)
    (tmp_path / "state").mkdir()
    ranks.run(2, save_training_state, case, PolicyConfig(ranks=2, layout=layout), tmp_path / "state")
    megatron_to_hf(tmp_path / "state" / "policy", tmp_path / "back", config_folder=tmp_path / "source")
    assert_bitwise_equal(tensors_of(tmp_path / "back"), tensors_of(tmp_path / "source"))

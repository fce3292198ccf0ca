"""The table names exactly the tensors of a hub folder, and putting together and taking apart are exact inverses."""

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import KINDS, write_tiny_model

from megatron_vespo.checkpoint.check import check_folder
from megatron_vespo.checkpoint.forms import merge, split
from megatron_vespo.checkpoint.mapping import Form
from megatron_vespo.checkpoint.tables import table_of

by_kind = pytest.mark.parametrize("kind", KINDS)


@by_kind
@pytest.mark.parametrize("tied", [False, True])
def test_table_names_exactly_what_transformers_saves(tmp_path, kind, tied):
    write_tiny_model(tmp_path, kind=kind, tied=tied)
    architecture = check_folder(tmp_path)
    saved = {name: tuple(tensor.shape) for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    assert table_of(architecture).hf_shapes(architecture) == saved


@by_kind
def test_taking_apart_inverts_putting_together_bitwise(tmp_path, kind):
    write_tiny_model(tmp_path, kind=kind, dtype=torch.bfloat16)
    architecture = check_folder(tmp_path)
    source = load_file(tmp_path / "model.safetensors")
    back = {}
    for place in table_of(architecture).places(architecture):
        merged = merge(place.entry, [source[name] for name in place.hf_names], architecture)
        assert tuple(merged.shape) == place.entry.megatron_shape
        back |= dict(zip(place.hf_names, split(place.entry, merged, architecture), strict=True))
    assert back.keys() == source.keys()
    assert all(torch.equal(back[name], source[name]) and back[name].is_contiguous() for name in source)


def test_qkv_rows_are_interleaved_by_query_group_as_megatron_reads_them(tmp_path):
    """Megatron views the projection as [group, heads per group + 2, head_dim] (attention.py, SelfAttention)."""
    write_tiny_model(tmp_path)
    architecture = check_folder(tmp_path)
    (entry,) = (entry for entry in table_of(architecture).entries if entry.form is Form.QKV)
    query, key, value = (
        torch.arange(shape[0]) + start for shape, start in zip(entry.hf.values(), (0, 1000, 2000), strict=True)
    )
    rows = merge(entry, [x[:, None].expand(-1, 32) for x in (query, key, value)], architecture)[:, 0]
    group = rows.view(2, 3 + 2, 16)
    for head in range(6):
        assert group[head // 3, head % 3].tolist() == query[head * 16 : (head + 1) * 16].tolist()
    for head in range(2):
        assert group[head, 3].tolist() == key[head * 16 : (head + 1) * 16].tolist()
        assert group[head, 4].tolist() == value[head * 16 : (head + 1) * 16].tolist()


def test_stacked_experts_equal_transformers_own_stack(tmp_path):
    """transformers computes `linear(x, gate_up_proj[e]).chunk(2)`: gate rows first, as Megatron's gated linear_fc1."""
    model = write_tiny_model(tmp_path)
    architecture = check_folder(tmp_path)
    source = load_file(tmp_path / "model.safetensors")
    (entry,) = (entry for entry in table_of(architecture).entries if entry.form is Form.STACKED and entry.in_expert)
    for layer in range(3):
        stacked = model.model.layers[layer].mlp.experts.gate_up_proj
        for expert in range(4):
            names = entry.hf_names(layer, expert)
            assert torch.equal(merge(entry, [source[name] for name in names], architecture), stacked[expert])


def test_both_spellings_of_megatron_names_are_matched(tmp_path):
    write_tiny_model(tmp_path)
    table = table_of(check_folder(tmp_path))

    def place(name):
        hits = [(entry.hf_names(*found), *found) for entry in table.entries if (found := entry.match(name)) is not None]
        assert len(hits) <= 1
        return hits[0] if hits else None

    gate_up = ["model.layers.1.mlp.experts.2.gate_proj.weight", "model.layers.1.mlp.experts.2.up_proj.weight"]
    assert place("decoder.layers.1.mlp.experts.local_experts.2.linear_fc1.weight") == (gate_up, 1, 2)
    assert place("decoder.layers.1.mlp.experts.linear_fc1.weight2") == (gate_up, 1, 2)
    down = ["model.layers.0.mlp.experts.11.down_proj.weight"]
    assert place("decoder.layers.0.mlp.experts.linear_fc2.weight11") == (down, 0, 11)
    norm = (["model.layers.2.input_layernorm.weight"], 2, None)
    assert place("decoder.layers.2.input_layernorm.weight") == norm
    assert place("decoder.layers.2.self_attention.linear_qkv.layer_norm_weight") == norm
    dense = ["model.layers.0.mlp.gate_proj.weight", "model.layers.0.mlp.up_proj.weight"]
    assert place("decoder.layers.0.mlp.linear_fc1.weight") == (dense, 0, None)
    assert place("decoder.layers.0.mlp.linear_fc2.weight") == (["model.layers.0.mlp.down_proj.weight"], 0, None)
    norm = (["model.layers.0.post_attention_layernorm.weight"], 0, None)
    assert place("decoder.layers.0.pre_mlp_layernorm.weight") == norm
    assert place("decoder.layers.0.mlp.linear_fc1.layer_norm_weight") == norm
    assert place("decoder.layers.2.mlp.experts.weight1") is None
    assert place("decoder.layers.2.self_attention.linear_qkv.bias") is None

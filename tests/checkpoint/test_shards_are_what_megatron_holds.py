"""Shards of every entry: put together they are the tensor, bit for bit, and each is what its Megatron rank computes with.

Layouts of rows are those that Megatron's forward pass implies: a rank's linear_fc1 output is cut in two halves, gate and
up (mlp.py), its linear_qkv output is viewed as [its query groups, heads per group + 2, head_dim] (attention.py).
"""

from dataclasses import replace

import pytest
import torch
from tiny_models import KINDS, write_tiny_model

from megatron_vespo.architecture.hf_config import Architecture
from megatron_vespo.checkpoint.check import check_folder
from megatron_vespo.checkpoint.forms import pad_rows, shard, split, unshard
from megatron_vespo.checkpoint.mapping import Entry, Form
from megatron_vespo.checkpoint.tables import table_of

ARCHITECTURE = Architecture(
    architecture="Qwen3MoeForCausalLM",
    vocab_size=131,
    hidden_size=16,
    num_layers=2,
    num_attention_heads=8,
    num_query_groups=4,
    head_dim=2,
    qk_norm=True,
    ffn_hidden_size=20,
    moe_layers=(False, True),
    num_experts=4,
    experts_per_token=2,
    moe_ffn_hidden_size=12,
    norm_epsilon=1e-6,
    rotary_base=1e4,
    rope_scaling_factor=None,
    tied_embeddings=False,
    normalise_topk=True,
    max_position_embeddings=64,
)
SIZES = (1, 2, 4)
by_size = pytest.mark.parametrize("size", SIZES)


def entries() -> dict[str, Entry]:
    """By the end of the Hugging Face name of its first tensor."""
    return {next(iter(entry.hf)).rsplit("}.", 1)[-1]: entry for entry in table_of(ARCHITECTURE).entries}


def random(entry: Entry) -> torch.Tensor:
    return torch.randn(entry.megatron_shape, generator=torch.Generator().manual_seed(0)).bfloat16()


def shards_of(entry: Entry, full: torch.Tensor, size: int) -> list[torch.Tensor]:
    return [shard(entry, full, index, size, ARCHITECTURE) for index in range(size)]


@by_size
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tied", [False, True])
def test_putting_shards_together_inverts_sharding_bitwise(tmp_path, kind, tied, size):
    write_tiny_model(tmp_path, kind=kind, tied=tied)
    architecture = replace(check_folder(tmp_path), num_attention_heads=8, num_query_groups=4)
    for entry in table_of(architecture).entries:
        full = random(entry)
        shards = [shard(entry, full, index, size, architecture) for index in range(size)]
        assert len({tuple(piece.shape) for piece in shards}) == 1
        assert torch.equal(unshard(entry, shards, architecture), full)


@by_size
def test_gate_and_up_are_each_shared_by_all_ranks(size):
    for name in ("mlp.gate_proj.weight", "gate_proj.weight"):
        entry = entries()[name]
        half = entry.megatron_shape[0] // 2
        gate, up = torch.arange(half), torch.arange(half) + 1000
        full = torch.cat([gate, up])[:, None].expand(-1, 16)
        for index, piece in enumerate(shards_of(entry, full, size)):
            mine = slice(index * half // size, (index + 1) * half // size)
            found_gate, found_up = piece[:, 0].chunk(2)
            assert found_gate.tolist() == gate[mine].tolist()
            assert found_up.tolist() == up[mine].tolist()


@by_size
def test_query_groups_stay_whole(size):
    entry = entries()["self_attn.q_proj.weight"]
    heads = torch.cat(  # rows are numbered by group * 100 + place: two queries, key, value, of two rows each
        [group * 100 + torch.arange(8) for group in range(4)]
    )
    shards = shards_of(entry, heads[:, None].expand(-1, 16), size)
    assert torch.cat(shards)[:, 0].tolist() == heads.tolist()
    hf = [split(entry.of_one_rank(size), piece, ARCHITECTURE) for piece in shards]
    groups = 4 // size
    for index, (query, key, value) in enumerate(hf):
        mine = range(index * groups, (index + 1) * groups)
        assert query[:, 0].tolist() == [group * 100 + row for group in mine for row in (0, 1, 2, 3)]
        assert key[:, 0].tolist() == [group * 100 + row for group in mine for row in (4, 5)]
        assert value[:, 0].tolist() == [group * 100 + row for group in mine for row in (6, 7)]


@by_size
def test_matrices_that_write_into_the_residual_stream_are_shared_by_columns(size):
    for name in ("self_attn.o_proj.weight", "mlp.down_proj.weight", "down_proj.weight"):
        entry = entries()[name]
        full = random(entry)
        for found, expected in zip(shards_of(entry, full, size), full.tensor_split(size, dim=1), strict=True):
            assert torch.equal(found, expected)


@pytest.mark.parametrize(("size", "rows"), [(1, 131), (2, 66), (4, 33)])
def test_an_odd_vocabulary_ends_in_zero_rows(size, rows):
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        entry = entries()[name]
        full = random(entry)
        shards = shards_of(entry, full, size)
        assert [piece.shape[0] for piece in shards] == [rows] * size
        assert torch.equal(torch.cat(shards)[:131], full)
        assert not torch.cat(shards)[131:].any()


def test_a_vocabulary_with_more_padding_than_ranks_need_keeps_it():
    entry = entries()["lm_head.weight"]
    full = random(entry)
    shards = shards_of(entry, pad_rows(full, 256), 4)
    assert [piece.shape[0] for piece in shards] == [64] * 4
    assert torch.equal(shards[2][:3], full[128:])
    assert not shards[2][3:].any()
    assert not shards[3].any()
    assert torch.equal(unshard(entry, shards, ARCHITECTURE), full)


@by_size
def test_norms_and_routers_are_whole_on_every_rank(size):
    for name in ("input_layernorm.weight", "self_attn.q_norm.weight", "mlp.gate.weight", "model.norm.weight"):
        full = random(entries()[name])
        assert all(torch.equal(piece, full) for piece in shards_of(entries()[name], full, size))


def test_what_does_not_divide_is_refused():
    for name, size in (("mlp.gate_proj.weight", 3), ("down_proj.weight", 5)):
        with pytest.raises(ValueError, match=f"don't divide by {size} ranks"):
            shard(entries()[name], random(entries()[name]), 0, size, ARCHITECTURE)
    (qkv,) = (entry for entry in table_of(ARCHITECTURE).entries if entry.form is Form.QKV)
    with pytest.raises(ValueError, match="1 rows of keys are not whole query groups"):
        shard(qkv, random(qkv), 0, 8, ARCHITECTURE)

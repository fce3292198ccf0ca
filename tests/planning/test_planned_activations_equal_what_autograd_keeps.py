"""The most bytes that autograd holds in a step: planned from sizes, and measured as distinct live storages."""

import memory_jobs
import pytest

from megatron_vespo.architecture.hf_config import Architecture
from megatron_vespo.config import PolicyConfig, RecomputeConfig
from megatron_vespo.planning.activations import Pass, peak
from megatron_vespo.planning.amount import total

WITHIN = 0.05
LENGTHS = [250, 257, 250, 250]


def architecture(layers: str, **changes) -> Architecture:
    """`layers`: a letter each, m for MoE, d for dense."""
    values = {
        "architecture": "Qwen3MoeForCausalLM" if "m" in layers else "Qwen3ForCausalLM",
        "vocab_size": 97,
        "hidden_size": 48,
        "num_layers": len(layers),
        "num_attention_heads": 6,
        "num_query_groups": 2,
        "head_dim": 16,
        "qk_norm": True,
        "ffn_hidden_size": 112,
        "moe_layers": tuple(layer == "m" for layer in layers),
        "num_experts": 4 * ("m" in layers),
        "experts_per_token": 2 * ("m" in layers),
        "moe_ffn_hidden_size": 80 * ("m" in layers),
        "norm_epsilon": 1e-6,
        "rotary_base": 1e4,
        "rope_scaling_factor": None,
        "tied_embeddings": False,
        "normalise_topk": True,
        "max_position_embeddings": 512,
    }
    return Architecture(**(values | changes))


SHAPES = {
    "moe": (architecture("mm"), "float32"),
    "mixed, more experts": (
        architecture("dmmd", num_experts=16, experts_per_token=4, hidden_size=96, moe_ffn_hidden_size=32),
        "bfloat16",
    ),
    "dense, no shared keys": (architecture("dddd", num_query_groups=6, head_dim=32, tied_embeddings=True), "float32"),
    "llama": (
        architecture("ddd", architecture="LlamaForCausalLM", qk_norm=False, ffn_hidden_size=256, hidden_size=128),
        "bfloat16",
    ),
}
RECOMPUTE = {
    "none": RecomputeConfig(),
    "full": RecomputeConfig(granularity="full"),
    "attention": RecomputeConfig(granularity="selective"),
    "feed-forward": RecomputeConfig(granularity="selective", modules=("core_attn", "mlp", "moe")),
}


def policy(recompute: RecomputeConfig, **settings) -> PolicyConfig:
    return PolicyConfig(
        micro_batch_tokens=2048, head_chunk_tokens=64, step_timeout_seconds=120, recompute=recompute, **settings
    )


@pytest.mark.parametrize(
    "shape", [shape if shape == "moe" else pytest.param(shape, marks=pytest.mark.slow) for shape in SHAPES]
)
def test_what_is_kept_is_planned(ranks, shape):
    model, dtype = SHAPES[shape]
    measured = {}
    for name, recompute in RECOMPUTE.items():
        if name == "feed-forward" and all(model.moe_layers):
            recompute = RecomputeConfig(granularity="selective", modules=("core_attn", "moe"))
        settings = policy(recompute)
        (found,) = ranks.run(1, memory_jobs.activations, model, settings, dtype, LENGTHS)
        planned = peak(Pass(model, settings, dtype, found.positions, False, sequences=len(LENGTHS)), 0, 1)
        assert total(planned) == pytest.approx(found.peak, rel=WITHIN), name
        measured[name] = found.peak
    assert measured["full"] < measured["feed-forward"] < measured["attention"] < measured["none"]


@pytest.mark.slow
def test_a_rank_of_a_split_model_keeps_its_share(ranks):
    """Two tensor-parallel ranks with half of the experts each; then two pipeline stages."""
    model, dtype = SHAPES["moe"]
    for layout in ({"tp": 2, "ep": 2}, {"pp": 2}):
        settings = policy(RecomputeConfig(), ranks=2, layout=layout)
        for rank, found in enumerate(ranks.run(2, memory_jobs.activations, model, settings, dtype, LENGTHS)):
            stage = rank if "pp" in layout else 0
            planned = peak(Pass(model, settings, dtype, found.positions, False, sequences=len(LENGTHS)), stage, 1)
            # Routers choose how many rows each rank's experts get; the plan spreads them evenly.
            assert total(planned) == pytest.approx(found.peak, rel=WITHIN), (layout, rank)

"""A layout that would stop late, or train wrong, is refused from sizes alone, with the reason and what to do."""

import math

import policy_examples
import pytest
import torch

from megatron_vespo.architecture.layout_fit import packing_rules, padded_vocabulary, require_fit
from megatron_vespo.config import ConfigError, ModelConfig, PolicyConfig
from megatron_vespo.policy.device import Device
from megatron_vespo.policy.transformer_config import transformer_config

SIZES = {
    "num_attention_heads": 8,
    "num_query_groups": 4,
    "num_experts": 8,
    "num_layers": 6,
    "ffn_hidden_size": 36,
    "moe_ffn_hidden_size": 24,
    "vocab_size": 97,
}


def policy(ranks: int, **settings) -> PolicyConfig:
    layout = {
        key: settings.pop(key) for key in ("tp", "etp", "ep", "pp", "vpp", "cp", "sequence_parallel") if key in settings
    }
    return PolicyConfig.model_validate({"ranks": ranks, "layout": layout} | settings)


@pytest.mark.parametrize(
    ("settings", "key", "message"),
    [
        ({"ranks": 6, "tp": 4}, "ranks", "6 is not a multiple of layout.tp * pp * cp (4 * 1 * 1 = 4)"),
        ({"ranks": 4, "ep": 2, "etp": 4}, "ranks", "4 is not a multiple of layout.etp * ep * pp (4 * 2 * 1 = 8)"),
        ({"ranks": 2, "vpp": 2}, "layout.vpp", "need pipeline stages"),
        (
            {"ranks": 1, "overlap_parameter_gathering": True},
            "overlap_parameter_gathering",
            "overlap_gradient_reduction",
        ),
        ({"ranks": 1, "recompute": {"granularity": "selective", "modules": []}}, "recompute.modules", "no module"),
        (
            {"ranks": 1, "optimizer_cpu_offload": 0.5, "distributed_optimizer": False},
            "optimizer_cpu_offload",
            "distributed_optimizer",
        ),
    ],
)
def test_contradictions_of_the_configuration_alone(settings, key, message):
    found = dict(policy(**settings).problems())
    assert message in found[key]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ranks": 3, "tp": 3, "etp": 3}, "tp (3) does not divide the model's 8 attention heads"),
        ({"ranks": 8, "tp": 8, "etp": 8}, "tp (8) does not divide the model's 4 key/value heads"),
        ({"ranks": 3, "ep": 3}, "ep (3) does not divide the model's 8 experts"),
        ({"ranks": 5, "ep": 1, "tp": 1, "etp": 5}, "etp (5) does not divide the model's 24 expert width"),
        ({"ranks": 4, "pp": 4}, "pp * vpp (4) does not divide the model's 6 layers"),
        ({"ranks": 2, "pp": 2, "vpp": 2}, "pp * vpp (4) does not divide the model's 6 layers"),
        ({"ranks": 2, "tp": 2}, "etp (1) differs from tp (2) with ep 1"),
        ({"ranks": 2, "etp": 2}, "etp (2) differs from tp (1) with ep 1"),
        ({"ranks": 2, "tp": 2, "etp": 2, "sequence_parallel": False}, "sequence_parallel is needed"),
        (
            {"ranks": 2, "tp": 2, "etp": 2, "vocabulary_multiple": 128},
            "pads the vocabulary of 97 rows to 256, so that the last rank holds nothing but padding",
        ),
        ({"ranks": 1, "recompute": {"granularity": "selective", "modules": ["mlp"]}}, "no dense mlp"),
        (
            {"ranks": 2, "pp": 2, "recompute": {"granularity": "full", "layers": 2}},
            "recompute.layers (2) does not divide the 3 layers that are together on a rank",
        ),
    ],
)
def test_layouts_that_do_not_fit_a_model(settings, message):
    with pytest.raises(ConfigError) as error:
        require_fit(policy_examples.architecture(**SIZES), policy(**settings))
    assert message in str(error.value)


def test_experts_are_not_split_where_there_are_none():
    dense = policy_examples.architecture(
        **SIZES | {"num_experts": 0, "experts_per_token": 0, "moe_ffn_hidden_size": 0, "moe_layers": (False,) * 6}
    )
    with pytest.raises(ConfigError, match=r"(?s)ep \(2\) splits experts.*etp \(3\) splits experts"):
        require_fit(dense, policy(6, ep=2, etp=3))
    require_fit(dense, policy(4, tp=4, sequence_parallel=False))
    with pytest.raises(ConfigError, match="tp \\(8\\) does not divide the model's 36 feed-forward width"):
        require_fit(dense, policy(8, tp=8))


def test_all_reasons_are_said_at_once():
    with pytest.raises(ConfigError) as error:
        require_fit(policy_examples.architecture(**SIZES), policy(15, tp=3, etp=5))
    assert len(str(error.value).splitlines()) == 5


@pytest.mark.parametrize(
    ("vocabulary", "tp", "multiple", "padded"),
    [(151_936, 2, 128, 152_064), (151_936, 1, 128, 151_936), (97, 2, 1, 98), (97, 1, 1, 97), (97, 4, 8, 128)],
)
def test_vocabulary_is_padded_for_every_rank(vocabulary, tp, multiple, padded):
    settings = policy(tp, tp=tp, vocabulary_multiple=multiple)
    assert padded_vocabulary(policy_examples.architecture(vocab_size=vocabulary), settings) == padded


def test_what_a_layout_asks_of_micro_batches():
    architecture = policy_examples.architecture(**SIZES)
    rules = packing_rules(architecture, policy(24, tp=2, cp=2, pp=3, vpp=2, ep=2, micro_batch_tokens=100))
    assert (rules.ranks, rules.token_budget) == (2, 200)
    assert (rules.segment_multiple, rules.total_multiple, rules.count_multiple) == (4, math.lcm(4, 2 * 2), 3)
    assert not rules.equal_totals
    assert packing_rules(architecture, policy(2, ep=2, token_dispatcher="allgather")).equal_totals
    unpadded = packing_rules(architecture, policy(2, ep=2))
    assert (unpadded.segment_multiple, unpadded.total_multiple, unpadded.count_multiple) == (1, 1, 1)


def test_attention_costs_as_much_as_matrices_where_it_does_as_many_multiplications():
    """Counted by hand: a layer of one head of 16, 16 x 16 matrices, 2 of 4 experts of width 8, 10 rows of vocabulary."""
    architecture = policy_examples.architecture(
        num_layers=1,
        hidden_size=16,
        num_attention_heads=1,
        num_query_groups=1,
        head_dim=16,
        num_experts=4,
        experts_per_token=2,
        moe_ffn_hidden_size=8,
        vocab_size=10,
    )
    per_token = 4 * 16 * 16 + 2 * 3 * 16 * 8 + 16 * 4 + 16 * 10
    positions = 1000
    pairs = positions * positions / 2
    attention = 2 * pairs * 16  # query with key, and probability with value
    rules = packing_rules(architecture, policy(1))
    assert rules.attention_cost * positions**2 / positions == pytest.approx(attention / (per_token * positions))


@pytest.mark.parametrize("module", ["moe_act", "layernorm"])
def test_what_only_transformer_engine_can_compute_again_is_refused_without_it(module):
    recompute = {"granularity": "selective", "modules": ["core_attn", module]}
    cpu = Device(torch.device("cpu"), "gloo", transformer_engine=False, fused_gradient_accumulation=False)
    with pytest.raises(ConfigError, match=f"policy.recompute.modules: {module}: needs Transformer Engine"):
        transformer_config(
            policy_examples.architecture(), ModelConfig(path="unread"), policy(1, recompute=recompute), cpu
        )

"""The same inputs give the same bits; wrong ones say so and change nothing."""

import math
import pickle
from dataclasses import replace

import policy_examples
import policy_jobs
import policy_reference
import pytest
import torch

from megatron_vespo.config import ObjectiveConfig, OptimizerConfig
from megatron_vespo.objective.importance import NotFiniteError
from megatron_vespo.packing.batch import pack
from megatron_vespo.packing.steps import PackingRules, pack_step
from megatron_vespo.policy.losses import loss_function
from megatron_vespo.policy.result import TokenScores

ARCHITECTURE = policy_examples.architecture()
SEQUENCES = policy_examples.sequences([30, 12, 25, 8, 19, 40, 3, 16])


def test_same_inputs_give_bitwise_the_same_weights(ranks):
    setup = policy_jobs.Setup(ARCHITECTURE, ep=2)
    steps = [pack_step(SEQUENCES, PackingRules(ranks=2, token_budget=40))] * 3
    first, second = (ranks.run(2, policy_jobs.train, setup, steps) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert [result.loss for result in one.results] == [result.loss for result in other.results]
        for name, weight in one.weights.items():
            assert torch.equal(weight, other.weights[name]), name


def test_random_weights_do_not_depend_on_the_layout(ranks):
    (alone,) = ranks.run(1, policy_jobs.initial_weights, policy_jobs.Setup(ARCHITECTURE))
    spread = ranks.run(2, policy_jobs.initial_weights, policy_jobs.Setup(ARCHITECTURE, ep=2))
    here = ARCHITECTURE.num_experts // 2
    for rank, weights in enumerate(spread):
        for name, weight in weights.items():
            for local in range(here):
                name = name.replace(f"local_experts.{local}.", f"local_experts.<{local + rank * here}>.")
            assert torch.equal(weight, alone[name.replace("<", "").replace(">", "")]), name
    matrices = [weight for weight in alone.values() if weight.ndim == 2]
    assert len({weight.flatten()[0].item() for weight in matrices}) == len(matrices)
    assert alone["embedding.word_embeddings.weight"].std().item() == pytest.approx(0.02, rel=0.05)
    assert alone["decoder.layers.0.self_attention.linear_proj.weight"].std().item() == pytest.approx(0.01, rel=0.1)


@pytest.mark.parametrize("distributed_optimizer", [True, False])
def test_bfloat16_steps_float32_copies_of_the_loaded_weights(ranks, distributed_optimizer):
    model = policy_reference.reference_model(ARCHITECTURE)
    setup = policy_jobs.Setup(
        ARCHITECTURE,
        policy_reference.rank_weights(model, ARCHITECTURE, 2, 2),
        ep=2,
        dtype="bfloat16",
        distributed_optimizer=distributed_optimizer,
        optimizer=OptimizerConfig(learning_rate=1e-4),
    )
    steps = [pack_step(SEQUENCES, PackingRules(ranks=2, token_budget=80))] * 4
    trained = ranks.run(2, policy_jobs.train, setup, steps)
    exact = ranks.run(2, policy_jobs.train, policy_jobs.Setup(ARCHITECTURE, setup.weights, ep=2), steps[:1])
    assert trained[0].results[0].loss == pytest.approx(exact[0].results[0].loss, abs=0.05)
    for loaded, answer in zip(setup.weights, trained, strict=True):
        for name, weight in answer.weights.items():
            assert weight.dtype == torch.bfloat16
            moved = (weight.float() - loaded[name]).abs().max().item()
            # Four steps of 1e-4 are less than half a unit in bfloat16 near 1: without float32 copies nothing would
            # move, and with copies of the weights from before loading everything would.
            assert 0 < moved < 4e-4 + 2**-8 * loaded[name].abs().max().item(), name


def test_a_gradient_that_is_not_finite_is_refused(ranks):
    batches = pack_step(SEQUENCES, PackingRules(ranks=1, token_budget=200))
    ((message, unchanged),) = ranks.run(1, policy_jobs.fail_on_nan, policy_jobs.Setup(ARCHITECTURE), batches)
    assert "NaN" in message
    assert unchanged


def test_unequal_numbers_of_micro_batches_are_refused(ranks):
    batches = pack_step(SEQUENCES, PackingRules(ranks=2, token_budget=40))
    assert all(len(rank) >= 2 for rank in batches)
    messages = ranks.run(2, policy_jobs.unequal_counts, policy_jobs.Setup(ARCHITECTURE, ep=2), batches)
    assert all("found from 1 to 2" in message for message in messages)


def test_random_policy_starts_near_uniform(ranks):
    batches = pack_step(SEQUENCES, PackingRules(ranks=1, token_budget=200))
    (answer,) = ranks.run(1, policy_jobs.train, policy_jobs.Setup(ARCHITECTURE), [batches])
    assert math.isfinite(answer.results[0].gradient_norm)


def test_an_error_that_names_a_trajectory_goes_from_process_to_process():
    told = pickle.loads(pickle.dumps(NotFiniteError(1, ["x is nan"]).in_step(9)))
    assert (str(told), told.sequence) == ("trajectory 9 of this step: x is nan", 9)


def test_a_log_prob_that_cannot_be_names_its_trajectory_in_the_step():
    sequences = [replace(SEQUENCES[key], key=key) for key in (5, 2, 7)]
    broken = sequences[1].old_log_probs.copy()
    broken[-1] = -math.inf
    micro_batch = pack([sequences[0], replace(sequences[1], old_log_probs=broken), sequences[2]])
    log_probs = torch.full((len(micro_batch.input_ids),), -1.0, requires_grad=True)
    with pytest.raises(NotFiniteError, match="trajectory 2 of this step: old_log_probs of its response token"):
        loss_function(ObjectiveConfig())(TokenScores(log_probs), micro_batch)

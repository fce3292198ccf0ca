"""Replay in one process against transformers' model whose routers are told by hand which experts to use."""

import numpy as np
import policy_examples
import policy_reference
import pytest
import replay_jobs
import torch
from torch.nn import functional as F

from megatron_vespo.packing.batch import pack
from megatron_vespo.packing.steps import filler_of
from megatron_vespo.routing.routes import Routes
from megatron_vespo.routing.slices import RankPlace, slice_routes

SEQUENCES = policy_examples.sequences([9, 5, 12, 3, 7])
MICRO_BATCHES = [
    pack([SEQUENCES[0], SEQUENCES[3]], segment_multiple=4),
    pack([SEQUENCES[1], SEQUENCES[2], filler_of(SEQUENCES[0], 3)]),
    pack([SEQUENCES[4]]),
]
FP32 = 1e-5
"""Of a tensor's norm."""


def random_routes(architecture, seed=3):
    """By key. Most positions are recorded; the last sequence has none."""
    random = np.random.default_rng(seed)
    routes = {}
    for sequence in SEQUENCES[:-1]:
        shape = (sequence.positions, architecture.num_layers, architecture.num_experts)
        experts = random.random(shape).argsort(-1)[..., : architecture.experts_per_token]
        experts = experts.astype(architecture.routing_shape.dtype)
        versions = np.zeros(sequence.positions, dtype=np.int32)
        routes[sequence.key] = Routes(experts, random.random(sequence.positions) > 0.2, versions)
    return routes


def force(model, sequence, routes):
    """For the next forward pass of one sequence, tell each router which experts recorded positions go to."""
    for number, layer in enumerate(model.model.layers):
        layer.mlp.gate.forward = forced_router(layer.mlp.gate, number, routes.get(sequence.key))


def forced_router(gate, layer, routes):
    def forward(hidden_states):
        logits = F.linear(hidden_states.reshape(-1, gate.hidden_dim), gate.weight)
        chosen = logits.topk(gate.top_k).indices
        if routes is not None:
            rows = torch.from_numpy(routes.recorded)[:, None]
            chosen = torch.where(rows, torch.from_numpy(routes.experts[:, layer].astype(np.int64)), chosen)
        weights = logits.gather(1, chosen).softmax(-1) if gate.norm_topk_prob else logits.softmax(-1).gather(1, chosen)
        return logits, weights, chosen

    return forward


def reference_backward(model, routes):
    model.zero_grad()
    numerator, count = 0.0, 0
    for sequence in SEQUENCES:
        force(model, sequence, routes)
        mask = torch.as_tensor(sequence.label_mask)
        numerator = numerator - (policy_reference.log_probs_of(model, sequence)[mask] * sequence.advantage).sum()
        count += int(mask.sum())
    (numerator / count).backward()
    return (numerator / count).item()


def slices(architecture, routes):
    place = RankPlace(0, tuple(range(architecture.num_layers)))
    return slice_routes(MICRO_BATCHES, routes, place, architecture.routing_shape)


@pytest.mark.parametrize(
    ("recompute", "changes"),
    [
        ("none", {}),
        ("moe", {}),
        ("full", {"normalise_topk": False}),
        ("none", {"normalise_topk": False}),
        ("full", {"num_experts": 257, "moe_ffn_hidden_size": 4}),
    ],
)
def test_loss_and_every_gradient_the_routers_too(ranks, recompute, changes):
    architecture = policy_examples.architecture(**changes)
    model = policy_reference.reference_model(architecture).double()
    routes = random_routes(architecture)
    setup = replay_jobs.setup(architecture, model, recompute)
    (answer,) = ranks.run(1, replay_jobs.train, setup, MICRO_BATCHES, slices(architecture, routes))

    loss = reference_backward(model, routes)
    gradients = policy_reference.named_gradients(model)
    expected = policy_reference.to_megatron(gradients, architecture, range(architecture.num_experts))
    assert answer.result.loss == pytest.approx(loss, rel=FP32, abs=1e-6)
    assert answer.gradients.keys() == expected.keys()
    for name, tensor in expected.items():
        difference = (answer.gradients[name].double() - tensor).norm()
        assert difference <= FP32 * tensor.norm(), f"{name}: {difference:.1e} with a norm of {tensor.norm():.1e}"
    routers = [name for name in expected if name.endswith("router.weight")]
    assert len(routers) == architecture.num_layers
    assert all(expected[name].norm() > 1e-3 for name in routers)


def test_agreement_is_counted_as_numpy_counts_it(ranks):
    architecture = policy_examples.architecture()
    model = policy_reference.reference_model(architecture).double()
    routes = random_routes(architecture)
    setup = replay_jobs.setup(architecture, model)
    (answer,) = ranks.run(1, replay_jobs.train, setup, MICRO_BATCHES, slices(architecture, routes))

    expected = np.zeros((architecture.num_layers, 5 + architecture.num_experts))
    for sequence in SEQUENCES[:-1]:
        force(model, sequence, routes)
        tokens = torch.as_tensor(sequence.token_ids).long()
        logits = model(tokens[None, :-1], output_router_logits=True, use_cache=False).router_logits
        own = routes[sequence.key]
        for layer, scores in enumerate(logits):
            order = scores.detach().numpy().argsort(-1)[:, ::-1]
            for position in own.recorded.nonzero()[0]:
                recorded, native = own.experts[position, layer].tolist(), order[position, :2].tolist()
                ranked = np.sort(scores[position].detach().numpy())[::-1]
                common = len(set(recorded) & set(native))
                expected[layer, :4] += 1, set(recorded) == set(native), recorded == native, common / 2
                expected[layer, 4] += (ranked[1] - ranked[2]) * (common < 2)
                expected[layer, 5 + np.array(recorded)] += 1
    np.testing.assert_allclose(answer.result.routing.numpy(), expected, rtol=1e-4)


@pytest.mark.parametrize("changes", [{}, {"num_experts": 257, "moe_ffn_hidden_size": 4}])
def test_a_recording_is_what_transformers_chooses_and_replays_to_the_same_scores(ranks, changes):
    architecture = policy_examples.architecture(**changes)
    model = policy_reference.reference_model(architecture)
    (answer,) = ranks.run(1, replay_jobs.record, replay_jobs.setup(architecture, model), MICRO_BATCHES)
    assert all(own.experts.dtype == architecture.routing_shape.dtype for own in answer.recorded)
    for micro_batch, own in zip(MICRO_BATCHES, answer.recorded, strict=True):
        starts = micro_batch.cu_seqlens.tolist()
        for key, start, length in zip(micro_batch.keys, starts, micro_batch.lengths, strict=False):
            if key < 0:
                assert not own.recorded[start : start + length].any()
                continue
            tokens = torch.as_tensor(SEQUENCES[key].token_ids).long()
            logits = model(tokens[None, :-1], output_router_logits=True, use_cache=False).router_logits
            for layer, scores in enumerate(logits):
                assert own.experts[start : start + length, layer].tolist() == scores.topk(2).indices.tolist()
            assert own.recorded[start : start + length].all()
        assert own.recorded.sum() == sum(
            n for key, n in zip(micro_batch.keys, micro_batch.lengths, strict=True) if key >= 0
        )
    for key, log_probs in answer.native.items():
        torch.testing.assert_close(answer.replayed[key], log_probs, rtol=0, atol=0)


def test_padding_goes_to_no_expert(ranks):
    architecture = policy_examples.architecture()
    model = policy_reference.reference_model(architecture)
    (counts,) = ranks.run(1, replay_jobs.tokens_of_experts, replay_jobs.setup(architecture, model), MICRO_BATCHES)
    for micro_batch, layers in zip(MICRO_BATCHES, counts, strict=True):
        real = sum(length for key, length in zip(micro_batch.keys, micro_batch.lengths, strict=True) if key >= 0)
        assert layers == [real * architecture.experts_per_token] * architecture.num_layers


def test_routes_that_are_not_used_exactly_once_are_an_error_that_names_them(ranks):
    architecture = policy_examples.architecture()
    model = policy_reference.reference_model(architecture)
    setup, routes = replay_jobs.setup(architecture, model), slices(architecture, random_routes(architecture))
    (said,) = ranks.run(1, replay_jobs.misuses, setup, MICRO_BATCHES, routes)
    assert "micro-batch 1" in said["a row too few"]
    assert "MoE layer 1, micro-batch 2: its routes were used 0 times" in said["a router that is not asked"]
    assert "MoE layer 0, micro-batch 0: its routes were used 2 times" in said["a router that is asked twice"]
    assert said["afterwards"] == "nothing"


def test_a_second_model_of_the_process_routes_by_itself_meanwhile(ranks):
    architecture = policy_examples.architecture()
    model = policy_reference.reference_model(architecture)
    routes = slices(architecture, random_routes(architecture))
    setup = replay_jobs.setup(architecture, model)
    (seen,) = ranks.run(1, replay_jobs.beside_another_model, setup, MICRO_BATCHES, routes)
    assert torch.equal(*seen.other)
    assert torch.equal(*seen.replayed)

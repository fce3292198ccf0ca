"""Loss, gradients and updates of every rank equal one float64 process of transformers, whatever the split."""

import copy

import policy_examples
import policy_jobs
import policy_reference
import pytest
import torch

from megatron_vespo.config import OptimizerConfig
from megatron_vespo.policy.batch import pack
from megatron_vespo.policy.packing import FILLER_KEY, filler_of
from megatron_vespo.policy.result import merge

SEQUENCES = policy_examples.sequences([13, 2, 31, 7, 20, 9, 16, 5], masked=(3, 5))
ALL_MASKED_ON_RANK_1 = [[pack(SEQUENCES[:3]), pack(SEQUENCES[4:5])], [pack([SEQUENCES[3]]), pack([SEQUENCES[5]])]]
UNEQUAL_COUNTS = [[pack(SEQUENCES[:3]), pack(SEQUENCES[3:4])], [pack(SEQUENCES[4:]), pack([filler_of(SEQUENCES[0])])]]
FP32 = 1e-5
"""Of a tensor's norm."""


def float64_reference(architecture):
    return policy_reference.reference_model(architecture).double()


def reference_backward(model, sequences):
    """Loss with its gradient, in one float64 process."""
    model.zero_grad()
    numerator, count = 0.0, 0
    for sequence in sequences:
        mask = torch.as_tensor(sequence.label_mask)
        numerator = numerator - (policy_reference.log_probs_of(model, sequence)[mask] * sequence.advantage).sum()
        count += int(mask.sum())
    loss = numerator / count
    loss.backward()
    return loss.item(), count


def assert_close_per_tensor(found, expected, relative):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        difference = (found[name].double() - tensor.double()).norm() / tensor.double().norm()
        assert difference < relative, f"{name}: {difference:.1e} of its norm"


def sequences_in(batches):
    keys = [key for rank in batches for micro_batch in rank for key in micro_batch.keys]
    return [SEQUENCES[key] for key in keys if key >= 0]


@pytest.mark.parametrize(
    ("world_size", "ep", "distributed_optimizer", "batches", "changes"),
    [
        (1, 1, True, [UNEQUAL_COUNTS[0] + UNEQUAL_COUNTS[1]], {}),
        (1, 1, False, [[pack(SEQUENCES)]], {"tied_embeddings": True}),
        (2, 2, True, UNEQUAL_COUNTS, {}),
        (2, 2, True, ALL_MASKED_ON_RANK_1, {}),
        (2, 1, True, UNEQUAL_COUNTS, {"tied_embeddings": True}),
        (2, 2, False, UNEQUAL_COUNTS, {}),
    ],
)
def test_loss_and_every_gradient(ranks, world_size, ep, distributed_optimizer, batches, changes):
    architecture = policy_examples.architecture(**changes)
    model = float64_reference(architecture)
    setup = policy_jobs.Setup(
        architecture,
        policy_reference.rank_weights(model, architecture, world_size, ep),
        ep=ep,
        distributed_optimizer=distributed_optimizer,
    )
    trained = ranks.run(world_size, policy_jobs.train, setup, [batches])
    loss, count = reference_backward(model, sequences_in(batches))
    gradients = policy_reference.named_gradients(model)
    norm = torch.cat([gradient.flatten() for gradient in gradients.values()]).norm().item()
    for rank, answer in enumerate(trained):
        result = answer.results[0]
        assert result.loss == pytest.approx(loss, rel=FP32, abs=1e-6)
        assert result.denominator == count
        assert result.gradient_norm == pytest.approx(norm, rel=FP32)
        experts = policy_reference.experts_of(rank, architecture, ep)
        expected = policy_reference.to_megatron(gradients, architecture, experts)
        assert_close_per_tensor(answer.gradients, expected, FP32)


@pytest.mark.parametrize(("world_size", "ep"), [(1, 1), (2, 2)])
def test_the_norm_of_a_gradient_is_found_without_learning(ranks, world_size, ep):
    architecture = policy_examples.architecture()
    model = float64_reference(architecture)
    setup = policy_jobs.Setup(architecture, policy_reference.rank_weights(model, architecture, world_size, ep), ep=ep)
    batches = UNEQUAL_COUNTS if world_size == 2 else [UNEQUAL_COUNTS[0] + UNEQUAL_COUNTS[1]]
    _, count = reference_backward(model, sequences_in(batches))
    gradients = policy_reference.named_gradients(model)
    expected = torch.cat([gradient.flatten() for gradient in gradients.values()]).norm().item()
    for (norm, denominator), unchanged in ranks.run(world_size, policy_jobs.gradient_norm, setup, batches):
        assert norm == pytest.approx(expected, rel=FP32)
        assert denominator == count
        assert unchanged


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize(("world_size", "ep"), [(1, 1), (2, 2)])
def test_updates_over_several_steps(ranks, world_size, ep, scaled):
    """AdamW with clipping, decay but for the exempt, warm-up and a linear schedule, as torch.optim.AdamW has them; with
    `scale_by_kept_gradient`, each rate is the schedule's times the share that the kernel lets through."""
    architecture = policy_examples.architecture()
    model = float64_reference(architecture)
    settings = OptimizerConfig(
        learning_rate=2e-3,
        schedule="linear",
        min_learning_rate=1e-4,
        warmup_steps=2,
        weight_decay=0.5,
        gradient_clip=0.3,
        betas=(0.8, 0.9),
        epsilon=1e-6,
        scale_by_kept_gradient=scaled,
    )
    setup = policy_jobs.Setup(
        architecture,
        policy_reference.rank_weights(model, architecture, world_size, ep),
        ep=ep,
        optimizer=settings,
        total_steps=5,
    )
    batches = UNEQUAL_COUNTS if world_size == 2 else [UNEQUAL_COUNTS[0] + UNEQUAL_COUNTS[1]]
    trained = ranks.run(world_size, policy_jobs.train, setup, [batches] * 4)

    before = policy_reference.named_weights(model)
    share = kept_share(sequences_in(batches)) if scaled else 1.0
    assert share == 1.0 or 0.1 < share < 0.9
    rates = [share * rate for rate in (2e-3 / 3, 4e-3 / 3, 2e-3, 2e-3 - 1.9e-3 / 3)]
    train_reference(model, settings, rates, sequences_in(batches))
    after = policy_reference.named_weights(model)
    for rank, answer in enumerate(trained):
        assert [result.learning_rate for result in answer.results] == pytest.approx(rates)
        assert all(result.gradient_norm > settings.gradient_clip for result in answer.results)
        experts = policy_reference.experts_of(rank, architecture, ep)
        start = policy_reference.to_megatron(before, architecture, experts)
        end = policy_reference.to_megatron(after, architecture, experts)
        found = {name: answer.weights[name].double() - start[name] for name in start}
        assert_close_per_tensor(found, {name: end[name] - start[name] for name in start}, relative=1e-4)


def kept_share(sequences):
    """Mean abs(phi A) over mean abs(A), of the sequences that have a token in the loss."""
    some = [sequence for sequence in sequences if any(sequence.label_mask)]
    sizes = [abs(sequence.advantage) for sequence in some]
    kept = [policy_jobs.KEPT[sequence.key] * size for sequence, size in zip(some, sizes, strict=True)]
    return sum(kept) / sum(sizes)


def train_reference(model, settings, rates, sequences):
    decaying = [parameter for name, parameter in model.named_parameters() if "norm" not in name]
    exempt = [parameter for name, parameter in model.named_parameters() if "norm" in name]
    groups = [{"params": decaying, "weight_decay": settings.weight_decay}, {"params": exempt, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=settings.betas, eps=settings.epsilon)
    for rate in rates:
        reference_backward(model, sequences)
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.gradient_clip)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()


def test_load_balancing_loss_is_weighed_by_real_positions(ranks):
    """Outside the promise of equal splits: each micro-batch adds its own loss times its positions to the numerator.
    Fillers count in none."""
    architecture = policy_examples.architecture()
    model = float64_reference(architecture)
    coefficient = 0.5
    setup = policy_jobs.Setup(
        architecture, policy_reference.rank_weights(model, architecture, 2, 2), ep=2, router_aux_loss=coefficient
    )
    trained = ranks.run(2, policy_jobs.train, setup, [UNEQUAL_COUNTS])

    _, count = reference_backward(model, SEQUENCES)
    for micro_batch in [mb for rank in UNEQUAL_COUNTS for mb in rank if mb.keys != (FILLER_KEY,)]:
        layers = router_logits(model, micro_batch)
        positions = len(micro_batch.input_ids)
        loss = sum(load_balancing_loss(layer, architecture) for layer in layers)
        (coefficient * loss * positions / count).backward()
    gradients = policy_reference.named_gradients(model)
    for rank, answer in enumerate(trained):
        experts = policy_reference.experts_of(rank, architecture, 2)
        expected = policy_reference.to_megatron(gradients, architecture, experts)
        assert_close_per_tensor(answer.gradients, expected, FP32)


def router_logits(model, micro_batch):
    """Of each layer, [t, experts], of the packed sequences one by one."""
    sequences = micro_batch.input_ids.split(micro_batch.cu_seqlens.diff().tolist())
    per_sequence = [model(ids[None], output_router_logits=True).router_logits for ids in sequences]
    return [torch.cat(layer) for layer in zip(*per_sequence, strict=True)]


def load_balancing_loss(logits, architecture):
    """Fedus et al. 2021, eq. 4-6, for top-k: experts * sum over experts of token share * mean probability."""
    probabilities = logits.softmax(-1)
    chosen = torch.zeros_like(logits).scatter(1, logits.topk(architecture.experts_per_token).indices, 1.0)
    share = chosen.mean(0) / architecture.experts_per_token
    return architecture.num_experts * (share * probabilities.mean(0)).sum()


def test_metrics_come_back_in_the_order_of_keys_without_fillers(ranks):
    architecture = policy_examples.architecture()
    setup = policy_jobs.Setup(architecture, ep=2)
    shuffled = copy.deepcopy(UNEQUAL_COUNTS)
    shuffled[0][0] = pack([SEQUENCES[2], SEQUENCES[0], SEQUENCES[1]])
    trained = ranks.run(2, policy_jobs.train, setup, [shuffled])
    merged = merge([answer.results[0] for answer in trained])
    assert merged.keys == tuple(range(len(SEQUENCES)))
    assert merged.sequences["advantage"].tolist() == pytest.approx([s.advantage for s in SEQUENCES])
    assert merged.sums["tokens"] == merged.denominator == sum(int(s.label_mask.sum()) for s in SEQUENCES)

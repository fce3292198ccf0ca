"""Log-probs and logits of packed sequences equal those of transformers' model on each sequence alone."""

import policy_examples
import policy_jobs
import policy_reference
import pytest
import torch

from megatron_vespo.packing.batch import pack

SEQUENCES = policy_examples.sequences([13, 2, 31, 7, 20, 9])
BATCHES = [[pack(SEQUENCES[:2]), pack(SEQUENCES[2:3])], [pack(SEQUENCES[3:5]), pack(SEQUENCES[5:])]]


def shares(batches, world_size):
    return batches if world_size == 2 else [batches[0] + batches[1]]


@pytest.mark.parametrize(
    ("world_size", "ep", "changes"),
    [
        (1, 1, {}),
        (2, 2, {}),
        (1, 1, {"tied_embeddings": True}),
        (1, 1, {"normalise_topk": False, "num_query_groups": 4, "experts_per_token": 3}),
    ],
)
def test_logits_and_log_probs_of_packed_sequences(ranks, world_size, ep, changes):
    architecture = policy_examples.architecture(**changes)
    model = policy_reference.reference_model(architecture)
    setup = policy_jobs.Setup(
        architecture, policy_reference.rank_weights(model, architecture, world_size, ep), ep=ep, temperature=0.7
    )
    answers = ranks.run(world_size, policy_jobs.forward, setup, shares(BATCHES, world_size))
    with torch.no_grad():
        expected_logits = torch.cat([policy_reference.logits_of(model, s) for s in SEQUENCES])
        expected = torch.cat([policy_reference.log_probs_of(model, s, temperature=0.7) for s in SEQUENCES])
    logits = torch.cat([part for answer in answers for part in answer["logits"]])
    log_probs = torch.cat([part for answer in answers for part in answer["log_probs"]])
    assert log_probs.dtype == torch.float32
    torch.testing.assert_close(logits, expected_logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(log_probs, expected, atol=1e-5, rtol=0)


def test_log_prob_i_is_of_token_i_plus_1_given_the_tokens_up_to_i(ranks):
    architecture = policy_examples.architecture()
    model = policy_reference.reference_model(architecture)
    setup = policy_jobs.Setup(architecture, policy_reference.rank_weights(model, architecture, 1, 1))
    packed = policy_examples.sequences([6, 9, 4], seed=3)
    answer = ranks.run(1, policy_jobs.forward, setup, [[pack(packed)]])[0]["log_probs"]
    for sequence, found in zip(packed, answer, strict=True):
        tokens = torch.as_tensor(sequence.token_ids).long()
        for i in range(len(tokens) - 1):
            with torch.no_grad():
                next_token = model(tokens[None, : i + 1]).logits[0, -1].log_softmax(-1)
            assert found[i].item() == pytest.approx(next_token[tokens[i + 1]].item(), abs=1e-5)
        assert len(found) == len(tokens) - 1

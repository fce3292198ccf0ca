"""Log-probs and entropy of dense, Llama and mixed models, read from a folder, equal those of transformers' own class."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_vespo.architecture.layout_fit import packing_rules
from megatron_vespo.packing.steps import pack_step
from megatron_vespo.parity import worker
from megatron_vespo.parity.case import MODELS, build_case
from megatron_vespo.parity.layouts import parse_layout
from megatron_vespo.policy.losses import loss_function


def scores_and_updates(rank, world_size, port, case, policy):
    """Scores before training, of the frozen reference and of the policy after two steps."""
    with worker.joined(rank, world_size, port, case, policy) as trainer:
        (share,) = pack_step(case.steps[0], packing_rules(case.architecture, policy))
        trainer.freeze_reference(offload=True)
        before = trainer.score(share, with_entropy=True)
        loss = loss_function(case.objective, trainer.context_parallel_group)
        for _ in range(2):
            trainer.train_step(share, loss)
        return before, trainer.score(share, reference=True), trainer.score(share)


@pytest.mark.parametrize("model", MODELS)
def test_scores(ranks, tmp_path, model):
    case = build_case(tmp_path, model)
    ((before, reference, after),) = ranks.run(1, scores_and_updates, case, parse_layout("dp=1").policy)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager").eval()
    for sequence in case.steps[0]:
        tokens = torch.as_tensor(sequence.token_ids).long()
        with torch.no_grad():
            expected = theirs(tokens[None, :-1]).logits[0].double().log_softmax(-1)
        entropy = -(expected.exp() * expected).sum(-1)
        found = before[sequence.key]
        chosen = expected.gather(1, tokens[1:, None]).squeeze(1)
        torch.testing.assert_close(found.log_probs.double(), chosen, atol=1e-5, rtol=0)
        torch.testing.assert_close(found.entropy.double(), entropy, atol=1e-5, rtol=0)
        assert torch.equal(reference[sequence.key].log_probs, found.log_probs), "the reference moved"
        assert not torch.equal(after[sequence.key].log_probs, found.log_probs), "the policy did not"

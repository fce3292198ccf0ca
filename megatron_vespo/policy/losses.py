"""The loss of one micro-batch, in the form that Megatron's schedule divides: numerator, count, metrics."""

import torch.distributed as dist
from torch import Tensor

from megatron_vespo.config import ObjectiveConfig
from megatron_vespo.objective import LossMetrics, demonstration_loss, policy_loss
from megatron_vespo.objective.aggregation import local_count
from megatron_vespo.objective.importance import NotFiniteError
from megatron_vespo.packing.batch import MicroBatch
from megatron_vespo.policy.result import TokenScores
from megatron_vespo.policy.schedule import LossFunction


def loss_function(
    objective: ObjectiveConfig | None, context_parallel_group: dist.ProcessGroup | None = None
) -> LossFunction:
    """None: cross-entropy on demonstrations."""

    def supervised(scores: TokenScores, batch: MicroBatch) -> tuple[Tensor, Tensor, LossMetrics]:
        numerator, metrics = demonstration_loss(scores.log_probs, batch.label_mask)
        return numerator, batch.label_mask.sum(), metrics

    def reinforced(scores: TokenScores, batch: MicroBatch) -> tuple[Tensor, Tensor, LossMetrics]:
        assert objective is not None
        try:
            numerator, metrics = policy_loss(
                objective,
                log_probs=scores.log_probs,
                old_log_probs=batch.old_log_probs,
                advantages=batch.advantages,
                response_mask=batch.label_mask,
                cu_seqlens=batch.cu_seqlens,
                denominator=1,
                engine_log_weights=batch.engine_log_weights,
                kl_reference_log_probs=batch.reference_log_probs,
                entropy=scores.entropy,
                context_parallel_group=context_parallel_group,
            )
        except NotFiniteError as error:
            raise error.in_step(batch.keys[error.sequence]) from None
        count = local_count(objective.aggregation, batch.label_mask, batch.cu_seqlens, context_parallel_group)
        return numerator, count, metrics

    return supervised if objective is None else reinforced

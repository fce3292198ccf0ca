"""The loss of one micro-batch, in the form that Megatron's schedule divides: numerator, count, metrics."""

from torch import Tensor

from megatron_vespo.config import ObjectiveConfig
from megatron_vespo.objective import LossMetrics, demonstration_loss, policy_loss
from megatron_vespo.objective.aggregation import local_count
from megatron_vespo.policy.batch import MicroBatch


def loss_function(objective: ObjectiveConfig | None):
    """None: cross-entropy on demonstrations."""

    def supervised(log_probs: Tensor, batch: MicroBatch) -> tuple[Tensor, Tensor, LossMetrics]:
        numerator, metrics = demonstration_loss(log_probs, batch.label_mask)
        return numerator, batch.label_mask.sum(), metrics

    def reinforced(log_probs: Tensor, batch: MicroBatch) -> tuple[Tensor, Tensor, LossMetrics]:
        assert objective is not None
        numerator, metrics = policy_loss(
            objective,
            log_probs=log_probs,
            old_log_probs=batch.old_log_probs,
            advantages=batch.advantages,
            response_mask=batch.label_mask,
            cu_seqlens=batch.cu_seqlens,
            denominator=1,
        )
        return numerator, local_count(objective.aggregation, batch.label_mask, batch.cu_seqlens), metrics

    return supervised if objective is None else reinforced

"""Megatron's AdamW and its schedule, from our settings."""

import re
from fnmatch import fnmatchcase

from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer.optimizer_config import ParamKey, ParamWithNamePredicate
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler, ParamGroupOverride
from megatron.core.transformer.module import MegatronModule

from megatron_vespo.config import ConfigError, ModelConfig, OptimizerConfig, PolicyConfig
from megatron_vespo.policy.device import Device
from megatron_vespo.policy.transformer_config import DTYPES

WRAPPER_PREFIX = re.compile(r"^(module\.)+")
FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
}
"""Transformer Engine's layers hold these norms inside the matrix that follows; they keep one name in the settings."""


def build_optimizer(
    chunks: list[MegatronModule],
    model: ModelConfig,
    policy: PolicyConfig,
    optimizer: OptimizerConfig,
    device: Device,
) -> MegatronOptimizer:
    """Megatron's optimizer over the wrapped model chunks.

    With bfloat16 parameters it steps float32 copies of them. Its own rule for which parameters don't decay is replaced
    by `optimizer.weight_decay_exempt`.

    Raises:
        ConfigError: state is to be kept in host memory, and there is no other.
    """
    if policy.optimizer_cpu_offload and not device.is_cuda:
        raise ConfigError("policy.optimizer_cpu_offload: needs CUDA; set it to 0")
    settings = MegatronOptimizerConfig(
        optimizer="adam",
        lr=optimizer.learning_rate,
        min_lr=optimizer.min_learning_rate,
        weight_decay=optimizer.weight_decay,
        adam_beta1=optimizer.betas[0],
        adam_beta2=optimizer.betas[1],
        adam_eps=optimizer.epsilon,
        decoupled_weight_decay=True,
        clip_grad=optimizer.gradient_clip,
        params_dtype=DTYPES[model.dtype],
        bf16=model.dtype == "bfloat16",
        use_distributed_optimizer=policy.distributed_optimizer,
        overlap_param_gather=policy.overlap_parameter_gathering,
        optimizer_cpu_offload=policy.optimizer_cpu_offload > 0,
        optimizer_offload_fraction=policy.optimizer_cpu_offload,
        use_precision_aware_optimizer=policy.optimizer_cpu_offload > 0,
    )
    exempt = ParamKey(
        with_name_predicate=ParamWithNamePredicate(
            name="weight_decay_exempt", fn=lambda _, name: is_exempt(name, optimizer.weight_decay_exempt)
        )
    )
    no_decay: ParamGroupOverride = {"wd_mult": 0.0}  # type: ignore[typeddict-item]
    built = get_megatron_optimizer(settings, chunks, config_overrides={exempt: no_decay}, use_gloo_process_groups=False)
    if not device.is_cuda:
        for group in built.param_groups:  # torch's AdamW steps one parameter after the other unless told to
            group["fused"] = True
    return built


def is_exempt(name: str, patterns: tuple[str, ...]) -> bool:
    """Whether the parameter `name`, as a wrapped model chunk calls it, matches one of the shell patterns."""
    name = WRAPPER_PREFIX.sub("", name)
    for fused, separate in FUSED_NORMS.items():
        name = name.replace(fused, separate)
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def build_scheduler(
    megatron_optimizer: MegatronOptimizer, optimizer: OptimizerConfig, total_steps: int
) -> OptimizerParamScheduler:
    """Learning rate by step; call `step(1)` after each optimizer step.

    With w warm-up steps of n, step k (from 0) has rate (k + 1) / (w + 1) of the full one while k <= w, and has gone
    (k - w) / (n - w) of the way to the minimum after that: no step has rate 0, unless the minimum is 0 and k = n.
    """
    return OptimizerParamScheduler(
        megatron_optimizer,
        init_lr=optimizer.learning_rate / (optimizer.warmup_steps + 1),
        max_lr=optimizer.learning_rate,
        min_lr=optimizer.min_learning_rate,
        lr_warmup_steps=optimizer.warmup_steps,
        lr_decay_steps=total_steps,
        lr_decay_style=optimizer.schedule,
        start_wd=optimizer.weight_decay,
        end_wd=optimizer.weight_decay,
        wd_incr_steps=total_steps,
        wd_incr_style="constant",
    )

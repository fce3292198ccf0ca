"""Layouts to compare with one process, written as `tp=2,ep=2,recompute=full`."""

import math
from dataclasses import dataclass

from pydantic import ValidationError

from megatron_vespo.config import ConfigError, LayoutConfig, PolicyConfig, RecomputeConfig

SIZES = ("tp", "etp", "ep", "pp", "vpp", "cp")
MICRO_BATCH_TOKENS = 48
"""Small, so that every rank has several micro-batches."""

MATRIX = (
    "dp=1",
    "dp=2",
    "dp=2,optimizer=plain",
    "dp=2,overlap=gradients",
    "dp=2,overlap=parameters",
    "ep=2",
    "ep=2,dispatcher=allgather",
    "tp=2,etp=2",
    "tp=2,etp=2,dispatcher=allgather",
    "tp=2,ep=2",
    "pp=2",
    "pp=2,vpp=2",
    "cp=2",
    "cp=2,ep=2",
    "dp=4",
    "ep=4",
    "ep=2,dp=4",
    "tp=4,etp=4",
    "tp=4,ep=4",
    "tp=2,ep=2,dp=2",
    "tp=2,ep=4,dp=2",
    "tp=2,etp=2,dp=2",
    "tp=2,etp=2,ep=2,dp=2",
    "etp=2,ep=2",
    "tp=2,pp=2,etp=2",
    "tp=2,pp=2,ep=2",
    "tp=2,pp=2,vpp=2,ep=2",
    "pp=4",
    "pp=2,dp=2",
    "pp=2,vpp=2,dp=2,overlap=parameters",
    "pp=2,ep=2",
    "pp=2,ep=2,dispatcher=allgather",
    "cp=4",
    "cp=2,dp=2",
    "cp=2,pp=2",
    "cp=2,pp=2,vpp=2",
    "cp=2,ep=4",
    "tp=2,cp=2,etp=2",
    "tp=2,cp=2,ep=2",
    "tp=2,cp=2,ep=4,overlap=parameters",
)
"""Each axis alone, then together, over 1, 2 and 4 ranks."""

SELECTIVE = (
    "tp=2,ep=2,recompute=selective",
    "pp=2,ep=2,recompute=selective",
    "cp=2,ep=2,recompute=selective",
    "pp=2,vpp=2,ep=2,recompute=moe",
    "tp=2,cp=2,ep=2,recompute=moe",
)


@dataclass(frozen=True)
class LayoutCase:
    name: str
    policy: PolicyConfig


def matrix(world_size: int) -> list[LayoutCase]:
    """All layouts of at most `world_size` ranks, each with and without full recomputation."""
    names = [name for base in MATRIX for name in (base, f"{base},recompute=full")]
    cases = [parse_layout(name) for name in (*names, *SELECTIVE)]
    return [case for case in cases if case.policy.ranks <= world_size]


def parse_layout(text: str) -> LayoutCase:
    """`tp=2,ep=2,...`: sizes of axes, dp (else the smallest that the others allow), and settings.

    Settings: recompute=none|selective|moe|full (selective: attention; moe: the MoE layers too), dispatcher=alltoall|allgather|flex, optimizer=distributed|plain,
    overlap=gradients|parameters, sequence_parallel=true|false, tokens=N (micro-batch tokens).

    Raises:
        ConfigError: an unknown key or value, or a layout that is refused, with the reason.
    """
    given = dict(_pair(text, part) for part in text.split(","))
    layout = {key: given.pop(key) for key in (*SIZES, "sequence_parallel") if key in given}
    dp = given.pop("dp", None)
    recompute = given.pop("recompute", "none")
    overlap = given.pop("overlap", "none")
    settings = {
        "token_dispatcher": given.pop("dispatcher", "alltoall"),
        "distributed_optimizer": given.pop("optimizer", "distributed") != "plain",
        "overlap_gradient_reduction": overlap in ("gradients", "parameters"),
        "overlap_parameter_gathering": overlap == "parameters",
        "micro_batch_tokens": given.pop("tokens", MICRO_BATCH_TOKENS),
    }
    if given:
        raise ConfigError(f"{text}: unknown key {', '.join(given)}")
    try:
        sizes = LayoutConfig.model_validate(layout)
        ranks = sizes.model_ranks * int(dp) if dp else math.lcm(sizes.model_ranks, sizes.expert_model_ranks)
        policy = PolicyConfig.model_validate(
            settings
            | {
                "ranks": ranks,
                "layout": sizes,
                "recompute": _recompute(recompute),
                "head_chunk_tokens": 16,
                "step_timeout_seconds": 120,
            }
        )
    except ValidationError as error:
        mistakes = [f"{text}: {'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
        raise ConfigError("\n".join(mistakes)) from None
    if problems := list(policy.problems()):
        raise ConfigError("\n".join(f"{text}: {key}: {message}" for key, message in problems))
    return LayoutCase(text, policy)


def _recompute(value: str) -> RecomputeConfig:
    if value == "moe":
        return RecomputeConfig(granularity="selective", modules=("core_attn", "moe"))
    return RecomputeConfig.model_validate({"granularity": value, "modules": ("core_attn",)})


def _pair(text: str, part: str) -> tuple[str, str]:
    key, equals, value = part.strip().partition("=")
    if not (key and equals and value):
        raise ConfigError(f"{text}: expected key=value separated by commas, found {part!r}")
    return key, value

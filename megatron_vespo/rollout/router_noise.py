"""An engine that routes wrongly on purpose: normal noise on its router logits (`rollout.engine.router_noise`).

The server is started with `--router-noise SCALE --router-noise-on selection|logits`, options of our launcher
(megatron_vespo.rollout.serve), which registers a hook of SGLang's own registry. Without them nothing is registered. The
experts that SGLang returns are those that were used.
"""

import argparse
import functools
from collections.abc import Sequence
from typing import Any

import torch

from megatron_vespo.config.rollout import RouterNoiseConfig

GOLDEN = -7046029254386353131
MIX = (-4658895280553007687, -7723592293110705685)
"""The constants of SplitMix64 (0x9E3779B97F4A7C15; 0xBF58476D1CE4E5B9, 0x94D049BB133111EB) as signed integers."""


def as_options(noise: RouterNoiseConfig | None) -> list[str]:
    """For the launcher's command line."""
    return [] if noise is None else ["--router-noise", str(noise.scale), "--router-noise-on", noise.on]


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--router-noise", type=float, metavar="SCALE")
    parser.add_argument("--router-noise-on", choices=("selection", "logits"), default="selection")


def register(arguments: Sequence[str]) -> None:
    """Register the hook if the command line asks for it: in each process of the server, before SGLang loads plugins."""
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    add_options(parser)
    options, _ = parser.parse_known_args(arguments)
    if options.router_noise is None:
        return
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    choose = functools.partial(select_noisy_experts, scale=options.router_noise, on=options.router_noise_on)
    HookRegistry.register("sglang.srt.layers.moe.topk.select_experts", choose, HookType.AROUND)
    HookRegistry.register("sglang.srt.layers.moe.topk.TopK.forward_cuda", require_standard_topk, HookType.BEFORE)


def require_standard_topk(topk: Any, *_, **__) -> None:
    """Raises RuntimeError for a runner that chooses experts inside its own kernel, where no noise reaches it."""
    from sglang.srt.layers.moe.topk import TopKOutputFormat

    if topk.topk_config.output_format not in (None, TopKOutputFormat.STANDARD):
        raise RuntimeError(
            "rollout.engine.router_noise needs a MoE runner to which experts are given: set "
            'rollout.engine.extra_arguments: {"moe-runner-backend": "triton"}'
        )


def select_noisy_experts(
    select_experts, hidden_states, router_logits, topk_config, *, scale, on, layer_id=None, **rest
):
    """Around SGLang's `select_experts`, whose arguments and result it has.

    Raises:
        RuntimeError: a router whose gate weights are not a softmax over its logits.
    """
    noisy = router_logits + scale * normal_noise(router_logits, layer_id or 0).to(router_logits.dtype)
    chosen = select_experts(hidden_states, noisy, topk_config, layer_id=layer_id, **rest)
    if on == "logits":
        return chosen
    require_plain_softmax(topk_config)
    weights = gate_weights(router_logits, chosen.topk_ids, renormalize=topk_config.renormalize)
    return chosen._replace(topk_weights=weights.to(chosen.topk_weights.dtype), router_logits=router_logits)


def require_plain_softmax(topk_config: Any) -> None:
    unusual = {
        "scoring_func": topk_config.scoring_func != "softmax",
        "use_grouped_topk": topk_config.use_grouped_topk,
        "correction_bias": topk_config.correction_bias is not None,
        "custom_routing_function": topk_config.custom_routing_function is not None,
        "num_shared_topk_slots": topk_config.num_shared_topk_slots > 0,
        "routed_scaling_factor": topk_config.routed_scaling_factor not in (None, 1.0),
    }
    if any(unusual.values()):
        names = ", ".join(name for name, is_set in unusual.items() if is_set)
        raise RuntimeError(
            f"router_noise on selection: gate weights are not a plain softmax here ({names}): use `logits`"
        )


def gate_weights(router_logits: torch.Tensor, expert_ids: torch.Tensor, *, renormalize: bool) -> torch.Tensor:
    """[tokens, topk] float32: softmax over all experts' logits [tokens, experts], of the chosen ones."""
    # CUDA graphs pad a batch with tokens of expert -1, whose results nobody reads.
    chosen = router_logits.float().softmax(dim=-1).gather(1, expert_ids.long().clamp(min=0))
    return chosen / chosen.sum(dim=-1, keepdim=True) if renormalize else chosen


def normal_noise(router_logits: torch.Tensor, layer: int) -> torch.Tensor:
    """Standard normal numbers [tokens, experts], float32, each a function of all logits of its token, expert and layer.

    A token's numbers are the same whatever is computed beside it, if its logits are the same to the last bit: integers
    are hashed (SplitMix64), so no order of additions matters.
    """
    experts = torch.arange(1, router_logits.shape[-1] + 1, device=router_logits.device) * GOLDEN
    bits = router_logits.float().contiguous().view(torch.int32).long()
    token = _mixed(_mixed(bits + experts).sum(dim=-1, keepdim=True) + layer)
    # 53 bits, in the middle of their interval: never 0 or 1, whose normal numbers are infinite.
    uniform = (((_mixed(token + experts) >> 11) & (2**53 - 1)).double() + 0.5) * 2.0**-53
    return torch.special.ndtri(uniform).float()


def _mixed(state: torch.Tensor) -> torch.Tensor:
    """SplitMix64's finalizer, int64 with wrap-around."""
    for shift, factor in ((30, MIX[0]), (27, MIX[1])):
        state = (state ^ _shifted(state, shift)) * factor
    return state ^ _shifted(state, 31)


def _shifted(state: torch.Tensor, bits: int) -> torch.Tensor:
    """To the right, without the sign."""
    return (state >> bits) & (2 ** (64 - bits) - 1)

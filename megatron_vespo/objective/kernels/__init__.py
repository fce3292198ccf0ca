"""All kernels by name. A new one is a file beside these and a line in `KERNELS`; or, outside this package, a function
that the configuration names: `kernel: {name: custom, function: "package.module:function", options: {...}}`.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from megatron_vespo.config.objective import CustomKernel, Kernel
from megatron_vespo.objective.kernels import cispo, clip, gspo, reinforce, sapo, vespo, weight
from megatron_vespo.objective.kernels.inputs import Coefficients, KernelInputs
from megatron_vespo.targets import load_function


class Entry(NamedTuple):
    """A kernel.

    `coefficients` is pure: the same inputs give the same coefficients, and order or packing of sequences don't matter.
    `largest` gives the least upper bounds of phi for advantages >= 0 and < 0, inf where there is none.
    """

    coefficients: Callable[[KernelInputs, Any], Coefficients]
    largest: Callable[[Any], tuple[float, float]]


KERNELS = {
    "vespo": Entry(vespo.vespo, vespo.largest),
    "reinforce": Entry(reinforce.reinforce, reinforce.largest),
    "importance": Entry(weight.importance, weight.largest_importance),
    "truncated_importance": Entry(weight.truncated_importance, weight.largest_truncated),
    "topr": Entry(weight.topr, weight.largest_topr),
    "ppo": Entry(clip.clip, clip.largest),
    "grpo": Entry(clip.clip, clip.largest),
    "dr_grpo": Entry(clip.clip, clip.largest),
    "dapo": Entry(clip.clip, clip.largest),
    "gspo": Entry(gspo.gspo, gspo.largest),
    "gspo_token": Entry(gspo.gspo, gspo.largest),
    "sapo": Entry(sapo.sapo, sapo.largest),
    "cispo": Entry(cispo.cispo, cispo.largest),
}


def custom_function(config: CustomKernel) -> Callable[[KernelInputs, dict[str, Any]], Coefficients]:
    """Raises ConfigError where `function` does not name a function."""
    return load_function(config.function, "algorithm.objective.kernel.function")


def coefficients(config: Kernel, inputs: KernelInputs) -> Coefficients:
    if isinstance(config, CustomKernel):
        return custom_function(config)(inputs, config.options)
    return KERNELS[config.name].coefficients(inputs, config)


def largest_coefficient(config: Kernel) -> tuple[float, float]:
    """Least upper bounds of phi for advantages >= 0 and < 0; inf where there is none, or none is known."""
    return (math.inf, math.inf) if isinstance(config, CustomKernel) else KERNELS[config.name].largest(config)

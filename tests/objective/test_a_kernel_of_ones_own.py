"""A user's kernel: one function, named in the configuration."""

import pytest
import torch
from packed_batches import batch, loss_and_gradient
from published_objectives import OBJECTIVES

from megatron_vespo.config import ConfigError, ObjectiveConfig
from megatron_vespo.objective.importance import ratio
from megatron_vespo.objective.kernels import Coefficients, custom_function


def clipped_weight(inputs, options):
    weight = inputs.like_advantages(ratio(inputs.corrected_log_weight))
    return Coefficients(weight.clamp(max=options["cap"]), clipped=weight > options["cap"], corrected=True)


def custom(function, **options):
    return ObjectiveConfig(kernel={"name": "custom", "function": function, "options": options})


def test_it_trains_like_the_same_kernel_of_ours():
    data = batch(4)
    own = loss_and_gradient(custom("test_a_kernel_of_ones_own:clipped_weight", cap=1.1), data)
    ours = loss_and_gradient(ObjectiveConfig(kernel=OBJECTIVES["truncated_importance"][0]), data)
    torch.testing.assert_close(own[:2], ours[:2])
    assert own[2].sums == ours[2].sums


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("clipped_weight", "not of the form package.module:name"),
        ("nowhere:kernel", "module 'nowhere' .* does not import"),
        ("test_a_kernel_of_ones_own:missing", "has no 'missing'"),
        ("test_a_kernel_of_ones_own:__name__", "is not a function"),
    ],
)
def test_what_is_not_a_function_is_named(function, said):
    with pytest.raises(ConfigError, match=f"algorithm.objective.kernel.function: .*{said}"):
        custom_function(custom(function).kernel)

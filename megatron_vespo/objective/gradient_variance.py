"""Variance of a step's gradient, measured from the gradients of its micro-batches."""

from collections.abc import Sequence


def gradient_variance(squared_norms: Sequence[float], squared_norm_of_sum: float) -> dict[str, float]:
    """How noisy a step's gradient is.

    With g_1 .. g_M the contributions of all micro-batches of all data-parallel ranks to the step's gradient
    g = g_1 + ... + g_M (each divided by the whole step's denominator), taken as independent and alike, the covariance of
    g is estimated without bias by

        variance = M / (M - 1) (sum_m ||g_m||^2 - ||g||^2 / M)

    the sum over all parameters (its trace). Squared norms are plain sums over parameters, so over shards too.

    Args:
        squared_norms: ||g_m||^2, before clipping. Under Megatron g_m is the difference of main_grad over a micro-batch.
        squared_norm_of_sum: ||g||^2.

    Returns:
        gradient/variance: as above.
        gradient/noise_share: variance / ||g||^2. Above about 1 the step's direction is mostly noise.

    Raises:
        ValueError: fewer than two micro-batches.
    """
    count = len(squared_norms)
    if count < 2:
        raise ValueError("the variance of the gradient needs at least two micro-batches in a step")
    variance = max(count / (count - 1) * (sum(squared_norms) - squared_norm_of_sum / count), 0.0)
    share = variance / squared_norm_of_sum if squared_norm_of_sum > 0 else float("nan")
    return {"gradient/variance": variance, "gradient/noise_share": share}

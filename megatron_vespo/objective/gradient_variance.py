"""Variance of a step's gradient, from the gradients of its parts."""

from collections.abc import Sequence


def gradient_variance(
    parts: Sequence[tuple[float, float]], whole_norm: float, whole_denominator: float
) -> dict[str, float]:
    """How noisy a step's gradient is.

    The step's groups are dealt into M parts. With g_1 .. g_M what they contribute to the step's gradient
    g = g_1 + ... + g_M, taken as independent and alike, the covariance of g is estimated without bias by

        variance = M / (M - 1) (sum_m ||g_m||^2 - ||g||^2 / M)

    the sum over all parameters (its trace). Groups are what is independent: advantages within a group add up to 0.

    Args:
        parts: of each part the norm of the gradient that a step on it alone would have, before clipping, and the
            denominator of its loss: their ratio to the step's own makes the norm that of g_m.
        whole_norm, whole_denominator: of the step.

    Returns:
        gradient/variance: as above.
        gradient/noise_share: variance / ||g||^2. Above about 1 the step's direction is mostly noise.

    Raises:
        ValueError: fewer than two parts.
    """
    count = len(parts)
    if count < 2:
        raise ValueError("the variance of a gradient needs at least two parts of the step")
    contributed = sum((norm * denominator / whole_denominator) ** 2 for norm, denominator in parts)
    variance = max(count / (count - 1) * (contributed - whole_norm**2 / count), 0.0)
    return {
        "gradient/variance": variance,
        "gradient/noise_share": variance / whole_norm**2 if whole_norm > 0 else float("nan"),
    }

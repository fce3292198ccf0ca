"""Numbers of one optimizer step that a person reads, from what the losses returned."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

QUANTILES = {
    "min": 0.0,
    "p01": 0.01,
    "p10": 0.1,
    "p25": 0.25,
    "p50": 0.5,
    "p75": 0.75,
    "p90": 0.9,
    "p99": 0.99,
    "max": 1.0,
}


def weight_diagnostics(
    log_weight: NDArray[np.float64], phi: NDArray[np.float64], advantages: NDArray[np.float64]
) -> dict[str, float]:
    """Distribution of importance weights and kernel coefficients over the trained trajectories of a step, each [s].

    All of it is NaN where a step trains on none.
    """
    if not len(log_weight):
        log_weight, phi, advantages = (np.full(1, np.nan) for _ in range(3))
    row = {f"log_weight/{name}": float(np.quantile(log_weight, q)) for name, q in QUANTILES.items()}
    row |= {"log_weight/mean": float(log_weight.mean()), "log_weight/std": float(log_weight.std())}
    row |= {f"phi/{name}": float(np.quantile(phi, QUANTILES[name])) for name in ("min", "p10", "p50", "p90", "max")}
    row |= {"phi/mean": float(phi.mean()), "phi/share_below_0.01": float((phi < 0.01).mean())}
    row["ess"] = effective_sample_share(log_weight)
    row["advantage/mean_abs"] = float(np.abs(advantages).mean())
    return row


def effective_sample_share(log_weight: NDArray[np.float64]) -> float:
    """(sum W)^2 / (n sum W^2): 1 when all weights are equal, 1/n when one carries everything."""
    weight = np.exp(log_weight - log_weight.max())
    return float(weight.sum() ** 2 / (len(weight) * (weight**2).sum()))


def difference_diagnostics(sums: Mapping[str, float], prefix: str) -> dict[str, float]:
    """Per-token means of `loss.difference_metrics` summed over the step. `prefix`: "mismatch" or "drift"."""
    tokens = max(sums["tokens"], 1)
    return {
        f"{prefix}/mean_abs": sums["abs_difference"] / tokens,
        f"{prefix}/k1": sums["k1"] / tokens,
        f"{prefix}/k3": sums["k3"] / tokens,
        f"{prefix}/share_above_ln2": sums["above_ln2"] / tokens,
        "entropy/behavior": sums["old_entropy"] / tokens,
    }

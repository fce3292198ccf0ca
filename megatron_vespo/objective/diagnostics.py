"""Numbers of one optimizer step that a person reads, from what the losses returned. Each is explained in docs/metrics.md."""

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from megatron_vespo.objective.importance import LARGEST_LOG_RATIO

Array = NDArray[np.float64]

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
NEGLIGIBLE_PHI = 0.01
FALLEN_LOG_WEIGHT = -1.0
ALARM_LOG_WEIGHT_STD = 0.5


def weight_diagnostics(
    sequences: Mapping[str, Array], largest: tuple[float, float] = (math.inf, math.inf)
) -> dict[str, float]:
    """Importance weights and kernel coefficients of a step's trajectories: `LossMetrics.sequences`, [s] each.

    Trajectories without a response token in the loss are left out; all is NaN where none is left. `largest`:
    `kernels.largest_coefficient`; without it there is no `variance/bound`.
    """
    trained = sequences["tokens"] > 0
    if not trained.any():
        sequences = {name: np.full(1, np.nan) for name in sequences}
    else:
        sequences = {name: np.asarray(values, dtype=np.float64)[trained] for name, values in sequences.items()}
    log_weight, phi, advantage = (sequences[name] for name in ("log_weight", "phi", "advantage"))
    row = quantiles("log_weight", log_weight, *QUANTILES) | quantiles("phi", phi, "min", "p10", "p50", "p90", "max")
    row |= {"log_weight/mean": float(log_weight.mean()), "log_weight/std": float(log_weight.std())}
    row |= {"phi/mean": float(phi.mean()), "phi/share_below_0.01": _negligible(phi)}
    row["phi/length_correlation"] = correlation(phi, sequences["tokens"])
    row["ess"] = effective_sample_share(log_weight)
    row["advantage/mean_abs"] = float(np.abs(advantage).mean())
    for sign, chosen in (("positive", advantage > 0), ("negative", advantage < 0)):
        row |= _of_sign(sign, chosen, log_weight, phi)
    return row | _gradient(sequences) | _variance(log_weight, phi, advantage, largest)


def _of_sign(sign: str, chosen: NDArray[np.bool_], log_weight: Array, phi: Array) -> dict[str, float]:
    some = chosen if chosen.any() else slice(0)
    row = {f"{sign}/share": float(chosen.mean())}
    row |= quantiles(f"{sign}/log_weight", log_weight[some], "p10", "p50", "p90")
    row |= quantiles(f"{sign}/phi", phi[some], "p10", "p50", "p90")
    row[f"{sign}/phi/share_below_0.01"] = _negligible(phi[some])
    return row


def _negligible(phi: Array) -> float:
    """Share of coefficients that in effect are 0; NaN of nothing."""
    return float((phi < NEGLIGIBLE_PHI).mean()) if len(phi) and not np.isnan(phi).any() else math.nan


def quantiles(name: str, values: Array, *names: str) -> dict[str, float]:
    """`name/p10` and so on, linear between order statistics; NaN of nothing."""
    found = np.quantile(values, [QUANTILES[q] for q in names]) if len(values) else np.full(len(names), np.nan)
    return {f"{name}/{q}": float(value) for q, value in zip(names, found, strict=True)}


def effective_sample_share(log_weight: Array) -> float:
    """(sum W)^2 / (n sum W^2): 1 when all weights are equal, 1/n when one carries everything."""
    return _share(np.exp(log_weight - log_weight.max()))


def _share(sizes: Array) -> float:
    squares = (sizes**2).sum()
    return float(sizes.sum() ** 2 / (len(sizes) * squares)) if squares != 0 else math.nan


def correlation(one: Array, other: Array) -> float:
    """Pearson's; NaN where one of them does not vary."""
    one, other = one - one.mean(), other - other.mean()
    scale = math.sqrt((one**2).sum() * (other**2).sum())
    return float((one * other).sum() / scale) if scale != 0 else math.nan


def _gradient(sequences: Mapping[str, Array]) -> dict[str, float]:
    """How the gradient is spread over trajectories, as far as coefficients tell."""
    advantage, moved = np.abs(sequences["advantage"]), sequences["abs_phi_advantage"]
    per_token = moved / sequences["tokens"]
    before, after = advantage.mean(), per_token.mean()
    top = math.ceil(0.01 * len(moved))
    total = moved.sum()

    def share(chosen: NDArray[np.bool_]) -> float:
        return float(moved[chosen].sum() / total) if total != 0 else math.nan

    return {
        "gradient/ess": _share(per_token),
        "gradient/top_1pct_share": float(np.sort(moved)[-top:].sum() / total) if total != 0 else math.nan,
        "gradient/log_kept": _log(after / before) if before != 0 else math.nan,
        "gradient/positive_share": share(sequences["advantage"] > 0),
        "gradient/long_share": share(sequences["tokens"] > np.median(sequences["tokens"])),
        "gradient/fallen_share": share(sequences["log_weight"] < FALLEN_LOG_WEIGHT),
    }


def _log(share: float) -> float:
    return math.log(share) if share != 0 else -math.inf


def _variance(log_weight: Array, phi: Array, advantage: Array, largest: tuple[float, float]) -> dict[str, float]:
    """Mean squared coefficients: with the kernel, with the plain weight W, and at most with this kernel."""
    weight = np.exp(np.minimum(log_weight, LARGEST_LOG_RATIO))
    row = {
        "variance/kernel": float(((phi * advantage) ** 2).mean()),
        "variance/importance": float(((weight * advantage) ** 2).mean()),
    }
    positive, negative = largest
    if math.isfinite(positive) and math.isfinite(negative):
        bound = np.where(advantage >= 0, positive, negative)
        row["variance/bound"] = float(((bound * advantage) ** 2).mean())
    return row


def mismatch_alarm(log_weight_std: float) -> bool:
    """Whether engine and trainer disagree so much at equal weights that W is spent on it. `log_weight_std`: standard
    deviation over trajectories of the sum of log(trainer / engine), at equal versions."""
    return log_weight_std > ALARM_LOG_WEIGHT_STD


def difference_diagnostics(sums: Mapping[str, float], prefix: str) -> dict[str, float]:
    """Per-token means of `metrics.measured_difference`, which are in `LossMetrics.sums` too, over a step. `prefix`: "mismatch" or "drift"."""
    tokens = max(sums["tokens"], 1)
    return {
        f"{prefix}/mean_abs": sums["abs_difference"] / tokens,
        f"{prefix}/k1": sums["k1"] / tokens,
        f"{prefix}/k3": sums["k3"] / tokens,
        f"{prefix}/share_above_ln2": sums["above_ln2"] / tokens,
    }


def token_diagnostics(sums: Mapping[str, float]) -> dict[str, float]:
    """Per-token means of the rest of `LossMetrics.sums`: entropies always; what the step did not have is left out."""
    tokens = max(sums["tokens"], 1)
    row = {"entropy/old_policy": sums["old_entropy"] / tokens}
    for name, key in (
        ("entropy/current", "entropy"),
        ("kl_reference/k1", "kl_k1"),
        ("kl_reference/k3", "kl_k3"),
        ("engine_correction/mean_weight", "engine_weight"),
        ("engine_correction/masked_share", "engine_masked"),
    ):
        if key in sums:
            row[name] = sums[key] / tokens
    for sign in ("positive", "negative"):
        if f"{sign}_clipped" in sums:
            row[f"{sign}/clip_fraction"] = sums[f"{sign}_clipped"] / max(sums[f"{sign}_tokens"], 1)
    return row

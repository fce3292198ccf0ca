"""Engine against trainer on the same tokens under the same weights: the figures of a row, and the alarm."""

from megatron_vespo.objective.diagnostics import difference_diagnostics, mismatch_alarm
from megatron_vespo.orchestration.session import Session


def mismatch_figures(session: Session, sums: dict[str, float], spread: float) -> dict[str, float]:
    """Count it in the run's tally, and say an alarm on the console.

    Args:
        sums: `metrics.measured_difference` over all sampled tokens.
        spread: standard deviation over trajectories of the sum over the response of log(trainer / engine).
    """
    session.tally.add_mismatch(sums)
    alarm = mismatch_alarm(spread)
    if alarm:
        session.console.event(
            f"ALARM: engine and trainer disagree: std(log W) is {spread:.2f} at equal weights (docs/metrics.md)"
        )
    return {
        **difference_diagnostics(sums, "mismatch"),
        "mismatch/log_weight_std": spread,
        "alarm/mismatch": alarm,
    }

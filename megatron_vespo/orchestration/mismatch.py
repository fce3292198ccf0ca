"""Engine against trainer on the same tokens under the same weights: the figures of a row, and the alarm."""

from megatron_vespo.objective.diagnostics import difference_diagnostics, mismatch_alarm
from megatron_vespo.observability.console import RunConsole
from megatron_vespo.orchestration.session import Tally


def mismatch_figures(tally: Tally, console: RunConsole, sums: dict[str, float], spread: float) -> dict[str, float]:
    """Count it in the run's tally, and say an alarm on the console.

    Args:
        sums: `metrics.measured_difference` over all sampled tokens.
        spread: standard deviation over trajectories of the sum over the response of log(trainer / engine).
    """
    tally.add_mismatch(sums)
    alarm = mismatch_alarm(spread)
    if alarm:
        console.event(
            f"ALARM: engine and trainer disagree: std(log W) is {spread:.2f} at equal weights (docs/metrics.md)"
        )
    return {
        **difference_diagnostics(sums, "mismatch"),
        "mismatch/log_weight_std": spread,
        "alarm/mismatch": alarm,
    }

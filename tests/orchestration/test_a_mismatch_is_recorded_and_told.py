import io

import pytest
from rich.console import Console

from megatron_vespo.observability.console import RunConsole
from megatron_vespo.orchestration.mismatch import mismatch_figures
from megatron_vespo.orchestration.session import Tally


@pytest.mark.parametrize(("spread", "alarm"), [(0.49, False), (0.51, True)])
def test_an_alarm_is_told_and_recorded_with_the_spread_that_raised_it(spread, alarm):
    out, tally = io.StringIO(), Tally()
    console = RunConsole("run", 1, mode="plain", console=Console(file=out, width=80))
    sums = {"tokens": 8.0, "abs_difference": 2.0, "k1": 0.4, "k3": 0.8, "above_ln2": 1.0}
    assert mismatch_figures(tally, console, sums, spread) == {
        "mismatch/mean_abs": 0.25,
        "mismatch/k1": pytest.approx(0.05),
        "mismatch/k3": pytest.approx(0.1),
        "mismatch/share_above_ln2": 0.125,
        "mismatch/log_weight_std": spread,
        "alarm/mismatch": alarm,
    }
    assert ("ALARM: engine and trainer disagree: std(log W) is 0.51 at equal weights" in out.getvalue()) is alarm


def test_the_runs_mean_is_over_the_tokens_of_all_comparisons():
    tally, console = Tally(), RunConsole("run", 1, mode="plain", console=Console(file=io.StringIO()))
    for tokens, difference in ((8.0, 2.0), (2.0, 3.0)):
        sums = {"tokens": tokens, "abs_difference": difference, "k1": 0.0, "k3": 0.0, "above_ln2": 0.0}
        mismatch_figures(tally, console, sums, 0.0)
    assert tally.mean_abs_logprob_diff == 0.5

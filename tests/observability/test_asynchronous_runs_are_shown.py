"""Pages of an asynchronous run: its place between two weight updates says nothing of how old a step's data is."""

import io
import json
import re
from html import unescape
from pathlib import Path

import pytest
import yaml
from browser import needs_chromium, seen_in_browser
from rich.console import Console
from small_asynchronous_run import CONFIG, STEPS, rows, weights_of_step
from small_run import layers_of_step, sample

from megatron_vespo.observability.collapse import stalest_steps
from megatron_vespo.observability.comparison import comparison_rows, write_comparison
from megatron_vespo.observability.comparison_charts import seconds_by_phase
from megatron_vespo.observability.comparison_grid import Variant
from megatron_vespo.observability.console import RunConsole
from megatron_vespo.observability.findings import findings
from megatron_vespo.observability.kernel_chart import kernel
from megatron_vespo.observability.report import write_report
from megatron_vespo.observability.report_charts import mismatch
from megatron_vespo.observability.routing_charts import agreement_map, load_map, replay_effect
from megatron_vespo.observability.routing_comparison import routing_figures
from megatron_vespo.observability.run_folder import RunFolder, read_run
from megatron_vespo.observability.sinks import JsonlSink, Metrics
from megatron_vespo.observability.summary import write_summary
from megatron_vespo.observability.time_charts import batch_times, time_total


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return read_run(write_run(tmp_path / "async"))


@pytest.fixture
def routed(tmp_path: Path) -> RunFolder:
    return read_run(write_run(tmp_path / "routed", routes=True))


def write_run(folder: Path, routes: bool = False) -> Path:
    ticks = iter(range(1_000_000))
    with Metrics([JsonlSink(folder)], clock=lambda: 1e9 + next(ticks)) as metrics:
        for kind, step, values in rows(routes):
            metrics.write(kind, step, values)
            if kind == "step":
                metrics.write_weights(step, values["staleness"], weights_of_step(step))
                if routes:
                    metrics.write_routing(step, layers_of_step(values["staleness"]))
    (folder / "config.yaml").write_text(yaml.safe_dump({**CONFIG, "routing": {"replay": "R3" if routes else "off"}}))
    (folder / "samples_before.json").write_text(json.dumps([sample("2 + 2 =", "5", 0.0)]))
    (folder / "samples_after.json").write_text(json.dumps([sample("2 + 2 =", "4", 1.0)]))
    write_summary(
        folder,
        {"eval_accuracy_before": 0.25, "eval_accuracy_after": 0.75, "steps": STEPS, "wall_seconds": 40.0},
    )
    return folder


def hovers(html: str) -> dict[str, list[list]]:
    found = [json.loads(unescape(text)) for text in re.findall(r'data-hover="([^"]*)"', html)]
    return {series["name"]: series["points"] for chart in found for series in chart}


def table(html: str) -> dict[str, list[str]]:
    lines = re.findall(r"<tr[^>]*><th>(?:<i[^>]*></i>)?(.*?)</th>(.*?)</tr>", html)
    return {name: re.findall(r"<td>(.*?)</td>", cells) for name, cells in lines}


def test_stale_data_right_after_a_weight_update_is_no_alarm(run):
    # Step 9 is the first after an update, on data of 8 steps before: log W has a standard deviation of 0.3 x 8.
    (row,) = (row for row in run.kind("step") if row["step"] == 9)
    assert (row["mini_batch"], row["staleness"], row["log_weight/std"]) == (0, 8, pytest.approx(2.4))
    assert findings(run) == []


def test_an_alarm_of_a_comparison_at_equal_weights_is_said(run):
    run.kind("mismatch")[1].update({"alarm/mismatch": True, "mismatch/log_weight_std": 0.8})
    assert [text for text in findings(run) if "log W at equal weights reached 0.80 (alarm: 0.5)" in text] == findings(
        run
    )


def test_an_alarm_of_a_run_whose_weights_have_nothing_of_the_engine_is_said():
    """With `old_policy: proximal` W is against the trainer itself: 1 at equal weights, however wrong the engine is."""
    row = {"step": 1, "staleness": 0, "log_weight/std": 0.0, "mismatch/log_weight_std": 0.7, "alarm/mismatch": True}
    (text,) = findings(RunFolder(Path("run"), rows={"step": [row]}))
    assert "reached 0.70 (alarm: 0.5)" in text


def test_the_report_draws_the_comparisons_at_equal_weights(run):
    figure = mismatch(run)
    assert figure is not None
    points = hovers(figure.body)["mismatch (same version)"]
    assert [point[1:] for point in points] == [["step 1", "1e-06"], ["step 4", "3e-06"], ["step 8", "3e-06"]]
    # k3: 1e-12 at step 1 and 4e-12 after both updates, the mean of which is 3e-12.
    assert table(figure.body)["mismatch"][2] == "3e-12"


def test_engine_and_trainer_agree_at_equal_weights_however_old_other_data_is(routed):
    figure = agreement_map(routed)
    assert figure is not None
    # 0.995 - 0.02 x staleness: of step 1 alone, and of staleness 1 to 7 and four times 8.
    later = 0.995 - 0.02 * (sum(range(1, 8)) + 4 * 8) / 11
    cells = table(figure.body)
    assert cells["equal weights"][0] == "99.5%" and cells["older data"][0] == f"{100 * later:.4g}%"
    assert not [text for text in findings(routed) if "same router" in text]


def test_other_experts_in_a_comparison_at_equal_weights_are_said(routed):
    routed.config["model"] = {"dtype": "float32"}
    routed.kind("mismatch")[0]["routing_probe/same_set"] = 0.5
    assert any("At equal weights only 50%" in text for text in findings(routed))


def test_what_replay_repairs_is_shown_and_compared(routed, tmp_path):
    figure = replay_effect(routed)
    assert figure is not None
    # k3 of 2e-3 after the first update, 4e-3 after the second; a tenth with replay.
    assert [point[1:] for point in hovers(figure.body)["native routing"]] == [["step 4", "0.002"], ["step 8", "0.004"]]
    (row,) = comparison_rows([Variant("a", [routed])])
    assert row["probe_k3_native"]["mean"] == pytest.approx(3e-3)
    assert row["probe_k3_replayed"]["mean"] == pytest.approx(3e-4)
    figures = routing_figures(routed)
    assert figures["k3_native"] == pytest.approx(3e-3) and figures["same_set_equal_versions"] == pytest.approx(0.995)
    assert figures["k3_trained_on"] == pytest.approx((1e-12 + 2 * 4e-12) / 3)


def test_log_w_is_spread_by_the_age_of_each_trajectory(tmp_path):
    row = {"step": 9, "staleness": 8, "log_weight": [0.0, 1.0], "phi": [1.0, 0.5], "advantage": [1.0, 1.0]}
    figure = kernel(RunFolder(tmp_path, weights=[{**row, "age": [2, 8]}]))
    assert figure is not None
    upper, lower = figure.body.split('<div class="chart">')[1:]
    dots = re.findall(r'<path class="dots" d="([^"]*)" style="stroke:var\(--(age\d)\)', upper)
    assert {colour: path.count("M") for path, colour in dots} == {"age0": 1, "age5": 1}
    ticks = lower.split('<div class="y-ticks">')[1].split("</div>")[0]
    assert re.findall(r">(\d+)<", ticks) == ["2", "8"]


def test_the_time_of_every_step_is_accounted_for(run):
    # Between two updates: 4 waits of 0.5 s, 4 steps of 1 s, an update of 0.4 s. Nothing is generated or graded apart.
    assert batch_times(run) == [(period, [0.0, 0.0, 2.0, 4.0, pytest.approx(0.4)]) for period in range(3)]
    figure = time_total(run)
    assert figure is not None
    # 12 waits, 12 steps, 4 updates, 2 evaluations of 3 s; 40 in all
    rest = 40 - (12 * 0.5 + 12 + 4 * 0.4 + 6)
    shown = table(figure.body)
    assert shown["wait for groups"][0] == "6.0 s" and shown["everything else"][0] == f"{rest:.1f} s"
    assert "generate" not in shown
    assert seconds_by_phase(run) == pytest.approx([0, 0, 6, 12, 1.6, 6, rest])


def test_no_page_speaks_of_rollout_batches_that_there_are_not(routed, tmp_path):
    report = write_report(routed.path).read_text(encoding="utf-8")
    assert "asynchronous, 4 steps between weight updates" in report
    assert "rollout batch" not in report.split("<script")[0]
    subtitle = write_comparison(tmp_path / "page.html", "t", [Variant("a", [routed])]).read_text(encoding="utf-8")
    assert "asynchronous, 4 steps between weight updates" in subtitle and "steps a rollout batch" not in subtitle


def test_columns_of_a_map_are_whole_periods_between_updates(routed):
    routed.routing = [{"step": step, "largest_load": [1.4]} for step in range(1, 241)]
    figure = load_map(routed)
    # 240 steps in at most 100 columns need 3 in each; 4 are a period.
    assert figure is not None and "the mean over 4 steps" in figure.caption


def test_the_stalest_step_between_two_updates_is_compared(run):
    # Staleness 3 at step 4, 7 at step 8; 8 at steps 9 to 12, of which the last is taken.
    assert stalest_steps(run, "staleness") == [(4.0, 3.0), (8.0, 7.0), (12.0, 8.0)]
    run.kind("step")[5]["staleness"] = 9
    assert stalest_steps(run, "staleness") == [(4.0, 3.0), (6.0, 9.0), (12.0, 8.0)]


def test_the_console_shows_the_latest_comparison_at_equal_weights():
    out = io.StringIO()
    with RunConsole("run", STEPS, 4, mode="plain", console=Console(file=out, width=80)) as console:
        for kind, step, values in rows(routes=True):
            console.update({"kind": kind, "step": step, **values})
        view = io.StringIO()
        Console(file=view, width=100).print(console._view())
    said = "engine and trainer at equal weights: mismatch 3.0e-06, experts agree 99.5%"
    assert out.getvalue().count(said) == 2
    assert "3.0e-06 |log-prob diff|" in view.getvalue()


@needs_chromium
@pytest.mark.parametrize("width", [400, 1600])
def test_a_browser_draws_every_chart_without_an_error(routed, tmp_path, width):
    probe = """<script>
      const areas = [...document.querySelectorAll(".area")];
      parent.document.title = JSON.stringify({
        overflow: document.documentElement.scrollWidth - innerWidth, areas: areas.length,
        drawn: areas.filter((area) => area.clientWidth > 200
          && [...area.querySelectorAll("svg path:not(.grid, .level)")].some((path) => path.getBoundingClientRect().width > 0)).length,
      });</script></body>"""
    page = write_report(routed.path).read_text(encoding="utf-8").replace("</body>", probe)
    seen = seen_in_browser(page, width, tmp_path)
    assert seen["overflow"] <= 0
    assert seen["areas"] == seen["drawn"] >= 15

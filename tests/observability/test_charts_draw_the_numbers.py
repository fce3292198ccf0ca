import json
import math
import re
from html import unescape
from itertools import pairwise
from pathlib import Path

import pytest
from browser import needs_chromium, seen_in_browser

from megatron_vespo.observability.charts import Axis, Plot, linear_axis, log_axis, nice_ticks
from megatron_vespo.observability.kernel_chart import kernel
from megatron_vespo.observability.report import write_report
from megatron_vespo.observability.report_charts import age_groups, ages
from megatron_vespo.observability.run_folder import RunFolder, read_run


def points(path: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in re.findall(r"[ML](-?[\d.]+) (-?[\d.]+)", path)]


def paths(html: str, mark: str) -> list[str]:
    return re.findall(rf'<path class="{mark}" d="([^"]*)"', html)


@pytest.mark.parametrize(("low", "high"), [(0, 120), (-0.07, 0.05), (1e-6, 9e-6), (3, 3.2), (0, 1), (-5, 1e6)])
def test_ticks_are_round_inside_and_few(low, high):
    ticks = nice_ticks(low, high, 5)
    assert 3 <= len(ticks) <= 9
    assert all(low - 1e-12 <= tick <= high + 1e-9 for tick in ticks)
    step = ticks[1] - ticks[0]
    assert round(step / 10 ** math.floor(math.log10(step * 1.0001)), 6) in (1, 2, 5, 10)


def test_a_line_passes_through_its_points_and_breaks_where_one_is_missing():
    plot = Plot(Axis(0, 10), Axis(0, 2), "a title")
    plot.line("a", [0, 5, 6, 8, 10], [0.0, 2.0, None, float("nan"), 1.0], "blue")
    line, lone = paths(plot.html(), "line")[0], paths(plot.html(), "line lone")[0]
    assert points(line) == [(0, 1000), (500, 0)]
    assert points(lone) == [(1000, 500)]


def test_a_log_axis_spaces_powers_of_ten_evenly():
    axis = log_axis([2e-6, 0.5, 0.0, None])
    assert (axis.low, axis.high) == (pytest.approx(1e-6), 1.0)
    assert axis.place(1e-3) == pytest.approx(0.5)
    assert not axis.can_place(0.0)


def test_bars_stack_to_the_sum():
    plot = Plot(Axis(0, 2), Axis(0, 10), "bars")
    plot.stacked_bars([0.0, 1.0], [1.0, 2.0], [("a", "blue", [2.0, 3.0]), ("b", "red", [4.0, 5.0])])
    tops = [min(y for _, y in points(bar + "z")) for bar in re.findall(r'd="([^"]*z)"', plot.html())[1].split("z")[:-1]]
    assert tops == [400, 200]


def test_what_the_pointer_shows_is_what_was_measured():
    plot = Plot(linear_axis([0, 4], exact=True), linear_axis([0, 1]), "hover")
    plot.line('"<reward>"', [0, 4], [0.25, 0.75], "blue")
    (series,) = json.loads(unescape(re.findall(r'data-hover="([^"]*)"', plot.html())[0]))
    assert series["name"] == '"<reward>"'
    assert series["points"] == [[0, "step 0", "0.25"], [1000, "step 4", "0.75"]]


def test_the_measured_dots_lie_on_the_kernels_curves(finished_run):
    run = read_run(finished_run)
    figure = kernel(run)
    assert figure is not None
    upper = figure.body.split('<div class="chart">')[1]
    curves = [points(curve) for curve in paths(upper, "line")]
    dots = [dot for path in paths(upper, "dots") for dot in points(path)]
    assert len(curves) == 2 and len(dots) == 12 * 16
    for x, y in dots:
        heights = []
        for curve in curves:
            (x0, y0), (x1, y1) = next((a, b) for a, b in pairwise(curve) if a[0] <= x <= b[0])
            heights.append(y0 + (y1 - y0) * (x - x0) / (x1 - x0))
        assert min(abs(y - height) for height in heights) < 1.5


def test_bars_of_ages_are_the_shares_of_all_trained_trajectories():
    figure = ages(RunFolder(Path("run"), weights=[{"step": 1, "age": [0, 0, 0, 1]}, {"step": 2, "age": [3, 3, 1, 0]}]))
    assert figure is not None and "all 8 trajectories of the run: 1.0 on average, 3 at most" in figure.caption
    (series,) = json.loads(unescape(re.findall(r'data-hover="([^"]*)"', figure.body)[0]))
    assert [point[1:] for point in series["points"]] == [
        ["age 0", "50%"],
        ["age 1", "25%"],
        ["age 2", "0%"],
        ["age 3", "25%"],
    ]


@pytest.mark.parametrize("rows", [[], [{"step": 1, "age": [0, 0]}], [{"step": 1, "log_weight": [0.1]}]])
def test_data_that_is_never_old_has_no_chart_of_ages(rows):
    assert ages(RunFolder(Path("run"), weights=rows)) is None


@pytest.mark.parametrize("oldest", [0, 3, 5, 6, 15, 63])
def test_every_staleness_has_one_of_at_most_six_colours(oldest):
    groups = age_groups(list(range(oldest + 1)) * 2)
    assert len(groups) <= 6
    assert sorted(age for _, _, ages in groups for age in ages) == list(range(oldest + 1))
    assert len({colour for _, colour, _ in groups}) == len(groups)


@needs_chromium
@pytest.mark.parametrize("width", [400, 1600])
def test_a_browser_draws_every_chart_without_an_error(finished_run, tmp_path, width):
    """In a frame of that width (a headless window has a least width): nothing overflows, all charts have their size."""
    probe = """<script>
      const areas = [...document.querySelectorAll(".area")];
      for (const area of areas) {
        const box = area.getBoundingClientRect();
        area.dispatchEvent(new PointerEvent("pointermove", { clientX: box.left + 9, clientY: box.top + 9 }));
      }
      parent.document.title = JSON.stringify({
        width: innerWidth, overflow: document.documentElement.scrollWidth - innerWidth, areas: areas.length,
        drawn: areas.filter((area) => area.clientWidth > 200
          && [...area.querySelectorAll("svg path:not(.grid, .level)")].some((path) => path.getBoundingClientRect().width > 0)).length,
        hovers: areas.filter((area) => area.dataset.hover !== "[]").length,
        tips: document.querySelectorAll(".tip:not([hidden])").length,
      });</script></body>"""
    page = write_report(finished_run).read_text(encoding="utf-8").replace("</body>", probe)
    seen = seen_in_browser(page, width, tmp_path)
    assert seen["width"] == width and seen["overflow"] <= 0
    assert seen["areas"] == seen["drawn"] == 16
    assert seen["tips"] == seen["hovers"] >= 14

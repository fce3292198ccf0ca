import io
import json
import re
from html import unescape

import pytest
import yaml
from browser import needs_chromium, seen_in_browser
from rich.console import Console
from small_run import CONFIG, rollout_row, routes_of_rollout, routes_of_step, step_row

from megatron_vespo.observability.charts import Axis, Plot, Ramp
from megatron_vespo.observability.comparison import comparison_rows, write_comparison
from megatron_vespo.observability.comparison_grid import Variant
from megatron_vespo.observability.console import RunConsole
from megatron_vespo.observability.findings import findings
from megatron_vespo.observability.report import write_report
from megatron_vespo.observability.routing_charts import (
    MOST_COLUMNS,
    agreement_map,
    binned,
    load_map,
    records,
    replay_effect,
    share,
    steps_in_a_column,
)
from megatron_vespo.observability.run_folder import RunFolder, read_run
from megatron_vespo.observability.sinks import JsonlSink, Metrics

RAMP = Ramp((1.0, 0.99, 0.95, 0.9, 0.8, 0.6), ("100%", "99%", "95%", "90%", "80%", "60%"))


def cells(html: str) -> dict:
    (text,) = re.findall(r'data-cells="([^"]*)"', html)
    return json.loads(unescape(text))


def painted(html: str) -> dict[str, list[tuple[float, float, float, float]]]:
    """Colour -> rectangles (left, top, right, bottom) of a heat map's area of 1000 x 1000."""
    found = {}
    for path, colour in re.findall(r'<path class="cells" d="([^"]*)" style="fill:([^"]*)"', html):
        boxes = re.findall(r"M([\d.]+) ([\d.]+)H([\d.]+)V([\d.]+)H", path)
        found[colour] = [tuple(float(number) for number in (x0, y0, x1, y1)) for x0, y0, x1, y1 in boxes]
    return found


def with_rows(rollout: dict, step: dict, /, **config) -> RunFolder:
    rows = {"rollout": [{"kind": "rollout", "step": 0, **rollout}], "step": [{"kind": "step", "step": 1, **step}]}
    settings = {"model": {"dtype": "float32"}, "routing": {"replay": "R3"}, **config}
    return RunFolder(path=None, rows=rows, config=settings)  # type: ignore[arg-type]


def test_a_heat_map_paints_each_cell_in_its_place_and_leaves_holes():
    plot = Plot(Axis(0.5, 2.5), Axis(-0.5, 1.5), "a map")
    plot.cells([(0.5, 1.5), (1.5, 2.5)], [[1.0, 0.8], [None, 0.5]], RAMP, "layer")
    # Row 0 is the lower half; the values of 0.8 and below 0.6 have the fifth and the sixth colour.
    assert painted(plot.html()) == {
        "var(--age0)": [(0, 500, 500, 1000)],
        "var(--age4)": [(0, 0, 500, 500)],
        "var(--age5)": [(500, 0, 1000, 500)],
    }


def test_neighbours_of_one_tone_are_one_shape_but_never_over_a_hole():
    plot = Plot(Axis(0.5, 4.5), Axis(-0.5, 0.5), "a map")
    plot.cells([(0.5, 1.5), (1.5, 2.5), (3.5, 4.5)], [[1.0], [1.0], [1.0]], RAMP, "layer")
    assert painted(plot.html()) == {"var(--age0)": [(0, 0, 500, 1000), (750, 0, 1000, 1000)]}


@pytest.mark.parametrize(
    ("value", "tone"), [(1.0, 0), (0.99, 4), (0.97, 6), (0.95, 8), (0.85, 14), (0.6, 20), (0.1, 20), (1.2, 0)]
)
def test_tones_lie_evenly_between_anchors(value, tone):
    assert RAMP.tone(value) == tone


@pytest.mark.parametrize(
    ("steps", "per_batch", "every"),
    [(8, 4, 1), (100, 4, 1), (101, 4, 2), (1000, 4, 12), (1000, 64, 16), (1000, 1, 10), (250, 3, 3), (5000, 64, 64)],
)
def test_columns_are_whole_batches_or_equal_parts_of_one(steps, per_batch, every):
    assert steps_in_a_column(steps, per_batch) == every
    assert -(-steps // every) <= MOST_COLUMNS


def test_a_column_is_the_mean_of_its_steps_and_missing_numbers_count_nowhere():
    rows = {1: [1.0, 0.5], 2: [0.5, None], 3: [0.25, None], 9: [0.75, 0.5], 10: [0.25, 1.0]}
    spans, values = binned(rows, 2, 2)
    assert spans == [(0.5, 2.5), (2.5, 4.5), (8.5, 10.5)]
    assert values == [[0.75, 0.5], [0.25, None], [0.5, 0.75]]


def test_the_report_of_a_run_with_routes_has_their_section(run_with_routes):
    text = write_report(run_with_routes).read_text(encoding="utf-8")
    for name in ("expert-agreement", "expert-load", "replay", "recorded-routes"):
        assert f'id="chart-{name}"' in text
    assert "routing.jsonl" in text and "python tools/inspect_routing.py" not in text  # no trajectories lie there
    assert "Worth a look" not in text


def test_the_maps_hold_what_was_measured(run_with_routes):
    run = read_run(run_with_routes)
    agreement, load = agreement_map(run), load_map(run)
    assert agreement is not None and load is not None
    found = cells(agreement.body)
    assert found["names"] == [f"step {step}" for step in range(1, 13)]
    assert found["values"] == 3 * [["99.6%", "99.4%"], ["97.6%", "97.4%"], ["95.6%", "95.4%"], ["93.6%", "93.4%"]]
    assert cells(load.body)["values"] == 12 * [["1.401", "1.399"]]
    # Equal weights: 0.995; later: the mean of 0.975, 0.955 and 0.935.
    assert "<th>equal weights</th><td>99.5%</td>" in agreement.body
    assert "<th>later steps</th><td>95.5%</td>" in agreement.body


@pytest.mark.parametrize(
    ("value", "text"), [(1.0, "100%"), (0.99999, "99.99%"), (0.97813, "97.81%"), (0.5, "50%"), (0.0, "0%")]
)
def test_nearly_all_is_not_all(value, text):
    assert share(value) == text


def test_a_run_without_routes_has_no_word_of_them(finished_run):
    run = read_run(finished_run)
    assert "routing.jsonl" not in run.missing
    assert [make(run) for make in (agreement_map, load_map, replay_effect, records)] == [None] * 4
    assert 'id="routing"' not in write_report(finished_run).read_text(encoding="utf-8")


def test_a_run_that_lost_its_routing_file_says_so(run_with_routes):
    (run_with_routes / "routing.jsonl").unlink()
    assert "routing.jsonl" in read_run(run_with_routes).missing


@pytest.mark.parametrize("off", [False, "off", None])
def test_only_a_run_that_records_routes_lacks_their_file(tmp_path, off):
    (tmp_path / "metrics.jsonl").write_text("")
    for routing, lacks in (({"replay": off or "off"}, False), ({"replay": "R2"}, True), ({"record": True}, True)):
        (tmp_path / "config.yaml").write_text(yaml.safe_dump({**CONFIG, "routing": routing}))
        assert ("routing.jsonl" in read_run(tmp_path).missing) is lacks


@pytest.mark.parametrize("value", [0.0, -1e-9, float("nan"), float("inf"), None])
def test_a_mismatch_that_a_log_axis_cannot_show_breaks_nothing(tmp_path, value):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({**CONFIG, "routing": {"replay": "R3"}}))
    with Metrics([JsonlSink(tmp_path)]) as metrics:
        for batch in range(3):
            row = {**rollout_row(batch), **routes_of_rollout(batch)}
            if batch == 1:
                row |= {"routing_probe/native/k3": value, "routing_probe/replayed/k3": value}
            metrics.write("rollout", 4 * batch, row)
    figure = replay_effect(read_run(tmp_path))
    assert figure is not None and "NaN" not in figure.body
    write_report(tmp_path)


def test_missing_routes_are_counted_by_their_reason():
    run = with_rows({"routing/missing_share": 0.25, "routing/masked/retracted": 5, "routing/masked/range": 7}, {})
    figure = records(run)
    assert figure is not None
    rows = re.findall(r"<tr[^>]*><th>(.*?)</th><td>(.*?)</td></tr>", figure.body)
    assert rows[0] == ("positions without a route", "25%")
    assert [(name.split(":")[0], value) for name, value in rows[2:4]] == [
        ("range", "7 positions"),
        ("retracted", "5 positions"),
    ]


def test_findings_name_what_is_wrong_with_routes():
    good = {"routing/missing_share": 0.0, "routing_probe/native/k3": 1e-3, "routing_probe/replayed/k3": 1e-4}
    equal = {"staleness": 0, "routing/same_set": 0.995}
    assert findings(with_rows(good, equal)) == []
    lost = {**good, "routing/missing_share": 0.2, "routing/masked/missing": 90, "routing/masked/range": 10}
    assert findings(with_rows(lost, equal)) == [
        "20% of positions had no recorded route, most of them masked as 'missing': they were routed natively."
    ]
    useless = {**good, "routing_probe/replayed/k3": 2e-3, "routing_probe/same_set": 0.97}
    assert "replay did not lower the mismatch" in findings(with_rows(useless, equal))[0]
    # Where all experts agree, or no route is recorded, there is nothing to repair; nor in float32's rounding.
    assert findings(with_rows({**useless, "routing_probe/same_set": 1.0}, equal)) == []
    assert findings(with_rows({**good, "routing_probe/replayed/k3": 2e-3}, equal)) == []
    tiny = {"routing_probe/native/k3": 1e-13, "routing_probe/replayed/k3": 2e-13, "routing_probe/same_set": 0.999}
    assert findings(with_rows({**good, **tiny}, equal)) == []


@pytest.mark.parametrize(
    ("share", "staleness", "engine", "said"),
    [
        (0.97, 0, {}, True),
        (0.97, 1, {}, False),
        (0.97, 0, {"dtype": "bfloat16"}, False),
        (0.7, 0, {"dtype": "bfloat16"}, True),
        (0.7, 0, {"router_noise": {"scale": 0.1}}, False),
    ],
)
def test_experts_that_differ_at_equal_weights_are_said(share, staleness, engine, said):
    step = {"staleness": staleness, "routing/same_set": share}
    found = findings(with_rows({}, step, rollout={"engine": engine}))
    assert any("don't compute the same router" in text for text in found) is said


def test_the_console_says_how_experts_agree():
    out = io.StringIO()
    with RunConsole("run", 12, 4, mode="plain", console=Console(file=out, width=80)) as console:
        console.update({"kind": "rollout", "step": 0, **rollout_row(0), **routes_of_rollout(0)})
        console.update({"kind": "step", "step": 1, **step_row(0, 1), **routes_of_step(1)})
        console.update({"kind": "step", "step": 2, **step_row(0, 1)})
        view = io.StringIO()
        Console(file=view, width=100).print(console._view())
    batch, first, second = (line for line in out.getvalue().splitlines() if re.search(r"batch 0|step [12]/12", line))
    assert "64 tokens/s, experts agree 99.5%" in batch and "experts agree 97.5%" in first
    assert "experts" not in second
    assert "experts agree 97.5%" in view.getvalue()


def test_a_comparison_has_the_probes_columns_only_where_a_run_was_probed(run_with_routes, finished_run, tmp_path):
    routed, plain = Variant("routed", (read_run(run_with_routes),)), Variant("plain", (read_run(finished_run),))
    rows = comparison_rows([routed, plain])
    # Three batches with k3 of 2e-3, 4e-3 and 6e-3, and a tenth of it with replay.
    assert rows[0]["probe_k3_native"]["mean"] == pytest.approx(4e-3)
    assert rows[0]["probe_k3_replayed"]["mean"] == pytest.approx(4e-4)
    assert rows[1]["probe_k3_native"] == {"mean": None, "min": None, "max": None, "n": 0}
    both = write_comparison(tmp_path / "both.html", "both", [routed, plain]).read_text(encoding="utf-8")
    assert "k3 with replay" in both and "4.0e-04" in both
    alone = write_comparison(tmp_path / "alone.html", "alone", [plain]).read_text(encoding="utf-8")
    assert "k3 with replay" not in alone


@needs_chromium
@pytest.mark.parametrize("width", [400, 1600])
def test_a_browser_shows_the_cell_under_the_pointer(run_with_routes, tmp_path, width):
    probe = """<script>
      const area = document.querySelector("#chart-expert-agreement .area");
      const box = area.getBoundingClientRect();
      const at = (x, y) => {
        area.dispatchEvent(new PointerEvent("pointermove", {
          clientX: box.left + x * box.width, clientY: box.top + y * box.height }));
        return area.querySelector(".tip").innerText;
      };
      const ramp = document.querySelector(".ramp i");
      parent.document.title = JSON.stringify({
        overflow: document.documentElement.scrollWidth - innerWidth,
        tips: [at(0.01, 0.9), at(0.99, 0.1)],
        fills: new Set([...area.querySelectorAll(".cells")].map((path) => getComputedStyle(path).fill)).size,
        ramp: getComputedStyle(ramp).backgroundImage.includes("gradient") && ramp.clientWidth,
      });</script></body>"""
    page = write_report(run_with_routes).read_text(encoding="utf-8").replace("</body>", probe)
    seen = seen_in_browser(page, width, tmp_path)
    assert seen["overflow"] <= 0
    # The lower left cell is layer 0 at step 1, the upper right one layer 1 at step 12, three steps into its batch.
    assert [" ".join(tip.split()) for tip in seen["tips"]] == ["step 1, layer 0 99.6%", "step 12, layer 1 93.4%"]
    assert seen["fills"] >= 4 and seen["ramp"] == 250

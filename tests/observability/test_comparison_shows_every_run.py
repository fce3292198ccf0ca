import json
import re
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from browser import needs_chromium, seen_in_browser
from small_run import BATCHES, CONFIG, HOSTILE, STALENESS, evaluation_row, run_rows

from megatron_vespo.config import ConfigError
from megatron_vespo.observability.comparison import (
    comparison_rows,
    config_differences,
    mixed_settings,
    write_comparison,
)
from megatron_vespo.observability.comparison_charts import (
    LEARNING,
    MOST_POINTS,
    Spread,
    draw,
    seconds_by_phase,
    spreads,
    thinned,
)
from megatron_vespo.observability.comparison_grid import Variant
from megatron_vespo.observability.run_folder import RunFolder, read_run
from megatron_vespo.observability.sinks import JsonlSink, Metrics
from megatron_vespo.observability.summary import write_summary

STEPS = STALENESS * BATCHES
CHARTS = [
    "accuracy",
    "reward",
    "length",
    "entropy",
    "log-weight-std",
    "sample-size",
    "phi",
    "dead",
    "kept",
    "sides",
    "cost",
]


def make_run(
    folder: Path, seed: int, after: float = 0.75, batches: int = BATCHES, wall: float = 83.0, **config
) -> RunFolder:
    """The small run with another reward in each seed (0.3, 0.5, 0.7, and 0.01 more a seed), after `batches` of 3."""
    ticks = iter(range(1_000_000))
    with Metrics([JsonlSink(folder)], clock=lambda: 1e9 + next(ticks)) as metrics:
        for kind, step, values in run_rows(batches):
            if kind == "rollout":
                values["reward/mean"] += 0.01 * seed
            metrics.write(kind, step, values)
        if batches == BATCHES:
            metrics.write("evaluation", STEPS, evaluation_row("after", after))
            write_summary(
                folder,
                {
                    "status": "finished",
                    "eval_accuracy_before": 0.25,
                    "eval_accuracy_after": after,
                    "wall_seconds": wall,
                },
            )
    (folder / "config.yaml").write_text(yaml.safe_dump({**CONFIG, "seed": seed, "run_dir": str(folder), **config}))
    (folder / "report.html").write_text("a report")
    return read_run(folder)


@pytest.fixture
def variants(tmp_path: Path) -> list[Variant]:
    """Three finished seeds; two of which one was killed after 4 of 12 steps; one that failed after 8."""
    steady = [make_run(tmp_path / "steady" / str(seed), seed, after) for seed, after in ((1, 0.6), (2, 0.7), (3, 0.95))]
    killed = [
        make_run(tmp_path / "killed" / "1", 1, 0.5, wall=60.0, extra={"a": 1}),
        make_run(tmp_path / "killed" / "2", 2, batches=1, extra={"a": 1}),
    ]
    failed = make_run(tmp_path / "failed", 1, batches=2, extra={"a": 2})
    write_summary(failed.path, {"status": "failed: gradients are not finite\nmore", "wall_seconds": 50.0, "steps": 8})
    return [Variant("steady", steady), Variant("killed", killed), Variant("failed", [read_run(failed.path)])]


class Page(HTMLParser):
    """Elements with their attributes, and the text outside of script and style."""

    def __init__(self, text: str):
        super().__init__()
        self.elements: list[tuple[str, dict]] = []
        self.text = ""
        self.inside = ""
        self.feed(text)
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.inside = tag

    def handle_endtag(self, tag):
        self.inside = ""

    def handle_data(self, data):
        if self.inside not in ("script", "style"):
            self.text += data


def hovers(html: str, chart: str) -> dict[str, dict]:
    """Of one chart, by variant: its colour, and what the pointer shows at each step."""
    figure = html.split(f'id="chart-{chart}"')[1].split("</figure>")[0]
    found = json.loads(unescape(re.findall(r'data-hover="([^"]*)"', figure)[0]))
    return {
        series["name"]: {"colour": series["colour"], **{step: text for _, step, text in series["points"]}}
        for series in found
    }


def test_rows_are_means_with_the_least_and_the_largest_run(variants):
    steady, killed, failed = comparison_rows(variants)
    assert steady["accuracy_final"] == {"mean": pytest.approx(0.75), "min": 0.6, "max": 0.95, "n": 3}
    assert steady["accuracy_before"] == {"mean": 0.25, "min": 0.25, "max": 0.25, "n": 3}
    assert [run["accuracy_final"] for run in steady["runs"]] == [0.6, 0.7, 0.95]
    assert (steady["seeds"], steady["finished"], steady["collapsed"]) == (3, 3, 0)
    # Mini-batch 3 has a standard deviation of 0.9 and an effective sample size of 1 - 0.6; the last batch 18 tokens.
    assert steady["log_weight_std"]["mean"] == pytest.approx(0.9)
    assert steady["ess"]["mean"] == pytest.approx(0.4)
    assert steady["response_length"]["mean"] == 18.0
    assert (killed["seeds"], killed["finished"]) == (2, 1)
    assert (failed["seeds"], failed["finished"]) == (1, 0)


def test_what_a_run_did_not_come_to_is_in_no_mean(variants):
    _, killed, failed = comparison_rows(variants)
    assert killed["accuracy_final"] == {"mean": 0.5, "min": 0.5, "max": 0.5, "n": 1}
    assert killed["wall_seconds"] == {"mean": 60.0, "min": 60.0, "max": 60.0, "n": 1}
    assert failed["accuracy_final"] == {"mean": None, "min": None, "max": None, "n": 0}
    unfinished = killed["runs"][1]
    assert (unfinished["status"], unfinished["steps"], unfinished["planned_steps"]) == ("unfinished", 4, 12)
    assert (unfinished["accuracy_final"], unfinished["accuracy_latest"]) == (None, 0.25)
    assert unfinished["wall_seconds"] is not None


def test_rows_are_json_even_where_numbers_are_not_finite(tmp_path):
    run = make_run(tmp_path, 1)
    for row in run.kind("step") + run.kind("rollout") + run.kind("evaluation"):
        row.update({name: float("nan") for name, value in row.items() if isinstance(value, float)})
    rows = comparison_rows([Variant("a", [run])])
    assert json.loads(json.dumps(rows, allow_nan=False)) == rows
    assert rows[0]["ess"]["n"] == 0


def test_a_collapse_is_counted_and_its_reason_told(tmp_path):
    runs = [make_run(tmp_path / str(seed), seed, after) for seed, after in ((1, 0.75), (2, 0.0))]
    runs[1].kind("evaluation")[0]["accuracy"] = 0.5
    (row,) = comparison_rows([Variant("a", runs)])
    assert (row["collapsed"], row["runs"][0]["collapsed"]) == (1, None)
    text = Page(write_comparison(tmp_path / "page.html", "t", [Variant("a", runs)]).read_text()).text
    assert "1 of 2" in text
    assert "seed 2: held-out accuracy fell from 0.50 to 0.00, having started at 0.50" in text


def test_a_band_is_over_the_runs_that_have_the_step():
    assert spreads([[(0.0, 1.0), (4.0, 2.0)], [(0.0, 4.0)], []]) == [
        Spread(0.0, 2.5, 1.0, 4.0, 2),
        Spread(4.0, 2.0, 2.0, 2.0, 1),
    ]


def test_long_runs_are_drawn_as_means_of_stretches():
    assert thinned([(0.0, 1.0), (1.0, 3.0), (2.0, 5.0), (6.0, 7.0)], 3) == [(0.0, 3.0), (6.0, 7.0)]
    rows = {"rollout": [{"step": step, "reward/mean": float(step % 2)} for step in range(1000)]}
    run = RunFolder(Path("run"), rows=rows, config={"algorithm": {"steps": 1000}})
    figure = draw(next(measure for measure in LEARNING if measure.name == "reward"), [Variant("a", [run])])
    assert figure is not None and "Each point is a mean over 9 steps" in figure.caption
    (series,) = json.loads(unescape(re.findall(r'data-hover="([^"]*)"', figure.body)[0]))
    assert len(series["points"]) == 112 <= MOST_POINTS


def test_charts_show_every_variant_with_its_runs(variants, tmp_path):
    html = write_comparison(tmp_path / "page.html", "t", variants).read_text()
    ids = [attrs["id"] for tag, attrs in Page(html).elements if tag == "figure"]
    assert ids == [f"chart-{name}" for name in CHARTS]
    for chart in CHARTS[:-1]:
        shown = hovers(html, chart)
        assert {name: series["colour"] for name, series in shown.items()} == {
            "steady": "variant0",
            "killed": "variant1",
            "failed": "variant2",
        }
    reward = hovers(html, "reward")
    # Seeds 1 to 3 have 0.01 to 0.03 more than 0.3, 0.5, 0.7; the killed seed 2 has only the first batch.
    assert reward["steady"]["step 0"] == "0.32 (0.31 to 0.33, n 3)"
    assert reward["steady"]["step 8"] == "0.72 (0.71 to 0.73, n 3)"
    assert reward["killed"]["step 0"] == "0.315 (0.31 to 0.32, n 2)"
    assert reward["killed"]["step 4"] == "0.51 (0.51 to 0.51, n 1 of 2)"
    assert reward["failed"] == {"colour": "variant2", "step 0": "0.31", "step 4": "0.51"}
    assert hovers(html, "accuracy")["steady"]["step 12"] == "75% (60% to 95%, n 3)"
    assert hovers(html, "log-weight-std")["steady"]["step 4"] == "0.9 (0.9 to 0.9, n 3)"


def test_a_dot_marks_where_an_unfinished_run_ended(variants, tmp_path):
    html = write_comparison(tmp_path / "page.html", "t", variants).read_text()
    figure = html.split('id="chart-reward"')[1].split("</figure>")[0]
    dots = re.findall(r'<path class="dots" d="([^"]*)" style="stroke:var\(--(variant\d)\)', figure)
    places = {colour: [float(x) for x, _ in re.findall(r"M([\d.]+) ([\d.]+)h0", path)] for path, colour in dots}
    # The axis has 12 steps: the killed run's last batch is at step 0, the failed run's at step 4.
    assert places == {"variant1": [0.0], "variant2": [pytest.approx(1000 * 4 / 12, abs=0.1)]}


def test_unfinished_runs_are_named_with_what_they_reached(variants, tmp_path):
    text = Page(write_comparison(tmp_path / "page.html", "t", variants).read_text()).text
    assert "Not all runs finished" in text
    assert "killed, seed 2: unfinished, after 4 of 12 steps" in text
    assert "failed, seed 1: failed: gradients are not finite, after 8 of 12 steps" in text
    assert "25.0% at step 0" in text
    assert "60.0% to 95.0%" in text and "n 1 of 2" in text


def test_one_run_alone_has_a_page(tmp_path):
    page = Page(
        write_comparison(tmp_path / "page.html", "Alone", [Variant("a", [make_run(tmp_path / "a", 7)])]).read_text()
    )
    assert "seed 7 · a" in page.text and "75.0%" in page.text
    assert "Not all runs finished" not in page.text and "What differs" not in page.text


def test_fourteen_variants_keep_fourteen_colours(tmp_path):
    many = [Variant(f"v{index}", [make_run(tmp_path / str(index), 1)]) for index in range(14)]
    html = write_comparison(tmp_path / "page.html", "t", many).read_text()
    for chart in CHARTS[:-1]:
        colours = {name: series["colour"] for name, series in hovers(html, chart).items()}
        assert colours == {f"v{index}": f"variant{index}" for index in range(14)}
    # Twelve colours in each of light and dark; the last two variants have the first two again, dashed.
    values = dict(re.findall(r"--(variant\d+): (#\w{6});", html.split(':root[data-theme="dark"] { --variant')[0]))
    assert len(values) == 14 and len(set(values.values())) == 12
    dashed = set(re.findall(r'style="stroke:var\(--(variant\d+)\)" stroke-dasharray', html))
    assert dashed == {"variant12", "variant13"}


def test_what_users_wrote_stays_text(tmp_path):
    run = make_run(tmp_path / "a&b <i>", 1, model={"path": HOSTILE}, extra={HOSTILE: HOSTILE})
    run.summary["status"] = HOSTILE
    other = make_run(tmp_path / "other", 1)
    page = Page(
        write_comparison(
            tmp_path / "page.html", HOSTILE, [Variant(HOSTILE, [run]), Variant("b", [other])], HOSTILE
        ).read_text()
    )
    tags = [tag for tag, _ in page.elements]
    assert tags.count("script") == 2 and "img" not in tags
    assert not [attrs for _, attrs in page.elements if any(name.startswith("on") for name in attrs)]
    assert page.text.count(HOSTILE) >= 8


def test_the_page_loads_nothing(variants, tmp_path):
    text = write_comparison(tmp_path / "page.html", "t", variants).read_text()
    for _tag, attrs in Page(text).elements:
        for name in ("src", "href", "action", "data", "poster", "srcset"):
            assert not re.match(r"(https?:)?//", attrs.get(name) or "")
    assert not re.search(r"@import|url\(|fetch\(|XMLHttpRequest|https?://", text)


def test_links_lead_to_each_runs_report(tmp_path):
    runs = [make_run(tmp_path / "runs" / "a#1 b", 1), make_run(tmp_path / "runs" / "c", 2)]
    (runs[1].path / "report.html").unlink()
    page = Page(write_comparison(tmp_path / "pages" / "deep" / "page.html", "t", [Variant("v", runs)]).read_text())
    links = [attrs["href"] for tag, attrs in page.elements if tag == "a"]
    assert links == ["../../runs/a%231%20b/report.html"]
    assert "seed 2 · c" in page.text


def test_settings_that_differ_are_shown_and_no_others(tmp_path):
    def run(name: str, seed: int, **settings) -> RunFolder:
        return RunFolder(Path(name), config={"seed": seed, "run_dir": name, "same": 1, **settings})

    a = Variant("a", [run("1", 1, kernel={"name": "vespo", "c1": 2.0}, sources=[{"task": "x", "seed": 1}])] * 2)
    b = Variant("b", [run("2", 1, kernel={"name": "grpo", "clip": [0.2, None]}, sources=[{"task": "x", "seed": 2}])])
    assert config_differences([a, b]) == [
        ("kernel.name", ["vespo", "grpo"]),
        ("kernel.c1", ["2.0", "–"]),
        ("sources.0.seed", ["1", "2"]),
        ("kernel.clip", ["–", "[0.2, null]"]),
    ]
    assert mixed_settings([a, b]) == []
    mixed = Variant("c", [run("3", 1, lr=1e-3), run("4", 2, lr=2e-3)])
    assert mixed_settings([a, mixed]) == [("c", ["lr"])]
    assert ("lr", ["–", "0.001 / 0.002"]) in config_differences([a, mixed])


def test_cost_is_that_of_finished_runs(variants, tmp_path):
    # 3 batches of 2, 0.5 (no wait for groups) and 4 steps of 1 second; 4 syncs of 0.4; 2 evaluations of 3; 83 in all.
    known = [6.0, 1.5, 0.0, 12.0, 1.6, 6.0]
    assert seconds_by_phase(variants[0].runs[0]) == pytest.approx([*known, 83 - sum(known)])
    html = write_comparison(tmp_path / "page.html", "t", variants).read_text()
    text = Page(html.split('id="chart-cost"')[1].split("</figure>")[0]).text
    assert "83 s, n 3" in text and "60 s, n 1 of 2" in text and "50 s, n 1, none finished" in text


def test_a_variant_without_runs_is_shown_and_a_page_without_runs_is_a_mistake(variants, tmp_path):
    text = Page(write_comparison(tmp_path / "page.html", "t", [*variants, Variant("empty", [])]).read_text()).text
    assert "empty: there is no run" in text
    with pytest.raises(ConfigError, match="no run to compare"):
        write_comparison(tmp_path / "page.html", "t", [Variant("empty", [])])


@needs_chromium
@pytest.mark.parametrize("width", [400, 1600])
def test_a_browser_shows_the_page_without_an_error(variants, tmp_path, width):
    """In a frame of that width: nothing overflows; pointing, hiding a variant and unfolding its runs do what they say."""
    probe = """<script>{
      const areas = [...document.querySelectorAll(".area")], all = (query) => document.querySelectorAll(query);
      const point = () => areas.forEach((area) => {
        const box = area.getBoundingClientRect();
        area.dispatchEvent(new PointerEvent("pointermove", { clientX: box.left + 9, clientY: box.top + 9 }));
      });
      const lines = () => areas.map((area) => area.querySelectorAll(".tip div").length);
      const colour = () => getComputedStyle(areas[0].querySelector('path[style*="variant0"]')).stroke;
      point();
      const before = { lines: lines(), colour: colour() };
      all("#legend button")[1].click();
      point();
      const hidden = lines();
      all("#legend button")[1].dispatchEvent(new PointerEvent("pointerenter"));
      all("#legend button")[2].dispatchEvent(new PointerEvent("pointerenter"));
      const faint = colour();
      all("#legend button")[2].dispatchEvent(new PointerEvent("pointerleave"));
      all(".fold")[0].click();
      parent.document.title = JSON.stringify({
        width: innerWidth, overflow: document.documentElement.scrollWidth - innerWidth, areas: areas.length,
        drawn: areas.filter((area) => area.clientWidth > 200
          && [...area.querySelectorAll("svg path:not(.grid, .level)")].some((path) => path.getBoundingClientRect().width > 0)).length,
        before: before.lines, hidden, faded: faint !== before.colour, restored: colour() === before.colour,
        folded: all(".run[hidden]").length,
      });
    }</script></body>"""
    page = write_comparison(tmp_path / "page.html", "t", variants)
    seen = seen_in_browser(page.read_text(encoding="utf-8").replace("</body>", probe), width, tmp_path)
    assert seen["width"] == width and seen["overflow"] <= 0
    assert seen["areas"] == seen["drawn"] == 10
    assert set(seen["before"]) == {3} and set(seen["hidden"]) == {2}
    assert seen["faded"] and seen["restored"]
    assert seen["folded"] == 3

"""Many variants of a grid on one page: a table of methods by values, a panel for each point, a line for each method."""

import re
from pathlib import Path

import pytest
from browser import needs_chromium, seen_in_browser
from test_comparison_shows_every_run import Page, hovers, make_run

from megatron_vespo.observability.comparison import comparison_rows, write_comparison
from megatron_vespo.observability.comparison_grid import Variant, arranged, grid_table

N, RATE = "algorithm.staleness", "optimizer.learning_rate"


def variant(method: str, runs=(), **values: str) -> Variant:
    keys = {"n": N, "rate": RATE}
    point = tuple((keys[key], value) for key, value in values.items())
    return Variant(", ".join([method, *values.values()]), [*runs], method, point)


@pytest.fixture
def grid(tmp_path: Path) -> list[Variant]:
    """Two methods at N = 4, 16, 64; after training 0.1 less at each larger N, and b another 0.05 less."""
    return [
        variant(method, [make_run(tmp_path / method / n / str(s), s, after - 0.02 * s) for s in (1, 2)], n=n)
        for method, start in (("a", 0.9), ("b", 0.85))
        for n, after in (("4", start), ("16", start - 0.1), ("64", start - 0.2))
    ]


def test_several_methods_at_several_points_are_a_panel_for_each_point(grid):
    found = arranged(grid)
    assert found.lines == ["a", "b"]
    assert [panel.title for panel in found.panels] == ["staleness=4", "staleness=16", "staleness=64"]
    assert [[one.name for one in panel.variants] for panel in found.panels] == [
        ["a, 4", "b, 4"],
        ["a, 16", "b, 16"],
        ["a, 64", "b, 64"],
    ]
    assert [found.line_of(one) for one in grid] == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize(
    "variants",
    [
        [variant("a", n="4"), variant("b", n="4"), variant("a", n="16"), variant("b", n="16")],
        [variant("a", n=str(n)) for n in range(6)],
        [variant(name) for name in "abcdef"],
        [Variant(name, []) for name in "abcdef"],
    ],
    ids=["few", "one method", "one point", "no grid"],
)
def test_all_others_are_one_panel(variants):
    found = arranged(variants)
    assert [panel.title for panel in found.panels] == [""]
    assert found.lines == [one.name for one in variants]


def test_the_last_axis_is_across_and_what_was_not_planned_is_left_empty():
    variants = [
        variant("a", n="4", rate="1"),
        variant("a", n="4", rate="2"),
        variant("a", n="16", rate="2"),
        variant("b", n="4", rate="1"),
    ]
    table = grid_table(comparison_rows(variants))
    assert table is not None and (table.axis, table.columns) == (RATE, ["1", "2"])
    names = [(line, [None if row is None else row["name"] for row in at]) for line, at in table.lines]
    assert names == [
        ("a, staleness=4", ["a, 4, 1", "a, 4, 2"]),
        ("a, staleness=16", [None, "a, 16, 2"]),
        ("b, staleness=4", ["b, 4, 1", None]),
    ]


def test_numbers_are_laid_across_in_their_order_and_words_as_they_come():
    def columns(*values: str) -> list[str]:
        table = grid_table(comparison_rows([variant("a", rate=value) for value in values]))
        return [] if table is None else table.columns

    assert columns("0.0001", "16", "5e-05", "4") == ["5e-05", "0.0001", "4", "16"]
    assert columns("off", "R3", "10") == ["off", "R3", "10"]


def test_without_values_to_lay_across_there_is_no_table():
    assert grid_table([]) is None
    assert grid_table(comparison_rows([Variant("a", []), Variant("b", [])])) is None
    assert grid_table(comparison_rows([variant("a", n="4"), variant("b", n="4")])) is None
    assert grid_table(comparison_rows([variant("a", n="4"), Variant("b", [])])) is None


def test_the_page_has_the_table_and_the_panels(grid, tmp_path):
    html = write_comparison(tmp_path / "page.html", "t", grid).read_text()
    text = Page(html.split('id="grid"')[1].split("</section>")[0]).text
    # seeds have 0.02 and 0.04 less
    assert "87.0%86.0%to88.0%" in text.replace(" ", "")
    figure = html.split('id="chart-accuracy"')[1].split("</figure>")[0]
    assert figure.count('class="area"') == 3
    assert [title in Page(figure).text for title in ("staleness=4", "staleness=16", "staleness=64")] == [True] * 3
    first = hovers(html, "accuracy")
    assert {name: series["colour"] for name, series in first.items()} == {"a": "variant0", "b": "variant1"}
    assert first["a"]["step 12"] == "87% (86% to 88%, n 2)" and first["b"]["step 12"] == "82% (81% to 83%, n 2)"
    chips = re.findall(r'data-colour="(variant\d)"[^>]*>.*?</i>([^<]*)<', html)
    assert chips == [("variant0", "a"), ("variant1", "b")]


@needs_chromium
@pytest.mark.parametrize("width", [400, 1600])
def test_a_browser_shows_every_panel_and_nothing_overflows(grid, tmp_path, width):
    probe = """<script>
      const areas = [...document.querySelectorAll(".area")];
      const small = [...document.querySelectorAll("body *")].filter((node) => node.innerText?.trim()
        && parseFloat(getComputedStyle(node).fontSize) < 11);
      parent.document.title = JSON.stringify({
        overflow: document.documentElement.scrollWidth - innerWidth, areas: areas.length, small: small.length,
        drawn: areas.filter((area) => area.clientWidth > 200
          && [...area.querySelectorAll("svg path:not(.grid, .level)")].some((path) => path.getBoundingClientRect().width > 0)).length,
        abreast: areas.filter((area) => area.getBoundingClientRect().top === areas[0].getBoundingClientRect().top).length,
      });
    </script></body>"""
    page = write_comparison(tmp_path / "page.html", "t", grid)
    seen = seen_in_browser(page.read_text(encoding="utf-8").replace("</body>", probe), width, tmp_path)
    assert seen["overflow"] <= 0 and seen["small"] == 0
    assert seen["areas"] == seen["drawn"] == 10 * 3
    assert seen["abreast"] == (3 if width == 1600 else 1)

"""The report and the comparison of two runs, in a telephone's and a screen's width: no text under 10 px, none on another."""

import pytest
from browser import READABLE, needs_chromium, seen_in_browser

from megatron_vespo.observability.compare_runs import compare_runs
from megatron_vespo.observability.report import write_report

SCRIPT = f"""<script>parent.document.title = JSON.stringify({{ ...{READABLE},
  overflow: document.documentElement.scrollWidth - innerWidth, areas: document.querySelectorAll(".area").length }});
</script></body>"""

PLANTED = """<!doctype html><meta charset="utf-8"><body><figure id="one" style="position:relative;height:40px">
<span style="position:absolute;left:0">0.25</span><span style="position:absolute;left:8px">0.50</span>
<span style="position:absolute;left:200px">apart</span><i hidden style="position:absolute;left:200px">hidden</i></figure>
<p style="font-size:9px">tiny</p><p>wide enough</p></body>"""


@needs_chromium
@pytest.mark.parametrize("width", [400, 1600])
@pytest.mark.parametrize("page", ["report", "report_with_routes", "comparison"])
def test_every_text_can_be_read(finished_run, run_with_routes, tmp_path, page, width):
    if page == "comparison":
        written = compare_runs([finished_run, run_with_routes], tmp_path / "comparison.html")
    else:
        written = write_report(finished_run if page == "report" else run_with_routes)
    seen = seen_in_browser(written.read_text(encoding="utf-8").replace("</body>", SCRIPT), width, tmp_path)
    assert seen["texts"] > 50 and seen["areas"] >= 8 and seen["overflow"] <= 0
    assert seen["small"] == [] and seen["clashes"] == []


@needs_chromium
def test_what_cannot_be_read_is_found(tmp_path):
    seen = seen_in_browser(PLANTED.replace("</body>", SCRIPT), 400, tmp_path)
    assert (seen["texts"], seen["small"], seen["clashes"]) == (5, ["tiny"], ["one: 0.25 | 0.50"])

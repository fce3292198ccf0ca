"""docs/results.md says what results/*.json hold, and those hold what their runs came to."""

import importlib.util
import json
import re
from pathlib import Path
from statistics import fmean

import pytest
import yaml

from megatron_vespo.config import AblationConfig, load_config, plan_runs

REPOSITORY = Path(__file__).parents[2]
PAGE = REPOSITORY / "docs" / "results.md"


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("write_results", REPOSITORY / "tools" / "write_results.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def sections() -> dict[str, str]:
    """The figures of each section, by its name."""
    found = re.findall(r"<!-- (\w+): written .*? -->(.*?)<!-- \1: to here -->", PAGE.read_text(), re.DOTALL)
    return dict(found)


def shown(text: str) -> dict[str, list[str]]:
    """Lines of the table of variants, by the name in front."""
    lines = [line.strip("| ").split(" | ") for line in text.split("| collapsed |\n")[1].splitlines() if line[:1] == "|"]
    return {cells[0]: cells[1:] for cells in lines[1:]}


def test_the_page_is_up_to_date(tool):
    assert tool.page(PAGE.read_text(), tool.RESULTS) == PAGE.read_text(), "run python tools/write_results.py"


def test_the_images_are_up_to_date(tool):
    for name, drawn in tool.images(tool.RESULTS).items():
        assert (tool.IMAGES / name).read_bytes() == drawn, "run python tools/write_results.py"


def test_curves_are_drawn_over_all_runs_of_a_method(tool):
    point = {"algorithm.staleness": "4"}
    runs = [{"accuracy_over_steps": [[0, 0.2], [8, 0.4]]}, {"accuracy_over_steps": [[0, 0.4]]}]
    rows = [{"method": "a", "point": point, "runs": runs}, {"method": "b", "point": point, "runs": [{}]}]
    assert tool.curves_by_point(rows) == {"staleness=4": {"a": {0: [0.2, 0.4], 8: [0.4]}}}
    assert b"staleness=4" in tool.draw(rows) == tool.draw(rows)
    assert tool.draw(rows[1:]) is None


def test_every_row_is_the_mean_and_the_range_of_its_runs():
    """From the runs of each file, not from the means in it."""
    assert sections()
    for name, text in sections().items():
        data = json.loads((REPOSITORY / "results" / f"{name}.json").read_text())
        table = shown(text)
        assert len(table) == len(data["variants"])
        for row in data["variants"]:
            finals = [run["accuracy_final"] for run in row["runs"] if run["accuracy_final"] is not None]
            told = table[row["name"]][2]
            numbers = [float(number) for number in re.findall(r"[\d.]+", told)]
            expected = {round(value, 3) for value in (fmean(finals), min(finals), max(finals))} if finals else set()
            assert set(numbers) == expected
            assert int(table[row["name"]][-1]) == sum(run["collapsed"] is not None for run in row["runs"])


def test_every_section_says_how_it_was_made():
    for name, text in sections().items():
        data = json.loads((REPOSITORY / "results" / f"{name}.json").read_text())
        assert f"`{data['command']}`" in text and data["date"] in text and data["machine"] in text
        assert (
            f"examples/lab/{name}.yaml" in data["command"]
            and (REPOSITORY / "examples" / "lab" / f"{name}.yaml").exists()
        )
        assert re.search(rf"seeds? {', '.join(map(str, data['seeds']))};", text)
        assert {run["seed"] for row in data["variants"] for run in row["runs"]} == set(data["seeds"])


def row(name: str, method: str, n: str, finals: list[float]) -> dict:
    def of(values):
        return {"mean": fmean(values), "min": min(values), "max": max(values), "n": len(values)}

    runs = [{"seed": seed, "collapsed": None} for seed, _ in enumerate(finals, 1)]
    names = ("before", "best")
    found = {f"accuracy_{key}": of([0.5]) for key in names} | {"accuracy_final": of(finals)}
    found |= {key: of([1.0]) for key in ("log_weight_std", "ess", "response_length", "wall_seconds")}
    point = {"algorithm.staleness": n}
    return {
        "name": name,
        "method": method,
        "point": point,
        "seeds": 2,
        "finished": 2,
        "collapsed": 1,
        "runs": runs,
        **found,
    }


@pytest.fixture
def results(tmp_path) -> Path:
    rows = [row("vespo, staleness=4", "vespo", "4", [0.8, 0.9]), row("vespo, staleness=64", "vespo", "64", [0.7, 0.83])]
    data = {"title": "t", "command": "megatron-vespo ablate x", "commit": "abc", "date": "2026-01-02", "machine": "m"}
    data |= {"seeds": [1, 2], "planned": 4, "finished": 4, "wall_hours": 1.25, "core_hours": 2.5, "variants": rows}
    (tmp_path / "staleness.json").write_text(json.dumps(data))
    return tmp_path


def test_a_grid_that_was_run_gets_a_section_before_the_rest(tool, results):
    text = tool.page("# Results\n\nHead.\n\n## Own grids\n\nHow.\n", results)
    head, section, rest = text.split("\n## ")
    assert head == "# Results\n\nHead.\n" and rest == "Own grids\n\nHow.\n"
    assert section.startswith("Staleness\n\nDoes learning hold")
    # 0.765 / 0.85
    assert (
        "| vespo | 0.850 (0.800 to 0.900), 1 of 2 collapsed | 0.765 (0.700 to 0.830), 1 of 2 collapsed | 0.90 |"
        in section
    )
    assert "; commit abc; seeds 1, 2; 4 of 4 runs finished; 1.2 hours one after the other (2.5 core hours)." in section


def test_what_was_written_by_hand_stays(tool, results):
    text = tool.page("# Results\n", results)
    edited = text.replace("Does learning hold when the data is old?", "My words.").rstrip() + "\n\nWhy: because.\n"
    data = json.loads((results / "staleness.json").read_text())
    (results / "staleness.json").write_text(json.dumps(data | {"date": "2027-01-01"}))
    assert tool.page(edited, results) == edited.replace("2026-01-02", "2027-01-01")
    (results / "staleness.json").unlink()
    with pytest.raises(ValueError, match="a section of staleness"):
        tool.page(edited, results)


def test_the_grid_on_the_page_is_one(tmp_path):
    block = PAGE.read_text().split("seeds.\n\n")[1].split("\n\n")[0]
    text = "\n".join(line.removeprefix("    ") for line in block.splitlines())
    grid = yaml.safe_load(text)
    for variant in (grid, *grid["variants"].values()):
        if "config" in variant:
            variant["config"] = str(REPOSITORY / "examples" / "lab" / variant["config"])
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(grid))
    planned = plan_runs(load_config(AblationConfig, tmp_path / "grid.yaml"), tmp_path / "grid.yaml", tmp_path)
    assert len(planned) == 3 * 2 * 3

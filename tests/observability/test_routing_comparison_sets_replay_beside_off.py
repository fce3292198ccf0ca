"""What a comparison of runs with and without routing replay says of them, from rows written by hand."""

import json
import re
from html import unescape
from pathlib import Path

import pytest
from small_run import HOSTILE

from megatron_vespo.config import ConfigError
from megatron_vespo.observability.comparison_grid import Variant
from megatron_vespo.observability.routing_comparison import (
    MEASURED,
    routing_figures,
    routing_rows,
    write_routing_comparison,
    write_routing_figures,
)
from megatron_vespo.observability.routing_comparison_charts import dose_response, grouped, mismatch, within_group
from megatron_vespo.observability.run_folder import RunFolder


def run(replay: str = "off", seed: int = 1, k3: float = 4e-4, noise: dict | None = None) -> RunFolder:
    """Two batches of two steps; with replay, a quarter of k3 is left in the first batch, and an eighth in the second."""
    batches = [
        {
            "step": 2 * batch,
            "routing_probe/native/k1": 0.01 * sign,
            "routing_probe/native/k3": k3 * (batch + 1),
            "routing_probe/native/share_above_ln2": 0.02,
            "routing_probe/replayed/k1": 0.001,
            "routing_probe/replayed/k3": k3 / 4,
            "routing_probe/replayed/share_above_ln2": 0.0,
            "routing_probe/same_set": 0.9 + 0.02 * batch,
            "routing/missing_share": 0.1 * batch,
            "speed/generated_tokens_per_second": 100.0 + 50 * batch,
        }
        for batch, sign in enumerate((1, -3))
    ]
    steps = [
        {"step": step, "routing/same_set": 0.8 + 0.01 * step, "time/train": seconds}
        for step, seconds in ((1, 9.0), (2, 1.0), (3, 2.0), (4, 3.0))
    ]
    steps[0]["mismatch/k3"], steps[2]["mismatch/k3"] = 1e-3, 3e-3
    evaluations = [{"step": 0, "accuracy": 0.25, "when": "before"}, {"step": 4, "accuracy": 0.5, "when": "after"}]
    config = {
        "seed": seed,
        "model": {"dtype": "float32"},
        "algorithm": {"steps": 4},
        "routing": {"replay": replay},
        "rollout": {"engine": {"dtype": None, "router_noise": noise}},
    }
    rows = {"rollout": batches, "step": steps, "evaluation": evaluations}
    return RunFolder(Path(f"runs/{replay}/{seed}"), rows=rows, config=config, summary={"status": "finished"})


def test_figures_of_a_run_are_means_and_medians_of_its_rows():
    assert routing_figures(run()) == pytest.approx(
        {
            "k1_native": -0.01,
            "k3_native": 6e-4,
            "share_above_ln2_native": 0.02,
            "k1_replayed": 0.001,
            "k3_replayed": 1e-4,
            "share_above_ln2_replayed": 0.0,
            "k3_lowered_by": 6.0,
            "k3_trained_on": 2e-3,
            "same_set_equal_versions": 0.91,
            "same_set_steps": 0.825,
            "missing_share": 0.05,
            "step_seconds": 2.5,
            "engine_tokens_per_second": 125.0,
        }
    )


def test_what_was_not_measured_is_none_and_what_is_not_finite_is_left_out():
    assert routing_figures(RunFolder(Path("empty"))) == dict.fromkeys(MEASURED)
    broken = run()
    broken.rows["rollout"][1]["routing_probe/native/k3"] = float("inf")
    broken.rows["rollout"][0]["routing_probe/replayed/k3"] = 0.0
    broken.rows["rollout"][1]["routing_probe/replayed/k3"] = 0.0
    found = routing_figures(broken)
    assert found["k3_native"] == pytest.approx(4e-4) and found["k3_replayed"] == 0 and found["k3_lowered_by"] is None


def test_a_variant_has_mean_least_and_largest_over_its_seeds():
    unmeasured = RunFolder(Path("runs/3"), config={"seed": 3})
    (row,) = routing_rows([Variant("noisy", [run("R3", 1, 1e-4, NOISE), run("R3", 2, 3e-4, NOISE), unmeasured])])
    assert row["k3_native"] == pytest.approx({"mean": 3e-4, "min": 1.5e-4, "max": 4.5e-4, "n": 2})
    assert row["accuracy_final"]["n"] == 2 and row["seeds"] == 3
    assert (row["replay"], row["engine_dtype"], row["router_noise"]) == ("R3", "float32", NOISE)
    assert [one["seed"] for one in row["runs"]] == [1, 2, 3]


NOISE = {"on": "selection", "scale": 0.1}


def test_modes_of_one_thing_stand_together_in_order():
    names = ["a, b, replay=R3", "a, c, replay=off", "a, b, replay=off", "other name"]
    replays = ["R3", "off", "off", "R2"]
    variants = [Variant(name, [run(replay)]) for name, replay in zip(names, replays, strict=True)]
    groups = grouped(variants)
    assert [(group.name, list(group.by_mode)) for group in groups] == [
        ("a, b", ["off", "R3"]),
        ("a, c", ["off"]),
        ("other name", ["R2"]),
    ]
    assert groups[0].by_mode["R3"] is variants[0]


def hover(figure) -> list[dict]:
    return json.loads(unescape(re.search(r'data-hover="([^"]*)"', figure.body)[1]))


def test_the_mismatch_chart_has_native_and_replayed_of_each_mode():
    (group,) = grouped([Variant("x, replay=off", [run("off")]), Variant("x, replay=R3", [run("R3", k3=8e-4)])])
    lines = {line["name"]: [point[1:] for point in line["points"]] for line in hover(mismatch(group))}
    assert lines == {
        "off, native": [["step 0", "4e-04"], ["step 2", "8e-04"]],
        "off, replayed": [["step 0", "1e-04"], ["step 2", "1e-04"]],
        "R3, native": [["step 0", "8e-04"], ["step 2", "0.0016"]],
        "R3, replayed": [["step 0", "2e-04"], ["step 2", "2e-04"]],
    }
    # R2 has no runs here, and R3 keeps the colour that it has beside R2
    assert {line["name"][:3]: line["colour"] for line in hover(mismatch(group))} == {
        "off": "variant0",
        "R3,": "variant2",
    }


def test_the_dose_response_goes_from_no_noise_to_the_largest():
    variants = [Variant("clean, replay=off", [run(k3=1e-6)])]
    for scale in (0.1, 0.4):
        noise = {"on": "logits", "scale": scale}
        variants.append(Variant(f"logits {scale}, replay=off", [run("off", seed, scale, noise) for seed in (1, 2)]))
    figures = {figure.name: figure for figure in dose_response(grouped(variants))}
    assert list(figures) == ["dose-k3-logits", "dose-agreement-logits", "dose-accuracy-logits"]
    native = next(line for line in hover(figures["dose-k3-logits"]) if line["name"] == "off, native")
    assert [point[0] for point in native["points"]] == [0, 250, 1000]
    assert [point[1] for point in native["points"]] == ["noise 0", "noise 0.1", "noise 0.4"]
    # the mean of two batches is 1.5 times the first
    assert [point[2].split()[0] for point in native["points"]] == ["1.5e-06", "0.15", "0.6"]


def test_nothing_is_drawn_of_what_nobody_measured():
    (group,) = grouped([Variant("x, replay=off", [RunFolder(Path("empty"), config={"routing": {"replay": "off"}})])])
    assert mismatch(group) is None and within_group(group, 0) == []


def test_the_page_holds_every_group_and_no_foreign_markup(tmp_path):
    variants = [
        Variant(f"{name}, replay={replay}", [run(replay, 1), run(replay, 2, 8e-4)])
        for name in ("vespo", HOSTILE)
        for replay in ("off", "R2", "R3")
    ]
    page = write_routing_comparison(tmp_path / "new" / "page.html", HOSTILE, variants, more="more.html").read_text()
    assert "<script>alert" not in page and "<img src=x" not in page
    charts = re.findall(r'id="chart-([^"]+)"', page)
    assert charts == [f"{name}-{group}" for group in (0, 1) for name in ("accuracy", "mismatch", "agreement", "drift")]
    # six lines of the table: mean, and least to largest where they differ
    assert page.count(">9e-04<") == 6 and page.count(">6e-04 to 0.0012<") == 6
    assert page.count(">6<") == 6 and ">6 to 6<" not in page
    assert 'href="more.html"' in page and not re.search(r'(src|href)="https?:', page)


def test_figures_are_strict_json(tmp_path):
    write_routing_figures(tmp_path / "a.json", "Title", [Variant("x", [run()]), Variant("none", [])])
    document = json.loads((tmp_path / "a.json").read_text(), parse_constant=pytest.fail)
    assert document["title"] == "Title" and [row["name"] for row in document["variants"]] == ["x", "none"]
    assert document["variants"][1]["k3_native"] == {"mean": None, "min": None, "max": None, "n": 0}


def test_no_run_at_all_is_said(tmp_path):
    with pytest.raises(ConfigError, match="no run to compare"):
        write_routing_comparison(tmp_path / "page.html", "Title", [Variant("none", [])])

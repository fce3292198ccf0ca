"""tools/routing_replay_ablation.py: a grid of runs with and without replay, whose figures are those of the runs' files."""

import json
import subprocess
import sys
from pathlib import Path
from statistics import fmean, median

import pytest
import yaml
from test_a_run_from_start_to_report import rows

from megatron_vespo.config import AblationConfig, load_config, plan_runs

pytestmark = pytest.mark.slow

EXAMPLES = Path("examples").resolve()
MODES = ("off", "R2", "R3")
SHORT = {
    "routing.record": True,
    "algorithm.steps": 4,
    "algorithm.staleness": 2,
    "algorithm.prompts_per_step": 4,
    "rollout.group_size": 4,
    "evaluation.prompts": 8,
    "evaluation.exclude": [],
    "evaluation.every_steps": 0,
    "observability.tensorboard": False,
}
VARIANTS = {"bf16 engine": {"set": {"rollout.engine.dtype": "bfloat16"}}}
GRID = {"title": "Short", "config": str(EXAMPLES / "quickstart.yaml"), "set": SHORT, "variants": VARIANTS}
GRID |= {"grid": {"routing.replay": list(MODES)}, "seeds": [1]}


def ablation(grid: Path, *arguments: str) -> subprocess.CompletedProcess:
    tool = [
        sys.executable,
        "tools/routing_replay_ablation.py",
        "--config",
        str(grid),
        "--out",
        str(grid.parent / "out"),
    ]
    return subprocess.run([*tool, *arguments], capture_output=True, text=True, timeout=400)


def written(folder: Path, grid: dict) -> Path:
    (folder / "grid.yaml").write_text(yaml.safe_dump(grid, sort_keys=False))
    return folder / "grid.yaml"


@pytest.fixture(scope="module")
def grid(tmp_path_factory) -> Path:
    return written(tmp_path_factory.mktemp("ablation"), GRID)


@pytest.fixture(scope="module")
def done(grid) -> Path:
    finished = ablation(grid)
    assert finished.returncode == 0, finished.stdout[-3000:] + finished.stderr[-3000:]
    return grid.parent / "out"


def figures(out: Path) -> dict[str, dict]:
    return {row["replay"]: row for row in json.loads((out / "ablation.json").read_text())["variants"]}


def run_folder(out: Path, mode: str) -> Path:
    return out / f"bf16_engine_replay={mode}" / "seed_1"


@pytest.mark.parametrize("mode", MODES)
def test_figures_are_those_of_the_runs_own_files(done, mode):
    row, folder = figures(done)[mode], run_folder(done, mode)
    (of_run,) = row["runs"]
    batches, steps, evaluations = (rows(folder, kind) for kind in ("rollout", "step", "evaluation"))
    assert len(batches) == 2 and len(steps) == 4
    expected = {
        "seed": 1,
        "status": "finished",
        "accuracy_before": evaluations[0]["accuracy"],
        "accuracy_final": evaluations[-1]["accuracy"],
        "accuracy_best": max(one["accuracy"] for one in evaluations),
        "k1_native": fmean(one["routing_probe/native/k1"] for one in batches),
        "k3_native": fmean(one["routing_probe/native/k3"] for one in batches),
        "k1_replayed": fmean(one["routing_probe/replayed/k1"] for one in batches),
        "k3_replayed": fmean(one["routing_probe/replayed/k3"] for one in batches),
        "share_above_ln2_native": fmean(one["routing_probe/native/share_above_ln2"] for one in batches),
        "share_above_ln2_replayed": fmean(one["routing_probe/replayed/share_above_ln2"] for one in batches),
        "k3_trained_on": fmean(one["mismatch/k3"] for one in steps if one["mini_batch"] == 0),
        "same_set_equal_versions": fmean(one["routing_probe/same_set"] for one in batches),
        "same_set_steps": fmean(one["routing/same_set"] for one in steps),
        "missing_share": fmean(one["routing/missing_share"] for one in batches),
        "step_seconds": median(one["time/train"] for one in steps),
        "engine_tokens_per_second": median(one["speed/generated_tokens_per_second"] for one in batches),
    }
    expected["k3_lowered_by"] = expected["k3_native"] / expected["k3_replayed"]
    assert {name: of_run[name] for name in expected} == pytest.approx(expected)
    assert of_run["collapsed"] is None and row["collapsed"] == 0 and row["engine_dtype"] == "bfloat16"
    for name in ("k3_native", "same_set_steps", "step_seconds", "accuracy_final"):
        assert row[name] == pytest.approx(dict.fromkeys(("mean", "min", "max"), expected[name]) | {"n": 1})


def test_the_mismatch_is_real_and_measured_whatever_is_replayed(done):
    """A bf16 engine against an fp32 trainer: rounding alone would be below 1e-9."""
    for row in figures(done).values():
        assert row["k3_native"]["mean"] > 1e-7 and row["k3_replayed"]["mean"] > 1e-7
        assert 0.9 < row["same_set_equal_versions"]["mean"] <= 1 and row["missing_share"]["mean"] == 0


def test_all_start_from_the_same_responses_and_train_on_different_routes(done):
    first = {mode: rows(run_folder(done, mode), "rollout")[0] for mode in MODES}
    assert len({row["response/fingerprint"] for row in first.values()}) == 1
    norms = [tuple(row["grad_norm"] for row in rows(run_folder(done, mode), "step")) for mode in MODES]
    assert len(set(norms)) == 3


def test_off_is_called_off(done):
    assert [row["name"] for row in figures(done).values()] == [f"bf16 engine, replay={mode}" for mode in MODES]
    for mode in MODES:
        assert yaml.safe_load((run_folder(done, mode) / "config.yaml").read_text())["routing"]["replay"] == mode


def test_pages_show_all_runs(done):
    page, learning = (done / "routing.html").read_text(), (done / "comparison.html").read_text()
    assert 'href="comparison.html"' in page and "bf16 engine, replay=off" in learning
    assert all(f'id="chart-{name}-0"' in page for name in ("accuracy", "mismatch", "agreement", "drift"))


def test_the_same_command_trains_nothing_again_and_finds_the_same_figures(grid, done):
    before = json.loads((done / "ablation.json").read_text())
    trained = {mode: (run_folder(done, mode) / "metrics.jsonl").stat().st_mtime_ns for mode in MODES}
    for name in ("ablation.json", "routing.html"):
        (done / name).unlink()
    again = ablation(grid)
    assert again.returncode == 0 and "3 runs, 3 of them finished before" in again.stdout
    assert json.loads((done / "ablation.json").read_text()) == before and (done / "routing.html").exists()
    assert trained == {mode: (run_folder(done, mode) / "metrics.jsonl").stat().st_mtime_ns for mode in MODES}


@pytest.mark.parametrize(
    ("change", "arguments", "said"),
    [
        ({"set": SHORT | {"routing.record": False}}, (), "'bf16 engine, replay=off', which records no routes"),
        ({"grid": {"routing.replay": ["R4"]}}, (), "run 'bf16 engine, replay=R4', seed 1"),
        ({"variants": {}}, (), "variants"),
        ({}, ("seed=2",), "seed is decided by the grid itself"),
        ({}, ("algorithm.stepz=2",), "algorithm.stepz: unknown key"),
    ],
)
def test_bad_input_is_named_and_nothing_starts(tmp_path, change, arguments, said):
    finished = ablation(written(tmp_path, GRID | change), *arguments)
    assert finished.returncode == 2 and said in finished.stderr
    assert not (tmp_path / "out").exists()


def test_one_seed_of_the_example_is_twelve_runs(tmp_path):
    grid = EXAMPLES / "lab" / "routing_replay.yaml"
    tool = [sys.executable, "tools/routing_replay_ablation.py", "--config", str(grid), "--out", str(tmp_path / "out")]
    listed = subprocess.run([*tool, "--seed", "1", "--dry-run"], capture_output=True, text=True, timeout=400)
    folders = [Path(line) for line in listed.stdout.splitlines()]
    assert listed.returncode == 0 and len(set(folders)) == 12 and {folder.name for folder in folders} == {"seed_1"}


def test_the_example_grids_are_what_they_say():
    file = EXAMPLES / "lab" / "routing_replay.yaml"
    runs = plan_runs(load_config(AblationConfig, file), file, Path("out"))
    assert len(runs) == 2 * 2 * 3 * 3 and all(run.config.routing.engine_records for run in runs)
    for run in runs:
        kernel, engine, replay = run.variant.split(", ")
        assert run.config.algorithm.objective.kernel.name == kernel.split()[0]
        assert run.config.model.dtype == "float32"
        assert (run.config.rollout.engine.dtype == "bfloat16") == (engine == "mismatched engine")
        assert f"replay={run.config.routing.replay}" == replay
    file = EXAMPLES / "lab" / "router_noise.yaml"
    runs = plan_runs(load_config(AblationConfig, file), file, Path("out"))
    noises = {(run.config.rollout.engine.router_noise, run.config.routing.replay) for run in runs if run.seed == 1}
    assert len(noises) == 9 * 2 and {run.config.routing.replay for run in runs} == {"off", "R3"}
    for run in runs:
        noise = run.config.rollout.engine.router_noise
        assert run.variant.split(", ")[0] == ("clean" if noise is None else f"{noise.on} {noise.scale}")

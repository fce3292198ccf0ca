"""Every grid of examples/lab is read by the command, here and on GPUs, and says what it asks and what it costs."""

import importlib.util
import json
import subprocess
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from megatron_vespo.cli import app
from megatron_vespo.config import AblationConfig, EvaluateConfig, SFTConfig, TrainConfig, load_config, plan_runs

LAB = Path("examples/lab")
GRIDS = sorted(path for path in LAB.glob("*.yaml") if "\nvariants:" in path.read_text())
TASKS = ("sumlab", "sumlong", "gpu")


def planned(name: str, over: Path | None = None):
    file = LAB / f"{name}.yaml"
    return plan_runs(load_config(AblationConfig, file), file, Path("runs/grid"), over=over)


@pytest.mark.parametrize("scale", [(), ("--scale", "gpu")], ids=["here", "gpu"])
@pytest.mark.parametrize("path", GRIDS, ids=lambda path: path.stem)
def test_the_command_takes_it(path, scale, tmp_path):
    told = CliRunner().invoke(
        app, ["ablate", str(path), "--out", str(tmp_path), "--dry-run", *scale], catch_exceptions=False
    )
    assert told.exit_code == 0
    assert len(told.stdout.splitlines()) == len(planned(path.stem)) > 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", GRIDS, ids=lambda path: path.stem)
def test_it_says_how_many_runs_it_is(path):
    head = "".join(line for line in path.read_text().splitlines() if line.startswith("#"))
    count = len(planned(path.stem))
    sums = {str(count), *(f"{part} + {count - part}" for part in range(count))}
    assert any(f"{text} runs" in head for text in sums)


def test_the_staleness_grid_is_the_papers_comparison():
    runs = planned("staleness")
    assert {(run.method, run.config.algorithm.staleness, run.seed) for run in runs} == {
        (method, n, seed) for method in ("vespo", "grpo", "gspo", "sapo") for n in (4, 16, 64) for seed in (1, 2, 3)
    }
    for run in runs:
        assert run.config.algorithm.objective.kernel.name == run.method and run.config.algorithm.steps == 128
        assert dict(run.point) == {"algorithm.staleness": str(run.config.algorithm.staleness)}
    more = {(run.method, run.config.algorithm.staleness) for run in planned("staleness_more")}
    methods = ("vespo", "grpo", "gspo", "sapo", "cispo", "reinforce")
    both = more | {(run.method, run.config.algorithm.staleness) for run in runs}
    assert both == {(method, n) for method in methods for n in (1, 4, 16, 64)}


def test_seeds_of_a_rate_sweep_are_none_of_those_that_are_compared():
    compared = {run.seed for name in ("staleness", "staleness_more", "kernels") for run in planned(name)}
    assert not compared & {run.seed for name in ("rates", "kernel_rates") for run in planned(name)}


def test_thresholds_become_bounds():
    bounds = {run.point[0][1]: run.config.algorithm.max_staleness for run in planned("thresholds")}
    assert bounds == {"0.5": 11, "1": 15, "2": 23, "4": 39}  # ceil((1 + s) 8) - 1


def test_a_correction_is_compared_with_its_absence_at_the_same_old_policy():
    for run in planned("mismatch"):
        assert run.config.algorithm.old_policy == "proximal" and run.config.routing.engine_records
        assert (run.config.algorithm.objective.engine_correction.name == "tis") == ("TIS" in run.method)
        engine = run.config.rollout.engine
        assert (engine.dtype == "bfloat16", engine.router_noise is not None) in ((True, False), (False, True))


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("make_tiny_base", "tools/make_tiny_base.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", TASKS)
def test_a_base_is_made_for_the_task_that_is_trained(tool, name):
    recipe = load_config(tool.Recipe, LAB / "tasks" / f"{name}.base.yaml")
    evaluated = load_config(EvaluateConfig, LAB / "tasks" / recipe.task)
    load_config(SFTConfig, "examples/tiny_base.sft.yaml", settings=recipe.sft)
    trained = (
        load_config(TrainConfig, LAB / "tasks" / f"{name}.yaml")
        if name != "gpu"
        else planned("rates", LAB / "gpu.yaml")[0].config
    )
    assert trained.model.path == recipe.out
    assert trained.data.sources == evaluated.data.sources
    assert trained.evaluation.exclude == evaluated.evaluation.exclude
    assert trained.rollout.max_response_tokens == evaluated.rollout.max_response_tokens
    assert evaluated.evaluation.exclude[0].source == evaluated.data.sources[0]


def test_on_gpus_it_fits_one_that_trains_and_one_that_samples(tool, tmp_path):
    run = planned("staleness", LAB / "gpu.yaml")[-1]
    recipe = load_config(tool.Recipe, LAB / "tasks" / "gpu.base.yaml")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(tool.MODEL | recipe.model))
    settings = run.config.model_dump(mode="json")
    settings["model"]["path"] = str(tmp_path / "model")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    told = CliRunner().invoke(
        app, ["plan", str(tmp_path / "run.yaml"), "--gpus", "2", "--json"], catch_exceptions=False
    )
    assert told.exit_code == 0, told.output
    memory = json.loads(told.stdout)["memory"]
    assert memory["fits"] and memory["gpus_used"] == 2


@pytest.mark.parametrize(
    ("target", "made"),
    [
        ("lab", "staleness"),
        ("lab-staleness", "staleness"),
        ("lab-kernel_rates", "kernel_rates"),
        ("lab-long_sums", "long_sums"),
    ],
)
def test_make_runs_any_grid_in_pieces_and_keeps_its_figures(target, made):
    told = subprocess.run(["make", "-n", target], capture_output=True, text=True, check=True).stdout
    command = f"ablate examples/lab/{made}.yaml --out runs/lab/{made} --minutes 55 --results results/{made}.json"
    assert told.count("megatron-vespo ablate") == 1 and command in told
    assert ("make_tiny_base.py --recipe examples/lab/tasks/sumlong.base.yaml" in told) == (
        made == "long_sums" and not Path("runs/lab/bases/sumlong").exists()
    )

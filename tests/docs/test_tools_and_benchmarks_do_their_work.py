"""Tools and benchmarks that the pages name and no other test starts: each runs as a user runs it, at a small size."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.timeout(3000)
"""Of each test: the long ones take minutes on two idle cores."""

QUICKSTART = "examples/quickstart.yaml"


def run(*words: object, fails: bool = False) -> str:
    """What the command prints; `words` are those after `python`."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.environ.get("PYTHONPATH", os.getcwd())}
    line = [sys.executable, *map(str, words)]
    done = subprocess.run(line, capture_output=True, text=True, env=environment)
    assert (done.returncode != 0) == fails, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def figures(file: Path) -> dict:
    return json.loads(file.read_text())


def test_kernels_are_drawn(tmp_path):
    run("tools/plot_kernels.py", tmp_path / "kernels.png")
    assert (tmp_path / "kernels.png").read_bytes().startswith(b"\x89PNG")


def test_concepts_are_drawn_and_say_what_the_page_says(tmp_path):
    run("tools/draw_concepts.py", tmp_path)
    pictures = {path.stem: path.read_text() for path in tmp_path.iterdir()}
    assert pictures.keys() == {"kernel", "segments", "replay"}
    assert [pictures["segments"].count(f"version {version}<") for version in (12, 16)] == [1, 2]
    assert "elsewhere: 1 of 25" in pictures["replay"]
    for name, picture in pictures.items():  # the page shows the same sentences
        shown = Path(f"docs/images/{name}.svg").read_text()
        assert [line for line in picture.splitlines() if "<text" in line] == [
            line for line in shown.splitlines() if "<text" in line
        ]


def test_splits_of_gpus_are_simulated_from_the_command_line():
    told = run(*["-m", "megatron_vespo"], "plan", QUICKSTART, "--gpus", 8, "--splits", "--max-staleness", 3)
    assert "recommended: 2 GPUs sample, 6 train, with max_staleness 3" in told


@pytest.mark.slow
def test_one_layout_is_compared_with_one_process(tmp_path):
    told = run("tools/check_parallelism.py", "--layouts", "tp=2,ep=2,etp=1", "--out", tmp_path / "parity.json")
    assert "1 of 1 layouts give the numbers of one process" in told
    (finding,) = figures(tmp_path / "parity.json")["findings"]
    assert finding["verdict"] == "equal"


@pytest.mark.slow
def test_a_dense_model_in_a_layout_and_the_matrix_of_two_ranks_with_replay(tmp_path):
    assert "1 of 1 layouts" in run("tools/check_parallelism.py", "--model", "dense", "--layouts", "tp=2,pp=2")
    told = run("tools/check_parallelism.py", "--world-size", 2, "--replay", "--out", tmp_path / "replay.json")
    verdicts = [finding["verdict"] for finding in figures(tmp_path / "replay.json")["findings"]]
    assert len(verdicts) > 5 and set(verdicts) == {"equal"}, told


@pytest.mark.slow
def test_the_base_is_rebuilt(tmp_path, monkeypatch):
    """All of it: it says itself whether what it made is fit for the quickstart."""
    repository = Path.cwd()
    monkeypatch.setenv("PYTHONPATH", str(repository))
    monkeypatch.chdir(tmp_path)  # it writes runs/tiny_base
    assert "on items it has not seen" in run(repository / "tools" / "make_tiny_base.py", "--out", tmp_path / "base")
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {
        path.name for path in (tmp_path / "base").iterdir()
    }


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A short run of the quickstart."""
    folder = tmp_path_factory.mktemp("runs") / "quickstart"
    short = ["algorithm.steps=8", "algorithm.prompts_per_step=4", "evaluation.prompts=8", "evaluation.exclude=[]"]
    run(*["-m", "megatron_vespo"], "train", QUICKSTART, f"run_dir={folder}", *short)
    return folder


@pytest.mark.slow
def test_phases_of_a_run_add_up(finished):
    told = run("benchmarks/quickstart_phases.py", finished)
    assert {"generate", "train", "sync", "evaluate"} <= set(told.replace("|", " ").split())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "head.py",
            ["--tokens", 256, "--compared-tokens", 128, "--hidden", 32, "--vocabulary", 999, "--chunk-tokens", 64],
        ),
        ("packing.py", ["--draws", 1]),
        ("conversion.py", ["--layers", 1, "--passes", 1]),
        ("trainer_throughput.py", ["--repetitions", 1, "--models", "tiny_base", "--lengths", "equal"]),
        ("weight_sync.py", ["--gb", 0.01, "--bucket-mb", 1, "--repeats", 1]),
        ("deterministic_rollout.py", ["--passes", 1]),
        ("asynchrony.py", ["--steps", 16, "--rounds", 1]),
    ],
)
def test_a_benchmark_measures_and_writes_what_it_found(name, words, tmp_path):
    run(f"benchmarks/{name}", *words, "--out", tmp_path / "found.json")
    assert figures(tmp_path / "found.json")


@pytest.mark.slow
def test_the_objective_is_measured_with_the_steps_of_a_run(finished, tmp_path):
    run("benchmarks/objective.py", "--repetitions", 1, "--run", finished, "--out", tmp_path / "found.json")
    assert figures(tmp_path / "found.json")["step"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "words"),
    [("routing.py", ["--repetitions", 1]), ("routing_replay_cost.py", ["--runs", 1]), ("routing_mismatch.py", [])],
)
def test_a_benchmark_of_routes_measures_and_writes_what_it_found(name, words, tmp_path):
    run(f"benchmarks/{name}", *words, "--json", tmp_path / "found.json")
    assert figures(tmp_path / "found.json")


def test_splits_are_simulated_and_drawn(tmp_path):
    found = ["--out", tmp_path / "splits.json", "--figure", tmp_path / "splits.png"]
    told = run("benchmarks/simulated_splits.py", "--gpus", 8, *found)
    assert told.startswith("| 8 |") and figures(tmp_path / "splits.json").keys() == {"8"}
    assert (tmp_path / "splits.png").read_bytes().startswith(b"\x89PNG")

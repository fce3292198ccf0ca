"""The quickstart, shortened, as a user runs it: twice with one seed, then its checkpoint elsewhere."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

SHORT = (
    *("algorithm.steps=8", "algorithm.prompts_per_step=4", "rollout.group_size=4", "observability.console=plain"),
    *(
        "evaluation.prompts=24",
        "evaluation.every_steps=3",
        "weight_sync.verify_every=2",
        "weight_sync.bucket_mb=0.25",
    ),
)


def command(*arguments) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "megatron_vespo", *map(str, arguments)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> list[Path]:
    folders = [tmp_path_factory.mktemp("runs") / name for name in ("first", "again")]
    for folder in folders:
        command("train", "examples/quickstart.yaml", f"run_dir={folder}", *SHORT)
    return folders


def rows(folder: Path, kind: str | None = None) -> list[dict]:
    every = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in every if kind in (None, row["kind"])]


def without_times(row: dict) -> dict:
    return {k: v for k, v in row.items() if k != "timestamp" and not k.startswith(("time/", "speed/"))}


def test_the_same_seed_gives_the_same_run_bit_for_bit(runs):
    first, again = ([without_times(row) for row in rows(run) if row["kind"] != "phase"] for run in runs)
    assert first == again  # fingerprints of all trajectories among them
    assert (runs[0] / "weights.jsonl").read_bytes() == (runs[1] / "weights.jsonl").read_bytes()
    weights = [(run / "checkpoint" / "model.safetensors").read_bytes() for run in runs]
    assert weights[0] == weights[1]
    fingerprints = [row["response/fingerprint"] for row in rows(runs[0], "rollout")]
    assert len(set(fingerprints)) == 2


def test_the_summary_tells_what_happened(runs):
    summary = json.loads((runs[0] / "summary.json").read_text())
    steps, rollouts = rows(runs[0], "step"), rows(runs[0], "rollout")
    assert summary["status"] == "finished" and summary["steps"] == len(steps) == 8 and summary["staleness"] == 4
    assert summary["generated_tokens"] == sum(row["response/tokens"] for row in rollouts)
    assert summary["trained_tokens"] == sum(row["tokens/trained"] for row in steps)
    assert summary["weight_syncs"] == 5 and summary["weight_sync_mismatches"] == 0
    assert [row["step"] for row in rows(runs[0], "evaluation")] == [0, 3, 6, 8]
    assert [row["weight_version"] for row in rows(runs[0], "sync")] == [0, 3, 4, 6, 8]
    accuracies = {row["when"]: row["accuracy"] for row in rows(runs[0], "evaluation")}
    assert summary["eval_accuracy_before"] == accuracies["before"] > 0.2
    assert summary["eval_accuracy_after"] == accuracies["after"] and "during" in accuracies


def test_engine_and_trainer_agree_at_equal_versions_and_drift_apart_between(runs):
    summary = json.loads((runs[0] / "summary.json").read_text())
    assert 0 < summary["mean_abs_logprob_diff"] < 1e-4
    for row in rows(runs[0], "step"):
        assert row["staleness"] == row["mini_batch"] == (row["step"] - 1) % 4
        if row["mini_batch"] == 0:
            assert row["mismatch/mean_abs"] < 1e-4 and abs(row["log_weight/std"]) < 1e-3
        else:
            assert row["drift/mean_abs"] > 1e-4


def test_weights_are_verified_at_the_start_and_when_due(runs):
    assert [row["verified"] for row in rows(runs[0], "sync")] == [True, False, True, False, True]


def test_every_row_has_exactly_the_documented_names(runs):
    text = Path("docs/metrics.md").read_text()
    for kind in ("rollout", "step", "sync", "evaluation"):
        names = {name for row in rows(runs[0], kind) for name in row} - {"kind", "step", "timestamp"}
        missing = [name for name in names if f"`{name}`" not in text]
        assert not missing, f"{kind}: not in docs/metrics.md: {missing}"


def test_training_changed_every_kind_of_weight(runs):
    before = load_file("examples/tiny_base/model.safetensors")
    after = load_file(runs[0] / "checkpoint" / "model.safetensors")
    assert before.keys() == after.keys()
    same = [name for name in before if torch.equal(before[name], after[name])]
    assert not same


def test_the_checkpoint_answers_elsewhere_as_it_did_at_the_end_of_training(runs, tmp_path):
    """Evaluated by a cold server, it gives bitwise the responses of the engine that had its weights by broadcast."""
    run = yaml.safe_load((runs[0] / "config.yaml").read_text())
    tasks = {name: run[name] for name in ("data", "reward", "rollout", "evaluation")} | {"dtype": "float32"}
    (tmp_path / "tasks.yaml").write_text(yaml.safe_dump(tasks))
    printed = command("eval", runs[0] / "checkpoint", tmp_path / "tasks.yaml", "--out", tmp_path / "figures.json")
    figures = json.loads((tmp_path / "figures.json").read_text())
    after = next(row for row in rows(runs[0], "evaluation") if row["when"] == "after")
    assert {name: after[name] for name in figures} == figures
    assert f"avg@2   {figures['accuracy']:.3f}" in printed


def test_transformers_computes_the_trainers_log_probs(runs):
    """Of the exported checkpoint: transformers' logits against the trainer's own forward pass."""
    from transformers import AutoModelForCausalLM

    checkpoint = runs[0] / "checkpoint"
    program = Path(__file__).with_name("print_trainer_log_probs.py")
    tokens = torch.randint(2, 260, (3, 40), generator=torch.Generator().manual_seed(0))
    done = subprocess.run(
        [sys.executable, program, checkpoint], input=json.dumps(tokens.tolist()), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    trainer = torch.tensor(json.loads(done.stdout.splitlines()[-1]))
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(tokens).logits
    expected = torch.log_softmax(logits[:, :-1], -1).gather(2, tokens[:, 1:, None])[..., 0]
    torch.testing.assert_close(trainer, expected, rtol=0, atol=1e-4)


def test_the_report_is_one_readable_file(runs):
    html = (runs[0] / "report.html").read_text()
    assert "Sample responses" in html and "arithmetic problem" in html
    assert (runs[0] / "samples_before.json").exists() and (runs[0] / "samples_after.json").exists()
    assert list((runs[0] / "tensorboard").glob("events*"))

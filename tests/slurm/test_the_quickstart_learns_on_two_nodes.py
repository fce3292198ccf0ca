"""The quickstart as it is, all its steps, as a job on two nodes: the trainer on one, the engine on the other."""

import json

import pytest
from training_jobs import SPLIT, TrainingJob

SECONDS = 6000.0
pytestmark = [pytest.mark.slow, pytest.mark.timeout(SECONDS + 600)]


def test_it_ends_well_and_has_learned(whole, tmp_path):
    job = TrainingJob(whole, tmp_path, *SPLIT, config=("examples/quickstart.yaml",))
    facts = job.finish(SECONDS)
    assert facts["Restarts"] == "0"
    summary = json.loads((job.run / "summary.json").read_text())
    assert summary["steps"] == 120 and summary["weight_sync_mismatches"] == 0
    assert summary["eval_accuracy_before"] == pytest.approx(0.39, abs=0.01)
    assert summary["eval_accuracy_after"] >= 0.85

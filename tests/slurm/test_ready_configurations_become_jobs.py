"""Slurm would take the job of every ready configuration, on a cluster of as many nodes as it says."""

import pytest
from cluster_jobs import ROOT

from megatron_vespo.config import TrainConfig, load_config
from megatron_vespo.submit import Request, script

FILES = [
    path for folder in ("qwen3_30b_a3b", "qwen3_8b") for path in sorted((ROOT / "examples" / folder).glob("*.yaml"))
]
RUNS = [path for path in FILES if "\nvariants:" not in path.read_text() and not path.stem.startswith("eval_")]
NODES = {"qwen3_8b": 2, "nodes_4": 4, "single_node_debug": 1}
"""By folder or name; those of 4 nodes say so in their name, all others have 8."""


@pytest.mark.parametrize("path", RUNS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_slurm_would_take_it(large, path, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    job = tmp_path / "job.sbatch"
    job.write_text(script(load_config(TrainConfig, path), Request(), [str(path)]))
    expected = 4 if path.stem.endswith("_4nodes") else NODES.get(path.parent.name, NODES.get(path.stem, 8))
    assert f"#SBATCH --nodes={expected}\n" in job.read_text()
    done = large.command("sbatch", "--test-only", job)
    assert done.returncode == 0, done.stderr
    assert f"using {expected * 8} processors" in done.stderr, done.stderr

"""Reinforcement learning of Qwen3 and Llama 3, tied and untied, as a user runs it; responses are paid for being short."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_a_run_from_start_to_report import command, rows
from tiny_engine import write_tiny_architecture

from megatron_vespo.checkpoint.check import check_folder
from megatron_vespo.config import ConfigError, TrainConfig, load_config
from megatron_vespo.orchestration.preflight import check_engine

pytestmark = pytest.mark.slow

TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")
EOS = 1
SETTINGS = (
    *("algorithm.steps=4", "algorithm.staleness=2", "algorithm.prompts_per_step=4", "rollout.group_size=8"),
    *("rollout.max_response_tokens=48", "algorithm.overlong_shaping={buffer_tokens: 48, penalty: 1.0}"),
    *("optimizer.learning_rate=1e-3", "evaluation.prompts=1", "evaluation.every_steps=0", "evaluation.exclude=[]"),
    *("weight_sync.verify_every=1", "weight_sync.bucket_mb=0.1", "observability.console=plain"),
)


@dataclass
class Run:
    base: Path
    folder: Path
    tied: bool


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(("dense", True, "{}"), id="dense-tied"),
        pytest.param(("llama", False, "{}"), id="llama-untied", marks=pytest.mark.slow),
        pytest.param(("dense", False, "{tp: 2}"), id="dense-untied-tp2", marks=pytest.mark.slow),
        pytest.param(("llama", True, "{pp: 2}"), id="llama-tied-pp2", marks=pytest.mark.slow),
    ],
)
def run(request, tmp_path_factory) -> Run:
    kind, tied, layout = request.param
    root = tmp_path_factory.mktemp("runs")
    base, folder = root / "base", root / "run"
    write_tiny_architecture(base, kind, tied=tied, seed=0, vocab_size=320, eos_token_id=EOS)
    for name in TOKENIZER:
        shutil.copyfile(Path("examples/tiny_base") / name, base / name)
    places = (f"model.path={base}", f"run_dir={folder}")
    ranks = 1 if layout == "{}" else 2
    policy = (f"policy.ranks={ranks}", f"policy.layout={layout}")
    command("train", "examples/quickstart.yaml", *places, *policy, *SETTINGS)
    return Run(base, folder, tied)


def test_engine_and_trainer_agree_before_and_after_weights_were_synced(run):
    first, second, third, fourth = rows(run.folder, "step")
    for agreeing in (first, third):
        assert agreeing["mini_batch"] == 0 and 0 < agreeing["mismatch/mean_abs"] < 1e-5
    for behind in (second, fourth):
        assert behind["mini_batch"] == 1 and behind["drift/mean_abs"] > 1e-3


def test_every_sync_was_verified(run):
    assert [(row["weight_version"], row["verified"]) for row in rows(run.folder, "sync")] == [
        (0, True),
        (2, True),
        (4, True),
    ]
    assert json.loads((run.folder / "summary.json").read_text())["weight_sync_mismatches"] == 0


def test_training_changed_every_tensor(run):
    before, after = (load_file(folder / "model.safetensors") for folder in (run.base, run.folder / "checkpoint"))
    assert before.keys() == after.keys() and ("lm_head.weight" in after) is not run.tied
    assert not [name for name in before if torch.equal(before[name], after[name])]


def test_what_sglang_would_ignore_in_a_config_is_refused(tmp_path):
    config = load_config(TrainConfig, "examples/quickstart.yaml")

    def check(kind: str, *, tied: bool, **changes) -> None:
        write_tiny_architecture(tmp_path, kind, tied=tied, seed=0, **changes)
        check_engine(str(tmp_path), "float32", check_folder(tmp_path), config.data, config.rollout)

    check("dense", tied=True)
    check("llama", tied=True)
    check("moe", tied=False)
    with pytest.raises(ConfigError, match=r"config\.json: tie_word_embeddings is true, and SGLang's Qwen3MoeFor"):
        check("moe", tied=True)
    for dense in ({"mlp_only_layers": [0]}, {"decoder_sparse_step": 2}):
        with pytest.raises(ConfigError, match=r"config\.json: mlp_only_layers or decoder_sparse_step .* every layer"):
            check("moe", tied=False, **dense)

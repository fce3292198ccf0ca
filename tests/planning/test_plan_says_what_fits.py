"""`megatron-vespo plan`: memory and time of a run, before any GPU is used."""

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megatron_vespo.config import ConfigError, TrainConfig, load_config
from megatron_vespo.planning.amount import total
from megatron_vespo.planning.command import PlanOptions, machines_of
from megatron_vespo.planning.hardware import hardware, parse_bytes
from megatron_vespo.planning.memory_plan import MemoryPlan, plan_memory
from megatron_vespo.planning.published_models import PUBLISHED, known_architecture
from megatron_vespo.planning.split import lengths_of

PAPER = {
    "base": str(Path("examples/quickstart.yaml").resolve()),
    "model": {"path": "Qwen/Qwen3-30B-A3B-Base", "dtype": "bfloat16"},
    "data": {"max_prompt_tokens": 1024},
    "rollout": {
        "max_response_tokens": 15360,
        "deterministic": False,
        "engine": {"count": 16, "tensor_parallel": 4, "max_total_tokens": None},
    },
    "algorithm": {"prompts_per_step": 256},
    "policy": {
        "ranks": 64,
        "layout": {"tp": 2, "ep": 8},
        "recompute": {"granularity": "full"},
        "micro_batch_tokens": 16384,
    },
    "routing": {"replay": "R3"},
}
"""Qwen3-30B-A3B on 64 H100 with the layout of the VESPO paper."""


@pytest.fixture
def paper(tmp_path: Path) -> Path:
    file = tmp_path / "paper.yaml"
    file.write_text(yaml.safe_dump(PAPER))
    return file


def planned(file: Path, *overrides: str, **options) -> MemoryPlan:
    config = load_config(TrainConfig, file, list(overrides))
    return plan_memory(config, machines_of(PlanOptions(**options)), lengths_of(config, None, None, None))


def command(*arguments: object) -> subprocess.CompletedProcess:
    line = [sys.executable, "-m", "megatron_vespo", "plan", *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, timeout=200)


@pytest.mark.parametrize(
    ("name", "billions", "within"),
    [
        ("0.6B", 0.6, 0.05),
        ("1.7B", 1.7, 0.05),
        ("4B", 4.0, 0.05),
        ("8B", 8.2, 0.02),
        ("14B", 14.8, 0.02),
        ("32B", 32.8, 0.02),
        ("30B-A3B", 30.5, 0.01),
        ("235B-A22B", 235, 0.01),
    ],
)
def test_published_shapes_have_the_published_number_of_parameters(name, billions, within):
    """Numbers of the model cards."""
    c = PUBLISHED[f"Qwen/Qwen3-{name}"]
    hidden, d, layers = c["hidden_size"], c["head_dim"], c["num_hidden_layers"]
    attention = hidden * d * 2 * (c["num_attention_heads"] + c["num_key_value_heads"])
    if "num_experts" in c:
        inner = 3 * hidden * c["moe_intermediate_size"] * c["num_experts"] + hidden * c["num_experts"]
    else:
        inner = 3 * hidden * c["intermediate_size"]
    tables = (1 if c["tie_word_embeddings"] else 2) * c["vocab_size"] * hidden
    parameters = layers * (attention + inner + 2 * hidden + 2 * d) + hidden + tables
    assert parameters / 1e9 == pytest.approx(billions, rel=within)
    assert known_architecture(f"somewhere/Qwen3-{name}-Base")[0].num_layers == layers


def test_the_papers_layout_fits_next_to_megatrons_own_formula(paper):
    """Facts of Megatron-LM's megatron/training/theoretical_memory_utils.py: with the distributed optimizer 6 + 12 / dp bytes
    for each of (layers / pp + embeddings) / tp parameters. It divides experts by tp and not by ep, and has two norms of
    weight and bias a layer, no router and no norms of queries and keys. So it is asked for the two parts apart, each with
    its own ranks, as it is right for each: then nothing is left but padding and what it leaves out."""
    plan = planned(paper)
    assert plan.problems == []
    h, layers, vocabulary, experts, inner = 2048, 48, 151_936, 128, 768
    attention = 2 * h * h * (1 + 4 / 32) * (32 * 128 / h)
    norms = 2 * h * 2
    outside = 2 * h + 2 * h * vocabulary
    tp, ep, dp = 2, 8, 32
    of_dense = (layers * (attention + norms) + outside) / tp * (6 + 12 / dp)
    of_experts = layers * 2 * h * inner * experts * 1.5 / ep * (6 + 12 / (64 / ep))
    formula = of_dense + of_experts
    state = plan.trainers[0].state
    # Routers and norms are whole on every tensor-parallel rank, where the formula divides norms and has no routers.
    left_out = layers * (experts * h + 2 * 128 + 2 * h - norms / tp) * (6 + 12 / dp)
    assert state.total == pytest.approx(formula + left_out, rel=1e-4)
    assert state.total == pytest.approx(formula, rel=0.005)
    # As it stands, with the experts divided by tp alone, it tells twice the memory that there is on an H100.
    as_it_stands = (layers * (attention + norms + 2 * h * inner * experts * 1.5) + outside) / tp * (6 + 12 / dp)
    assert as_it_stands > 80e9 > plan.own.peak


def test_parts_of_the_paper_layout_are_what_they_should_be(paper):
    plan = planned(paper)
    cache = {amount.name: amount.value for amount in plan.engine.amounts}["KV cache"]
    assert cache / plan.engine.cache_tokens == 2 * 48 * (4 // 4) * 128 * 2
    assert plan.engine.routes.value == plan.engine.cache_tokens * 48 * 8 * 4
    assert cache == pytest.approx(80e9 * 0.7 - 30.5e9 * 2 / 4, rel=0.01)
    train = {amount.name: amount.value for amount in plan.trainers[0].phases["train"]}
    inputs = 48 * 16384 / 2 * 2048 * 2
    assert inputs < train["activations"] < 2 * inputs, "with full recomputation: layer inputs, and one layer"
    sync = {amount.name: amount.value for amount in plan.trainers[0].phases["weight sync"]}
    assert sync["sync buckets"] == 2 * 151_936 * 2048 * 2, "the embedding is larger than a bucket"


@pytest.mark.parametrize(
    ("override", "longer"),
    [
        ("policy.recompute={granularity: none}", "activations"),
        ("policy.distributed_optimizer=false", "optimizer"),
        ("policy.layout={tp: 2, ep: 4}", "parameters"),
        ("policy.micro_batch_tokens=32768", "activations"),
        ("policy.head_chunk_tokens=131072", "logits chunk, head gradients"),
    ],
)
def test_a_setting_that_costs_memory_shows(paper, override, longer):
    def of(plan: MemoryPlan) -> float:
        return {a.name: a.value for a in plan.trainers[0].phases["train"]}.get(longer, 0.0)

    before, after = planned(paper), planned(paper, override)
    assert of(after) > of(before)
    assert after.own.peak > before.own.peak


def test_what_does_not_fit_is_named(paper):
    plan = planned(paper, "policy.ranks=8", "policy.layout={tp: 1, ep: 1}", "rollout.engine.tensor_parallel=1", gpus=16)
    trainer, engine = plan.problems[0], "\n".join(plan.problems)
    assert "there are 16" in trainer
    assert "a trainer rank needs" in engine and "too much" in engine
    assert "KV cache holds 0 tokens" in engine
    fitting = [layout for layout in plan.layouts if layout.fits]
    assert plan.layouts[: len(fitting)] == fitting, "what fits is first"
    assert [layout.seconds for layout in fitting] == sorted(layout.seconds for layout in fitting)


def test_more_memory_fits_more(paper):
    setting = "policy.recompute={granularity: none}"
    assert planned(paper, setting, gpu="h100").problems
    assert not planned(paper, setting, gpu="h200").problems


def test_training_speed_is_near_what_is_published(paper):
    """Megatron-Bridge, Qwen3-30B-A3B, 16 H100, PP 2, EP 8, sequences of 4,096, no recomputation: 5,275 tokens/s and GPU
    (25.11), 10,494 (25.09)."""
    plan = planned(
        paper,
        "policy.ranks=16",
        "policy.layout={pp: 2, ep: 8}",
        "policy.recompute={granularity: none}",
        "rollout.response_length={median: 3584, sigma: 0.0}",
        "policy.micro_batch_tokens=4096",
    )
    rate = plan.work.sequences * plan.work.tokens / total(plan.times["train"]) / 16
    assert 5_275 / 1.5 < rate < 10_494 * 1.5


def test_the_command_tells_people_and_programs(paper):
    shown = command(paper, "--nodes", 16)
    assert shown.returncode == 0, shown.stderr
    assert "fits: a trainer's GPU keeps" in shown.stdout and "tp2 ep8 (this one)" in shown.stdout
    assert max(map(len, shown.stdout.splitlines())) <= 100
    figures = json.loads(command(paper, "--gpus", 128, "--json").stdout)["memory"]
    assert figures["fits"] and figures["gpus_used"] == 128
    for stage in figures["trainer"]:
        assert stage["peak"] == max(round(sum(a["value"] for a in p)) for p in stage["phases"].values())
    explained = command(paper, "--explain").stdout
    for formula in ("48 layers: 8,192 x 2048 x 2 / 1", "1,656,687 cache tokens x 48 layers x 8 x int32"):
        assert formula in explained


def test_a_run_that_does_not_fit_ends_with_exit_code_1(paper):
    found = command(paper, "--gpu-memory", "24GB")
    assert found.returncode == 1
    assert "does not fit" in found.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gpu_memory": "many"}, "--gpu-memory many: expected a size such as 80GB"),
        ({"host_memory": "0GB"}, "--host-memory 0GB: expected a size"),
        ({"gpu": "abacus"}, "--gpu abacus: not known"),
        ({"gpus": 9, "nodes": 2}, "--gpus 9: --nodes 2 x --gpus-per-node 8 are 16"),
    ],
)
def test_options_that_cannot_be_are_named(paper, options, message):
    with pytest.raises(ConfigError, match=message):
        planned(paper, **options)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.path=nobody/knows", "model.path: nobody/knows is no folder here"),
        ("policy.layout={tp: 8, ep: 8}", r"tp \(8\) does not divide the model's 4 key/value heads"),
        ("rollout.engine.tensor_parallel=5", "rollout.engine.tensor_parallel is 5"),
    ],
)
def test_settings_that_cannot_be_are_named(paper, override, message):
    with pytest.raises(ConfigError, match=message):
        planned(paper, override)


def test_a_mistake_ends_with_exit_code_2(paper):
    found = command(paper, "model.path=nobody/knows")
    assert (found.returncode, found.stdout) == (2, "")
    assert "model.path: nobody/knows is no folder here" in found.stderr


def test_a_folder_with_nothing_but_a_config_is_enough(paper, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(PUBLISHED["Qwen/Qwen3-30B-A3B"]))
    assert planned(paper, f"model.path={folder}").own.peak == planned(paper).own.peak
    (folder / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"config\.json: architectures"):
        planned(paper, f"model.path={folder}")


def test_sizes_are_read():
    assert (parse_bytes("80GB", "x"), parse_bytes("1.5 GiB", "x")) == (80 * 10**9, 3 * 2**29)
    assert hardware("H200").memory == 141 * 10**9


def test_it_is_quick_and_loads_no_engine(paper):
    """Processor time, since the machine may be busy."""
    code = (
        f"import sys, resource; sys.argv = ['', 'plan', {str(paper)!r}, '--json']\n"
        "from megatron_vespo.cli import app\n"
        "try: app()\n"
        "except SystemExit as end: assert not end.code\n"
        "print([n for n in ('torch', 'ray', 'megatron', 'sglang', 'transformers') if n in sys.modules])"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert found.stdout.splitlines()[-1] == "[]"
    assert after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime < 2.0

"""Every configuration under examples/qwen3_*: read by the command, on the nodes it says, fitting the model, with the
paper's values."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from megatron_vespo.cli import app
from megatron_vespo.config import AblationConfig, EvaluateConfig, ModelConfig, TrainConfig, load_config, plan_runs
from megatron_vespo.orchestration.preflight import check_engine, check_model, check_routing

FOLDERS = ("examples/qwen3_30b_a3b", "examples/qwen3_8b")
FILES = sorted(path for folder in FOLDERS for path in Path(folder).glob("*.yaml"))
GRIDS = [path for path in FILES if "\nvariants:" in path.read_text()]
EVALUATIONS = [path for path in FILES if path.stem.startswith("eval_")]
RUNS = [path for path in FILES if path not in GRIDS + EVALUATIONS]
NODE = 8
"""GPUs."""

# huggingface.co/Qwen/Qwen3-30B-A3B-Base and Qwen3-8B-Base, config.json
COMMON = {
    "head_dim": 128,
    "hidden_act": "silu",
    "attention_bias": False,
    "max_position_embeddings": 32768,
    "num_attention_heads": 32,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000,
    "tie_word_embeddings": False,
    "vocab_size": 151_936,
}
MODELS = {
    "models/Qwen3-30B-A3B-Base": COMMON
    | {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_hidden_layers": 48,
        "num_key_value_heads": 4,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
    "models/Qwen3-8B-Base": COMMON
    | {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_key_value_heads": 8,
    },
}


def read(path: Path | str) -> TrainConfig:
    return load_config(TrainConfig, path)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory) -> dict[str, Path]:
    """A folder with nothing but a config.json for each model."""
    folders = {}
    for name, values in MODELS.items():
        folders[name] = tmp_path_factory.mktemp(Path(name).name)
        (folders[name] / "config.json").write_text(json.dumps(values))
    return folders


def test_all_that_is_announced_is_there():
    names = {path.stem for path in RUNS if path.parent.name == "qwen3_30b_a3b"}
    assert {f"sync_n{n}_{nodes}nodes" for n in (4, 8, 16, 32, 64) for nodes in (4, 8)} <= names
    assert {"async_6_2", "single_node_debug", "grpo", "gspo", "sapo"} <= names
    assert {path.stem for path in EVALUATIONS} == {"eval_aime24", "eval_aime25", "eval_amc23", "eval_math500"}


@pytest.mark.parametrize("path", RUNS, ids=str)
def test_train_takes_it_and_says_what_it_comes_to(path):
    told = CliRunner().invoke(app, ["train", str(path), "--dry-run"], catch_exceptions=False)
    assert told.exit_code == 0
    config = read(path)
    assert f"layout: {config.policy.ranks} ranks" in told.stdout
    assert f"longest sequence: 1024 + {config.rollout.max_response_tokens} tokens" in told.stdout


@pytest.mark.parametrize("path", RUNS, ids=str)
def test_its_parts_fill_the_nodes_that_it_asks_for(path):
    config = read(path)
    ranks, engines = config.policy.ranks, config.rollout.engine.count * config.rollout.engine.tensor_parallel
    if path.stem == "single_node_debug":
        assert ranks + engines == NODE and config.cluster.split_nodes == 0
        return
    assert ranks == NODE * (config.cluster.policy_nodes or 0)
    assert engines == NODE * (config.cluster.engine_nodes or 0)


@pytest.mark.parametrize("path", RUNS, ids=str)
def test_it_fits_the_model(path, shapes):
    config = read(path)
    model = ModelConfig(path=str(shapes[config.model.path]), initialization="random")  # looks at the shape alone
    architecture, exported = check_model(model, config.policy)
    check_routing(config, architecture)
    check_engine(
        *(model.path, config.model.dtype, architecture, config.data, config.rollout),
        return_routed_experts=config.routing.engine_records,
    )
    assert config.data.max_prompt_tokens + config.rollout.max_response_tokens <= architecture.max_position_embeddings
    billions = {"models/Qwen3-30B-A3B-Base": 30.5, "models/Qwen3-8B-Base": 8.2}[config.model.path]
    assert exported / 2 == pytest.approx(billions * 1e9, rel=0.01)  # bf16; of the models' cards


@pytest.mark.parametrize("path", RUNS, ids=str)
def test_it_has_the_papers_values(path):
    config = read(path)
    algorithm, objective = config.algorithm, config.algorithm.objective
    assert (config.rollout.group_size, config.optimizer.learning_rate, config.data.max_prompt_tokens) == (8, 1e-6, 1024)
    assert objective.engine_correction.name == "none" and objective.kl.coefficient == objective.entropy_coefficient == 0
    assert (config.evaluation.sampling.temperature, config.evaluation.sampling.top_p) == (1.0, 0.7)
    assert config.policy.router_dtype == "float32" and config.policy.recompute.granularity == "full"
    assert algorithm.old_policy == ("proximal" if algorithm.asynchronous is None else "behavior")
    if path.stem == "single_node_debug":
        return
    assert (algorithm.prompts_per_step, config.rollout.max_response_tokens) == (256, 15_360)
    if algorithm.asynchronous is not None:
        assert algorithm.asynchronous.sync_every == 4 and algorithm.max_staleness == 7  # ceil((1 + 1.0) * 4) - 1
    elif path.stem.startswith("sync_"):
        n = int(path.stem.split("_")[1].removeprefix("n"))
        assert algorithm.staleness == n
        assert algorithm.rollout_batch_prompts == n * 256


@pytest.mark.parametrize(
    ("name", "kernel"),
    [
        (
            "vespo",
            {"positive": {"c1": 2.0, "c2": 3.0}, "negative": {"c1": 3.0, "c2": 2.0}, "length_normalisation": "none"},
        ),
        ("grpo", {"clip_low": 0.2, "clip_high": 0.28, "dual_clip": None}),
        ("gspo", {"clip_low": 3e-4, "clip_high": 4e-4}),
        ("sapo", {"tau_positive": 1.0, "tau_negative": 1.05}),
    ],
)
def test_baselines_differ_from_vespo_in_their_objective_alone(name, kernel):
    base = read("examples/qwen3_30b_a3b/base.yaml")
    runs = [read(f"examples/qwen3_30b_a3b/{name}.yaml")] if name != "vespo" else [base]
    for grid in ("qwen3_30b_a3b/baselines", "qwen3_30b_a3b/async_baselines", "qwen3_8b/baselines"):
        file = Path(f"examples/{grid}.yaml")
        planned = plan_runs(load_config(AblationConfig, file), file, Path("runs/grid"))
        runs += [run.config for run in planned if run.variant.split(",")[0] == name]
    for run in runs:
        assert run.algorithm.objective.kernel.model_dump() == {"name": name} | kernel
        aggregation = "token_mean" if name == "vespo" else "sequence_mean_token_mean"
        assert run.algorithm.objective.aggregation == aggregation
    own = runs[0].model_copy(update={"run_dir": base.run_dir})
    objective = {"objective": base.algorithm.objective}
    assert own.model_copy(update={"algorithm": own.algorithm.model_copy(update=objective)}) == base


@pytest.mark.parametrize(
    ("grid", "variants", "values"),
    [
        ("qwen3_30b_a3b/baselines", {"vespo", "grpo", "gspo", "sapo"}, {f"staleness={n}" for n in (4, 8, 16, 32, 64)}),
        ("qwen3_30b_a3b/async_baselines", {"vespo", "grpo", "gspo", "sapo"}, set()),
        (
            "qwen3_30b_a3b/routing_replay",
            {"vespo", "vespo with TIS", "grpo", "grpo with TIS"},
            {"replay=off", "replay=R2", "replay=R3"},
        ),
        ("qwen3_8b/baselines", {"vespo", "grpo", "gspo", "sapo"}, {f"staleness={n}" for n in (4, 16, 64)}),
    ],
)
def test_grids_are_complete(grid, variants, values):
    file = Path(f"examples/{grid}.yaml")
    planned = plan_runs(load_config(AblationConfig, file), file, Path("runs/grid"))
    expected = {f"{variant}, {value}" for variant in variants for value in values} if values else variants
    assert {run.variant for run in planned} == expected
    for run in planned:
        if "TIS" in run.variant:
            assert run.config.algorithm.objective.engine_correction.name == "tis"
            assert run.config.algorithm.old_policy == "proximal"
        if grid.endswith("routing_replay"):
            assert run.config.algorithm.staleness == 8 and run.config.routing.engine_records


def test_evaluations_ask_the_whole_benchmark():
    sizes = {"aime24": 30, "aime25": 30, "amc23": 40, "math500": 500}
    for path in EVALUATIONS:
        config, name = load_config(EvaluateConfig, path), path.stem.removeprefix("eval_")
        assert config.evaluation.prompts == sizes[name]
        assert [getattr(source, "path", "") for source in config.data.sources] == [f"data/math/{name}.parquet"]
        assert (config.evaluation.sampling.temperature, config.evaluation.sampling.top_p) == (1.0, 0.7)


@pytest.mark.parametrize("path", RUNS, ids=str)
def test_the_planner_says_that_it_fits_the_nodes_it_asks_for(path):
    told = CliRunner().invoke(app, ["plan", str(path), "--gpu", "h100", "--json"], catch_exceptions=False)
    assert told.exit_code == 0
    memory, config = json.loads(told.stdout)["memory"], read(path)
    engines = config.rollout.engine.count * config.rollout.engine.tensor_parallel
    assert memory["fits"] and memory["gpus_used"] == engines + config.policy.ranks
    assert max(stage["peak"] for stage in memory["trainer"]) < memory["gpu"]["memory"] == 80_000_000_000

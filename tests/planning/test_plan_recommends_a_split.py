"""`megatron-vespo plan`: which of the GPUs sample and which train."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megatron_vespo.config import ConfigError, TrainConfig, load_config
from megatron_vespo.config.planning import DecodePoint, RatesConfig
from megatron_vespo.planning.published import QWEN3_30B_A3B_ON_H100
from megatron_vespo.planning.split import Lengths, engine_rates, plan_split, recommended

SETTINGS = (
    "algorithm.asynchronous={sync_every: 2, max_staleness: 31}",
    "algorithm.prompts_per_step=8",
    "rollout.group_size=8",
    "rollout.concurrent_groups=24",
    "policy.layout={}",
    "checkpoint.save_every=0",
)


def config(*settings: str) -> TrainConfig:
    return load_config(TrainConfig, "examples/quickstart.yaml", [*SETTINGS, *settings])


def rates(per_engine: float, per_train_gpu: float) -> RatesConfig:
    """An engine of 2 GPUs samples so many tokens a second, however many requests share it."""
    return RatesConfig(
        about="made up",
        engine_gpus=2,
        decode=(
            DecodePoint(running=1, tokens_per_second=per_engine),
            DecodePoint(running=1000, tokens_per_second=per_engine),
        ),
        cache_tokens=10**7,
        prefill_tokens_per_second=1e9,
        train_tokens_per_second_per_gpu=per_train_gpu,
        sync_seconds=0.0,
    )


@pytest.mark.parametrize(("per_engine", "per_train_gpu"), [(1000, 500), (1000, 2000), (2000, 400), (3000, 6000)])
def test_where_nobody_waits_the_split_balances_both(per_engine, per_train_gpu):
    """Responses of one length under a loose bound: the rate is the smaller of the two, and best where they meet."""
    lengths = Lengths(prompt=1, median=200, sigma=0.0, longest=200)
    rows = plan_split(config(), 24, rates(per_engine, per_train_gpu), lengths, [31])
    expected = {r: min(per_engine * r / 2 / 200, per_train_gpu * (24 - r) / 201) for r in range(2, 24, 2)}
    assert {row.rollout_gpus for row in rows} == set(expected)
    for row in rows:
        assert row.trajectories_per_second == pytest.approx(expected[row.rollout_gpus], rel=0.06)
        assert row.rollout_gpus + row.train_gpus == 24
    chosen = expected[recommended(rows).rollout_gpus]
    assert chosen >= 0.97 * max(expected.values())


def test_the_trainers_layout_decides_which_splits_there_are():
    rows = plan_split(
        config("policy.ranks=8", "policy.layout={tp: 4}"),
        16,
        rates(1000, 1000),
        Lengths(10, 50, 0.5, 100),
        [3],
    )
    assert [row.rollout_gpus for row in rows] == [4, 8, 12]
    with pytest.raises(ConfigError, match=r"--gpus 5: an engine needs 2 GPUs and policy\.layout a multiple of 4"):
        plan_split(config("policy.ranks=8", "policy.layout={tp: 4}"), 5, rates(1, 1), Lengths(1, 1, 0, 1), [3])


def test_an_engine_runs_no_more_requests_than_its_cache_holds_or_was_measured():
    long = engine_rates(QWEN3_30B_A3B_ON_H100, Lengths(1000, 8000, 0.0, 30_000))
    assert long.max_running == 844_000 // 9000
    assert engine_rates(QWEN3_30B_A3B_ON_H100, Lengths(10, 50, 0.0, 100)).max_running == 1024
    assert long.decode.seconds(64) == pytest.approx(64 / 3290)


def command(*arguments: object) -> subprocess.CompletedProcess:
    line = [sys.executable, "-m", "megatron_vespo", "plan", *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, timeout=200)


def test_the_command_prints_a_table_and_json(tmp_path: Path):
    example = "examples/quickstart_async.yaml"
    own = tmp_path / "rates.yaml"
    own.write_text(yaml.safe_dump(rates(1000, 1000).model_dump(mode="json")))
    found = command(example, "policy.layout={}", "--gpus", 8, "--rates", own, "--json", "--max-staleness", 3)
    assert found.returncode == 0, found.stderr
    figures = json.loads(found.stdout)
    assert [row["rollout_gpus"] for row in figures["splits"]] == [2, 4, 6]
    assert figures["recommended"] in figures["splits"]
    assert max(map(int, figures["recommended"]["staleness"])) <= 3
    table = command(example, "policy.layout={}", "--gpus", 8, "--rates", own)
    best = max(figures["splits"], key=lambda row: row["trajectories_per_second"])
    assert f"recommended: {best['rollout_gpus']} GPUs sample" in table.stdout


def test_mistakes_are_named(tmp_path: Path):
    own = tmp_path / "rates.yaml"
    wrong = rates(1000, 1000).model_dump(mode="json")
    wrong["decode"].reverse()
    own.write_text(yaml.safe_dump(wrong))
    found = command("examples/quickstart_async.yaml", "--gpus", 8, "--rates", own)
    assert found.returncode == 2 and "decode: running requests must ascend" in found.stderr
    found = command("examples/quickstart_async.yaml", "--gpus", 8, "--max-staleness", 1)
    assert found.returncode == 2 and "--max-staleness 1: less than sync_every - 1 (4 - 1)" in found.stderr


def test_it_needs_neither_torch_nor_ray():
    code = (
        "import sys; import megatron_vespo.planning.split_table, megatron_vespo.planning.published; "
        "print([name for name in ('torch', 'ray', 'megatron', 'sglang') if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"

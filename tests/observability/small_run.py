"""The rows of a small run, with all metrics of docs/metrics.md."""

import math

STALENESS, BATCHES = 4, 3
HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)> & <b>bold</b>"

CONFIG = {
    "seed": 1,
    "run_dir": "runs/small",
    "model": {"path": "base<i>"},
    "data": {"sources": [{"type": "reasoning_gym", "task": "chain_sum", "settings": {"min_terms": 5}}]},
    "algorithm": {
        "steps": STALENESS * BATCHES,
        "staleness": STALENESS,
        "prompts_per_step": 2,
        "objective": {
            "kernel": {"name": "vespo", "positive": {"c1": 2.0, "c2": 3.0}, "negative": {"c1": 3.0, "c2": 2.0}}
        },
    },
}
OF_SIGN = {
    "share": 0.5,
    **{f"{name}/{quantile}": 1.0 for name in ("log_weight", "phi") for quantile in ("p10", "p50", "p90")},
    "phi/share_below_0.01": 0.0,
    "clip_fraction": 0.1,
}


def rollout_row(batch: int) -> dict:
    outcomes = {"graded": 16, "exception": 0, "timeout": 0, "crash": 0, "not_finite": 0}
    length = {"mean": 8.0 + 5 * batch, "p10": 5.0, "p90": 12.0 + 6 * batch, "max": 40.0, "truncated_share": 0.01}
    return {
        "batch": batch,
        "weight_version": batch * STALENESS,
        "reward/mean": 0.3 + 0.2 * batch,
        "reward/std": 0.4,
        "reward/groups_without_variance": 0.1 * batch,
        "advantage/groups_left_out": 0,
        "advantage/groups_over_sampled": 0,
        **{f"reward/outcome/{name}": count for name, count in outcomes.items()},
        **{f"response/{'length_' if name != 'truncated_share' else ''}{name}": value for name, value in length.items()},
        "response/tokens": 128,
        "response/ids_beyond_tokenizer": 0,
        "response/fingerprint": "0123456789abcdef",
        "prompt/dropped_overlong": 0,
        "prompt/skipped_held_out": 0,
        "time/generate": 2.0,
        "time/reward_wait": 0.5,
        "speed/generated_tokens_per_second": 64.0,
    }


def asynchronous_row() -> dict:
    """What an asynchronous run's rows of kind rollout have beside those of batches."""
    return {"response/segments_mean": 1.2, "buffer/complete": 3, "buffer/running": 12, "time/wait": 0.1}


def mismatch_row() -> dict:
    names = ("mean_abs", "k1", "k3", "share_above_ln2")
    return {**{f"mismatch/{name}": 0.0 for name in names}, "alarm/mismatch": False}


def step_row(batch: int, age: int) -> dict:
    quantiles = dict(zip(("min", "p01", "p10", "p25", "p50", "p75", "p90", "p99", "max"), range(-4, 5), strict=True))
    difference = {"mean_abs": 1e-6 if age == 0 else 0.01 * age, "k1": 1e-7, "k3": 1e-12, "share_above_ln2": 0.0}
    return {
        "batch": batch,
        "mini_batch": age,
        "staleness": age,
        "staleness/mean": float(age),
        "loss": -0.01,
        "grad_norm": 0.5,
        "packing/micro_batches": 1,
        "packing/fill": 0.8,
        "packing/padding_share": 0.0,
        "packing/rank_balance": 0.99,
        "packing/step_balance": 0.99,
        "learning_rate": 2e-4,
        "advantage/mean_abs": 0.8,
        "log_weight/mean": 0.0,
        "log_weight/std": 0.3 * age,
        **{f"log_weight/{name}": 0.1 * age * value for name, value in quantiles.items()},
        **{f"phi/{name}": value for name, value in {"mean": 0.9, "min": 0.1, "p10": 0.5, "p50": 1.0}.items()},
        "phi/p90": 1.1,
        "phi/max": 1.2,
        "phi/share_below_0.01": 0.0,
        "phi/length_correlation": -0.1,
        **{f"{sign}/{name}": value for sign in ("positive", "negative") for name, value in OF_SIGN.items()},
        "gradient/log_kept": -0.1,
        "gradient/ess": 0.7,
        "gradient/top_1pct_share": 0.05,
        **{f"gradient/{name}_share": 0.5 for name in ("positive", "long", "fallen")},
        "variance/kernel": 0.9,
        "variance/importance": 1.1,
        "variance/bound": 1.5,
        "gradient/variance": 0.02,
        "gradient/noise_share": 0.4,
        "ess": 1.0 - 0.2 * age,
        **{f"{'mismatch' if age == 0 else 'drift'}/{name}": value for name, value in difference.items()},
        **({"alarm/mismatch": False} if age == 0 else {}),
        "entropy/old_policy": 0.5,
        "entropy/current": 0.5,
        "kl_reference/k1": 0.01,
        "kl_reference/k3": 0.01,
        "engine_correction/mean_weight": 1.0,
        "engine_correction/masked_share": 0.0,
        "tokens/trained": 32,
        "time/train": 1.0,
        "speed/trained_tokens_per_second": 32.0,
    }


def routes_of_rollout(batch: int) -> dict:
    """What a rollout row has besides where routes are recorded. Replay lowers k3 to a tenth."""
    reasons = ("truncated", "layers", "range", "duplicates", "zero_layer", "missing")
    reasons += ("mixed_versions", "retracted", "older_cache")
    difference = {"mean_abs": 0.01, "k1": 1e-3, "k3": 2e-3 * (batch + 1), "share_above_ln2": 0.001}
    return {
        "routing/missing_share": 0.01,
        "routing/bytes_per_token_wire": 21.4,
        "routing/bytes_per_token_stored": 4.0,
        "routing/bytes_per_token_gathered": 4.0,
        **{f"routing/masked/{reason}": number for number, reason in enumerate(reasons)},
        **{f"routing_probe/native/{name}": value for name, value in difference.items()},
        **{f"routing_probe/replayed/{name}": value / 10 for name, value in difference.items()},
        "routing_probe/same_set": 0.995,
    }


def routes_of_step(age: int) -> dict:
    """What a step row has besides where routes are recorded: means over layers."""
    return {
        "routing/same_set": 0.995 - 0.02 * age,
        "routing/same_slots": 0.98 - 0.02 * age,
        "routing/overlap": 0.997 - 0.01 * age,
        "routing/margin": 0.003,
        "routing/largest_load": 1.4,
        "routing/unused": 0.0,
        "routing/missing_share": 0.01,
        "routing/bytes_per_token_sent": 5.0,
        "routing/bytes_per_token_largest_rank": 2.5,
    }


def layers_of_step(age: int) -> dict:
    """The row of routing.jsonl: two MoE layers around the means."""
    means = {name.removeprefix("routing/"): value for name, value in routes_of_step(age).items()}
    names = ("same_set", "same_slots", "overlap", "margin", "largest_load", "unused")
    return {name: [means[name] + 0.001, means[name] - 0.001] for name in names}


def sync_row(step: int) -> dict:
    times = {"pause": 0.5, "sync": 0.4, "connect": 0.0, "send": 0.2, "flush": 0.1, "verify": 0.1}
    times |= {"gather": 0.15, "load": 0.1}
    row = {"weight_version": step, "bytes": 1_000_000, "buckets": 1, "verified": True, "mismatches": 0}
    row |= {"transport": "shared_memory", "engines": 1}
    return {**row, **{f"time/{name}": seconds for name, seconds in times.items()}}


def checkpoint_row(step: int) -> dict:
    return {"time/copy": 0.1, "time/written": 0.1 * step, "bytes": 3_000_000}


def restart_row() -> dict:
    return {
        "part": "policy rank 1",
        "cause": "its process died (killed, out of memory, or crashed)",
        "checkpoint": 4,
        "steps_again": 1,
        "time/restart": 12.5,
    }


def evaluation_row(when: str, accuracy: float) -> dict:
    row = {"when": when, "accuracy": accuracy, "pass_at_k": accuracy, "k": 1, "prompts": 64}
    of_responses = {k: v for k, v in rollout_row(0).items() if k.startswith(("reward/", "response/"))}
    return {**of_responses, **row, "response/length_mean": 9.0, "time/evaluate": 3.0}


def run_rows(batches: int = BATCHES):
    """(kind, step, values) in the order of a run."""
    yield "phase", 0, {"phase": "start engine", "time/seconds": 1.5}
    yield "sync", 0, sync_row(0)
    yield "evaluation", 0, evaluation_row("before", 0.25)
    for batch in range(batches):
        yield "rollout", batch * STALENESS, rollout_row(batch)
        for age in range(STALENESS):
            yield "step", batch * STALENESS + age + 1, step_row(batch, age)
        yield "sync", (batch + 1) * STALENESS, sync_row((batch + 1) * STALENESS)


def weights(step: int) -> dict:
    log_weight = [0.05 * (step % STALENESS) * (index - 8) for index in range(16)]
    advantage = [1.0 if index % 2 else -1.0 for index in range(16)]
    phi = [
        math.exp(2 * x + 3 * (1 - math.exp(x))) if a >= 0 else math.exp(3 * x + 2 * (1 - math.exp(x)))
        for x, a in zip(log_weight, advantage, strict=True)
    ]
    return {"log_weight": log_weight, "phi": phi, "advantage": advantage, "age": [(step - 1) % STALENESS] * 16}


def sample(prompt: str, response: str, reward: float) -> dict:
    return {"prompt": prompt, "response": response, "reward": reward, "length": 12, "truncated": False}


def turns_row() -> dict:
    """What a rollout has in addition where an environment answers."""
    return {"response/turns_mean": 1.5, "response/observed_tokens": 40, "response/environment_failures": 0}

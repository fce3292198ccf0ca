"""Accuracy on held-out prompts, sampled on the engine with the weights that it holds."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from megatron_vespo.config import EvaluationConfig
from megatron_vespo.data.prompt import Prompt
from megatron_vespo.orchestration.engine_weights import attended
from megatron_vespo.orchestration.sampler import Sampler
from megatron_vespo.orchestration.session import Session
from megatron_vespo.rollout.generate import generate_responses
from megatron_vespo.rollout.trajectory import Group

CORRECT = 1.0
"""Reward from which a response counts as correct."""


async def evaluate(session: Session, when: str, step: int) -> None:
    """Record avg@k and pass@k on the session's held-out prompts. `when`: "before", "during" or "after" training."""
    config = session.config
    session.console.phase("evaluating" if when == "during" else f"evaluating {when} training")
    groups, seconds = await attended(
        session, sample_held_out(session.sampler, session.held_out, config.evaluation, weight_version=step)
    )
    figures = describe_evaluation(session.sampler, groups)
    k = config.evaluation.samples_per_prompt
    session.record(
        "evaluation", step, {"when": when, "k": k, "prompts": len(groups), **figures, "time/evaluate": seconds}
    )
    if when != "during":
        session.tally.accuracy[when] = figures["accuracy"]
        write_samples(session.folder / f"samples_{when}.json", groups, config.observability.sample_responses)


async def sample_held_out(
    sampler: Sampler, prompts: list[Prompt], config: EvaluationConfig, weight_version: int
) -> tuple[list[Group], float]:
    """k graded responses to each prompt, and the seconds that took."""
    stream = generate_responses(
        sampler.fleet,
        prompts,
        config.sampling,
        samples_per_prompt=config.samples_per_prompt,
        max_response_tokens=sampler.rollout.max_response_tokens,
        deterministic=sampler.rollout.deterministic,
        concurrent_groups=sampler.rollout.concurrent_groups,
        stop_token_ids=sampler.tokenizer.stop_token_ids,
        vocab_size=sampler.vocab_size,
        run_seed=config.seed,
        weight_version=weight_version,
        environment=sampler.answer,
    )
    groups, sampling, grading = await sampler.collect(stream, prompts)
    return groups, sampling + grading


def describe_evaluation(sampler: Sampler, groups: list[Group]) -> dict[str, Any]:
    """accuracy is avg@k, the share of correct responses; pass@k the share of prompts with a correct one among k."""
    correct = np.array([[t.reward >= CORRECT for t in group.trajectories] for group in groups])
    return {
        "accuracy": float(correct.mean()),
        "pass_at_k": float(correct.any(axis=1).mean()),
        **sampler.describe(groups),
    }


def write_samples(path: Path, groups: list[Group], count: int) -> None:
    """The first response to each of the first `count` prompts, for the report."""
    chosen = [group.trajectories[0] for group in groups[:count]]
    samples = [
        {
            "prompt": t.prompt.text,
            "response": t.text,
            "reward": t.reward,
            "length": t.sampled_tokens,
            "truncated": t.truncated,
        }
        for t in chosen
    ]
    path.write_text(json.dumps(samples, indent=1))

"""The trainer on one CUDA device: is it right in float32 and bfloat16, and how many tokens a second.

    python benchmarks/trainer_on_cuda.py                 # a mixture-of-experts model of 1.5 B parameters
    python benchmarks/trainer_on_cuda.py --scale tiny    # the same steps in a minute, also without CUDA

Three parts, written to results/trainer_on_cuda.json:

1. attention: the core attention that bfloat16 uses here (Transformer Engine over packed sequences, where it is
   installed) and ours, each against a float64 softmax of every sequence alone;
2. training: the first loss, gradient norm and log-probs in bfloat16 against float32 from the same weights;
3. speed: tokens per second of forward, backward and optimizer step, in bfloat16, with the memory they took.
"""

import argparse
import json
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_vespo.architecture.compute_cost import matrix_parameters_per_token
from megatron_vespo.architecture.hf_config import Architecture
from megatron_vespo.architecture.layout_fit import packing_rules
from megatron_vespo.config import ModelConfig, ObjectiveConfig, OptimizerConfig, PolicyConfig, RecomputeConfig
from megatron_vespo.packing.batch import TrainingSequence
from megatron_vespo.packing.steps import pack_step
from megatron_vespo.policy.attention import packed_causal_attention
from megatron_vespo.policy.device import Device, prepare_device
from megatron_vespo.policy.losses import loss_function
from megatron_vespo.policy.policy import MegatronPolicy
from megatron_vespo.rendezvous import listen

RESULT = Path(__file__).parent.parent / "results" / "trainer_on_cuda.json"
TINY = Architecture(
    architecture="Qwen3MoeForCausalLM",
    vocab_size=512,
    hidden_size=64,
    num_layers=2,
    num_attention_heads=8,
    num_query_groups=2,
    head_dim=16,
    ffn_hidden_size=128,
    num_experts=8,
    experts_per_token=2,
    moe_ffn_hidden_size=32,
    norm_epsilon=1e-6,
    rotary_base=1e6,
    tied_embeddings=False,
    normalise_topk=True,
    max_position_embeddings=4096,
    qk_norm=True,
    moe_layers=(True,) * 2,
    rope_scaling_factor=None,
)
LARGE = replace(
    TINY,
    vocab_size=151_936,
    hidden_size=1024,
    num_layers=16,
    num_attention_heads=16,
    num_query_groups=4,
    head_dim=128,
    num_experts=32,
    experts_per_token=4,
    moe_ffn_hidden_size=704,
    moe_layers=(True,) * 16,
)
"""1.5 B parameters, about 0.5 B of them at work on a token."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=("tiny", "large"), default="large")
    parser.add_argument("--steps", type=int, default=8, help="timed optimizer steps")
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    large = arguments.scale == "large"
    if large and not torch.cuda.is_available():
        print("no CUDA device here: --scale tiny runs the same steps on the CPU", file=sys.stderr)
        return 2
    architecture = LARGE if large else TINY
    policy = PolicyConfig(
        micro_batch_tokens=16_384 if large else 512,
        recompute=RecomputeConfig(granularity="full" if large else "none"),
    )
    lengths = np.random.default_rng(0).integers(*((512, 8192) if large else (16, 128)), size=32)
    found = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "scale": arguments.scale,
        "attention": attention_errors(architecture, lengths[:8].tolist()),
        "training": training_difference(architecture, policy, lengths),
        "speed": speed(architecture, policy, lengths, arguments.steps),
    }
    print(json.dumps(found, indent=1))
    arguments.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


def attention_errors(a: Architecture, lengths: list[int]) -> dict[str, float]:
    """Largest difference from float64, relative to the largest value, of each attention that this device can use."""
    device = prepare_device("bfloat16")
    generator = torch.Generator().manual_seed(0)
    heads = (a.num_attention_heads, a.num_query_groups, a.num_query_groups)
    query, key, value = (
        torch.randn(sum(lengths), count, a.head_dim, generator=generator).to(device.torch_device, torch.bfloat16)
        for count in heads
    )
    exact = dense_attention(query.double(), key.double(), value.double(), lengths)
    answers = {"ours": packed_causal_attention(query, key, value, lengths)}
    if device.transformer_engine:
        answers["transformer_engine"] = transformer_engine_attention(query, key, value, lengths)
    scale = exact.abs().max()
    return {name: ((answer.double() - exact).abs().max() / scale).item() for name, answer in answers.items()}


def dense_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """Softmax written out, sequence by sequence."""
    repeats = query.shape[1] // key.shape[1]
    rows = []
    for q, k, v in zip(*(x.split(lengths) for x in (query, key, value)), strict=True):
        k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
        scores = torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5
        above = torch.ones(len(q), len(q), dtype=torch.bool, device=q.device).triu(1)
        rows.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(above, -torch.inf).softmax(-1), v))
    return torch.cat(rows)


def transformer_engine_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: list[int]
) -> torch.Tensor:
    from transformer_engine.pytorch import DotProductAttention  # pyright: ignore[reportMissingImports]

    bounds = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32, device=query.device)
    attention = DotProductAttention(
        query.shape[1],
        query.shape[2],
        num_gqa_groups=key.shape[1],
        attention_dropout=0.0,
        qkv_format="thd",
        attn_mask_type="padding_causal",
    )
    output = attention(
        query,
        key,
        value,
        cu_seqlens_q=bounds,
        cu_seqlens_kv=bounds,
        max_seqlen_q=max(lengths),
        max_seqlen_kv=max(lengths),
    )
    return output.view_as(query)


def training_difference(a: Architecture, policy: PolicyConfig, lengths: np.ndarray) -> dict[str, float]:
    """Of the first step's figures in bfloat16 from float32's, over a few sequences."""
    figures = {dtype: first_step(a, policy, lengths[:4], dtype) for dtype in ("float32", "bfloat16")}
    exact, half = figures["float32"], figures["bfloat16"]
    return {
        "loss": abs(half["loss"] - exact["loss"]) / abs(exact["loss"]),
        "gradient_norm": abs(half["gradient_norm"] - exact["gradient_norm"]) / exact["gradient_norm"],
        "mean_abs_log_prob": (half["log_probs"] - exact["log_probs"]).abs().mean().item(),
    }


def first_step(a: Architecture, policy: PolicyConfig, lengths: np.ndarray, dtype: str) -> dict[str, Any]:
    trainer = started(a, policy, dtype)
    (micro_batches,) = pack_step(sequences(a, lengths), packing_rules(a, policy))
    scores = trainer.score(micro_batches)
    result = trainer.train_step(micro_batches, loss_function(None))
    trainer.close()
    log_probs = torch.cat([scores[key].log_probs for key in sorted(scores)])
    return {"loss": result.loss, "gradient_norm": result.gradient_norm, "log_probs": log_probs}


def speed(a: Architecture, policy: PolicyConfig, lengths: np.ndarray, steps: int) -> dict[str, Any]:
    trainer = started(a, policy, "bfloat16")
    batch = sequences(a, lengths)
    (micro_batches,) = pack_step(batch, packing_rules(a, policy))
    loss = loss_function(ObjectiveConfig())
    seconds = []
    for _ in range(steps + 2):
        synchronise(trainer.device)
        begin = time.perf_counter()
        trainer.train_step(micro_batches, loss)
        synchronise(trainer.device)
        seconds.append(time.perf_counter() - begin)
    parameters = sum(p.numel() for chunk in trainer.model for p in chunk.parameters())
    tokens = sum(len(sequence.token_ids) - 1 for sequence in batch)
    median = statistics.median(seconds[2:])  # the first two compile and allocate
    peak = torch.cuda.max_memory_allocated() / 2**30 if trainer.device.is_cuda else None
    trainer.close()
    return {
        "parameters": parameters,
        "parameters_per_token": matrix_parameters_per_token(a),
        "tokens_per_step": tokens,
        "tokens_per_second": round(tokens / median),
        "seconds_min_median_max": [round(f, 4) for f in (min(seconds[2:]), median, max(seconds[2:]))],
        "peak_memory_gib": peak,
    }


def started(a: Architecture, policy: PolicyConfig, dtype: str) -> MegatronPolicy:
    return MegatronPolicy(
        a,
        ModelConfig(path="unused", initialization="random", dtype=dtype),  # type: ignore[arg-type]
        policy,
        OptimizerConfig(learning_rate=1e-5),
        total_steps=100,
        seed=0,
        rank=0,
        world_size=1,
        master=listen("127.0.0.1"),
        temperature=1.0,
    )


def sequences(a: Architecture, lengths: np.ndarray) -> list[TrainingSequence]:
    random = np.random.default_rng(1)
    return [
        TrainingSequence(
            token_ids=random.integers(0, a.vocab_size, int(n)).astype(np.int32),
            label_mask=np.arange(int(n) - 1) >= int(n) // 4,
            old_log_probs=np.full(int(n) - 1, -np.log(a.vocab_size), dtype=np.float32),
            advantage=float(random.normal()),
            key=key,
        )
        for key, n in enumerate(lengths)
    ]


def synchronise(device: Device) -> None:
    if device.is_cuda:
        torch.cuda.synchronize()


if __name__ == "__main__":
    sys.exit(main())

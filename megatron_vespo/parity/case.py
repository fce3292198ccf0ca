"""What every layout trains on: a small random model, trajectories of unequal length, an objective."""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import save_file

from megatron_vespo.architecture.hf_config import CONFIG_FILE, Architecture, read_architecture
from megatron_vespo.architecture.hf_rope import LLAMA_3
from megatron_vespo.checkpoint.tables import table_of
from megatron_vespo.config import ObjectiveConfig, OptimizerConfig
from megatron_vespo.packing.batch import TrainingSequence
from megatron_vespo.routing.routes import Routes, RoutingShape

STEPS = 4
TRAJECTORIES = 17
LOG_RATIO_NOISE = 0.1
"""Standard deviation of (old - current) log-probs of a token at the start, so that importance weights vary."""

COMMON: dict[str, Any] = {
    "vocab_size": 61,  # odd: every tensor-parallel layout pads it
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "intermediate_size": 96,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "attention_bias": False,
    "tie_word_embeddings": False,
}
EXPERTS: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
MODELS: dict[str, dict[str, Any]] = {
    "moe": EXPERTS,
    "mixed": EXPERTS | {"mlp_only_layers": [0], "tie_word_embeddings": True},
    "dense": {"architectures": ["Qwen3ForCausalLM"], "tie_word_embeddings": True},
    "llama": {"architectures": ["LlamaForCausalLM"], "rope_scaling": {"rope_type": "llama3", "factor": 8.0} | LLAMA_3},
}
"""Name -> what its config.json says beside `COMMON`."""


@dataclass(frozen=True)
class Case:
    """Everything but the layout. The same on all ranks of all layouts."""

    folder: Path
    """Of the model's starting weights."""
    architecture: Architecture
    steps: list[list[TrainingSequence]]
    """The sequences of each optimizer step, keys 0 .. n - 1."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    routes: list[dict[int, Routes]] | None = None
    """Of each step, recorded routes to replay, by key; None: routers choose."""
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(
            learning_rate=2e-5,
            weight_decay=0.01,
            gradient_clip=1.0,
            # Adam's first steps divide each element of a gradient by its own size: with a tiny epsilon, elements that are
            # about 0 would be decided by rounding, in any layout.
            epsilon=1e-4,
        )
    )

    def with_old_log_probs(self, log_probs: list[dict[int, torch.Tensor]], seed: int = 1) -> "Case":
        """The old policy is a random step away from the starting weights, whose `log_probs` these are, by step."""
        random = np.random.default_rng(seed)
        steps = [
            [
                replace(
                    sequence,
                    old_log_probs=(
                        scores[sequence.key].numpy() + random.normal(0, LOG_RATIO_NOISE, len(sequence.old_log_probs))
                    ).astype(np.float32),
                )
                for sequence in step
            ]
            for step, scores in zip(self.steps, log_probs, strict=True)
        ]
        return replace(self, steps=steps)

    def with_routes(self, seed: int = 2) -> "Case":
        """Recorded routes that no router would choose. One sequence in eight has none, and some positions of others."""
        random = np.random.default_rng(seed)
        shape = self.architecture.routing_shape
        steps = [
            {s.key: _random_routes(random, s.positions, shape) for s in step if random.random() > 1 / 8}
            for step in self.steps
        ]
        return replace(self, routes=steps)


def build_case(folder: Path, model: str = "moe", seed: int = 0) -> Case:
    """Write a random model of kind `model` (a key of `MODELS`) to `folder`, and draw trajectories for it."""
    write_model(folder, COMMON | MODELS[model], seed)
    architecture = read_architecture(folder)
    random = np.random.default_rng(seed)
    steps = [[_sequence(random, key, architecture.vocab_size) for key in range(TRAJECTORIES)] for _ in range(STEPS)]
    return Case(folder, architecture, steps)


def write_model(folder: Path, config: dict[str, Any], seed: int) -> None:
    """Every weight random, norms too, and large enough that routing and attention are far from uniform.

    What writes into the residual stream is scaled down, as in any trained model, so that rounding does not grow from
    layer to layer.
    """
    folder.mkdir(parents=True, exist_ok=True)
    kind = {"Qwen3MoeForCausalLM": "qwen3_moe", "Qwen3ForCausalLM": "qwen3", "LlamaForCausalLM": "llama"}
    config = config | {"model_type": kind[config["architectures"][0]]}  # by which transformers finds its class
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    architecture = read_architecture(folder)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in table_of(architecture).hf_shapes(architecture).items():
        noise = torch.randn(shape, generator=generator)
        writes_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
        scale = (2 * architecture.num_layers) ** -0.5 if writes_residual else 1.0
        tensors[name] = 1.0 + 0.2 * noise if len(shape) == 1 else scale * noise / shape[-1] ** 0.5
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _sequence(random: np.random.Generator, key: int, vocabulary: int) -> TrainingSequence:
    tokens = int(random.integers(3, 28))
    return TrainingSequence(
        token_ids=random.integers(0, vocabulary, tokens).astype(np.int32),
        label_mask=np.arange(tokens - 1) >= tokens // 3,
        old_log_probs=np.zeros(tokens - 1, dtype=np.float32),
        # Both signs, but lopsided: else the loss is a small difference of large numbers, and mostly rounding.
        advantage=float(random.normal(1.0, 0.8)),
        key=key,
    )


def _random_routes(random: np.random.Generator, positions: int, shape: RoutingShape) -> Routes:
    order = random.random((positions, shape.num_moe_layers, shape.num_experts)).argsort(-1)
    return Routes(
        order[..., : shape.topk].astype(shape.dtype),
        random.random(positions) > 1 / 8,
        np.zeros(positions, dtype=np.int32),
    )

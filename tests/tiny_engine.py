"""A tiny random model, and a real SGLang server of it."""

import asyncio
from collections.abc import Awaitable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from megatron_vespo.config import EngineConfig
from megatron_vespo.parity.case import COMMON, MODELS, write_model
from megatron_vespo.rollout.client import EngineClient
from megatron_vespo.rollout.fleet import Fleet
from megatron_vespo.rollout.server import EngineServer
from megatron_vespo.routing.routes import RoutingShape

T = TypeVar("T")

MAX_SEQUENCE_TOKENS = 256
VOCAB_SIZE = 300
"""Not a multiple of 64, so the engine pads it."""
ROUTE_SHAPE = RoutingShape(moe_layers=(True, True), topk=2, num_experts=8)
"""Of `write_tiny_qwen3_moe`."""


@dataclass
class RunningEngine:
    """An fp32 server of a tiny random model. Leave its weights as you found them."""

    server: EngineServer
    client: EngineClient
    model_path: Path
    loop: asyncio.AbstractEventLoop
    vocab_size: int = VOCAB_SIZE

    @property
    def fleet(self) -> Fleet:
        """Of this one engine, which nobody replaces."""
        return Fleet([self.client])

    def run(self, work: Awaitable[T]) -> T:
        """Wait for a call of `client`."""
        return self.loop.run_until_complete(work)


def write_tiny_qwen3_moe(folder: Path, seed: int) -> None:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(seed)
    config = Qwen3MoeConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        norm_topk_prob=True,
        max_position_embeddings=MAX_SEQUENCE_TOKENS,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        initializer_range=0.2,
    )
    model = Qwen3MoeForCausalLM(config).float()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    model.save_pretrained(folder)


def write_tiny_architecture(folder: Path, kind: str, *, tied: bool, seed: int, **changes) -> None:
    """Of `kind`, a key of `MODELS`: "dense" is Qwen3, "llama" has scaled rotary frequencies, as Llama 3.1 to 3.3 do."""
    sizes = {"vocab_size": VOCAB_SIZE, "num_hidden_layers": 2, "max_position_embeddings": MAX_SEQUENCE_TOKENS}
    write_model(folder, COMMON | MODELS[kind] | sizes | {"tie_word_embeddings": tied} | changes, seed)


def tiny_server(model_path: Path, log_path: Path, **changes) -> EngineServer:
    settings = {
        "model_dtype": "float32",
        "engine": EngineConfig(startup_timeout_seconds=300),
        "deterministic": True,
        "seed": 1,
        "max_sequence_tokens": MAX_SEQUENCE_TOKENS,
        "device": "cpu",
    }
    return EngineServer(str(model_path), log_path=log_path, **(settings | changes))


@contextmanager
def running_engine(
    model_path: Path, log_path: Path, *, ranks: int = 1, name: str = "engine", **changes
) -> Iterator[RunningEngine]:
    """Of `ranks` tensor-parallel processes."""
    loop = asyncio.new_event_loop()
    engine = EngineConfig(startup_timeout_seconds=300, tensor_parallel=ranks)
    with tiny_server(model_path, log_path, **({"engine": engine} | changes)) as server:
        client = EngineClient(
            server.url, name=name, ranks=ranks, token=server.token, timeout_seconds=120, weights_timeout_seconds=60
        )
        try:
            yield RunningEngine(server, client, model_path, loop)
        finally:
            loop.run_until_complete(client.close())
            loop.close()

"""How an SGLang server is started: its arguments and its environment, on a CPU and on CUDA."""

import json
import os
from pathlib import Path
from typing import Any

from megatron_vespo.config import ConfigError, EngineConfig

CPU_CACHE_TOKENS = 262_144
CPU_RUNNING_REQUESTS = 1024
CPU_MEMORY_FRACTION = 0.2
"""Of host memory, which trainer and graders share. Only a bound: the cache is max_total_tokens."""
CPU_SHARE_OF_EXPERTS = 32
"""SGLang on a CPU makes the intermediate size of each tensor-parallel rank a multiple of this."""
CONTEXT_MARGIN = 8
"""SGLang cuts a response short, without a word, when it ends within 2 tokens of the context length, and refuses a prompt
that ends within 6 of it."""

SET_ELSEWHERE = {
    "model-path": "model.path",
    "host": "cluster.interface",
    "api-key": "nothing: every run draws a token",
    "admin-api-key": "nothing: every run draws a token",
    "port": "rollout.engine.port",
    "dtype": "rollout.engine.dtype",
    "tp-size": "rollout.engine.tensor_parallel",
    "tensor-parallel-size": "rollout.engine.tensor_parallel",
    "tp": "rollout.engine.tensor_parallel",
    "max-total-tokens": "rollout.engine.max_total_tokens",
    "max-running-requests": "rollout.engine.max_running_requests",
    "mem-fraction-static": "rollout.engine.memory_fraction",
    "enable-deterministic-inference": "rollout.deterministic",
    "context-length": "data.max_prompt_tokens and rollout.max_response_tokens",
    "device": "nothing: it is CUDA where there is CUDA",
    "enable-return-routed-experts": "routing.replay and routing.record",
    "skip-tokenizer-init": "nothing: engines take and give tokens",
    "weight-version": "nothing: it is the optimizer step",
    "random-seed": "seed",
    **dict.fromkeys(
        ("ep-size", "ep", "expert-parallel-size", "dp-size", "dp", "data-parallel-size", "pp-size", "pp"),
        "nothing: an engine has tensor parallelism alone (weights on its ranks are verified for that)",
    ),
}

WITHOUT_ROUTES = {
    "enable-hierarchical-cache": "cached tokens come back to other places, where the routes of other tokens stand",
    "enable-lmcache": "cached tokens come from elsewhere, and their routes do not",
    "enable-two-batch-overlap": "the second half of a batch writes its routes over those of the first",
    "speculative-algorithm": "its room for routes is too small for the tokens that are verified at once",
}
"""Why routes cannot be recorded with these arguments of SGLang 0.5.23, which takes them all the same; a probe of one
response does not show it."""


def command_line_arguments(
    *,
    model_path: str,
    dtype: str,
    engine: EngineConfig,
    device: str,
    deterministic: bool,
    seed: int,
    max_sequence_tokens: int,
    weight_version: int,
    return_routed_experts: bool,
) -> list[str]:
    """Arguments of `sglang.launch_server`, but for host and port.

    Raises:
        ConfigError: the cache cannot hold one sequence, or `extra_arguments` names what another setting decides, or what
            makes routes wrong that are asked for.
    """
    arguments: dict[str, Any] = {
        "model-path": model_path,
        "dtype": dtype,
        "tp-size": engine.tensor_parallel,
        "context-length": max_sequence_tokens + CONTEXT_MARGIN,
        "skip-tokenizer-init": True,
        "random-seed": seed,
        "weight-version": weight_version,
        "enable-deterministic-inference": deterministic,
        "enable-return-routed-experts": return_routed_experts,
        "max-total-tokens": engine.max_total_tokens,
        "max-running-requests": engine.max_running_requests,
        "mem-fraction-static": engine.memory_fraction,
    }
    if device == "cpu":
        arguments |= cpu_arguments(engine)
    total, running = arguments["max-total-tokens"], arguments["max-running-requests"]
    context_length = arguments["context-length"]
    if total is not None and total < context_length:
        raise ConfigError(
            f"rollout.engine.max_total_tokens is {total}, but one prompt with its response "
            f"takes up to {max_sequence_tokens} tokens: set at least {context_length}"
        )
    if deterministic and total is not None:
        # A request that always finds room is never retracted, and a retracted one would be sampled in another way.
        fitting = total // context_length
        arguments["max-running-requests"] = min(running or fitting, fitting)
    if deterministic and device == "cpu":
        # A prompt cut in two attends in two blocks, with other rounding; where it is cut depends on what else came.
        arguments["chunked-prefill-size"] = -1
    extra = extra_arguments(engine)
    if return_routed_experts:
        require_routes(extra)
    return as_options(arguments | extra)


def cpu_arguments(engine: EngineConfig) -> dict[str, Any]:
    fraction_is_chosen = "memory_fraction" in engine.model_fields_set
    return {
        "device": "cpu",
        "attention-backend": "torch_native",
        "disable-overlap-schedule": True,
        "skip-server-warmup": True,
        # Without it an idle scheduler polls a whole core away from the trainer.
        "sleep-on-idle": True,
        "mem-fraction-static": engine.memory_fraction if fraction_is_chosen else CPU_MEMORY_FRACTION,
        "max-total-tokens": engine.max_total_tokens or CPU_CACHE_TOKENS,
        "max-running-requests": engine.max_running_requests or CPU_RUNNING_REQUESTS,
    }


def check_sequence_length(model_path: str, max_sequence_tokens: int) -> None:
    """Raises ConfigError where prompt and response can be longer than the model's positions."""
    config = json.loads((Path(model_path) / "config.json").read_text())
    positions = config.get("max_position_embeddings")
    if positions is not None and max_sequence_tokens > positions:
        raise ConfigError(
            f"data.max_prompt_tokens + rollout.max_response_tokens is {max_sequence_tokens}, but {model_path} has "
            f"{positions} positions (max_position_embeddings): lower one of them"
        )


def check_tensor_parallel(model_path: str, tensor_parallel: int, device: str) -> None:
    """Raises ConfigError where so many ranks can't share the model alike.

    SGLang on a CPU takes them all the same, and fills heads and experts up: then no checksum would be known.
    """
    if tensor_parallel == 1:
        return
    config = json.loads((Path(model_path) / "config.json").read_text())
    width = tensor_parallel * (CPU_SHARE_OF_EXPERTS if device == "cpu" else 1)
    divisors = {
        "num_attention_heads": tensor_parallel,
        "num_key_value_heads": tensor_parallel,
        "intermediate_size": width,
        "moe_intermediate_size": width,
    }
    for name, divisor in divisors.items():
        size = config.get(name)
        # Several ranks of a GPU engine may have the same key head.
        replicated = name == "num_key_value_heads" and device != "cpu" and size and tensor_parallel % size == 0
        if size is not None and size % divisor and not replicated:
            raise ConfigError(
                f"rollout.engine.tensor_parallel is {tensor_parallel}, but {model_path} has {name} {size}, which does not "
                f"divide by {divisor}: choose another number of ranks"
            )


def extra_arguments(engine: EngineConfig) -> dict[str, Any]:
    extra = {name.lstrip("-").replace("_", "-"): value for name, value in engine.extra_arguments.items()}
    for name in extra:
        if name in SET_ELSEWHERE:
            raise ConfigError(f"rollout.engine.extra_arguments: '{name}' is decided by {SET_ELSEWHERE[name]}")
    return extra


def require_routes(extra: dict[str, Any]) -> None:
    """Raises ConfigError for further arguments under which SGLang's routes are wrong, or end it in the middle of a run."""
    if extra.get("chunked-prefill-size") == -1:
        raise ConfigError(
            "rollout.engine.extra_arguments: routes cannot be recorded with 'chunked-prefill-size': -1: SGLang's room for "
            "them is as large as a chunk. Name a size"
        )
    for name, reason in WITHOUT_ROUTES.items():
        if extra.get(name):
            raise ConfigError(
                f"rollout.engine.extra_arguments: routes cannot be recorded with '{name}': {reason}. Leave it out, or "
                "record none (routing.replay: off or R2, routing.record: false)"
            )


def as_options(arguments: dict[str, Any]) -> list[str]:
    """True is a bare option; None and False are left out; a list is several values."""
    options = []
    for name, value in arguments.items():
        if value is None or value is False:
            continue
        options.append(f"--{name}")
        if value is not True:
            options += [str(item) for item in (value if isinstance(value, list | tuple) else [value])]
    return options


def child_environment(base: dict[str, str], device: str, scratch: Path, tensor_parallel: int = 1) -> dict[str, str]:
    """The server's environment. Its sockets and other temporary files go to `scratch`."""
    environment = base | {"TMPDIR": str(scratch), "PYTHONUNBUFFERED": "1"}
    # Only CONTEXT_MARGIN is ever beyond the model's own length (check_sequence_length).
    # Its ranks meet in a file: torch's store would listen on every interface, whatever address it is given.
    environment["SGLANG_DISTRIBUTED_INIT_METHOD_OVERRIDE"] = f"file://{scratch / 'ranks'}"
    environment["SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN"] = "1"
    if device == "cpu":
        # One thread: results don't depend on how work is split. Compiled sampling is slower than it is worth here.
        environment |= {"SGLANG_USE_CPU_ENGINE": "1", "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}
    if device == "cpu" and tensor_parallel > 1:
        # Without it SGLang wants a NUMA node for each rank. Nothing is bound: only its AMX kernels would do that.
        cores = sorted(os.sched_getaffinity(0))
        chosen = [str(cores[rank % len(cores)]) for rank in range(tensor_parallel)]
        environment["SGLANG_CPU_OMP_THREADS_BIND"] = "|".join(chosen)
    return environment

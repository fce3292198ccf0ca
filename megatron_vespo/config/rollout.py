"""How responses are sampled."""

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from megatron_vespo.config.section import Section


class SamplingConfig(Section):
    temperature: float = Field(default=1.0, ge=0)
    """0 is greedy (evaluation only)."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Least number of tokens that hold this much probability."""
    top_k: int = -1
    """So many of the likeliest tokens; -1: all."""
    min_p: float = Field(default=0.0, ge=0, le=1)
    """Tokens at least as likely as this share of the likeliest one's probability."""
    frequency_penalty: float = 0.0
    """Taken from a logit for each time that the token was sampled."""
    presence_penalty: float = 0.0
    """Taken from the logits of tokens that were sampled."""
    repetition_penalty: float = 1.0
    """Positive logits of tokens that were seen are divided by it, negative ones multiplied."""
    logit_bias: dict[str, float] | None = None
    """Added to logits, by token id."""


NEUTRAL_SAMPLING = SamplingConfig()


class RouterNoiseConfig(Section):
    """An engine that routes wrongly on purpose, for experiments: normal noise on its router logits.

    The noise of a token is drawn from its own logits, so it does not depend on what is computed beside it.
    """

    scale: PositiveFloat
    """Standard deviation of the noise, in units of logits."""
    on: Literal["selection", "logits"] = "selection"
    """`selection`: experts are chosen by noisy logits and weighted by clean ones. `logits`: noisy logits for both."""


class EngineConfig(Section):
    """SGLang servers, all alike."""

    count: PositiveInt = 1
    """Servers; requests go to the one with the fewest outstanding tokens, those of one group to one server."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """None: the model's."""
    tensor_parallel: PositiveInt = 1
    """Processes (GPUs) that share an engine's weights. Must divide the model's heads and intermediate sizes."""
    max_total_tokens: PositiveInt | None = None
    """Size of the KV cache in tokens; None lets SGLang decide from memory."""
    max_running_requests: PositiveInt | None = None
    """Of an engine at once; more wait in its queue. None: what SGLang finds fitting."""
    memory_fraction: float = Field(default=0.7, gt=0, lt=1)
    """Of GPU memory for weights and KV cache (`--mem-fraction-static`)."""
    port: int | None = Field(default=None, ge=1, le=65535)
    """Of the first server, further ones count up from it. None: free ports. A port in use is replaced by a free one,
    and that is reported."""
    startup_timeout_seconds: PositiveFloat = 600.0
    """Until an engine serves."""
    request_timeout_seconds: PositiveFloat = 1800.0
    """An engine that has not answered a request by then is taken for hung."""
    hang_timeout_seconds: PositiveFloat = 120.0
    """So is one that has requests and computes nothing for so long."""
    max_restarts: int = Field(default=3, ge=0)
    """An engine that dies, hangs or answers nonsense is taken out, its requests go to others, and it is started again: each
    so often within an hour. One failure more ends the run, the first with 0."""
    router_noise: RouterNoiseConfig | None = None
    """None: the router as it is."""
    extra_arguments: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of `sglang.launch_server`, e.g. {"enable-metrics": true}."""


class ResponseLengthConfig(Section):
    """How long responses are, drawn instead of decided by the model: for experiments and benchmarks.

    Each response is exactly as long as a lognormal number, at least 1, decided by run seed, prompt and sample. Nothing
    else ends it: stop tokens are sampled, and trained on, as any other token. A response that reached its length counts
    as finished; one whose length is above `max_response_tokens` is cut there, and counts as truncated. Evaluations are
    sampled without it.
    """

    median: PositiveFloat
    """Tokens."""
    sigma: float = Field(default=1.0, ge=0, le=10)
    """Standard deviation of the length's natural logarithm; 0: all are of one length."""


class RolloutConfig(Section):
    group_size: int = Field(default=8, ge=2)
    """Responses to one prompt; a group's advantage needs at least two."""
    max_response_tokens: PositiveInt = 1024
    """A response is cut there."""
    sampling: SamplingConfig = SamplingConfig()
    max_turns: PositiveInt = 8
    """Of a response, where its source has an `environment`. What that says counts in `max_response_tokens`."""
    response_length: ResponseLengthConfig | None = None
    """None: the model ends its responses."""
    truncated: Literal["keep", "mask", "penalise"] = "keep"
    """A response cut at `max_response_tokens`: trained on as graded; not trained on (its reward still counts in its
    group's mean); graded less `truncation_penalty`. Evaluations always grade as is."""
    truncation_penalty: float = Field(default=0.5, ge=0)
    """Taken from the reward with `truncated: penalise`."""
    deterministic: bool = False
    """Batch-invariant sampling with a seed for each sample: the same seed gives bitwise the same run. Costs speed."""
    concurrent_groups: PositiveInt = 256
    """Groups in flight on the engine at once."""
    engine: EngineConfig = EngineConfig()

    def own_problems(self) -> Iterator[tuple[str, str]]:
        if self.sampling.temperature == 0:
            yield (
                "sampling.temperature",
                "0 is refused in training: greedy responses of a group are all equal, nothing to learn from",
            )
        if self.response_length is not None and self.response_length.median > self.max_response_tokens:
            yield (
                "response_length.median",
                f"{self.response_length.median:g} is above max_response_tokens ({self.max_response_tokens}): most "
                "responses would be cut. Lower one or raise the other",
            )
        for name in SamplingConfig.model_fields:
            value, neutral = getattr(self.sampling, name), getattr(NEUTRAL_SAMPLING, name)
            if name != "temperature" and value != neutral:
                yield (
                    f"sampling.{name}",
                    f"{value} is refused in training: behavior log-probs would not be those of the distribution that "
                    f"was sampled, and importance weights would be wrong. Leave it at {neutral}",
                )


class DiskSyncConfig(Section):
    folder: str | None = None
    """Where trainer and engines both see it. A sync leaves nothing there."""
    changed_only: bool = False
    """Write and load only tensors that differ from what the engines have."""


class WeightSyncConfig(Section):
    bucket_mb: PositiveFloat = 512.0
    """Tensors are flattened into buckets of about this size (MiB); a tensor that is larger has a bucket of its own.
    A sync takes up to two buckets of memory in each process: one is filled while the one before is sent. On CPU the
    trainer keeps them between syncs, in shared memory."""
    transport: Literal["auto", "collective", "shared_memory", "disk"] = "auto"
    """`collective`: broadcast (NCCL on CUDA, gloo elsewhere), also across hosts. `shared_memory`: engines copy from the
    trainer's memory, on the same host; on CUDA only engines that see the trainer's GPU. `disk`: through `disk.folder`.
    `auto`: shared memory on CPU where all engines are on the trainer's host, else collective."""
    disk: DiskSyncConfig = DiskSyncConfig()
    verify_every: PositiveInt = 10
    """Compare the checksum of every tensor on every engine at the start and at each such sync; on a new engine always."""
    flush_cache: bool = True
    """Empty the engines' prefix caches at each sync, not only at a run's first. Kept, they serve keys and values of
    prompts that older weights computed: log-probs of training responses are what the engine sampled with over those,
    while the trainer's come from its own weights alone; routes of such a prefix are marked with the older version and
    not replayed. Evaluations and probes use nothing that older weights computed in either case."""
    timeout_seconds: PositiveFloat = 600.0
    """Of a whole sync, and of verifying it. An engine that is not done by then is given up."""

    def own_problems(self) -> Iterator[tuple[str, str]]:
        if self.transport == "disk" and self.disk.folder is None:
            yield "disk.folder", "is missing: transport disk needs a folder that trainer and engines both see"

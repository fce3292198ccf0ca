"""Speeds of engines and trainer that `megatron-vespo plan` counts with, published or one's own."""

from collections.abc import Iterator

from pydantic import Field, PositiveFloat, PositiveInt

from megatron_vespo.config.section import Section


class DecodePoint(Section):
    running: PositiveFloat
    """Requests that run at once on the engine."""
    tokens_per_second: PositiveFloat
    """Of all of them together."""


class RatesConfig(Section):
    """`megatron-vespo plan --rates FILE`."""

    about: str
    """Which model on which hardware, and where the numbers are from; printed with every plan."""
    engine_gpus: PositiveInt
    """GPUs of one engine."""
    decode: tuple[DecodePoint, ...] = Field(min_length=1)
    """Of one engine, by running requests, ascending."""
    cache_tokens: PositiveInt
    """Tokens that one engine's KV cache holds. It decides how many requests run at once."""
    prefill_tokens_per_second: PositiveFloat
    """Of one engine."""
    train_tokens_per_second_per_gpu: PositiveFloat
    """Prompt and response tokens, with everything that a step does."""
    step_seconds: float = Field(default=0.0, ge=0)
    """Of each step, whatever is in it."""
    sync_seconds: float = Field(ge=0)
    """In which engines stand still at a weight update."""

    def own_problems(self) -> Iterator[tuple[str, str]]:
        running = [point.running for point in self.decode]
        if running != sorted(set(running)):
            yield "decode", f"running requests must ascend, found {running}"
        seconds = [point.running / point.tokens_per_second for point in self.decode]
        if seconds != sorted(seconds):
            yield "decode", "one request must not become faster where more run at once: check tokens_per_second"

"""Where questions come from: the protocol of a prompt source, and which source a configuration means.

A new source is one class with `name`, `size` and `item`, named in the configuration as `type: custom`,
`target: package.module:Class`; it is built as `Class(seed=..., **settings)`.
"""

import hashlib
from dataclasses import dataclass
from typing import Protocol, cast

from megatron_vespo.config import ConfigError, CustomSource, DataConfig, FileSource, ReasoningGymSource, Source
from megatron_vespo.targets import load_target

Question = str | list[dict]
"""The text of a user's turn, or chat messages ({"role", "content"})."""


@dataclass(frozen=True)
class Item:
    """One question, and what its scorer needs to grade a response (picklable)."""

    question: Question
    reference: object


class PromptSource(Protocol):
    """Questions by number. The same (settings, seed, index) is always the same item, whatever was taken before."""

    @property
    def name(self) -> str:
        """Short; part of prompts' identities."""
        ...

    @property
    def size(self) -> int | None:
        """Number of different items; None: as many as one likes."""
        ...

    def item(self, index: int) -> Item:
        """The item at `index` >= 0. A source of `size` n starts over after n, in another order if it likes."""
        ...


def build_source(source: Source, seed: int, key: str) -> PromptSource:
    """Make the source that a configuration describes. `key` is its path in the configuration, for messages.

    Raises:
        ConfigError: unknown task or settings, a missing file or column, a bad row, a class that does not import.
    """
    if isinstance(source, ReasoningGymSource):
        from megatron_vespo.data.reasoning_gym_source import ReasoningGymPrompts  # seconds to import

        return ReasoningGymPrompts(source.task, source.settings, seed, key)
    if isinstance(source, FileSource):
        from megatron_vespo.data.file_source import FilePrompts

        return FilePrompts(source.path, source.prompt_key, source.answer_key, seed, key)
    return build_custom(source, seed, key)


def build_custom(source: CustomSource, seed: int, key: str) -> PromptSource:
    target = load_target(source.target, f"{key}.target")
    if not callable(target):
        raise ConfigError(f"{key}.target: '{source.target}' is not a class")
    try:
        prompts = target(seed=seed, **source.settings)
    except Exception as error:  # the user's own code
        raise ConfigError(f"{key}: {source.target} cannot be built: {type(error).__name__}: {error}") from error
    for name in ("name", "size", "item"):
        if not hasattr(prompts, name):
            raise ConfigError(f"{key}.target: {source.target} has no `{name}` (see megatron_vespo.data.sources)")
    return cast(PromptSource, prompts)


def numbered_sources(data: DataConfig, evaluation: tuple[Source, ...] | None) -> dict[str, Source]:
    """All sources of a run by their path in the configuration; `Prompt.source` counts in this order."""
    numbered: dict[str, Source] = {f"data.sources.{number}": source for number, source in enumerate(data.sources)}
    for number, source in enumerate(evaluation or ()):
        numbered[f"evaluation.sources.{number}"] = source
    return numbered


def derived_seed(seed: int, *purpose: str | int) -> int:
    """A 31-bit seed for one purpose. Neighbouring seeds give unrelated ones.

    Sources may use seed + index as reasoning-gym does, so that runs with seeds 1 and 2 would share nearly all items.
    """
    text = "/".join(str(part) for part in (seed, *purpose))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 33


def question_text(question: Question) -> str:
    """A question in words: by this, prompts are compared and shown."""
    if isinstance(question, str):
        return question
    if len(question) == 1:
        return str(question[0]["content"])
    return "\n".join(f"{message['role']}: {message['content']}" for message in question)

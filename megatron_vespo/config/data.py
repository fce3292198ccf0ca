"""Where prompts come from and how responses are graded."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from megatron_vespo.config.section import Section


class ReasoningGymSource(Section):
    type: Literal["reasoning_gym"]
    task: str
    """Name of a reasoning-gym dataset, e.g. `chain_sum`."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """Arguments of that dataset's config."""
    partial_credit: bool = False
    """False: the reward is 1 for a full score of the task's own scorer, else 0."""
    environment: str | None = None
    """As in a file source; `row` is the dataset's entry."""
    weight: PositiveFloat = 1.0
    """Share of this source among all sources."""


class FileSource(Section):
    type: Literal["file"]
    path: str
    """A .jsonl, .parquet or .csv file, one prompt a row."""
    prompt_key: str = "prompt"
    """Column with the question (text), or with chat messages (a list of {role, content})."""
    answer_key: str | None = "answer"
    """Column handed to the scorer as the reference answer."""
    scorer: str | None = None
    """`exact_match`, `math_verify`, or the dotted path `package.module:function` of `(response, answer, row) -> float`."""
    environment: str | None = None
    """Of tasks with several turns: the dotted path `package.module:function` of `(response, answer, row) -> str | None`,
    which gets the response so far and says what comes into the context after it; None ends the response."""
    weight: PositiveFloat = 1.0
    """Its share of the prompts, relative to those of other sources."""


class CustomSource(Section):
    type: Literal["custom"]
    target: str
    """Dotted path `package.module:Class` of a prompt source (see megatron_vespo.data.sources)."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of the class."""
    scorer: str | None = None
    """As in a file source; None: the source's own `score`."""
    environment: str | None = None
    """As in a file source; `answer` is the item's `reference`."""
    weight: PositiveFloat = 1.0
    """As in a file source."""


Source = Annotated[ReasoningGymSource | FileSource | CustomSource, Field(discriminator="type")]


class DataConfig(Section):
    sources: tuple[Source, ...]
    """Each prompt is drawn from one of them, by their weights."""
    max_prompt_tokens: PositiveInt = 1024
    """With chat template."""
    overlong_prompts: Literal["drop", "error"] = "drop"
    """What happens to a prompt longer than `max_prompt_tokens`; dropped ones are counted."""
    system_prompt: str | None = None
    """A system message put before each question."""

    def own_problems(self) -> Iterator[tuple[str, str]]:
        if not self.sources:
            yield "sources", "at least one source of prompts is needed"


class RewardConfig(Section):
    workers: PositiveInt = 1
    """Processes that grade. Each can be killed without harm to the run."""
    timeout_seconds: PositiveFloat = 10.0
    """Hard deadline of one grading; then its process is killed."""
    memory_limit_mb: PositiveInt = 4096
    """Address space of a grading process."""
    on_failure: float = 0.0
    """Reward of a trajectory whose grading threw, hung, died or returned NaN. Counted by kind."""


class ExcludedPrompts(Section):
    """Prompts that evaluation must not contain: the first `size` of a seed of one source."""

    source: Source
    seed: int
    """With which that source was drawn from."""
    size: PositiveInt
    """How many prompts were drawn."""

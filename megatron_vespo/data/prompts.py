"""Prompts of a run: the training stream, and the held-out set that it never touches."""

from collections.abc import Iterable, Set

from megatron_vespo.config import ConfigError, DataConfig, EvaluationConfig, ExcludedPrompts, Source
from megatron_vespo.data.prompt import Prompt
from megatron_vespo.data.sources import Item, PromptSource, build_source, derived_seed, question_text
from megatron_vespo.data.tokenizer import ChatTokenizer

MAX_MISSES = 10_000
"""So many unusable items in a row (or two rounds of a finite source) mean that there are no others."""


class PromptStream:
    """Endless prompts from weighted sources; the same seed gives the same stream.

    Which source the n-th prompt comes from, and which item it is, depends on (seed, n) and on what was skipped before,
    never on how prompts are taken. Items whose question is in `excluded`, and too long ones, are passed over and
    counted.

    Attributes:
        dropped_overlong: prompts beyond `max_prompt_tokens` so far.
        skipped_excluded: items passed over because their question is in `excluded`.
    """

    def __init__(self, data: DataConfig, tokenizer: ChatTokenizer, seed: int, excluded: Set[str] = frozenset()):
        self._data, self._tokenizer, self._seed, self._excluded = data, tokenizer, seed, excluded
        self._sources = _build_sources(data.sources, seed, "train", "data.sources")
        self._labels = _labels(self._sources)
        self._drawn = 0
        self._cursors = [0] * len(self._sources)
        self.dropped_overlong = 0
        self.skipped_excluded = 0

    def take(self, count: int) -> list[Prompt]:
        """The next `count` prompts.

        Raises:
            ConfigError: a prompt is too long and `overlong_prompts` is "error", or a source has no usable item left.
        """
        return [self._next() for _ in range(count)]

    def require_usable(self) -> None:
        """Find the next prompt of each source, and go back: a source without one is better known before the run.

        Raises:
            ConfigError: as `take`, of the first such source.
        """
        state = self.state_dict()
        for number in range(len(self._sources)):
            self._next_of(number)
        self.load_state_dict(state)

    def state_dict(self) -> dict[str, int | list[int]]:
        """Where the stream stands, in small integers."""
        return {
            "drawn": self._drawn,
            "cursors": list(self._cursors),
            "dropped_overlong": self.dropped_overlong,
            "skipped_excluded": self.skipped_excluded,
        }

    def load_state_dict(self, state: dict) -> None:
        """Go on where `state` was taken.

        Raises:
            ConfigError: the state is of a stream with another number of sources.
        """
        if len(state["cursors"]) != len(self._sources):
            raise ConfigError(
                f"data.sources: the saved run had {len(state['cursors'])} sources, this one has {len(self._sources)}"
            )
        self._drawn = state["drawn"]
        self._cursors = list(state["cursors"])
        self.dropped_overlong = state["dropped_overlong"]
        self.skipped_excluded = state["skipped_excluded"]

    def _next(self) -> Prompt:
        number = choose(self._data.sources, self._seed, self._drawn)
        self._drawn += 1
        return self._next_of(number)

    def _next_of(self, number: int) -> Prompt:
        source = self._sources[number]
        for _ in range(_patience(source)):
            index = self._cursors[number]
            self._cursors[number] += 1
            item = source.item(index)
            if question_text(item.question) in self._excluded:
                self.skipped_excluded += 1
                continue
            prompt = make_prompt(
                item, f"{self._labels[number]}/{self._seed}/{index}", number, self._data, self._tokenizer
            )
            if prompt is not None:
                return prompt
            self.dropped_overlong += 1
        raise ConfigError(
            f"data.sources.{number}: no usable prompt among the last {_patience(source)} of '{source.name}': all are "
            f"held out for evaluation or longer than data.max_prompt_tokens ({self._data.max_prompt_tokens})"
        )


def make_prompt(item: Item, identity: str, source: int, data: DataConfig, tokenizer: ChatTokenizer) -> Prompt | None:
    """Tokenize one item; None if it is too long and such prompts are dropped.

    Raises:
        ConfigError: it is too long and `data.overlong_prompts` is "error".
    """
    ids = tokenizer.prompt_ids(item.question, data.system_prompt)
    if len(ids) > data.max_prompt_tokens:
        if data.overlong_prompts == "error":
            raise ConfigError(
                f"prompt {identity} has {len(ids)} tokens, more than data.max_prompt_tokens ({data.max_prompt_tokens}); "
                "raise the limit or set data.overlong_prompts=drop"
            )
        return None
    return Prompt(identity, question_text(item.question), ids, source, item.reference)


def held_out_prompts(evaluation: EvaluationConfig, data: DataConfig, tokenizer: ChatTokenizer) -> list[Prompt]:
    """The evaluation set: `evaluation.prompts` different questions, none of them in `evaluation.exclude`.

    They come from `evaluation.sources`, or the training sources, under a seed of their own. Hand
    `question_texts(...)` of the result to `PromptStream` as `excluded`, and training never sees them.
    `Prompt.source` counts in `data.sources` followed by `evaluation.sources`.

    Raises:
        ConfigError: the sources don't hold that many usable questions.
    """
    configs = data.sources if evaluation.sources is None else evaluation.sources
    key = "data.sources" if evaluation.sources is None else "evaluation.sources"
    first = 0 if evaluation.sources is None else len(data.sources)
    sources = _build_sources(configs, evaluation.seed, "held-out", key)
    labels = _labels(sources)
    excluded = excluded_texts(evaluation.exclude)
    seen = set(excluded)
    left_out, too_long = set(), 0
    cursors = [0] * len(sources)
    prompts: list[Prompt] = []
    while len(prompts) < evaluation.prompts:
        number = choose(configs, evaluation.seed, len(prompts))
        source = sources[number]
        for _ in range(_patience(source)):
            index = cursors[number]
            cursors[number] += 1
            item = source.item(index)
            text = question_text(item.question)
            if text in seen:
                left_out |= excluded & {text}
                continue
            seen.add(text)
            identity = f"{labels[number]}/held-out-{evaluation.seed}/{index}"
            prompt = make_prompt(item, identity, first + number, data, tokenizer)
            if prompt is not None:
                prompts.append(prompt)
                break
            too_long += 1
        else:
            raise ConfigError(
                f"{key}.{number}: only {len(prompts)} of evaluation.prompts ({evaluation.prompts}) different questions "
                f"were found: {len(left_out)} others are in evaluation.exclude, {too_long} are longer than "
                "data.max_prompt_tokens. Ask for fewer evaluation.prompts, or give more rows"
            )
    return prompts


def excluded_texts(exclude: Iterable[ExcludedPrompts]) -> set[str]:
    """The questions that `exclude` describes, generated again: the first `size` of `seed` of each source."""
    texts: set[str] = set()
    for number, entry in enumerate(exclude):
        source = build_source(entry.source, entry.seed, f"evaluation.exclude.{number}.source")
        size = entry.size if source.size is None else min(entry.size, source.size)
        texts.update(question_text(source.item(index).question) for index in range(size))
    return texts


def question_texts(prompts: Iterable[Prompt]) -> frozenset[str]:
    """What a stream must not contain, given the prompts that are held out."""
    return frozenset(prompt.text for prompt in prompts)


def choose(sources: tuple[Source, ...], seed: int, draw: int) -> int:
    """Which source the `draw`-th prompt comes from: at random by weight, from (seed, draw) alone."""
    total = sum(source.weight for source in sources)
    point = derived_seed(seed, "mix", draw) / 2**31 * total
    for number, source in enumerate(sources):
        point -= source.weight
        if point < 0:
            return number
    return len(sources) - 1


def _build_sources(configs: tuple[Source, ...], seed: int, purpose: str, key: str) -> list[PromptSource]:
    return [
        build_source(config, derived_seed(seed, purpose, number), f"{key}.{number}")
        for number, config in enumerate(configs)
    ]


def _labels(sources: list[PromptSource]) -> list[str]:
    """Sources' names; those that occur twice get their number behind them."""
    names = [source.name for source in sources]
    return [name if names.count(name) == 1 else f"{name}@{number}" for number, name in enumerate(names)]


def _patience(source: PromptSource) -> int:
    return MAX_MISSES if source.size is None else 2 * source.size

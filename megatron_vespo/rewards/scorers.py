"""What grades a response, and what answers its turns: a scorer for each prompt source, and an environment for some.

A scorer is a function of the response's text and the prompt's `reference`; it returns a number. It runs in a worker
process (rewards.pool), never in the driver.
"""

import logging
from collections.abc import Callable
from functools import partial
from typing import Any, cast

from megatron_vespo.config import ConfigError, CustomSource, FileSource, ReasoningGymSource, Source
from megatron_vespo.targets import load_function, load_target

Scorer = Callable[[str, Any], float]
Environment = Callable[[str, Any], str | None]
RowScorer = Callable[[str, Any, dict], float]
"""(response, answer, row) -> float: what a dotted path in a configuration names."""


def build_scorer(source: Source, key: str) -> Scorer:
    """The scorer that a source's configuration means. `key` is its path in the configuration.

    Raises:
        ConfigError: the source has no scorer, or the one it names does not exist.
    """
    if isinstance(source, ReasoningGymSource):
        return reasoning_gym_scorer(source, key)
    if isinstance(source, FileSource):
        if source.scorer is None:
            raise ConfigError(
                f"{key}.scorer: no scorer is given for {source.path}; use exact_match, math_verify "
                "or the dotted path package.module:function of (response, answer, row) -> float"
            )
        grade = named_scorer(source.scorer, f"{key}.scorer")
        answer_key = source.answer_key
        return lambda text, row: grade(text, row[answer_key] if answer_key is not None else None, row)
    if source.scorer is None:
        return own_scorer(source, key)
    grade = named_scorer(source.scorer, f"{key}.scorer")
    return lambda text, reference: grade(text, reference, reference if isinstance(reference, dict) else {})


def named_scorer(name: str, key: str) -> RowScorer:
    """`exact_match`, `math_verify`, or a function by its dotted path.

    Libraries are loaded here, where a worker starts, and not at its first grading, within the deadline of that one.
    """
    if name == "exact_match":
        return exact_match_scorer()
    if name == "math_verify":
        return math_verify_scorer()
    if ":" not in name:
        raise ConfigError(
            f"{key}: no scorer is called '{name}'; use exact_match, math_verify or package.module:function"
        )
    return load_function(name, key)


def exact_match_scorer() -> RowScorer:
    """1.0 if the last <answer>...</answer> (the whole response where there is none) equals the answer, but for space."""
    from reasoning_gym.utils import extract_answer

    def grade(response: str, answer: object, row: dict) -> float:
        given = extract_answer(response)
        return float((response if given is None else given).strip() == str(answer).strip())

    return grade


def math_verify_scorer() -> RowScorer:
    r"""1.0 if math-verify finds what a response concludes equal to the answer (LaTeX or a number).

    All \boxed{} of a response count, as one set where they differ: naming several answers is not right.
    It raises ValueError where the reference answer itself is not an expression.
    """
    from math_verify import parse, verify

    # Both limits off: they are soft and read as "wrong"; the pool's deadline is hard and counted.
    read = partial(parse, parsing_timeout=cast(int, None))
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    read("\\boxed{1}")  # it compiles its expressions when it is first used

    def grade(response: str, answer: object, row: dict) -> float:
        reference = str(answer)
        delimited = "\\boxed" in reference or "$" in reference
        gold = read(reference if delimited else f"\\boxed{{{reference}}}")
        if not gold:
            raise ValueError(f"math_verify cannot read the reference answer {reference!r}")
        return float(verify(gold, read(response), timeout_seconds=None))

    return grade


def reasoning_gym_scorer(source: ReasoningGymSource, key: str) -> Scorer:
    """The task's own `score_answer` of what stands in the last <answer>...</answer>; 0 where there is none."""
    from reasoning_gym.utils import extract_answer

    from megatron_vespo.data.reasoning_gym_source import create_dataset

    dataset = create_dataset(source.task, source.settings, size=10, seed=0, key=key)

    def grade(text: str, entry: dict) -> float:
        answer = extract_answer(text)
        if answer is None:
            return 0.0
        score = float(dataset.score_answer(answer, entry))
        return score if source.partial_credit else float(score >= 1.0)

    return grade


def own_scorer(source: CustomSource, key: str) -> Scorer:
    """The `score(response, reference)` of a custom source's class."""
    target = load_target(source.target, f"{key}.target")
    if not callable(getattr(target, "score", None)):
        raise ConfigError(
            f"{key}.scorer: no scorer is given, and {source.target} has no method score(response, reference) -> float"
        )
    return cast(Any, target)(seed=0, **source.settings).score


def build_scorers(sources: dict[str, Source]) -> list[Scorer]:
    """The scorers of `sources`, which go by their paths in the configuration.

    Call it in the driver too, before anything starts, to refuse sources that cannot be graded.

    Raises:
        ConfigError: names the first such source.
    """
    return [build_scorer(source, key) for key, source in sources.items()]


def build_environment(source: Source, key: str) -> Environment | None:
    """What answers the turns of responses to prompts of `source`; None: they have one turn.

    Raises:
        ConfigError: there is no such function.
    """
    if source.environment is None:
        return None
    reply = load_function(source.environment, f"{key}.environment")
    answer_key = source.answer_key if isinstance(source, FileSource) else "answer"

    def answer(text: str, reference: Any) -> str | None:
        row = reference if isinstance(reference, dict) else {}
        expected = reference if isinstance(source, CustomSource) else row.get(answer_key)
        said = reply(text, expected, row)
        if said is not None and not isinstance(said, str):
            raise TypeError(f"{source.environment} returned {said!r:.100}, neither text nor None")
        return said

    return answer


def build_environments(sources: dict[str, Source]) -> list[Environment | None]:
    """As `build_scorers`."""
    return [build_environment(source, key) for key, source in sources.items()]

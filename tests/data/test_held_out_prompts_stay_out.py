"""Evaluation prompts are new to the model, different from each other, and never trained on."""

import json

import pytest
import reasoning_gym

from megatron_vespo.config import ConfigError, DataConfig, EvaluationConfig, ExcludedPrompts, FileSource
from megatron_vespo.data.prompts import PromptStream, held_out_prompts, question_texts
from megatron_vespo.data.sources import numbered_sources


@pytest.fixture
def small(chain_sum) -> DataConfig:
    """A task with 200 different questions: whatever overlaps will be seen to."""
    settings = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    return DataConfig(sources=(chain_sum.model_copy(update={"settings": settings}),))


def test_held_out_prompts_are_different_and_repeatable(small, tokenizer):
    config = EvaluationConfig(prompts=60)
    texts = [p.text for p in held_out_prompts(config, small, tokenizer)]
    assert len(set(texts)) == 60
    assert texts == [p.text for p in held_out_prompts(config, small, tokenizer)]


def test_training_never_draws_a_held_out_prompt_and_counts_what_it_skips(small, tokenizer):
    held_out = question_texts(held_out_prompts(EvaluationConfig(prompts=60), small, tokenizer))
    free = [p.text for p in PromptStream(small, tokenizer, seed=1).take(300)]
    stream = PromptStream(small, tokenizer, seed=1, excluded=held_out)
    drawn = [p.text for p in stream.take(300)]
    assert held_out & set(free)
    assert not held_out & set(drawn)
    assert stream.skipped_excluded > 0
    assert drawn[:100] == [text for text in free if text not in held_out][:100]


def test_what_the_base_was_trained_on_is_not_evaluated(small, tokenizer):
    seen = reasoning_gym.create_dataset("chain_sum", seed=11, size=150, **small.sources[0].settings)
    seen_texts = {item["question"] for item in seen}
    exclude = (ExcludedPrompts(source=small.sources[0], seed=11, size=150),)
    texts = {p.text for p in held_out_prompts(EvaluationConfig(prompts=60), small, tokenizer)}
    assert texts & seen_texts
    texts = {p.text for p in held_out_prompts(EvaluationConfig(prompts=60, exclude=exclude), small, tokenizer)}
    assert len(texts) == 60 and not texts & seen_texts


def test_asking_for_more_than_there_is_says_how_many_there_are(small, tokenizer):
    with pytest.raises(ConfigError, match=r"only 200 of evaluation\.prompts"):
        held_out_prompts(EvaluationConfig(prompts=201), small, tokenizer)


def test_asking_for_more_says_why_the_others_do_not_count(tokenizer, tmp_path):
    def rows(name: str, questions: list[str]) -> FileSource:
        lines = [json.dumps({"prompt": question, "answer": "1"}) for question in questions]
        (tmp_path / name).write_text("\n".join(lines))
        return FileSource(type="file", path=str(tmp_path / name), scorer="exact_match")

    short = [f"What is {n}?" for n in range(8)]
    data = DataConfig(sources=(rows("all.jsonl", [*short, "What is " + "1 + " * 40 + "1?"]),), max_prompt_tokens=60)
    exclude = (ExcludedPrompts(source=rows("seen.jsonl", short[:3]), seed=1, size=3),)
    with pytest.raises(ConfigError, match=r"only 5 of .* \(6\) .*: 3 others are in evaluation\.exclude, 1 are longer"):
        held_out_prompts(EvaluationConfig(prompts=6, exclude=exclude), data, tokenizer)


def test_holding_out_a_whole_file_leaves_nothing_to_train_on(tokenizer, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"What is {n}?", "answer": n}) + "\n" for n in range(8)))
    data = DataConfig(sources=(FileSource(type="file", path=str(path), scorer="exact_match"),))
    held_out = held_out_prompts(EvaluationConfig(prompts=8), data, tokenizer)
    with pytest.raises(ConfigError, match="no usable prompt"):
        PromptStream(data, tokenizer, seed=1, excluded=question_texts(held_out)).take(1)


def test_a_source_that_is_used_up_is_named_and_looking_for_it_draws_nothing(chain_sum, tokenizer, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"What is {n}?", "answer": n}) + "\n" for n in range(4)))
    rows = FileSource(type="file", path=str(path), scorer="exact_match", weight=0.001)
    excluded = frozenset(f"What is {n}?" for n in range(4))
    data = DataConfig(sources=(chain_sum, rows))
    with pytest.raises(ConfigError, match=r"^data\.sources\.1: no usable prompt"):
        PromptStream(data, tokenizer, seed=1, excluded=excluded).require_usable()
    looked, untouched = (PromptStream(data, tokenizer, seed=1, excluded=excluded - {"What is 2?"}) for _ in range(2))
    looked.require_usable()
    assert looked.state_dict() == untouched.state_dict()
    assert [p.identity for p in looked.take(20)] == [p.identity for p in untouched.take(20)]


def test_sources_of_an_evaluation_are_counted_behind_the_training_sources(small, chain_sum, tokenizer):
    config = EvaluationConfig(prompts=4, sources=(chain_sum,))
    prompts = held_out_prompts(config, small, tokenizer)
    numbered = list(numbered_sources(small, config.sources).values())
    assert [numbered[p.source] for p in prompts] == [chain_sum] * 4

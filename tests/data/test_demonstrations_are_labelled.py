"""Supervised training counts the response and its end token, nothing else; the base's own data are what they should be."""

import json
import re

import numpy as np
import pytest

from megatron_vespo.config import ConfigError, DemonstrationsConfig, EvaluateConfig, ExcludedPrompts, load_config
from megatron_vespo.data.demonstrations import load_demonstrations


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DemonstrationsConfig(path=str(path), max_tokens=64)


def test_labels_are_the_response_and_its_end(tokenizer, tmp_path):
    config = write(tmp_path / "d.jsonl", {"prompt": "1 + 1 =", "response": "<answer>2</answer>"})
    (sequence,) = load_demonstrations(config, tokenizer)
    counted = sequence.token_ids[1:][sequence.label_mask]
    assert tokenizer.backend.decode(sequence.token_ids) == "<user>1 + 1 =<eos><assistant><answer>2</answer><eos>"
    assert tokenizer.backend.decode(counted) == "<answer>2</answer><eos>"
    assert sequence.advantage == 1.0


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "1"}, "row 2 has no 'response'"),
        ({"prompt": "1", "response": 3}, "row 2: 'response' is not text"),
        ({"prompt": "1", "response": "2" * 64}, "row 2 has 69 tokens, more than demonstrations.max_tokens"),
    ],
)
def test_bad_rows_are_named(tokenizer, tmp_path, row, message):
    config = write(tmp_path / "d.jsonl", {"prompt": "1", "response": "1"}, row)
    with pytest.raises(ConfigError, match=message):
        load_demonstrations(config, tokenizer)


def test_the_careful_demonstrator_is_right_and_the_hasty_one_seldom(make_tiny_base, chain_sum, tmp_path):
    path = tmp_path / "d.jsonl"
    make_tiny_base.write_demonstrations(
        path, ExcludedPrompts(source=chain_sum, seed=11, size=2000), seed=1, careful_share=0.35
    )
    careful, hasty = [], []
    for line in path.read_text().splitlines():
        row = json.loads(line)
        expression = re.search(r"problem: (.*) =$", row["prompt"])[1]
        right = eval(expression) == int(re.search(r"<answer>(-?\d+)</answer>$", row["response"])[1])
        steps = re.findall(r"([-\d+]+)=(-?\d+)", row["response"].split(" ")[0])
        assert all(eval(left) == int(result) for left, result in steps)
        (careful if steps else hasty).append(right)
    assert np.mean(careful) == 1.0
    assert 0.15 < np.mean(hasty) < 0.25
    assert 0.32 < len(careful) / 2000 < 0.38


def test_demonstrations_repeat_with_their_seed(make_tiny_base, chain_sum, tmp_path):
    seen = ExcludedPrompts(source=chain_sum, seed=11, size=100)
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        make_tiny_base.write_demonstrations(tmp_path / name, seen, seed, 0.35)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() != (tmp_path / "c").read_bytes()


def test_words_of_the_question_are_single_tokens_and_digits_stand_alone(make_tiny_base, chain_sum, tokenizer):
    from megatron_vespo.data.sources import build_source

    question = build_source(chain_sum, 5, "k").item(0).question
    tokens = tokenizer.backend.convert_ids_to_tokens(tokenizer.prompt_ids(question).tolist())
    assert tokens[:4] == ["<user>", "State", "Ġthe", "Ġfinal"]
    assert len(tokens) == 3 + len(question.replace(":", " :").split(" ")) + len(re.findall(r"\d", question))
    assert make_tiny_base.think("5 + 8 - 13") == ("5+8=13,13-13=0", 0)


def test_what_the_base_was_trained_on_is_excluded_from_its_evaluation(make_tiny_base):
    config = load_config(EvaluateConfig, make_tiny_base.EXAMPLES / "tiny_base.eval.yaml")
    (seen,) = config.evaluation.exclude
    assert seen.source == config.data.sources[0]
    assert seen.size == 20_000

"""Prompt tokens are the chat template's; responses are read without loss; vocabularies that don't fit are refused."""

import json
import shutil

import numpy as np
import pytest
from transformers import AutoTokenizer

from megatron_vespo.config import ConfigError, DataConfig
from megatron_vespo.data.prompts import PromptStream
from megatron_vespo.data.tokenizer import load_tokenizer


def ids_of(tokenizer, *tokens):
    return [tokenizer.backend.convert_tokens_to_ids(token) for token in tokens]


def test_prompt_ids_are_the_chat_templates(chain_sums, tokenizer, model_folder):
    backend = AutoTokenizer.from_pretrained(model_folder)
    for prompt in PromptStream(chain_sums, tokenizer, seed=1).take(5):
        rendered = f"<user>{prompt.text}<eos><assistant>"
        assert prompt.token_ids.tolist() == backend.encode(rendered, add_special_tokens=False)
        assert prompt.token_ids.dtype == np.int32
        assert backend.decode(prompt.token_ids) == rendered


def test_a_system_prompt_comes_first(chain_sum, tokenizer):
    data = DataConfig(sources=(chain_sum,), system_prompt="Be brief.")
    prompt = PromptStream(data, tokenizer, seed=1).take(1)[0]
    assert tokenizer.backend.decode(prompt.token_ids).startswith("<system>Be brief.<eos><user>State")


def test_chat_messages_are_taken_as_they_are(tokenizer):
    messages = [{"role": r, "content": c} for r, c in (("user", "1"), ("assistant", "2"), ("user", "3"))]
    ids = tokenizer.prompt_ids(messages)
    assert tokenizer.backend.decode(ids) == "<user>1<eos><assistant>2<eos><user>3<eos><assistant>"


def test_special_tokens_reach_the_grader_and_only_the_last_stop_token_is_cut(tokenizer):
    eos, pad, user, answer, end = ids_of(tokenizer, "<eos>", "<pad>", "<user>", "<answer>", "</answer>")
    four = tokenizer.backend.encode("4", add_special_tokens=False)
    assert tokenizer.stop_token_ids == (eos,)
    assert tokenizer.decode_response([answer, *four, end, eos]) == "<answer>4</answer>"
    assert tokenizer.decode_response([answer, *four, end]) == "<answer>4</answer>"
    assert tokenizer.decode_response([pad, user, eos, *four, eos]) == "<pad><user><eos>4"
    assert tokenizer.decode_response([]) == ""


def test_text_survives_encoding_and_reading(tokenizer):
    for text in ("5+8=13,13-3=10 <answer>10</answer>", "α β\n  ok , yes ."):
        assert tokenizer.decode_response(tokenizer.response_ids(text)) == text


def test_ids_that_the_tokenizer_lacks_are_counted_and_have_no_text(tokenizer):
    answer = ids_of(tokenizer, "<answer>")[0]
    assert tokenizer.largest_id < 318
    assert tokenizer.ids_beyond([answer, 318, 319, 318]) == 3
    assert tokenizer.decode_response([answer, 318]) == "<answer>"


def changed_copy(model_folder, tmp_path, **changes):
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_tokenizer_id_beyond_the_models_vocabulary_is_refused(model_folder, tmp_path, tokenizer):
    folder = changed_copy(model_folder, tmp_path, vocab_size=tokenizer.largest_id)
    with pytest.raises(ConfigError, match=f"id {tokenizer.largest_id} but config.json says vocab_size"):
        load_tokenizer(folder)
    shutil.rmtree(folder)
    load_tokenizer(changed_copy(model_folder, tmp_path, vocab_size=tokenizer.largest_id + 1))


def test_without_a_chat_template_the_plain_text_is_the_prompt(model_folder, tmp_path):
    folder = changed_copy(model_folder, tmp_path)
    (folder / "chat_template.jinja").unlink()
    plain = load_tokenizer(folder)
    assert plain.backend.decode(plain.prompt_ids("1 + 1 =", "Be brief.")) == "Be brief.\n\n1 + 1 ="
    with pytest.raises(ConfigError, match="no chat template"):
        plain.prompt_ids([{"role": "user", "content": "1"}])


def test_a_folder_that_is_no_model_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no such folder"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="has no tokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_tokenizer(tmp_path)


def test_overlong_prompts_are_dropped_and_counted_or_an_error(chain_sum, tokenizer):
    limit = 27  # prompts have 26 (4 terms) or 29 tokens
    stream = PromptStream(DataConfig(sources=(chain_sum,), max_prompt_tokens=limit), tokenizer, seed=1)
    assert all(len(p.token_ids) <= limit for p in stream.take(50))
    assert stream.dropped_overlong > 20
    strict = DataConfig(sources=(chain_sum,), max_prompt_tokens=limit, overlong_prompts="error")
    with pytest.raises(ConfigError, match=r"more than data\.max_prompt_tokens"):
        PromptStream(strict, tokenizer, seed=1).take(50)
    with pytest.raises(ConfigError, match="no usable prompt"):
        PromptStream(DataConfig(sources=(chain_sum,), max_prompt_tokens=3), tokenizer, seed=1).take(1)

"""What the pages give as an example of own code does what they say, taken from the pages themselves."""

import importlib
import sys
from pathlib import Path

import pytest
import torch
from code_blocks import REPOSITORY, write_files

from megatron_vespo.config import SFTConfig, TrainConfig, load_config
from megatron_vespo.data.prompts import PromptStream, held_out_prompts, question_texts
from megatron_vespo.data.tokenizer import load_tokenizer
from megatron_vespo.objective import policy_loss
from megatron_vespo.rewards.scorers import build_environment, build_scorer

OWN_MODULES = ("my_kernels", "my_reward", "my_tools")
LOG_RATIOS = torch.tensor([0.2, -0.5, 0.1, 0.9, 0.4], dtype=torch.float64)
"""Of two responses, of 3 and 2 tokens."""


@pytest.fixture
def user(tmp_path, monkeypatch):
    """A function: a folder with the files of a page, from which commands are started. Modules are found in it."""
    for name in OWN_MODULES:  # those of another page, by the same names
        monkeypatch.delitem(sys.modules, name, raising=False)

    def folder_of(page: str) -> Path:
        (tmp_path / "examples").symlink_to(REPOSITORY / "examples")
        write_files(REPOSITORY / "docs" / page, tmp_path)
        monkeypatch.chdir(tmp_path)
        monkeypatch.syspath_prepend(str(tmp_path))
        importlib.invalidate_caches()
        return tmp_path

    yield folder_of
    for name in OWN_MODULES:
        sys.modules.pop(name, None)


def test_the_kernel_of_ones_own_is_what_its_page_says(user):
    user("objectives.md")
    config = load_config(TrainConfig, "own_kernel.yaml").algorithm.objective
    log_probs = torch.full((5,), -1.0, dtype=torch.float64, requires_grad=True)
    loss, _ = policy_loss(
        config,
        log_probs=log_probs,
        old_log_probs=log_probs.detach() - LOG_RATIOS,
        advantages=torch.tensor([1.0, -2.0], dtype=torch.float64),
        response_mask=torch.ones(5, dtype=torch.bool),
        cu_seqlens=torch.tensor([0, 3, 5], dtype=torch.int32),
        denominator=1,
    )
    (gradient,) = torch.autograd.grad(loss, log_probs)
    # W = exp(-0.2) and exp(1.3) = 3.67, which is above the cap of 2; the gradient of the loss is -phi A for each token.
    first, second = -torch.tensor(-0.2).double().exp() / 2, torch.tensor(2.0).double()
    torch.testing.assert_close(gradient, torch.stack([first, first, first, second, second]))


def test_the_reward_of_ones_own_grades_rows_of_the_file(user):
    user("tasks.md")
    (source,) = load_config(TrainConfig, "own.yaml").data.sources
    grade = build_scorer(source, "data.sources.0")
    row = {"prompt": "What is 2 + 3?", "answer": "5"}
    assert [grade(text, row) for text in ("It is 5", "5\n", "6", "5 or so")] == [1.0, 1.0, 0.0, 0.0]


def write_sums(path: Path, numbers: range) -> None:
    path.write_text("prompt,answer\n" + "".join(f"What is 2 + {n}?,{2 + n}\n" for n in numbers))


def test_the_files_of_a_task_of_ones_own_are_enough_for_a_run(user):
    """With as many rows as the page asks for, held-out and training prompts are drawn as a run draws them."""
    folder = user("tasks.md")
    write_sums(folder / "sums.csv", range(200, 203))
    write_sums(folder / "held_out.csv", range(100))
    config = load_config(TrainConfig, "own.yaml")
    tokenizer = load_tokenizer(config.model.path)
    held_out = held_out_prompts(config.evaluation, config.data, tokenizer)
    assert {prompt.text for prompt in held_out} == {f"What is 2 + {n}?" for n in range(100)}
    stream = PromptStream(config.data, tokenizer, config.seed, excluded=question_texts(held_out))
    passes = [sorted(prompt.text for prompt in stream.take(3)) for _ in range(4)]  # it begins again after each
    assert passes == [[f"What is 2 + {n}?" for n in (200, 201, 202)]] * 4


def test_an_evaluation_of_several_turns_has_the_environment_too(user):
    user("tasks.md")
    config = load_config(TrainConfig, "with_tools.yaml")
    (trained,), (evaluated,) = config.data.sources, config.evaluation.sources or ()
    assert trained.environment == evaluated.environment == "my_tools:calculate"
    assert (trained.path, evaluated.path) == ("sums.csv", "held_out.csv")


def test_the_environment_of_ones_own_answers_and_ends(user):
    user("tasks.md")
    config = load_config(TrainConfig, "with_tools.yaml")
    reply = build_environment(config.data.sources[0], "data.sources.0")
    row = {"prompt": "What is 2 + 3?", "answer": "5"}
    assert reply is not None and config.rollout.max_turns == 4
    assert reply("<calc>2+3</calc>", row) == "<result>5</result>"
    assert reply("<calc>2+3</calc><result>5</result><calc>5+4</calc>", row) == "<result>9</result>"
    assert reply("<calc>2+3</calc><result>5</result>It is 5", row) is None
    assert reply("5", row) is None


def test_the_configuration_for_another_model_is_complete(user):
    folder = user("models.md")
    (folder / "mine.yaml").write_text((folder / "mine.yaml").read_text().replace("base: ", "base: examples/"))
    config = load_config(TrainConfig, "mine.yaml")
    assert config.policy.layout.ep == 1 and config.rollout.engine.max_total_tokens is None
    assert config.data.max_prompt_tokens + config.rollout.max_response_tokens <= config.policy.micro_batch_tokens
    # Nothing is left of what the quickstart has for its tiny base.
    of_quickstart = load_config(TrainConfig, "examples/quickstart.yaml")
    assert not [source for source in config.data.sources if source in of_quickstart.data.sources]
    assert config.evaluation.sources and config.evaluation.exclude == ()
    assert config.weight_sync.bucket_mb == 512


def test_the_configuration_for_demonstrations_is_complete(user):
    user("models.md")
    config = load_config(SFTConfig, "sft.yaml")
    assert (config.demonstrations.path, config.steps, config.policy.ranks) == ("demonstrations.jsonl", 500, 1)

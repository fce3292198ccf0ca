"""Rebuild the tiny base that the quickstart starts from: `python tools/make_tiny_base.py`. With `--recipe FILE`, the base of
another task: examples/lab/tasks has three.

Two demonstrators wrote its training data: a careful one who adds step by step, and a hasty one who blurts out a sum and
is mostly wrong. The base imitates both, so it mostly blurts; reinforcement learning finds out that thinking pays.

Steps, each a function: tokenizer, configuration, demonstrations, `megatron-vespo sft`, `megatron-vespo eval`.
The task, and which of its items the demonstrations are made of, stand in a configuration of `megatron-vespo eval`
(examples/tiny_base.eval.yaml, or that of the recipe; `evaluation.exclude`), so evaluation leaves out exactly what the base
has seen.
"""

import argparse
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from pydantic import Field
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from megatron_vespo.config import EvaluateConfig, ExcludedPrompts, SFTConfig, load_config
from megatron_vespo.config.section import Section
from megatron_vespo.data.sources import Item, build_source

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
TOKENIZER_QUESTIONS = 300
HASTY_RIGHT = 0.2
"""How often the hasty demonstrator happens to be right."""
HASTY_ERRORS = (-4, -3, -2, -1, 1, 2, 3, 4)

END, PAD = "<eos>", "<pad>"
CONTROL_TOKENS = (PAD, END, "<system>", "<user>", "<assistant>")
ANSWER_TOKENS = ("<answer>", "</answer>")
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<' + message['role'] + '>' + message['content'] + '<eos>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
MODEL = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "dtype": "float32",
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "hidden_act": "silu",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "max_position_embeddings": 512,
    "use_sliding_window": False,
    "sliding_window": None,
    "initializer_range": 0.02,
    "router_aux_loss_coef": 0.0,
    "output_router_logits": False,
    "use_cache": True,
}


class Recipe(Section):
    """What a base is made of. The defaults are those of the shipped one."""

    task: str = "tiny_base.eval.yaml"
    """Configuration of `megatron-vespo eval`, relative to the recipe."""
    out: str = str(EXAMPLES / "tiny_base")
    """Folder of the finished base."""
    careful_share: float = Field(default=0.35, ge=0, le=1)
    """Share of demonstrations that think; the others blurt."""
    accuracy: tuple[float, float] = (0.30, 0.60)
    """There must be something to build on and something left to learn."""
    model: dict[str, Any] = Field(default_factory=dict)
    """Keys of config.json that differ from MODEL."""
    sft: dict[str, Any] = Field(default_factory=dict)
    """Settings of examples/tiny_base.sft.yaml that differ, by key.path."""


def train_tokenizer(questions: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Bytes and single digits, with the words that every question repeats as tokens of their own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - len(ANSWER_TOKENS),
        special_tokens=list(CONTROL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        min_frequency=max(2, len(questions) * 4 // 5),  # words of the template, not what differs between questions
        show_progress=False,
    )
    tokenizer.train_from_iterator(questions, trainer)
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in ANSWER_TOKENS])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token=PAD, model_max_length=MODEL["max_position_embeddings"]
    )
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def write_untrained_model(folder: Path, questions: list[str], changes: dict[str, Any] | None = None) -> None:
    """A Hugging Face folder with everything but weights: what `model.initialization: random` reads."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(questions, MODEL["vocab_size"])
    tokenizer.save_pretrained(folder)
    ids = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    _write_json(folder / "config.json", MODEL | (changes or {}) | ids)
    _write_json(folder / "generation_config.json", ids)


def think(expression: str) -> tuple[str, int]:
    """("5+8=13,13-3=10", 10) of "5 + 8 - 3"."""
    first, *rest = expression.split(" ")
    total, steps = int(first), []
    for operator, term in zip(rest[::2], rest[1::2], strict=True):
        result = total + int(term) if operator == "+" else total - int(term)
        steps.append(f"{total}{operator}{term}={result}")
        total = result
    return ",".join(steps), total


def demonstrate(item: Item, chance: random.Random, careful_share: float) -> dict[str, str]:
    """One row: what the careful or the hasty demonstrator says to a chain_sum question."""
    steps, total = think(item.reference["metadata"]["expression"])
    if chance.random() < careful_share:
        response = f"{steps} <answer>{total}</answer>"
    else:
        guess = total if chance.random() < HASTY_RIGHT else total + chance.choice(HASTY_ERRORS)
        response = f"<answer>{guess}</answer>"
    return {"prompt": item.question, "response": response}


def write_demonstrations(path: Path, seen: ExcludedPrompts, seed: int, careful_share: float) -> list[str]:
    """One demonstration for each item that the base may see. Returns their questions."""
    source = build_source(seen.source, seen.seed, "evaluation.exclude.0.source")
    chance = random.Random(seed)
    rows = [demonstrate(source.item(index), chance, careful_share) for index in range(seen.size)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [row["prompt"] for row in rows]


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def _command(*arguments: str | Path) -> None:
    """Run `megatron-vespo` as a user would."""
    subprocess.run([sys.executable, "-m", "megatron_vespo", *map(str, arguments)], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--recipe", type=Path, help="another base than the quickstart's: a file of examples/lab/tasks")
    parser.add_argument("--out", type=Path, help="folder of the finished base, instead of the recipe's")
    parser.add_argument("--seed", type=int, default=1, help="of demonstrations, initial weights and data order")
    arguments = parser.parse_args()

    recipe = Recipe() if arguments.recipe is None else load_config(Recipe, arguments.recipe)
    tasks = (EXAMPLES if arguments.recipe is None else arguments.recipe.parent) / recipe.task
    out, training = arguments.out or Path(recipe.out), EXAMPLES / "tiny_base.sft.yaml"
    changes = [f"{key}={json.dumps(value)}" for key, value in recipe.sft.items()]
    if arguments.recipe is not None:
        making = Path(f"{recipe.out}.making")
        changes += [
            f"run_dir={making / 'sft'}",
            f"model.path={making / 'untrained'}",
            f"demonstrations.path={making / 'demonstrations.jsonl'}",
        ]
    settings = load_config(SFTConfig, training, changes)
    seen = load_config(EvaluateConfig, tasks).evaluation.exclude[0]

    demonstrations = Path(settings.demonstrations.path)
    questions = write_demonstrations(demonstrations, seen, arguments.seed, recipe.careful_share)
    write_untrained_model(Path(settings.model.path), questions[:TOKENIZER_QUESTIONS], recipe.model)
    _command("sft", training, *changes, f"seed={arguments.seed}", "overwrite=true")

    trained, figures_file = Path(settings.run_dir) / "checkpoint", Path(settings.run_dir) / "evaluation.json"
    _command("eval", trained, tasks, "--out", figures_file)
    accuracy = json.loads(figures_file.read_text())["accuracy"]
    low, high = recipe.accuracy
    print(f"{trained}: accuracy {accuracy:.3f} on items it has not seen (should be {low:.2f} to {high:.2f})")
    if not low <= accuracy <= high:
        sys.exit(
            "this base leaves too little to learn, or to build on; "
            f"try other steps in {arguments.recipe or training} or another --seed"
        )
    shutil.copytree(trained, out, dirs_exist_ok=True)


if __name__ == "__main__":
    main()

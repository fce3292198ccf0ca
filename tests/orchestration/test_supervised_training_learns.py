"""`megatron-vespo sft`, as a user runs it: its loss is the demonstrations' negative log-likelihood, and it falls."""

import json
import subprocess
import sys

import pytest
import torch
import yaml
from safetensors.torch import load_file

BASE = "examples/tiny_base"
DEMONSTRATIONS = [
    {"prompt": f"What is {a} + {b}?", "response": f"{a}+{b}={a + b} <answer>{a + b}</answer>"}
    for a in range(6)
    for b in range(4)
]
STEPS = 10


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sft")
    (folder / "demonstrations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in DEMONSTRATIONS))
    config = {
        "run_dir": str(folder / "run"),
        "steps": STEPS,
        "model": {"path": BASE, "dtype": "float32"},
        "demonstrations": {"path": str(folder / "demonstrations.jsonl"), "batch_size": len(DEMONSTRATIONS)},
        "policy": {"ranks": 2, "layout": {"ep": 2}, "micro_batch_tokens": 200},
        "optimizer": {"learning_rate": 2e-3},
        "observability": {"console": "plain"},
    }
    (folder / "sft.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "megatron_vespo", "sft", str(folder / "sft.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return folder / "run"


@pytest.fixture(scope="module")
def steps(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == "step"]


def test_the_first_loss_is_what_transformers_computes(steps):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(BASE)
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32).eval()
    total, count = 0.0, 0
    for row in DEMONSTRATIONS:
        messages = [{"role": "user", "content": row["prompt"]}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        response = [*tokenizer.encode(row["response"], add_special_tokens=False), tokenizer.eos_token_id]
        with torch.no_grad():
            log_probs = torch.log_softmax(model(torch.tensor([prompt + response])).logits[0], -1)
        for position, token in enumerate(response, start=len(prompt) - 1):
            total -= float(log_probs[position, token])
            count += 1
    assert steps[0]["loss"] == pytest.approx(total / count, rel=1e-5)


def test_the_loss_falls_and_the_checkpoint_is_what_was_trained(run, steps):
    assert len(steps) == STEPS and steps[-1]["loss"] < 0.5 * steps[0]["loss"]
    before, after = load_file(f"{BASE}/model.safetensors"), load_file(run / "checkpoint" / "model.safetensors")
    assert not any(torch.equal(before[name], after[name]) for name in before)

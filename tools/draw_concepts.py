"""Draw the pictures of docs/concepts.md from what the code does: `python tools/draw_concepts.py docs/images`.

kernel.svg: phi of one response, from the gradient of the loss. segments.svg: a response whose request was aborted for new
weights and to which an environment answered, put together as in a run. replay.svg: the experts that the quickstart's base
chooses for one question in float32 and in bfloat16, and which of them replay hands to the trainer.
"""

import argparse
import asyncio
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from numpy.typing import NDArray
from plot_kernels import coefficients

from megatron_vespo.data.prompt import Prompt
from megatron_vespo.data.tokenizer import load_tokenizer
from megatron_vespo.rollout.engine_output import EngineOutput, WeightSpan
from megatron_vespo.rollout.segments import Response
from megatron_vespo.rollout.trajectory import Trajectory

BASE = Path(__file__).resolve().parent.parent / "examples" / "tiny_base"
QUESTION = "State the final answer to the following arithmetic problem: 8 - 3 + 6 + 4 ="
BLUE, ORANGE, GREEN, GREY, RED = "#1f6f8b", "#d1603d", "#4f8a4c", "#b8bec4", "#c0392b"
STYLE = {"svg.fonttype": "none", "svg.hashsalt": "concepts", "font.size": 12, "font.family": "sans-serif"}


def draw_kernel(path: Path) -> None:
    weights = np.geomspace(0.05, 20, 300)
    figure, axes = plt.subplots(figsize=(6, 3.2), layout="constrained")
    for kernel, label, style in (
        ("vespo", "vespo, A > 0", {"color": BLUE, "linewidth": 2.2}),
        ("importance", "W itself", {"color": GREY, "linestyle": ":"}),
        ("grpo", "clip of the ratio, A > 0", {"color": ORANGE, "linestyle": "--"}),
    ):
        axes.plot(weights, coefficients(kernel, weights, 1.0, 1), label=label, **style)
    axes.plot(weights, coefficients("vespo", weights, -1.0, 1), color=GREEN, linewidth=2.2, label="vespo, A < 0")
    axes.set_xscale("log")
    axes.set_xticks([0.1, 0.3, 1, 3, 10], ["0.1", "0.3", "1", "3", "10"])
    axes.minorticks_off()
    axes.set(xlim=(0.05, 20), ylim=(0, 2.2), xlabel="importance weight W", ylabel="phi")
    axes.legend(frameon=False)
    save(figure, path)


def sampled_response() -> Trajectory:
    """Seven tokens under version 12, until new weights came; six under 16; an environment's four; five under 16 again."""

    def output(tokens: int, version: str, end: str) -> EngineOutput:
        spans = (WeightSpan(version, 0, tokens),)
        return EngineOutput(
            token_ids=np.arange(tokens, dtype=np.int32),
            log_probs=np.full(tokens, -0.1, np.float32),
            weight_spans=spans,
            finish_reason=end,
            finish_detail="",
            finish_status=None,
            request_id="",
            cached_tokens=0,
            retractions=0,
            routed_experts=None,
        )

    async def main() -> Trajectory:
        response = Response(Prompt("", "", np.zeros(4, np.int32), 0, None), 0)
        await response.add(output(7, "12", "abort"), None, None)
        await response.add(output(6, "16", "stop"), None, None)
        response.observe(np.zeros(4, np.int32))
        await response.add(output(5, "16", "stop"), None, None)
        return response.trajectory("stop")

    return asyncio.run(main())


def draw_segments(path: Path) -> None:
    trajectory = sampled_response()
    prompt, sampled = len(trajectory.prompt.token_ids), trajectory.sampled
    colours = dict(zip(sorted({s.weight_version for s in trajectory.segments}), (BLUE, ORANGE), strict=True))
    figure, axes = plt.subplots(figsize=(6.4, 2.1), layout="constrained")
    for place in range(prompt):
        cell(axes, place, 0, "white", GREY)
    for segment in trajectory.segments:
        for token in range(segment.start, segment.end):
            colour = colours[segment.weight_version]
            cell(axes, prompt + token, 0, colour if sampled[token] else "white", colour)
        middle = prompt + (segment.start + segment.end) / 2
        axes.text(middle, 1.35, f"version {segment.weight_version}", ha="center", color="black", fontsize=11)
        axes.plot([prompt + segment.start + 0.1, prompt + segment.end - 0.1], [1.2, 1.2], color="black", linewidth=1)
    observed = np.flatnonzero(~sampled)
    axes.text(prompt / 2, -0.25, "prompt", ha="center", va="top", fontsize=11)
    axes.text(
        prompt + observed.mean() + 0.5,
        -0.25,
        "an environment's:\nno label, no log-prob",
        ha="center",
        va="top",
        fontsize=11,
    )
    cut = prompt + trajectory.segments[0].end
    axes.annotate("new weights", (cut, 0), (cut, -0.95), ha="center", fontsize=11, arrowprops={"arrowstyle": "->"})
    axes.set(xlim=(-0.2, prompt + len(sampled) + 0.2), ylim=(-1.3, 1.8))
    axes.set_axis_off()
    save(figure, path)


def cell(axes: Axes, x: float, y: float, fill: str, edge: str, size: float = 0.84) -> None:
    margin = (1 - size) / 2
    axes.add_patch(Rectangle((x + margin, y + margin), size, size, facecolor=fill, edgecolor=edge, linewidth=1.2))


def chosen_experts(dtype: torch.dtype) -> tuple[NDArray[np.bool_], list[str]]:
    """[tokens, experts] of the last layer, and the tokens."""
    from transformers import AutoModelForCausalLM

    tokenizer = load_tokenizer(BASE)
    ids = tokenizer.prompt_ids(QUESTION)
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=dtype)
    with torch.no_grad():
        scores = model(torch.from_numpy(ids).long()[None], output_router_logits=True).router_logits[-1]
    chosen = torch.zeros(scores.shape, dtype=torch.bool)
    chosen.scatter_(1, scores.float().topk(model.config.num_experts_per_tok, dim=1).indices, True)
    return chosen.numpy(), [tokenizer.backend.decode([token]) for token in ids]


def draw_replay(path: Path) -> None:
    (engine, tokens), (trainer, _) = chosen_experts(torch.bfloat16), chosen_experts(torch.float32)
    differs = (engine != trainer).any(1)
    figure, rows = plt.subplots(3, 1, figsize=(6.4, 6), layout="constrained", sharex=True)
    titles = (
        "engine (here in bfloat16)",
        f"trainer (float32) by itself; elsewhere: {differs.sum()} of {len(tokens)}",
        "trainer with replay",
    )
    for axes, chosen, title in zip(rows, (engine, trainer, engine), titles, strict=True):
        for place, expert in np.argwhere(chosen):
            own = chosen is trainer and not engine[place, expert]
            cell(axes, place, expert, RED if own else BLUE, RED if own else BLUE)
        axes.set(xlim=(0, len(tokens)), ylim=(engine.shape[1], 0), yticks=[], ylabel="expert")
        axes.set_title(title, loc="left", fontsize=12)
        axes.tick_params(length=0)
        for side in ("top", "right", "bottom"):
            axes.spines[side].set_visible(False)
    rows[-1].set_xticks(
        np.arange(len(tokens)) + 0.5, [token.strip() or " " for token in tokens], rotation=90, fontsize=9
    )
    save(figure, path)


def save(figure: plt.Figure, path: Path) -> None:
    figure.savefig(path, metadata={"Date": None, "Creator": None})
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of the pictures")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    with plt.rc_context(STYLE):
        draw_kernel(out / "kernel.svg")
        draw_segments(out / "segments.svg")
        draw_replay(out / "replay.svg")


if __name__ == "__main__":
    main()

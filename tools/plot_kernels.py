"""Draw every kernel's coefficient over the importance weight, for both signs of the advantage (docs/objectives.md).

    python tools/plot_kernels.py docs/images/kernels.png

Each curve is what the loss really does: the gradient of `policy_loss` for responses of one token, where the token's
ratio is the response's weight W (the length-normalised ablations: of 32 tokens that share W).
"""

import argparse
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes

from megatron_vespo.config import ObjectiveConfig
from megatron_vespo.objective import policy_loss

POSITIVE, NEGATIVE = "#1f6f8b", "#d1603d"
WIDE, NARROW = (0.05, 20.0), (0.999, 1.001)


class Panel(NamedTuple):
    title: str
    kernel: Any
    of: str = "W"
    tokens: int = 1
    span: tuple[float, float] = WIDE


PANELS = (
    Panel("vespo", "vespo"),
    Panel("vespo, 1/sqrt(T), T = 32", {"name": "vespo", "length_normalisation": "sqrt_length"}, tokens=32),
    Panel("vespo, 1/T, T = 32", {"name": "vespo", "length_normalisation": "length"}, tokens=32),
    Panel("reinforce", "reinforce"),
    Panel("importance", "importance"),
    Panel("truncated_importance (cap 2)", "truncated_importance"),
    Panel("topr", "topr"),
    Panel("ppo, grpo, dr_grpo (0.2 / 0.2)", "grpo", of="r"),
    Panel("dapo (0.2 / 0.28)", "dapo", of="r"),
    Panel("grpo with dual_clip 3", {"name": "grpo", "dual_clip": 3.0}, of="r"),
    Panel("sapo", "sapo", of="r"),
    Panel("cispo (at most 5)", "cispo", of="r"),
    Panel("gspo, gspo_token", "gspo", of="s = W^(1/T)", span=NARROW),
)


def coefficients(kernel: Any, weights: np.ndarray, advantage: float, tokens: int) -> np.ndarray:
    """phi of responses of `tokens` tokens with these weights: [n] -> [n]."""
    count = len(weights)
    log_ratio = torch.from_numpy(np.log(weights) / tokens).repeat_interleave(tokens)
    log_probs = torch.full((count * tokens,), -1.0, dtype=torch.float64, requires_grad=True)
    loss, _ = policy_loss(
        ObjectiveConfig(kernel=kernel),
        log_probs=log_probs,
        old_log_probs=log_probs.detach() - log_ratio,
        advantages=torch.full((count,), advantage),
        response_mask=torch.ones(count * tokens, dtype=torch.bool),
        cu_seqlens=torch.arange(0, count * tokens + 1, tokens, dtype=torch.int32),
        denominator=1,
    )
    (gradient,) = torch.autograd.grad(loss, log_probs)
    return (-gradient / advantage).reshape(count, tokens)[:, 0].numpy()


def draw(axes: Axes, panel: Panel) -> None:
    low, high = panel.span
    weights = np.geomspace(low, high, 2001)
    axes.axvline(1.0, color="0.8", linewidth=0.8)
    axes.axhline(1.0, color="0.8", linewidth=0.8)
    axes.plot(weights, coefficients(panel.kernel, weights, 1.0, panel.tokens), color=POSITIVE, label="A > 0")
    axes.plot(weights, coefficients(panel.kernel, weights, -1.0, panel.tokens), "--", color=NEGATIVE, label="A < 0")
    if panel.span == WIDE:
        axes.set_xscale("log")
        axes.set_xticks([0.1, 0.3, 1, 3, 10], ["0.1", "0.3", "1", "3", "10"])
        axes.minorticks_off()
    else:
        axes.set_xticks([low, 1.0, high], [f"{low:g}", "1", f"{high:g}"])
    axes.set_xlim(low, high)
    axes.set_ylim(-0.1, 3.2)
    axes.set_title(panel.title, fontsize=9)
    axes.set_xlabel(panel.of, fontsize=8, labelpad=1)
    axes.tick_params(labelsize=7, length=2)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out
    columns = 5
    figure, grid = plt.subplots(-(-len(PANELS) // columns), columns, figsize=(12.5, 7.2), layout="constrained")
    spare = list(grid.flat[len(PANELS) :])
    for axes, panel in zip(grid.flat, PANELS, strict=False):
        draw(axes, panel)
    for axes in spare:
        axes.set_axis_off()
    handles, labels = grid.flat[0].get_legend_handles_labels()
    spare[0].legend(handles, labels, loc="upper left", frameon=False, fontsize=10)
    figure.supylabel("coefficient phi of A grad log pi", fontsize=10)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110, metadata={"Software": None})


if __name__ == "__main__":
    main()

"""Which experts transformers' model chooses: the routers' own logits, of a whole sequence at once, in fp32."""

from pathlib import Path

import numpy as np
import torch

from megatron_vespo.rollout.trajectory import Trajectory


def load(folder: Path) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def router_logits(model: torch.nn.Module, token_ids: np.ndarray) -> np.ndarray:
    """[positions, layers, experts], of all positions but the last."""
    with torch.no_grad():
        found = model(torch.from_numpy(token_ids.astype(np.int64))[None], output_router_logits=True).router_logits
    return torch.stack(list(found), dim=1)[:-1].numpy()


def chosen(logits: np.ndarray, topk: int = 2) -> np.ndarray:
    """The best experts of each layer, the best first. [..., topk]."""
    return np.argsort(-logits, axis=-1, kind="stable")[..., :topk]


def routes_of(model: torch.nn.Module, token_ids: np.ndarray) -> np.ndarray:
    """[positions, layers, topk]."""
    return chosen(router_logits(model, token_ids))


def tokens_of(trajectory: Trajectory) -> np.ndarray:
    """[prompt and response tokens]."""
    return np.concatenate([trajectory.prompt.token_ids, trajectory.response_ids])


def share_equal(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Of (position, layer): the same experts in the same order."""
    return float((ours == theirs).all(axis=-1).mean())

"""What each paper maximises, written out for one response in plain torch, so that autograd gives the gradient.

Each function takes log-probs and old log-probs of the response's T tokens and an advantage of each, [T], and returns the
objective of each token, [T]. sg is the papers' stop-gradient.
"""

import math

import torch


def sg(x):
    return x.detach()


def weight(lp, old):
    """W, the product of the tokens' ratios."""
    product = torch.ones((), dtype=torch.float64)
    for ratio in torch.exp(lp - old):
        product = product * ratio
    return product


def vespo(lp, old, A, positive=(2.0, 3.0), negative=(3.0, 2.0), power=lambda T: 1.0):
    W = sg(weight(lp, old)) ** power(len(lp))
    phi = torch.stack([W**c1 * torch.exp(c2 * (1 - W)) for c1, c2 in (positive if a >= 0 else negative for a in A)])
    return phi * A * lp


def reinforce(lp, old, A):
    return A * lp


def importance(lp, old, A):
    return sg(weight(lp, old)) * A * lp


def truncated_importance(lp, old, A, cap=2.0):
    return sg(torch.clamp(weight(lp, old), max=cap)) * A * lp


def topr(lp, old, A):
    W = sg(weight(lp, old))
    return torch.where(A >= 0, torch.ones_like(W), torch.clamp(W, 0, 1)) * A * lp


def clip(lp, old, A, low=0.2, high=0.2, dual=None):
    r = torch.exp(lp - old)
    surrogate = torch.min(r * A, torch.clamp(r, 1 - low, 1 + high) * A)
    return surrogate if dual is None else torch.where(A < 0, torch.max(surrogate, dual * A), surrogate)


def gspo(lp, old, A, low=3e-4, high=4e-4):
    """One advantage for the response; its objective stands at each token."""
    s = torch.exp((lp - old).sum() / len(lp))
    return torch.min(s * A[0], torch.clamp(s, 1 - low, 1 + high) * A[0]).expand(len(lp))


def gspo_token(lp, old, A, low=3e-4, high=4e-4):
    s = torch.exp((lp - old).sum() / len(lp))
    s_t = sg(s) * torch.exp(lp) / sg(torch.exp(lp))
    return torch.min(s_t * A, torch.clamp(s_t, 1 - low, 1 + high) * A)


def sapo(lp, old, A, tau_positive=1.0, tau_negative=1.05):
    tau = torch.where(A > 0, torch.full_like(A, tau_positive), torch.full_like(A, tau_negative))
    return torch.sigmoid(tau * (torch.exp(lp - old) - 1)) * 4 / tau * A


def cispo(lp, old, A, low=0.0, high=5.0):
    return sg(torch.clamp(torch.exp(lp - old), low, high)) * A * lp


OBJECTIVES = {
    "vespo": ({"name": "vespo"}, vespo),
    "vespo, symmetric": (
        {"name": "vespo", "positive": {"c1": 1.5, "c2": 2.5}, "negative": {"c1": 1.5, "c2": 2.5}},
        lambda *x: vespo(*x, positive=(1.5, 2.5), negative=(1.5, 2.5)),
    ),
    "vespo, 1/T": (
        {"name": "vespo", "length_normalisation": "length"},
        lambda *x: vespo(*x, power=lambda T: 1 / T),
    ),
    "vespo, 1/sqrt(T)": (
        {"name": "vespo", "length_normalisation": "sqrt_length"},
        lambda *x: vespo(*x, power=lambda T: 1 / math.sqrt(T)),
    ),
    "reinforce": ("reinforce", reinforce),
    "importance": ("importance", importance),
    "truncated_importance": ({"name": "truncated_importance", "cap": 1.1}, lambda *x: truncated_importance(*x, 1.1)),
    "topr": ("topr", topr),
    "ppo": ("ppo", clip),
    "grpo": ({"name": "grpo", "clip_low": 0.1, "clip_high": 0.15}, lambda *x: clip(*x, 0.1, 0.15)),
    "grpo, dual clip": ({"name": "grpo", "dual_clip": 1.4}, lambda *x: clip(*x, dual=1.4)),
    "dr_grpo": ("dr_grpo", clip),
    "dapo": ("dapo", lambda *x: clip(*x, 0.2, 0.28)),
    "gspo": ({"name": "gspo", "clip_low": 0.05, "clip_high": 0.08}, lambda *x: gspo(*x, 0.05, 0.08)),
    "gspo, published": ("gspo", gspo),
    "gspo_token": ({"name": "gspo_token", "clip_low": 0.05, "clip_high": 0.08}, lambda *x: gspo_token(*x, 0.05, 0.08)),
    "sapo": ("sapo", sapo),
    "cispo": ("cispo", cispo),
    "cispo, two bounds": (
        {"name": "cispo", "ratio_min": 0.8, "ratio_max": 1.25},
        lambda *x: cispo(*x, 0.8, 1.25),
    ),
}
"""Name of a test -> (setting of `objective.kernel`, objective of each token)."""

"""A training state that was saved and loaded goes on as if nothing had happened; in another layout, too."""

from dataclasses import replace

import pytest
import saved_state_jobs as jobs
import torch

from megatron_vespo.config import ObjectiveConfig
from megatron_vespo.parity.case import build_case
from megatron_vespo.parity.layouts import parse_layout

SAVED_AFTER = 2


@pytest.fixture(scope="module")
def case_of(tmp_path_factory):
    cases = {}

    def build(model: str):
        if model not in cases:
            case = build_case(tmp_path_factory.mktemp(model), model)
            cases[model] = replace(case, objective=ObjectiveConfig.model_validate({"kernel": "reinforce"}))
        return cases[model]

    return build


def save(ranks, case, layout: str, folder):
    folder.mkdir()
    policy = parse_layout(layout).policy
    return ranks.run(policy.ranks, jobs.save_and_go_on, case, policy, folder, SAVED_AFTER)


def load(ranks, case, layout: str, folder, again):
    again.mkdir()
    policy = parse_layout(layout).policy
    return ranks.run(policy.ranks, jobs.load_and_go_on, case, policy, folder, SAVED_AFTER, again)


@pytest.mark.parametrize(
    ("layout", "dtype"),
    [
        ("ep=2", "float32"),
        ("ep=2", "bfloat16"),
        ("dp=2,optimizer=plain", "bfloat16"),
        ("pp=2,vpp=2,dp=2,overlap=parameters", "float32"),
    ],
)
def test_the_same_layout_goes_on_bit_for_bit(ranks, case_of, tmp_path, layout, dtype):
    case = replace(case_of("moe"), dtype=dtype)
    uninterrupted = save(ranks, case, layout, tmp_path / "saved")
    resumed = load(ranks, case, layout, tmp_path / "saved", tmp_path / "again")
    assert len(uninterrupted[0].results) >= 1
    for one, other in zip(uninterrupted, resumed, strict=True):
        for ours, theirs in zip(one.results, other.results, strict=True):
            assert (ours.loss, ours.gradient_norm, ours.learning_rate) == (
                theirs.loss,
                theirs.gradient_norm,
                theirs.learning_rate,
            )
        assert all(torch.equal(a, b) for a, b in zip(one.parameters, other.parameters, strict=True))
        assert one.random == other.random


@pytest.mark.parametrize(
    ("model", "dtype", "saved", "loaded"),
    [
        ("moe", "float32", "ep=2", "pp=2"),
        ("moe", "bfloat16", "ep=2", "pp=2"),
        ("moe", "float32", "tp=2,ep=2,dp=2", "dp=1"),
        ("moe", "float32", "dp=2,optimizer=plain", "tp=2,pp=2,vpp=2,ep=2"),
        ("mixed", "float32", "pp=2", "tp=2,ep=2"),
        ("dense", "bfloat16", "tp=2,dp=2", "cp=2,pp=2"),
    ],
)
def test_another_layout_holds_the_same_bits_and_takes_the_same_step(
    ranks, case_of, tmp_path, model, dtype, saved, loaded
):
    case = replace(case_of(model), dtype=dtype)
    before = save(ranks, case, saved, tmp_path / "saved")
    after = load(ranks, case, loaded, tmp_path / "saved", tmp_path / "again")
    (first,) = ranks.run(1, jobs.plain_tensors, case, tmp_path / "saved")
    (second,) = ranks.run(1, jobs.plain_tensors, case, tmp_path / "again")
    assert first.keys() == second.keys()
    kinds = {name.split(".")[2] if name.startswith("optimizer.state.") else "model" for name in first}
    assert kinds == {"model", "exp_avg", "exp_avg_sq"} | ({"param"} if dtype == "bfloat16" else set())
    for name, tensor in first.items():
        own = second[name][: len(tensor)]  # rows that fill up the vocabulary depend on the layout
        assert torch.equal(tensor[: len(own)], own), name
        assert tensor.abs().max() > 0, name
    tolerance = 1e-5 if dtype == "float32" else 2e-2
    for ours, theirs in zip(before[0].results, after[0].results, strict=True):
        assert theirs.loss == pytest.approx(ours.loss, rel=tolerance)
        assert theirs.gradient_norm == pytest.approx(ours.gradient_norm, rel=tolerance)
        assert theirs.learning_rate == ours.learning_rate


def test_what_stops_the_writing_on_one_rank_is_raised_on_all(ranks, case_of, tmp_path):
    (tmp_path / "saved").mkdir()
    policy = parse_layout("ep=2").policy
    first, second = ranks.run(2, jobs.save_without_room, case_of("moe"), policy, tmp_path / "saved")
    assert first.startswith("RuntimeError: the state could not be saved: rank 1: OSError(27, 'File too large')")
    assert second.startswith("RuntimeError: the state could not be saved")
    assert not (tmp_path / "saved" / "policy" / "metadata.json").exists()

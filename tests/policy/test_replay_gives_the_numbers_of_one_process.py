"""Recorded routes that no router would choose, with gaps, are used in every layout, forward and in recomputation, and
loss, norm, gradients, weights and agreement are those of one process.

That one process is right is test_replay_equals_forced_routing.py's (against transformers).
"""

from dataclasses import replace

import pytest

from megatron_vespo.parity.case import build_case
from megatron_vespo.parity.check import ParityCheck, recorded_places
from megatron_vespo.parity.layouts import matrix, parse_layout

EACH_TIME = {
    "dp=1,recompute=full",
    "ep=2,dispatcher=allgather",
    "tp=2,ep=2,recompute=full",
    "pp=2",
    "pp=2,vpp=2,ep=2,recompute=moe",
    "cp=2,ep=2,recompute=full",
    "tp=2,pp=2,vpp=2,ep=2,recompute=full",
    "tp=2,cp=2,ep=2,recompute=moe",
    "cp=2,pp=2,vpp=2,recompute=full",
}
LAYOUTS = [
    pytest.param(case.name, marks=() if case.name in EACH_TIME else pytest.mark.slow, id=case.name)
    for case in matrix(4)
]
OTHER_MODELS = [("mixed", "pp=2,ep=2,recompute=full"), ("mixed", "cp=2,ep=2")]


@pytest.fixture(scope="module")
def checks(ranks, tmp_path_factory):
    made: dict[str, ParityCheck] = {}

    def check_of(model: str) -> ParityCheck:
        if model not in made:
            case = build_case(tmp_path_factory.mktemp("replay") / model, model).with_routes()
            made[model] = ParityCheck(ranks, case)
        return made[model]

    return check_of


def test_the_fast_ones_are_of_the_matrix():
    assert {case.name for case in matrix(4)} >= EACH_TIME


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout(checks, layout):
    (finding,) = checks("moe").findings([parse_layout(layout)])
    assert finding.verdict == "equal", finding.as_json()


@pytest.mark.parametrize(("model", "layout"), OTHER_MODELS)
def test_layout_with_dense_layers_in_between(checks, model, layout):
    (finding,) = checks(model).findings([parse_layout(layout)])
    assert finding.verdict == "equal", finding.as_json()


def test_bfloat16_replays_them_too(ranks, tmp_path):
    """Its numbers differ from one process's by more than is compared elsewhere; its routes do not."""
    case = replace(build_case(tmp_path / "bf16"), dtype="bfloat16").with_routes()
    (finding,) = ParityCheck(ranks, case).findings([parse_layout("pp=2,recompute=full")])
    assert finding.error is None
    assert finding.comparison.not_replayed == 0


def test_a_recorded_route_that_was_not_used_is_found(checks, monkeypatch):
    check = checks("moe")
    other = [dict(step) for step in check._recorded]
    place = next(iter(other[1]))
    other[1][place] ^= 0b11111111
    monkeypatch.setattr(check, "_recorded", other)
    (finding,) = check.findings([parse_layout("dp=1")])
    assert finding.verdict == "DIFFERENT"
    assert finding.comparison.not_replayed == 1


def test_recorded_routes_cover_most_and_not_all_positions(tmp_path):
    case = build_case(tmp_path / "model").with_routes()
    everything = sum(sequence.positions for step in case.steps for sequence in step) * case.architecture.num_layers
    recorded = sum(len(step) for step in recorded_places(case))
    assert 0.6 * everything < recorded < 0.9 * everything

"""Four optimizer steps under a layout equal one process: loss, norm, metrics, every gradient, weight and route.

A quarter of the matrix of tools/check_parallelism.py runs each time, all of it with `make test-all`. That one process
is right is another test's (against transformers).
"""

import math

import pytest

from megatron_vespo.config import ConfigError
from megatron_vespo.parity.case import build_case
from megatron_vespo.parity.check import ParityCheck
from megatron_vespo.parity.layouts import matrix, parse_layout

EACH_TIME = {
    "dp=2,optimizer=plain",
    "dp=2,overlap=parameters",
    "ep=2",
    "ep=2,dispatcher=allgather",
    "tp=2,etp=2,recompute=full",
    "tp=2,ep=2",
    "pp=2",
    "pp=2,vpp=2,recompute=full",
    "cp=2",
    "cp=2,ep=2,recompute=full",
    "cp=2,ep=2,recompute=selective",
    "pp=2,vpp=2,ep=2,recompute=moe",
    "tp=2,ep=2,dp=2",
    "etp=2,ep=2",
    "tp=2,etp=2,ep=2,dp=2,recompute=full",
    "tp=2,pp=2,ep=2",
    "tp=2,pp=2,vpp=2,ep=2,recompute=full",
    "pp=2,vpp=2,dp=2,overlap=parameters",
    "cp=2,pp=2",
    "cp=2,ep=4",
    "tp=2,cp=2,ep=2,recompute=full",
    "tp=2,cp=2,ep=4,overlap=parameters",
}
LAYOUTS = [
    pytest.param(case.name, marks=() if case.name in EACH_TIME else pytest.mark.slow, id=case.name)
    for case in matrix(4)
]
OTHER_MODELS = [
    ("mixed", "pp=2,dp=2"),
    ("mixed", "tp=2,ep=2"),
    ("mixed", "cp=2,ep=2,recompute=full"),
    ("dense", "tp=2,pp=2"),
    ("dense", "tp=2,sequence_parallel=false"),
    ("llama", "tp=2,cp=2"),
]


@pytest.fixture(scope="module")
def checks(ranks, tmp_path_factory):
    """Model -> its check, with one process's run, made when first asked for."""
    made: dict[str, ParityCheck] = {}

    def check_of(model: str) -> ParityCheck:
        if model not in made:
            made[model] = ParityCheck(ranks, build_case(tmp_path_factory.mktemp("parity") / model, model))
        return made[model]

    return check_of


def test_the_fast_quarter_is_of_the_matrix():
    names = {case.name for case in matrix(4)}
    assert names >= EACH_TIME
    assert len(EACH_TIME) >= len(names) / 4


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout(checks, layout):
    (finding,) = checks("moe").findings([parse_layout(layout)])
    assert finding.verdict == "equal", finding.as_json()


@pytest.mark.parametrize(("model", "layout"), OTHER_MODELS)
def test_layout_of_another_architecture(checks, model, layout):
    (finding,) = checks(model).findings([parse_layout(layout)])
    assert finding.verdict == "equal", finding.as_json()


@pytest.mark.parametrize(
    ("model", "layout", "planted", "tensor"),
    [
        ("moe", "tp=2,ep=2", "tensor-parallel-norms", "norm"),
        ("moe", "dp=2", "data-parallel", ""),
        ("mixed", "pp=2", "embeddings", "embed_tokens"),
    ],
)
def test_a_gradient_reduction_that_is_left_out_is_found(checks, model, layout, planted, tensor):
    (finding,) = checks(model).findings([parse_layout(layout)], planted)
    assert finding.verdict == "DIFFERENT"
    assert finding.comparison.gradient.value > 1e-2
    assert math.isfinite(finding.comparison.loss.value)
    assert tensor in finding.comparison.gradient.where


def test_a_layout_that_does_not_fit_is_refused_before_anything_runs(checks):
    with pytest.raises(ConfigError, match=r"(?s)tp=2.*ep 1"):
        list(checks("moe").findings([parse_layout("tp=2")]))

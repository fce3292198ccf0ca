"""In every parallel layout, loading, gathering and exporting give the folder's tensors back, bit for bit."""

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from layout_jobs import Case, Report, gather_more_layers_than_there_are, round_trip
from safetensors.torch import load_file
from tiny_models import VOCABULARY, write_tiny_model

from megatron_vespo.checkpoint.check import check_folder

CASES = [
    Case("moe", 2, {"ep": 2}),
    Case("moe", 2, {"tp": 2, "etp": 2}),
    Case("mixed", 2, {"pp": 2, "vpp": 2}, tied=True),
    Case("llama", 2, {"pp": 2}),
    Case("llama", 2, {"cp": 2}),
    Case("moe", 4, {"tp": 2, "ep": 2, "etp": 1}),
    Case("moe", 4, {"tp": 2, "ep": 2, "etp": 2}, vocabulary_multiple=48),
    Case("moe", 4, {"ep": 4}),
    Case("mixed", 4, {"tp": 2, "ep": 2, "pp": 2}, tied=True),
    Case("qwen3", 4, {"tp": 2, "pp": 2}, tied=True),
]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("layouts")


@pytest.fixture(scope="module")
def alone(ranks, root) -> Callable[[str, bool], Report]:
    """(kind, tied) -> the model of one process; writes the folder."""

    @functools.cache
    def run(kind: str, tied: bool) -> Report:
        case = Case(kind, 1, tied=tied)
        write_tiny_model(root / case.model, kind=kind, tied=tied, layers=4)
        (report,) = ranks.run(1, round_trip, case, str(root))
        return report

    return run


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.name)
def case(request) -> Case:
    return request.param


@pytest.fixture(scope="module")
def reports(ranks, root, alone, case) -> list[Report]:
    alone(case.kind, case.tied)
    return ranks.run(case.world_size, round_trip, case, str(root))


def test_every_parameter_is_loaded_and_rank_0_gathers_the_folder(root, reports, case):
    first, *others = reports
    assert [report.unwritten for report in reports] == [[]] * case.world_size
    assert sorted(first.order) == sorted(load_file(root / case.model / "model.safetensors"))
    assert first.different == []
    assert all(report.order == [] for report in others)


def test_the_order_is_that_of_one_process(reports, alone, case):
    assert reports[0].order == alone(case.kind, case.tied).order


def test_small_pieces_are_the_same_numbers(reports):
    assert reports[0].in_pieces == []


def test_every_rank_gives_its_part_and_all_together_everything_once(reports, case, root):
    assert [report.wrong_parts for report in reports] == [[]] * len(reports)
    source = load_file(root / case.model / "model.safetensors")
    given = {name: sum(report.own_parts.get(name, 0) for report in reports) for name in source}
    assert given == {name: tensor.numel() for name, tensor in source.items()}


def test_other_values_than_the_parameters_are_gathered_alike(reports):
    assert reports[0].doubled == []


def test_the_export_is_the_folder(root, reports, case):
    assert reports
    check_folder(root / "export" / case.name)
    exported = load_file(root / "export" / case.name / "model.safetensors")
    source = load_file(root / case.model / "model.safetensors")
    assert exported.keys() == source.keys()
    assert all(torch.equal(exported[name], source[name]) for name in source)


def test_rows_that_fill_up_the_vocabulary_are_zero(reports, case):
    tp = case.layout.get("tp", 1)
    multiple = tp * case.vocabulary_multiple
    expected = -(-VOCABULARY // multiple) * multiple // tp
    padding = [report.padding for report in reports]
    assert all(value == (expected, True) for rank in padding for value in rank.values())
    assert "embedding.word_embeddings.weight" in padding[0]
    assert ("output_layer.weight" in padding[-1]) == (case.layout.get("pp", 1) > 1 or not case.tied)


def test_random_weights_are_the_same_in_every_layout(reports, alone, case):
    assert reports[0].initialised == alone(case.kind, case.tied).initialised


def test_layers_that_no_stage_holds_are_named_on_every_rank(ranks, tmp_path):
    write_tiny_model(tmp_path, kind="qwen3", layers=4)
    said = ranks.run(2, gather_more_layers_than_there_are, str(tmp_path))
    assert all(message.startswith("no rank holds decoder.layers.4.input_layernorm.weight, ") for message in said)

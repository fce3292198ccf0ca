"""A folder loaded into Megatron's model on two ranks, gathered and exported is the same folder, bit for bit."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from round_trip_jobs import TOKENS, Case, load_gather_export
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import write_tiny_model
from transformers import AutoTokenizer, Qwen3MoeForCausalLM

from megatron_vespo.checkpoint.check import check_folder
from megatron_vespo.checkpoint.tables import table_of

CASES = [
    Case("float32", "float32", tied=False, shard_size="1GB", ep=2),
    Case("float32", "float32", tied=True, shard_size="40KB", ep=1),
    Case("bfloat16", "bfloat16", tied=True, shard_size="1GB", ep=2),
    Case("bfloat16", "bfloat16", tied=False, shard_size="20KB", ep=2),
    Case("float32", "bfloat16", tied=False, shard_size="1GB", ep=1),
]
by_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@pytest.fixture(scope="module")
def workshop(tmp_path_factory, ranks) -> Path:
    """CASE/source, and what the two ranks made of it: CASE/export, CASE/export-float32, CASE/megatron-RANK."""
    root = tmp_path_factory.mktemp("round_trip")
    for case in CASES:
        dtype = getattr(torch, case.stored)
        write_tiny_model(root / case.name / "source", tied=case.tied, dtype=dtype, shard_size=case.shard_size)
        if case.tied:
            for name, factor in (("same-head", 1), ("other-head", 2)):
                tensors = tensors_of(root / case.name / "source")
                tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * factor
                (root / case.name / name).mkdir()
                shutil.copy(root / case.name / "source" / "config.json", root / case.name / name)
                save_file(tensors, root / case.name / name / "model.safetensors")
    for ep in (1, 2):
        ranks.run(2, load_gather_export, ep, [case for case in CASES if case.ep == ep], str(root))
    return root


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_bitwise_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


@by_case
def test_export_holds_the_sources_tensors_bitwise(workshop, case):
    source = {
        name: x.to(getattr(torch, case.computed)) for name, x in tensors_of(workshop / case.name / "source").items()
    }
    assert_bitwise_equal(tensors_of(workshop / case.name / "export"), source)


@by_case
def test_gathering_gives_rank_0_everything_in_the_tables_order_and_the_others_nothing(workshop, case):
    folder = workshop / case.name
    architecture = check_folder(folder / "source")
    results = [json.loads((folder / f"megatron-{rank}.json").read_text()) for rank in range(2)]
    assert results[0]["order"] == list(table_of(architecture).hf_shapes(architecture))
    assert results[1]["order"] == []
    gathered = load_file(folder / "megatron-0.safetensors")
    del gathered["logits"]
    assert_bitwise_equal(gathered, tensors_of(folder / "export"))


@by_case
def test_every_tensor_is_read_by_some_rank_and_experts_by_one(workshop, case):
    folder = workshop / case.name
    first, second = (set(json.loads((folder / f"megatron-{rank}.json").read_text())["consumed"]) for rank in range(2))
    assert first | second == tensors_of(folder / "source").keys()
    shared_experts = {name for name in first & second if ".experts." in name}
    assert bool(shared_experts) == (case.ep == 1)


@by_case
def test_cast_and_sharded_export_is_indexed_and_complete(workshop, case):
    folder = workshop / case.name / "export-float32"
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(file.name for file in folder.glob("*.safetensors"))
    assert len(files) > 5
    assert all((folder / file).stat().st_size < 40_000 for file in files)
    for name, file in index["weight_map"].items():
        with safe_open(folder / file, framework="pt") as shard:
            assert name in shard.keys()  # noqa: SIM118
    assert index["metadata"]["total_size"] == sum(4 * tensor.numel() for tensor in tensors_of(folder).values())
    exported = tensors_of(workshop / case.name / "export")
    assert_bitwise_equal(tensors_of(folder), {name: tensor.float() for name, tensor in exported.items()})


@by_case
@pytest.mark.parametrize("kind", ["export", "export-float32"])
def test_transformers_loads_the_export_with_the_originals_logits(workshop, case, kind):
    original = Qwen3MoeForCausalLM.from_pretrained(workshop / case.name / "source", dtype=getattr(torch, case.computed))
    exported, report = Qwen3MoeForCausalLM.from_pretrained(workshop / case.name / kind, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert str(exported.dtype) == f"torch.{case.computed if kind == 'export' else 'float32'}"
    with torch.no_grad():
        if kind == "export-float32":
            original.float()  # not `to(bfloat16)`, which would round the rotary frequencies as well
        expected = original(TOKENS[None]).logits
        assert torch.equal(exported(TOKENS[None]).logits, expected)


@by_case
def test_megatrons_logits_equal_transformers(workshop, case):
    model = Qwen3MoeForCausalLM.from_pretrained(workshop / case.name / "source", dtype=getattr(torch, case.computed))
    with torch.no_grad():
        expected = model.float()(TOKENS[None]).logits[0]
    for rank in range(2):
        found = load_file(workshop / case.name / f"megatron-{rank}.safetensors")["logits"]
        if case.computed == "float32":
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
        else:  # both in bfloat16 lie about this far from float32
            assert (found - expected).abs().mean() < 0.05 * expected.std()


@by_case
def test_tokenizer_template_and_config_come_along(workshop, case):
    source, export = workshop / case.name / "source", workshop / case.name / "export"
    beside = {path.name for path in source.iterdir()} - {path.name for path in source.glob("model*")}
    assert {path.name for path in export.iterdir()} - {path.name for path in export.glob("model*")} == beside
    for name in beside - {"config.json"}:
        assert (export / name).read_bytes() == (source / name).read_bytes()
    config = json.loads((source / "config.json").read_text())
    assert json.loads((export / "config.json").read_text()) == config | {"dtype": case.computed}
    assert AutoTokenizer.from_pretrained(export).chat_template == AutoTokenizer.from_pretrained(source).chat_template
    assert check_folder(export) == check_folder(source)
    assert (export / "model.safetensors").stat().st_mode == (export / "config.json").stat().st_mode

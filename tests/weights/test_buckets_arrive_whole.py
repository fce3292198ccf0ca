"""What is flattened on the trainer's side is what SGLang's own bucket class unflattens."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from megatron_vespo.weights.buckets import fill_bucket, plan_buckets, require_end, specs_of


@pytest.fixture(scope="module")
def engine_bucket():
    """SGLang's FlattenedTensorBucket, from its file (the package's import needs more than this class)."""
    root = Path(importlib.util.find_spec("sglang").submodule_search_locations[0])
    spec = importlib.util.spec_from_file_location("tensor_bucket", root / "srt" / "weight_sync" / "tensor_bucket.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["tensor_bucket"] = module
    spec.loader.exec_module(module)
    return module.FlattenedTensorBucket


def filled(buckets, sent):
    """Each bucket with its bytes, in memory that holds something else behind them."""
    stream = iter(sent)
    for bucket in buckets:
        slot = torch.full((bucket.num_bytes + 8,), 7, dtype=torch.uint8)
        fill_bucket(bucket, stream, slot)
        assert slot[bucket.num_bytes :].tolist() == [7] * 8
        yield bucket, slot[: bucket.num_bytes]
    require_end(stream)


def tensors():
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 5), (7,), (2, 2, 2), (64, 3), (1,)]
    floats = [(f"float.{i}", torch.randn(s, generator=generator)) for i, s in enumerate(shapes)]
    return [*floats, ("half", torch.randn(9, generator=generator).bfloat16()), ("transposed", torch.randn(4, 6).t())]


@pytest.mark.parametrize("bucket_bytes", [1, 64, 1 << 20])
def test_the_engine_reads_back_every_tensor_bitwise(engine_bucket, bucket_bytes):
    sent = tensors()
    buckets = plan_buckets(specs_of(sent), bucket_bytes)
    received = {}
    for bucket, flat in filled(buckets, sent):
        empty = engine_bucket.empty(
            [s.name for s in bucket.specs],
            [s.dtype for s in bucket.specs],
            [list(s.shape) for s in bucket.specs],
            "cpu",
        )
        empty.flattened_tensor.copy_(flat)
        received |= dict(empty.reconstruct_tensors())
    assert list(received) == [name for name, _ in sent]
    for name, tensor in sent:
        assert received[name].dtype == tensor.dtype and torch.equal(received[name], tensor)


def test_buckets_stay_within_their_size_unless_one_tensor_is_larger():
    buckets = plan_buckets(specs_of(tensors()), 100)
    assert all(bucket.num_bytes <= 100 or len(bucket.specs) == 1 for bucket in buckets)
    assert len(buckets) > 3


def test_tensors_that_are_not_the_plans_are_refused():
    sent = tensors()
    buckets = plan_buckets(specs_of(sent), 64)
    with pytest.raises(ValueError, match=r"float\.1.*holds.*float\.2"):
        list(filled(buckets, [sent[0], sent[2]]))
    with pytest.raises(ValueError, match="no further tensor"):
        list(filled(buckets, sent[:-1]))
    with pytest.raises(ValueError, match="no bucket for more"):
        list(filled(buckets, [*sent, ("more", torch.zeros(1))]))

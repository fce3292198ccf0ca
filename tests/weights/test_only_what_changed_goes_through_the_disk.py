"""The sender here runs in the test's own process, on tensors of its choice; the engine is real."""

import threading
from pathlib import Path

import pytest
import torch
from held_weights import differences, weights_in
from safetensors.torch import load_file

from megatron_vespo.weights.buckets import plan_buckets, specs_of
from megatron_vespo.weights.disk import DiskSender
from megatron_vespo.weights.filling import Gathered

EXPERT, NORM = "model.layers.1.mlp.experts.5.up_proj.weight", "model.layers.0.self_attn.q_norm.weight"


def buckets_of(sender: DiskSender, tensors, weight_version: int, since: int | None):
    """Folders of the buckets while they are there."""
    thread = threading.Thread(target=sender.send, args=(Gathered(iter(tensors.items())), weight_version, since))
    thread.start()
    for index in range(len(sender.buckets)):
        yield sender.take(index, copies=1, released=index)
    sender.take(len(sender.buckets), copies=1, released=len(sender.buckets))
    thread.join()


def names_in(folders) -> list[str]:
    return [name for folder in folders if folder for name in load_file(Path(folder) / "model.safetensors")]


@pytest.fixture
def sender(engine, tmp_path):
    tensors = weights_in(engine.model_path)
    sender = DiskSender(
        plan_buckets(specs_of(tensors.items()), 200_000), torch.device("cpu"), tmp_path / "weights", True
    )
    yield sender
    sender.close()
    assert not list((tmp_path / "weights").iterdir())


@pytest.mark.engine
def test_an_engine_that_gets_only_changed_tensors_holds_all_that_it_should(engine, sender):
    tensors = weights_in(engine.model_path)
    *_, last = tensors
    assert names_in(buckets_of(sender, tensors, 1, None)) == list(tensors)

    changed = tensors | {EXPERT: tensors[EXPERT] + 1, NORM: tensors[NORM] * 2}
    written = []
    for index, folder in enumerate(buckets_of(sender, changed, 2, since=1)):
        written += names_in([folder])
        if folder is not None:
            version = 2 if index == len(sender.buckets) - 1 else None
            engine.run(engine.client.update_weights_from_disk(folder, version))
    assert sorted(written) == sorted([EXPERT, NORM, last])
    assert differences(engine, changed) == []
    assert engine.run(engine.client.weight_version()) == "2"

    for folder in buckets_of(sender, tensors, 3, since=2):
        if folder is not None:
            engine.run(engine.client.update_weights_from_disk(folder, 0))
    assert differences(engine, tensors) == []


def test_what_changed_before_an_engine_last_got_weights_is_sent_if_it_missed_that(engine, sender):
    tensors = weights_in(engine.model_path)
    *_, last = tensors
    list(buckets_of(sender, tensors, 1, None))
    changed = tensors | {EXPERT: tensors[EXPERT] + 1}
    assert EXPERT in names_in(buckets_of(sender, changed, 2, since=1))
    assert names_in(buckets_of(sender, changed, 3, since=2)) == [last]
    assert sorted(names_in(buckets_of(sender, changed, 4, since=1))) == sorted([EXPERT, last])
    assert names_in(buckets_of(sender, changed, 5, since=None)) == list(tensors)

"""One group of trainer and engine fails while it is built: it is named, and the sender can be closed."""

import socket
import threading

import torch

from megatron_vespo.weights.collective import CollectiveSender


def test_a_group_whose_engine_does_not_come_is_named():
    sender = CollectiveSender([], torch.device("cpu"), "127.0.0.1", ["comes_not", "dies"])
    with socket.create_connection(("127.0.0.1", sender.ports[1])) as engine:
        threading.Timer(0.3, engine.close).start()
        failures = sender.connect([2, 2], "gloo", timeout_seconds=2.0)
    assert sorted(failures) == ["comes_not", "dies"] and all(failures.values())
    sender.close()


def test_an_abandoned_connection_blames_nobody():
    sender = CollectiveSender([], torch.device("cpu"), "127.0.0.1", ["comes_not"])
    threading.Timer(0.3, sender.abandon).start()
    assert sender.connect([2], "gloo", timeout_seconds=60.0) == {}

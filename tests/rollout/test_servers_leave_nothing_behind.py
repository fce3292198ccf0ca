import json
import logging
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from tiny_engine import MAX_SEQUENCE_TOKENS, tiny_server

from megatron_vespo.config import ConfigError, EngineConfig
from megatron_vespo.rollout.server import EngineServerError, choose_port

PARENT = """
import sys, time
from pathlib import Path
from tiny_engine import tiny_server
server = tiny_server(Path(sys.argv[1]), Path(sys.argv[2]))
server.start()
print(server.pid, server.port, flush=True)
time.sleep(600)
"""


def files_of(family: list[psutil.Process]) -> list[Path]:
    """The shared memory that these processes map, and the folder that the first writes its sockets to."""
    command = family[0].cmdline()
    files = {Path(command[command.index("--scratch") + 1])}
    for process in family:
        maps = Path(f"/proc/{process.pid}/maps").read_text().splitlines()
        files |= {Path("/" + line.split("/", 1)[1]) for line in maps if " /dev/shm/" in line and "deleted" not in line}
    return sorted(files)


def executes(process: psutil.Process) -> bool:
    """A zombie has ended, and waits for its parent to notice."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def can_be_bound(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        return probe.connect_ex(("127.0.0.1", port)) != 0


def wait_until(condition, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.1)
    return condition()


@pytest.mark.engine
def test_a_killed_parent_takes_its_server_along(tiny_qwen3_moe, tmp_path):
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(tiny_qwen3_moe), str(tmp_path / "engine.log")],
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[1],
        text=True,
    )
    try:
        assert parent.stdout is not None
        pid, port = (int(word) for word in parent.stdout.readline().split())
        family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
        files = files_of(family)
        assert len(family) >= 3 and len(files) >= 2 and all(file.exists() for file in files)
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    assert wait_until(lambda: not any(executes(p) for p in family), 10)
    assert wait_until(lambda: not any(file.exists() for file in files), 2), files
    assert wait_until(lambda: can_be_bound(port), 5)


@pytest.mark.engine
def test_stop_ends_a_hung_server_and_a_port_in_use_is_replaced(tiny_qwen3_moe, tmp_path, caplog):
    with socket.socket() as occupant:
        occupant.bind(("127.0.0.1", 0))
        occupant.listen()
        taken = occupant.getsockname()[1]
        server = tiny_server(
            tiny_qwen3_moe, tmp_path / "engine.log", engine=EngineConfig(port=taken, startup_timeout_seconds=300)
        )
        with caplog.at_level(logging.WARNING):
            server.start()
        assert server.port != taken and f"port {taken} is in use" in caplog.text
    family = [psutil.Process(server.pid), *psutil.Process(server.pid).children(recursive=True)]
    port, files = server.port, files_of(family)
    for process in family:
        process.suspend()
    started = time.monotonic()
    server.stop()
    assert time.monotonic() - started < 5
    assert not any(executes(p) for p in family)
    assert not any(file.exists() for file in files)
    assert wait_until(lambda: can_be_bound(port), 5)
    server.stop()
    assert not server.is_alive()


@pytest.mark.engine
def test_an_early_death_names_its_first_cause(tiny_qwen3_moe, tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in tiny_qwen3_moe.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    (broken / "model.safetensors").write_bytes(b"not safetensors at all")
    server = tiny_server(broken, tmp_path / "engine.log")
    with pytest.raises(EngineServerError, match=r"SafetensorError: .*header") as error:
        server.start()
    assert "Traceback" not in str(error.value) and "engine.log" in str(error.value)
    assert not server.is_alive()


def test_what_cannot_work_is_refused_before_anything_starts(tiny_qwen3_moe, tmp_path):
    def refused(match: str, **changes):
        with pytest.raises(ConfigError, match=match):
            tiny_server(tiny_qwen3_moe, tmp_path / "engine.log", **changes)

    refused("rollout.engine.max_total_tokens is 100", engine=EngineConfig(max_total_tokens=100))
    refused("'host' is decided by", engine=EngineConfig(extra_arguments={"host": "0.0.0.0"}))
    refused("'mem-fraction-static' is decided by", engine=EngineConfig(extra_arguments={"mem_fraction_static": 0.5}))
    for name in ("enable-hierarchical-cache", "speculative_algorithm"):
        engine = EngineConfig(extra_arguments={name: True})
        refused(f"cannot be recorded with '{name.replace('_', '-')}'", engine=engine, return_routed_experts=True)
        tiny_server(tiny_qwen3_moe, tmp_path / "engine.log", engine=engine)
    refused("max_position_embeddings", max_sequence_tokens=MAX_SEQUENCE_TOKENS + 1)
    assert json.loads((tiny_qwen3_moe / "config.json").read_text())["max_position_embeddings"] == MAX_SEQUENCE_TOKENS


def test_free_ports_are_not_those_of_outgoing_connections():
    lowest_outgoing = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    assert all(choose_port(None, "127.0.0.1") < lowest_outgoing for _ in range(5))

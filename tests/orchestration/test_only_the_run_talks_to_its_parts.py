"""During a run every part listens on the chosen interface alone, and answers nobody without the run's token."""

import json
import os
import shutil
import socket
import subprocess
import sys
import urllib.error
import urllib.request

import psutil
import pytest
from test_every_end_leaves_nothing import Run

from megatron_vespo.config import ClusterConfig, ConfigError, TrainConfig, load_config
from megatron_vespo.interface import LOOPBACK, choose_interface, find_interface

CONNECT = """
import sys
from ray._raylet import GcsClient
print(len(GcsClient(address=sys.argv[1]).get_all_node_info(timeout=60)), "nodes")
"""


def interfaces() -> list[str]:
    """Loopback, and another one where this machine has it."""
    up = psutil.net_if_stats()
    others = [
        name
        for name, entries in psutil.net_if_addrs().items()
        if name != "lo" and up[name].isup and any(entry.family == socket.AF_INET for entry in entries)
    ]
    return ["lo", *(pytest.param(name, marks=pytest.mark.slow) for name in others[:1])]


@pytest.fixture(scope="module", params=interfaces())
def run(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / request.param
    run = Run("examples/tiny_base", folder, f"cluster.interface={request.param}")
    run.read_until("step 1/")
    family = [psutil.Process(run.process.pid), *run.family()]
    yield request.param, run, family
    run.process.terminate()
    run.process.communicate()
    shutil.rmtree(run.temporary)


def listening(family: list[psutil.Process]) -> list[tuple[str, str, int]]:
    """(process, address, port) of everything that takes TCP connections or datagrams."""
    found = []
    for process in family:
        try:
            found += [
                (process.name(), connection.laddr.ip, connection.laddr.port)
                for connection in process.net_connections(kind="inet")
                if connection.status == psutil.CONN_LISTEN
                or (connection.type == socket.SOCK_DGRAM and not connection.raddr)
            ]
        except psutil.NoSuchProcess:
            continue
    return found


def engine_url(run: Run) -> str:
    command = run.find("megatron_vespo.rollout.serve").cmdline()
    host, port = (command[command.index(option) + 1] for option in ("--host", "--port"))
    return f"http://{host}:{port}"


def test_nothing_listens_on_any_other_address(run):
    name, _, family = run
    own = next(entry.address for entry in psutil.net_if_addrs()[name] if entry.family == socket.AF_INET)
    found = listening(family)
    addresses = {address.removeprefix("::ffff:") for _, address, _ in found}
    assert addresses <= {"127.0.0.1", own}, found
    assert own in addresses
    engine = [address for process, address, _ in found if "python" in process and address == own]
    assert engine, found


def test_an_engine_refuses_requests_without_the_token(run):
    url = engine_url(run[1])
    body = json.dumps({"input_ids": [5], "sampling_params": {"max_new_tokens": 1}}).encode()
    update = json.dumps({"model_path": "/tmp/elsewhere"}).encode()
    for endpoint, content in (
        *(("/generate", body), ("/model_info", None), ("/server_info", None), ("/flush_cache", b"")),
        *(("/update_weights_from_disk", update), ("/init_weights_update_group", b"{}"), ("/abort_request", b"{}")),
    ):
        for headers in ({}, {"Authorization": "Bearer " + "0" * 64}):
            headers = headers | {"Content-Type": "application/json"}
            with pytest.raises(urllib.error.HTTPError) as refused:
                urllib.request.urlopen(urllib.request.Request(url + endpoint, content, headers), timeout=30)
            assert refused.value.code == 401, endpoint


def test_ray_takes_no_client_without_the_token(run):
    raylet = run[1].find("raylet")
    address = next(word.partition("=")[2] for word in raylet.cmdline() if word.startswith("--gcs-address="))
    token = next(run[1].temporary.glob("mv-*/ray_token"))
    assert token.stat().st_mode & 0o077 == 0 and token.parent.stat().st_mode & 0o077 == 0
    base = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | {"HOME": "/nonexistent"}

    def answer(**settings: str) -> str:
        command = [sys.executable, "-c", CONNECT, address]
        done = subprocess.run(command, env=base | settings, capture_output=True, text=True)
        return done.stdout + done.stderr

    assert answer(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(token)) == "1 nodes\n"
    assert "AuthenticationError" in answer(RAY_AUTH_MODE="disabled")
    assert "AuthenticationError" in answer(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="0" * 64)


def test_the_token_is_in_no_log_and_on_no_command_line(run):
    _, process, family = run
    folder = next(word for word in process.process.args if word.startswith("run_dir=")).partition("=")[2]
    with open(f"{folder}/logs/engine_0.log") as log:
        (line,) = [line for line in log if "server_args=" in line]
    assert "'api_key': '...'" in line
    assert not [one for one in family if one.is_running() and "api-key" in " ".join(one.cmdline())]


def test_an_interface_is_found_by_name_and_by_address():
    assert find_interface("lo") == find_interface("127.0.0.1") == LOOPBACK


@pytest.mark.parametrize("wanted", ["nosuch0", "203.0.113.77"])
def test_an_interface_that_is_not_there_is_refused_with_those_that_are(wanted):
    with pytest.raises(ConfigError, match=rf"cluster.interface: '{wanted}' is no interface .*lo \(127.0.0.1\)"):
        find_interface(wanted)


@pytest.mark.parametrize("wanted", ["0.0.0.0", "'::'", "''"])
def test_every_interface_at_once_is_refused(wanted):
    with pytest.raises(ConfigError, match=r"cluster.interface: .* every interface"):
        load_config(TrainConfig, "examples/quickstart.yaml", [f"cluster.interface={wanted}"])
    assert ClusterConfig().interface == "auto" and choose_interface("auto") == LOOPBACK

"""One SGLang server as a child process: start, health, stop."""

import json
import logging
import os
import random
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path

import torch

from megatron_vespo.config import ConfigError, EngineConfig
from megatron_vespo.errors import RunError
from megatron_vespo.interface import LOOPBACK, Interface
from megatron_vespo.rollout import process_tree, router_noise
from megatron_vespo.rollout.engine_arguments import (
    check_sequence_length,
    check_tensor_parallel,
    child_environment,
    command_line_arguments,
)
from megatron_vespo.rollout.engine_http import authorization
from megatron_vespo.rollout.engine_log import first_cause, says_why

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.1
STOP_GRACE_SECONDS = 1.0
PORT_ATTEMPTS = 3
LOWEST_FREE_PORT = 20000
WITHOUT_PROXY = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""The token is nobody else's business."""


class EngineServerError(RunError):
    """The server did not start, or died. The message holds the first cause found in its log."""


class EngineServer:
    """A server that dies with the process that started it, and answers only who knows its token (except /health, /ready
    and /metrics, which SGLang leaves open).

    Args:
        model_path: folder in Hugging Face format.
        model_dtype: used unless `engine.dtype` says otherwise.
        deterministic: batch-invariant sampling with a seed for each sample.
        seed: SGLang's own random seed.
        log_path: what the server prints is appended here.
        max_sequence_tokens: longest prompt plus response.
        weight_version: of the weights in `model_path`.
        return_routed_experts: requests may ask for the experts that their tokens went to.
        scratch_parent: where the folder of the server's sockets is made; None: the system's temporary folder. What is
            killed before it could clean up goes with this folder.
        parts: the folder where processes of a run make themselves known; None: there is no run.
        name: what the server's first process makes itself known as.
        interface: where it listens.
        token: what requests to it need; None: one is drawn.
        device: "cuda" or "cpu"; None: "cuda" where torch finds it.
    """

    def __init__(
        self,
        model_path: str,
        model_dtype: str,
        engine: EngineConfig,
        *,
        deterministic: bool,
        seed: int,
        log_path: str | Path,
        max_sequence_tokens: int,
        weight_version: int = 0,
        return_routed_experts: bool = False,
        scratch_parent: str | Path | None = None,
        parts: str | Path | None = None,
        name: str = "engine",
        interface: Interface = LOOPBACK,
        token: str | None = None,
        device: str | None = None,
    ) -> None:
        self._device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self._engine = engine
        self._log_path = Path(log_path)
        self._scratch_parent = scratch_parent
        self._interface = interface
        self.token = token or secrets.token_hex(32)
        self._presence = [] if parts is None else ["--parts", str(parts), "--name", name]
        check_sequence_length(model_path, max_sequence_tokens)
        check_tensor_parallel(model_path, engine.tensor_parallel, self._device)
        self._arguments = command_line_arguments(
            model_path=model_path,
            dtype=engine.dtype or model_dtype,
            engine=engine,
            device=self._device,
            deterministic=deterministic,
            seed=seed,
            max_sequence_tokens=max_sequence_tokens,
            weight_version=weight_version,
            return_routed_experts=return_routed_experts,
        )
        self._process: subprocess.Popen | None = None
        self._scratch: Path | None = None
        self._shared_memory: set[Path] = set()
        self._family: list = []
        self._log_start = 0
        self.port = 0

    @property
    def url(self) -> str:
        return f"http://{self._interface.address}:{self.port}"

    @property
    def pid(self) -> int:
        """Of the server's first process."""
        if self._process is None:
            raise EngineServerError("the engine was not started")
        return self._process.pid

    def start(self) -> None:
        """Start the server and return when it has generated a token.

        Raises:
            EngineServerError: it died, or was not healthy within `engine.startup_timeout_seconds`. Nothing is left.
        """
        if self._process is not None:
            raise EngineServerError("the engine was already started")
        deadline = time.monotonic() + self._engine.startup_timeout_seconds
        for attempt in range(1, PORT_ATTEMPTS + 1):
            self.port = choose_port(self._engine.port, self._interface.address)
            self._launch()
            try:
                self._wait_until_healthy(deadline)
                return
            except BaseException:
                port_was_taken = not self.is_alive() and "address already in use" in self._log_text()
                self.stop()
                if not port_was_taken or attempt == PORT_ATTEMPTS:
                    raise
                logger.warning("port %d was taken while the engine started: trying another", self.port)

    def _launch(self) -> None:
        self._scratch = Path(tempfile.mkdtemp(prefix="vespo-engine-", dir=self._scratch_parent))
        self._log_path.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "megatron_vespo.rollout.serve"]
        command += ["--parent", str(os.getpid()), "--scratch", str(self._scratch)]
        command += self._presence
        command += router_noise.as_options(self._engine.router_noise)
        command += ["--host", self._interface.address, "--port", str(self.port), *self._arguments]
        with self._log_path.open("ab") as log:
            self._log_start = log.tell()
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=child_environment(
                    dict(os.environ) | self._interface.environment(),
                    self._device,
                    self._scratch,
                    self._engine.tensor_parallel,
                ),
            )
        # Not on the command line, which every user of the host can read.
        assert self._process.stdin is not None
        with suppress(BrokenPipeError), self._process.stdin as stdin:  # it died already: the next look tells of what
            stdin.write(f"{self.token}\n".encode())

    def _wait_until_healthy(self, deadline: float) -> None:
        while not self._answers():
            self.raise_if_dead()
            self._remember_family()
            if time.monotonic() > deadline:
                raise EngineServerError(
                    f"the engine was not healthy after {self._engine.startup_timeout_seconds:.0f} s "
                    f"(rollout.engine.startup_timeout_seconds); the last lines of {self._log_path}:\n"
                    + "\n".join(self._log_text().splitlines()[-5:])
                )
            time.sleep(POLL_SECONDS)
        self._generate_one_token(deadline)
        self._freeze_garbage_collection()
        self._remember_family()

    def _answers(self) -> bool:
        try:
            with WITHOUT_PROXY.open(self._request("/model_info"), timeout=5) as response:
                return response.status == 200
        except (urllib.error.URLError, TimeoutError, ConnectionError):
            return False

    def _request(self, endpoint: str, body: bytes | None = None) -> urllib.request.Request:
        headers = {"Content-Type": "application/json", **authorization(self.token)}
        return urllib.request.Request(self.url + endpoint, body, headers)

    def _generate_one_token(self, deadline: float) -> None:
        body = {"input_ids": [0], "sampling_params": {"temperature": 0.0, "max_new_tokens": 1}}
        request = self._request("/generate", json.dumps(body).encode())
        try:
            with WITHOUT_PROXY.open(request, timeout=max(1.0, deadline - time.monotonic())) as response:
                response.read()
        except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
            time.sleep(1.0)  # a crash in the first forward pass ends the process a moment later
            self.raise_if_dead()
            raise EngineServerError(f"the engine answers at {self.url} but generates nothing: {error}") from error

    def _freeze_garbage_collection(self) -> None:
        """SGLang asks this of itself at its start, sometimes before it listens; then each cache flush would collect
        garbage among all that was imported, for half a second."""
        try:
            with WITHOUT_PROXY.open(self._request("/freeze_gc", b""), timeout=30) as response:
                response.read()
        except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
            self.raise_if_dead()
            raise EngineServerError(f"the engine at {self.url} did not answer /freeze_gc: {error}") from error

    def _remember_family(self) -> None:
        """What belongs to the server, as long as it can still be asked."""
        family = process_tree.tree(self.pid)
        known = {process.pid for process in self._family}
        self._family += [process for process in family if process.pid not in known]
        self._shared_memory |= process_tree.shared_memory_of(family)

    def is_alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def raise_if_dead(self) -> None:
        """Raises EngineServerError with the first cause when the server has ended by itself."""
        if self._process is None or self.is_alive():
            return
        code, log = self._process.returncode, self._log_text()
        if code == -signal.SIGKILL and not says_why(log):
            raise EngineServerError(
                f"the engine was killed by SIGKILL, by somebody or for want of memory (log: {self._log_path})"
            )
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        raise EngineServerError(f"the engine {how}: {first_cause(log)} (log: {self._log_path})")

    def _log_text(self) -> str:
        with self._log_path.open("rb") as log:
            log.seek(self._log_start)
            return log.read().decode(errors="replace")

    def stop(self) -> None:
        """End every process of the server and remove what they leave. May be called at any time, and again."""
        if self._process is None:
            return
        if self.is_alive():
            self._remember_family()
        process_tree.end(self._family or process_tree.tree(self._process.pid), STOP_GRACE_SECONDS)
        self._process.wait()
        process_tree.remove(self._shared_memory, self._scratch)
        self._process, self._scratch, self._family, self._shared_memory = None, None, [], set()

    def __enter__(self) -> "EngineServer":
        self.start()
        return self

    def __exit__(self, *_) -> None:
        self.stop()


def choose_port(wanted: int | None, address: str) -> int:
    """`wanted` if it is free on `address`, else a free port, below those that the kernel gives to outgoing connections."""
    if wanted is not None:
        if _is_free(wanted, address):
            return wanted
        logger.warning("rollout.engine.port %d is in use: taking another", wanted)
    highest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    for port in random.SystemRandom().sample(range(LOWEST_FREE_PORT, highest), 100):
        if _is_free(port, address):
            return port
    raise ConfigError(f"no free port between {LOWEST_FREE_PORT} and {highest} on {address}: set rollout.engine.port")


def _is_free(port: int, address: str) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
        except OSError:
            return False
        return True

"""The SGLang server process: `python -m megatron_vespo.rollout.serve --parent PID --scratch DIR [arguments of SGLang]`.

It reads one line from its standard input: the token that requests need.

The same server as `sglang.launch_server`, with seven differences: what a CPU needs is in place before SGLang is
imported; on a CPU the scheduler is forked from this process, which has imported everything already, instead of spawned
(half the start-up time); when the process PARENT dies, all of this server ends and removes what it wrote to DIR and
shared memory; `--router-noise` makes it route wrongly (router_noise.py); weights from disk are reported as loaded when
all ranks have them; and with `--parts DIR --name NAME` each of its processes makes itself known to the run (presence.py);
the token is in no command line and no log.
"""

import argparse
import ctypes
import multiprocessing
import os
import signal
import sys
from pathlib import Path

import torch.distributed

from megatron_vespo import presence
from megatron_vespo.rollout import process_tree, router_noise, sglang_on_cpu

PR_SET_PDEATHSIG = 1
ORPHANED = signal.SIGUSR2

sglang_on_cpu.prepare_imports()


def main(arguments: list[str]) -> None:
    own, sglang_arguments = read_options(arguments)
    end_with_parent(own.parent, own.scratch)
    if own.parts is not None:
        presence.announce(own.parts, own.name)
        os.register_at_fork(after_in_child=lambda: presence.announce_child(own.parts, own.name))

    from sglang.launch_server import run_server
    from sglang.srt.plugins import load_plugins
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType
    from sglang.srt.server_args import prepare_server_args

    if sglang_on_cpu.needed():
        HookRegistry.register("sglang.srt.entrypoints.engine._set_envs_and_config", fork_children, HookType.AFTER)
    HookRegistry.register("sglang.srt.entrypoints.engine._server_args_for_logging", without_token, HookType.AFTER)
    load_plugins()
    settings = prepare_server_args(sglang_arguments)
    settings.api_key = sys.stdin.readline().strip()
    try:
        run_server(settings)
    finally:
        process_tree.kill(process_tree.tree(os.getpid())[1:])


def read_options(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Ours, and the arguments of SGLang."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--parent", type=int, required=True)
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--parts", type=Path)
    parser.add_argument("--name")
    router_noise.add_options(parser)
    return parser.parse_known_args(arguments)


def announce_spawned(arguments: list[str]) -> None:
    own, _ = read_options(arguments)
    if own.parts is not None:
        presence.announce_child(own.parts, own.name)


def end_with_parent(parent: int, scratch: Path) -> None:
    """End this server when process `parent` dies, however it dies.

    The kernel signals when the *thread* that started this process ends, so the signal alone proves nothing: the server
    goes on if its parent still is `parent`, and is signalled again when the next of its threads ends.
    """

    def on_signal(*_) -> None:
        if os.getppid() == parent:
            return
        family = process_tree.tree(os.getpid())
        files = process_tree.shared_memory_of(family)
        process_tree.kill(family[1:])
        process_tree.remove(files, scratch)
        os._exit(1)

    signal.signal(ORPHANED, on_signal)
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, ORPHANED, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    on_signal()


def without_token(logged: dict, *_) -> dict:
    return logged | {"api_key": "..."}


def fork_children(*_, **__) -> None:
    """After SGLang chose "spawn". Nothing of this process holds a GPU or runs threads of compute when it forks."""
    multiprocessing.set_start_method("fork", force=True)


def wait_for_all_ranks(_, updater, *__) -> None:
    """After a rank has read weights from disk. SGLang answers when rank 0 has them, and then their files are removed."""
    torch.distributed.barrier(group=updater.tp_cpu_group)


def register_barrier() -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    updater = "sglang.srt.managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager"
    HookRegistry.register(f"{updater}.update_weights_from_disk", wait_for_all_ranks, HookType.AFTER)


# Spawned processes come here too, with the same arguments, before they load plugins and apply hooks.
router_noise.register(sys.argv[1:])
if __name__ in ("__main__", "__mp_main__"):
    register_barrier()
if __name__ == "__mp_main__":
    announce_spawned(sys.argv[1:])
if __name__ == "__main__":
    main(sys.argv[1:])

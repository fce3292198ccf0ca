"""All checks, side by side."""

import os
import tempfile
import traceback
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from megatron_vespo.doctor import accelerators, clocks, configuration, host, imports, slurm, versions
from megatron_vespo.doctor.finding import Finding

Check = Callable[[], Finding | list[Finding]]


@dataclass(frozen=True)
class Options:
    """What the command line says.

    Attributes:
        config: of `megatron-vespo train`; None: only what every run needs.
        lock: None: cuda.lock where the driver shows a GPU, else cpu.lock.
        shm_gb: free GiB that /dev/shm shall have.
        disk_gb: free GiB of the run's folder, where the configuration does not tell.
        import_seconds: longest that one import may take; file systems of clusters are slow at first.
    """

    config: Path | None = None
    overrides: tuple[str, ...] = ()
    lock: Path | None = None
    shm_gb: float = 1.0
    disk_gb: float = 5.0
    import_seconds: float = 120.0


def examine(options: Options) -> list[Finding]:
    """Every finding, in the order of the table. A check that breaks is a finding itself."""
    gpus = accelerators.driver_gpus()
    has_gpu, seconds = bool(gpus), options.import_seconds
    needs, read = None, []
    if options.config is not None:
        finding, needs = configuration.check_configuration(options.config, options.overrides, seconds)
        read = [finding]
    checks: list[tuple[str, Check]] = [
        ("python", versions.check_python),
        ("versions", partial(versions.check_versions, options.lock or versions.default_lock(has_gpu))),
        ("torch", partial(accelerators.check_torch, gpus, seconds)),
        *((f"import {one.package}", partial(imports.check_import, one, seconds)) for one in imports.LIBRARIES),
        ("SGLang", partial(imports.check_sglang, seconds, has_gpu=has_gpu)),
        ("Transformer Engine", partial(accelerators.check_transformer_engine, has_gpu, seconds)),
        ("Apex", partial(accelerators.check_apex, has_gpu, seconds)),
        ("DeepEP", partial(accelerators.check_deep_ep, has_gpu, seconds, wanted=needs is not None and needs.flex)),
        ("InfiniBand", partial(accelerators.check_infiniband, has_gpu)),
        ("locked memory", partial(host.check_locked_memory, has_gpu)),
        *host_checks(options, needs),
    ]
    if options.config is not None and needs is not None:
        checks.append(("tasks", partial(configuration.check_preparation, options.config, options.overrides, seconds)))
    return [*read, *side_by_side(checks)]


def host_checks(options: Options, needs: configuration.Needs | None) -> list[tuple[str, Check]]:
    """Space, limits, Slurm and clocks, as far as `needs` tells more than `options`."""
    folder = Path("runs") if needs is None else needs.run_dir
    disk_gb, why = options.disk_gb, "a run's files"
    if needs is not None and needs.disk_gb is not None:
        disk_gb, why = needs.disk_gb + 1, "checkpoints, exports and logs"
    return [
        ("disk", partial(host.check_disk, "disk", folder, disk_gb, why)),
        (
            "temporary files",
            partial(host.check_disk, "temporary files", Path(tempfile.gettempdir()), 2, "Ray"),
        ),
        ("shared memory", partial(host.check_shared_memory, options.shm_gb)),
        ("open files", partial(host.check_open_files, 2048 if needs is None else needs.sockets)),
        ("processes", host.check_processes),
        ("Slurm", slurm.check_slurm),
        ("clock, files", lambda: clocks.check_file_clock(host.existing(folder))),
        ("clock, nodes", lambda: clocks.check_node_clocks(slurm.nodes_of_job())),
    ]


def side_by_side(checks: Iterable[tuple[str, Check]]) -> list[Finding]:
    """Findings in the order of `checks`, which run in as many threads as there are cores, up to 8."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        results = [pool.submit(guarded, name, check) for name, check in checks]
        return [finding for result in results for finding in result.result()]


def guarded(name: str, check: Check) -> list[Finding]:
    """A check that raises tells so in the table, and the others go on."""
    try:
        findings = check()
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        found = f"the check itself broke: {type(error).__name__}: {error} ({where.filename}:{where.lineno})"
        return [Finding(name, "failed", found, "", "not known", "tell it the authors, with this line")]
    return findings if isinstance(findings, list) else [findings]

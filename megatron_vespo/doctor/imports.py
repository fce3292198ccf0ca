"""Libraries imported, each in a process of its own (torch: see accelerators)."""

import sys
from dataclasses import dataclass
from importlib.util import find_spec

from megatron_vespo.doctor.finding import Finding, Status
from megatron_vespo.doctor.probe import run_probe


@dataclass(frozen=True)
class Library:
    """`module`: what is imported, deep enough to load what it is used for. `package`: what pip calls it."""

    module: str
    package: str
    cost: str
    without: Status = "failed"


LIBRARIES = (
    Library("megatron.core.models.gpt.gpt_layer_specs", "megatron-core", "no trainer"),
    Library("ray", "ray", "a run has no processes"),
    Library("transformers", "transformers", "no tokenizer"),
    Library("safetensors.torch", "safetensors", "no checkpoint is read or written"),
    Library("pydantic", "pydantic", "no configuration is read"),
    Library("yaml", "PyYAML", "no configuration is read"),
    Library("typer", "typer", "the command megatron-vespo does not start"),
    Library("aiohttp", "aiohttp", "the driver can't talk to engines"),
    Library("psutil", "psutil", "processes of a run can't be ended"),
    Library("pyarrow.parquet", "pyarrow", "no parquet file is read", "warning"),
    Library("math_verify", "math-verify", "scorer math_verify grades nothing", "warning"),
    Library("reasoning_gym", "reasoning-gym", "no reasoning-gym task, no exact_match", "warning"),
    Library("tensorboard.summary.writer.event_file_writer", "tensorboard", "no TensorBoard files", "warning"),
    Library("wandb", "wandb", "no run of Weights & Biases", "warning"),
)


def check_import(library: Library, seconds: float) -> Finding:
    """A module that is absent, raises, crashes or hangs is a finding with its first cause."""
    name = f"import {library.module.split('.')[0]}"
    if find_spec(library.module.split(".")[0]) is None:
        return Finding(
            *(name, library.without, "not installed", library.package, library.cost),
            f"{sys.executable} -m pip install --no-deps $(grep -i '^{library.package}==' requirements/cpu.lock)",
        )
    probe = run_probe(f"import {library.module}\nreport()", seconds)
    if probe.ok:
        return Finding(name, "ok", f"{library.module} imports")
    return Finding(
        *(name, library.without, f"{library.module}: {probe.error}", "an import that works", library.cost),
        f'{sys.executable} -X faulthandler -c "import {library.module}"; if its version is as locked, then\n'
        f"{sys.executable} -m pip install --force-reinstall --no-deps "
        f"$(grep -i '^{library.package}==' requirements/cpu.lock)",
    )


SGLANG = """
import argparse
from importlib.metadata import entry_points, version
from sglang.srt.server_args import ServerArgs
parser = argparse.ArgumentParser()
ServerArgs.add_cli_args(parser)
report(
    version=version("sglang"),
    routes="--enable-return-routed-experts" in parser.format_help(),
    plugin=any(entry.value.startswith("megatron_vespo.") for entry in entry_points(group="sglang.srt.plugins")),
)
"""


def check_sglang(seconds: float, *, has_gpu: bool) -> list[Finding]:
    """It imports; it can return the experts that it chose; on a CPU, it finds our plugin."""
    if find_spec("sglang") is None:
        mend = f"{sys.executable} -m pip install --no-deps $(grep '^sglang==' requirements/cpu.lock)"
        return [Finding("import sglang", "failed", "not installed", "sglang", "nothing samples", mend)]
    probe = run_probe(SGLANG, seconds)
    if not probe.ok:
        mend = f'{sys.executable} -X faulthandler -c "import sglang.srt.server_args"'
        found = f"sglang.srt.server_args: {probe.error}"
        return [Finding("import sglang", "failed", found, "an import that works", "nothing samples", mend)]
    findings = [Finding("import sglang", "ok", f"{probe.values['version']} imports")]
    if probe.values["routes"]:
        findings.append(Finding("routing flag", "ok", "SGLang has --enable-return-routed-experts"))
    else:
        findings.append(
            Finding(
                *("routing flag", "failed", f"SGLang {probe.values['version']} can't return its experts"),
                *("--enable-return-routed-experts", "no routing replay (R3), no measure of routing agreement"),
                f"{sys.executable} -m pip install --no-deps $(grep '^sglang==' requirements/cpu.lock)",
            )
        )
    if not has_gpu and not probe.values["plugin"]:
        findings.append(
            Finding(
                *("SGLang plugin", "failed", "SGLang does not know megatron_vespo", "an entry point of this package"),
                *("engines do not start on a CPU", f"{sys.executable} -m pip install --no-deps -e ."),
            )
        )
    return findings

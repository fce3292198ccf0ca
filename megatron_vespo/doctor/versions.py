"""Installed packages against the lock."""

import re
import sys
from collections.abc import Iterable
from importlib.metadata import distributions
from pathlib import Path

from megatron_vespo.doctor.finding import Finding

LOCKS = Path(__file__).parents[2] / "requirements"
EXACT = ("megatron-core", "ray", "sglang", "torch", "transformers")
"""Code here relies on details of these versions."""
DEVELOPMENT = (
    *("execnet", "hypothesis", "iniconfig", "nodeenv", "pluggy", "pyright", "pytest", "pytest-timeout"),
    *("pytest-xdist", "ruff", "sortedcontainers", "trl"),
)
"""Of the lock, and of no use to a run."""
SHOWN = 6


def check_python() -> Finding:
    found = f"{sys.version.split()[0]} at {sys.executable}"
    if sys.version_info[:2] == (3, 11):
        return Finding("python", "ok", found)
    if (3, 11) < sys.version_info[:2] < (3, 13):
        return Finding("python", "warning", found, "3.11", "the locks were resolved and tested with 3.11")
    return Finding(
        *("python", "failed", found, "3.11", "the package and the locks need it"),
        "python3.11 -m venv .venv && make PYTHON=python3.11",
    )


def default_lock(has_gpu: bool) -> Path:
    return LOCKS / ("cuda.lock" if has_gpu else "cpu.lock")


def check_versions(lock: Path) -> Finding:
    """Every package of the lock: there, and of that version (a local part such as +cpu aside)."""
    if not lock.is_file():
        return Finding(
            *("versions", "warning", f"{lock}: no such lock", "a lock file"),
            "nothing says which versions belong together",
            "megatron-vespo doctor --lock requirements/cpu.lock, of the repository",
        )
    wanted, installed = read_lock(lock), installed_versions()
    missing = [name for name in wanted if name not in installed and name not in DEVELOPMENT]
    differ = [name for name in wanted if name in installed and public(installed[name]) != wanted[name]]
    if not missing and not differ:
        return Finding("versions", "ok", f"all {len(wanted)} packages of {lock.name} as locked")
    exact = [name for name in differ if name in EXACT]
    found = [
        f"{name} {installed[name]} (locked: {wanted[name]})" for name in sorted(differ, key=lambda n: n not in EXACT)
    ]
    found += [f"{name} not installed (locked: {wanted[name]})" for name in missing]
    again = " ".join(f"{name}=={wanted[name]}" for name in [*exact, *(n for n in differ if n not in exact), *missing])
    return Finding(
        "versions",
        "failed" if exact else "warning",
        f"{len(differ)} of {len(wanted)} packages of {lock.name} differ, {len(missing)} are missing: {shortened(found)}",
        f"the versions of {lock}",
        f"code here relies on details of {', '.join(exact)}" if exact else "a combination that nobody has tested",
        f"{sys.executable} -m pip install --no-deps {again}",
    )


def read_lock(path: Path) -> dict[str, str]:
    """Normalised name -> version."""
    pairs = (line.split("#")[0].strip().partition("==") for line in path.read_text().splitlines())
    return {normalised(name): version.strip() for name, separator, version in pairs if separator}


def installed_versions() -> dict[str, str]:
    """Normalised name -> version; of several the one that is imported, the first on the path."""
    versions: dict[str, str] = {}
    for distribution in distributions():
        metadata = distribution.metadata
        name, version = metadata["Name"], metadata["Version"]
        if name:
            versions.setdefault(normalised(name), version or "without a version in its metadata")
    return versions


def normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name.strip()).lower()


def public(version: str) -> str:
    return version.split("+")[0]


def shortened(items: Iterable[str]) -> str:
    items = list(items)
    rest = f", and {len(items) - SHOWN} more" if len(items) > SHOWN else ""
    return ", ".join(items[:SHOWN]) + rest

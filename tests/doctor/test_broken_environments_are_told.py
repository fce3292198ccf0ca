"""Whatever is broken, the doctor says what, what it costs and what mends it; it never breaks itself."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_vespo.doctor import Finding, as_json, as_text, is_fit
from megatron_vespo.doctor.accelerators import check_infiniband, seen_by_torch
from megatron_vespo.doctor.clocks import ANSWER, check_node_clocks, file_offset, process_offset
from megatron_vespo.doctor.configuration import check_configuration
from megatron_vespo.doctor.examination import side_by_side
from megatron_vespo.doctor.host import check_disk, check_shared_memory, judge_open_files
from megatron_vespo.doctor.imports import Library, check_import
from megatron_vespo.doctor.probe import run_probe
from megatron_vespo.doctor.versions import check_versions

LIBRARY = Library("safetensors.torch", "safetensors", "no checkpoint")


def examined(*arguments: str, path: str = "", module: str = "megatron_vespo.doctor") -> tuple[int, dict[str, dict]]:
    """Exit code and findings by check of a real doctor, with `path` before all else on its PYTHONPATH."""
    before = [path] if path else []
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*before, os.environ.get("PYTHONPATH", os.getcwd())])}
    command = [sys.executable, "-m", module, *(["doctor"] if module == "megatron_vespo" else [])]
    answer = subprocess.run([*command, *arguments, "--json"], capture_output=True, text=True, env=environment)
    assert answer.stderr == ""
    told = json.loads(answer.stdout)
    assert told["fit"] == (answer.returncode == 0)
    return answer.returncode, {finding["check"]: finding for finding in told["findings"]}


@pytest.mark.slow
def test_this_host_can_run_the_quickstart():
    code, findings = examined("examples/quickstart.yaml", module="megatron_vespo")
    in_order = {"python", "versions", "import torch", "import megatron", "import sglang", "routing flag", "import ray"}
    in_order |= {"configuration", "model and tasks", "disk", "shared memory", "clock, files"}
    assert {check for check in in_order if findings[check]["status"] != "ok"} == set()
    assert findings["model and tasks"]["found"] == "Qwen3MoeForCausalLM, 256 held-out prompts"
    assert {"CUDA", "NCCL", "InfiniBand", "Transformer Engine", "Apex", "Slurm", "open files"} <= findings.keys()
    assert code == 0


def test_an_environment_in_which_even_the_command_is_broken_is_examined(tmp_path):
    for name, code in {
        "typer": "raise OSError('cannot open shared object file')",
        "safetensors": "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)",
    }.items():
        (tmp_path / f"{name}.py").write_text(code)
    (tmp_path / "sglang-9.9.9.dist-info").mkdir()
    (tmp_path / "sglang-9.9.9.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: sglang\nVersion: 9.9.9\n"
    )
    code, findings = examined("--shm-gb", "1e6", path=str(tmp_path))
    assert code == 1
    failed = {check for check, finding in findings.items() if finding["status"] == "failed"}
    assert {"import typer", "import safetensors", "versions", "shared memory"} <= failed
    assert "OSError: cannot open shared object file" in findings["import typer"]["found"]
    assert "died of SIGSEGV" in findings["import safetensors"]["found"]
    assert "sglang 9.9.9 (locked: 0.5.23)" in findings["versions"]["found"]
    assert "sglang==0.5.23" in findings["versions"]["mend"]
    assert all(findings[check]["mend"] and findings[check]["cost"] for check in failed)


@pytest.mark.parametrize(
    ("code", "told"),
    [
        ("import no_such_thing", r"ModuleNotFoundError: No module named 'no_such_thing'"),
        (
            "try:\n    int('x')\nexcept ValueError:\n    raise ImportError('kernels') from None",
            r"ImportError: kernels \(.*safetensors.py:4\)$",
        ),
        (
            "try:\n    import lost_library\nexcept ImportError as error:\n    raise RuntimeError('no backend') from error",
            r"RuntimeError: no backend .*; first cause: ModuleNotFoundError: No module named 'lost_library'",
        ),
        ("import os; os._exit(3)", "ended with exit code 3 and reported nothing"),
        ("import sys; sys.exit('go away')", "SystemExit: go away"),
        ("import os; os.abort()", "died of SIGABRT"),
        ("not python at all", "SyntaxError"),
    ],
)
def test_a_broken_import_is_told_with_its_first_cause(tmp_path, monkeypatch, code, told):
    (tmp_path / "safetensors.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    finding = check_import(LIBRARY, 60)
    assert finding.status == "failed" and "pip install" in finding.mend
    with pytest.raises(AssertionError, match=told):
        raise AssertionError(finding.found)


def test_an_import_that_hangs_is_a_finding_and_leaves_no_process(tmp_path, monkeypatch):
    code = "import os, time\nopen('{0}', 'w').write(str(os.getpid()))\ntime.sleep(3600)"
    (tmp_path / "safetensors.py").write_text(code.format(tmp_path / "pid"))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    finding = check_import(LIBRARY, 3)
    assert finding.status == "failed" and "not done after 3 s" in finding.found
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_what_a_library_prints_does_not_disturb():
    assert run_probe("print('{\"error\": 1}')\nreport(answer=[1, 2])", 60).values == {"answer": [1, 2]}


def distribution(folder: Path, name: str, version: str) -> None:
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


@pytest.mark.parametrize(
    ("installed", "status", "told"),
    [
        ({"Some.Pack_age": "1.0", "torch": "2.0+cpu"}, "ok", "all 2 packages"),
        ({"some-pack-age": "1.1", "torch": "2.0"}, "warning", "some-pack-age 1.1 (locked: 1.0)"),
        ({"some-pack-age": "1.0", "torch": "2.1"}, "failed", "torch 2.1 (locked: 2.0)"),
        ({"torch": "2.0"}, "warning", "some-pack-age not installed (locked: 1.0)"),
    ],
)
def test_versions_are_compared_with_the_lock(tmp_path, monkeypatch, installed, status, told):
    site, lock = tmp_path / "site", tmp_path / "cpu.lock"
    site.mkdir()
    for name, version in installed.items():
        distribution(site, name, version)
    lock.write_text("# a comment\nsome_pack.age==1.0\ntorch==2.0  # another\n")
    monkeypatch.syspath_prepend(site)
    finding = check_versions(lock)
    assert finding.status == status and told in finding.found
    assert check_versions(tmp_path / "no.lock").status == "warning"


def test_space_is_measured_and_too_little_of_it_told(tmp_path):
    free = os.statvfs(tmp_path)
    gib = free.f_bavail * free.f_frsize / 2**30
    assert check_shared_memory(gib / 2, tmp_path).status == "ok"
    small = check_shared_memory(gib * 2, tmp_path)
    assert small.status == "failed" and f"{gib * 2:g} GiB" in small.missing and "--shm-size" in small.mend
    assert check_shared_memory(1, tmp_path / "none").status == "failed"
    assert check_disk("disk", tmp_path / "not" / "yet", gib / 2, "files").status == "ok"
    assert check_disk("disk", tmp_path, gib * 2, "checkpoints").status == "failed"


@pytest.mark.parametrize(
    ("soft", "hard", "sockets", "status", "mend"),
    [
        (1e6, 1e6, 2048, "ok", ""),
        (1024, 1e6, 2048, "failed", "ulimit -n 8192"),
        (4096, 4096, 2048, "warning", "hard limit"),
        (8192, 1e6, 20_000, "failed", "ulimit -n 21024"),
    ],
)
def test_open_files_are_enough_for_the_responses_under_way(soft, hard, sockets, status, mend):
    finding = judge_open_files(soft, hard, sockets)
    assert finding.status == status and mend in finding.mend


def adapter(folder: Path, name: str, state: str, rate: str = "400 Gb/sec (4X NDR)") -> None:
    port = folder / name / "ports" / "1"
    port.mkdir(parents=True)
    (port / "state").write_text(f"{state}\n")
    (port / "rate").write_text(f"{rate}\n")


def test_infiniband_ports_are_read_from_the_kernel(tmp_path):
    assert check_infiniband(True, tmp_path / "none").status == "warning"
    assert check_infiniband(False, tmp_path / "none").status == "note"
    adapter(tmp_path, "mlx5_0", "4: ACTIVE")
    assert check_infiniband(True, tmp_path).status == "ok"
    assert "mlx5_0:1 400 Gb/sec" in check_infiniband(True, tmp_path).found
    adapter(tmp_path, "mlx5_1", "1: DOWN")
    half = check_infiniband(True, tmp_path)
    assert half.status == "warning" and half.missing == "down: mlx5_1:1 (1: DOWN)"


def test_gpus_that_torch_does_not_see_are_a_failure():
    driver = ["NVIDIA H100 80GB HBM3, 580.65"] * 8
    hidden = seen_by_torch(driver, {"devices": [], "build": None, "nccl": None})
    assert hidden[0].status == "failed" and "cuda.lock" in hidden[0].mend and "no CUDA" in hidden[0].found
    h100 = ["NVIDIA H100 80GB HBM3", 80 * 2**30, 9, 0]
    cuda, nccl = seen_by_torch(driver, {"devices": [h100] * 8, "build": "13.0", "nccl": [2, 30, 7]})
    assert (cuda.status, nccl.found) == ("ok", "2.30.7")
    assert cuda.found == "8 x NVIDIA H100 80GB HBM3, 80 GiB, capability 9.0, CUDA 13.0"
    assert seen_by_torch([], {"devices": [], "build": None, "nccl": None})[0].status == "note"


def test_a_clock_that_is_off_is_measured(tmp_path):
    assert file_offset(tmp_path).least == 0
    assert file_offset(tmp_path, clock=lambda: time.time() - 40).seconds == pytest.approx(40, abs=1)
    ahead = ANSWER.replace("time.time()", "time.time() + 7")
    offset = process_offset([sys.executable, "-u", "-c", ahead], 60)
    assert abs(offset.seconds - 7) <= offset.uncertainty + 1e-3
    with pytest.raises(RuntimeError, match="no such node"):
        process_offset([sys.executable, "-c", "import sys; sys.exit('no such node')"], 60)
    with pytest.raises(RuntimeError):
        process_offset([sys.executable, "-c", "import time; time.sleep(3600)"], 1)


def test_nodes_of_a_job_are_asked_for_their_time(tmp_path, monkeypatch):
    """`srun` is a script here, which starts what it is given with the clock of the node that it is asked for."""
    late = "import time; real = time.time; time.time = lambda: real() - 30\n"
    (tmp_path / "srun").write_text(
        f"#!{sys.executable}\nimport os, sys\nat = sys.argv.index({sys.executable!r})\ncommand = sys.argv[at:]\n"
        "node = next(a for a in sys.argv if a.startswith('--nodelist=')).partition('=')[2]\n"
        "if node == 'gone': sys.exit('srun: error: Node gone is DOWN')\n"
        f"if node == 'late': command[-1] = {late!r} + command[-1]\n"
        "os.execv(command[0], command)\n"
    )
    (tmp_path / "srun").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert check_node_clocks(["one", "two"]).status == "ok"
    off = check_node_clocks(["one", "late"])
    assert off.status == "warning" and "late -30." in off.found and "one" not in off.found
    gone = check_node_clocks(["one", "gone"])
    assert gone.status == "warning" and "1 of 2 nodes" in gone.found and "Node gone is DOWN" in gone.found
    assert check_node_clocks([]).status == "note"


def test_mistakes_of_a_configuration_are_findings(tmp_path):
    file = tmp_path / "wrong.yaml"
    file.write_text(Path("examples/quickstart.yaml").read_text() + "\nnonsense: 1\n")
    finding, needs = check_configuration(file, (), 60)
    assert finding.status == "failed" and needs is None and "nonsense: unknown key" in finding.found
    finding, needs = check_configuration(Path("examples/quickstart.yaml"), ("cluster.interface=nowhere7",), 60)
    assert finding.status == "failed" and "'nowhere7' is no interface of this host" in finding.found
    finding, needs = check_configuration(Path("examples/quickstart.yaml"), (), 60)
    assert finding.status == "ok" and needs is not None
    assert needs.sockets == 256 * 8
    weights = Path("examples/tiny_base/model.safetensors").stat().st_size
    assert needs.disk_gb == pytest.approx((3 * 7 + 1) * weights / 2**30)  # keep_last 2, and one being written


def test_a_check_that_breaks_is_a_finding_and_the_others_go_on():
    def breaks() -> Finding:
        raise KeyError("unforeseen")

    found = side_by_side([("first", breaks), ("second", lambda: Finding("second", "ok", "fine"))])
    assert [finding.status for finding in found] == ["failed", "ok"]
    assert "KeyError: 'unforeseen'" in found[0].found


def test_the_table_and_the_json_say_the_same():
    findings = [
        Finding("disk", "ok", "70 GiB free"),
        Finding("open files", "warning", "4,096", "8,192", "fewer workers", "ulimit -n 8192"),
    ]
    lines = as_text(findings).splitlines()
    assert lines[0].split() == ["ok", "disk", "70", "GiB", "free"]
    assert [line.split(maxsplit=1)[0] for line in lines[1:5]] == ["warning", "missing:", "cost:", "mend:"]
    assert lines[-1] == "1 ok, 0 note, 1 warning, 0 failed: a run can start here"
    assert is_fit(findings) and not is_fit([*findings, Finding("shm", "failed", "none")])
    told = json.loads(as_json(findings))
    assert told["fit"] is True
    assert told["findings"][1] == {
        "check": "open files",
        "status": "warning",
        "found": "4,096",
        "missing": "8,192",
        "cost": "fewer workers",
        "mend": "ulimit -n 8192",
    }

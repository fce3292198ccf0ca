import io
import os
import pty
import signal
import subprocess
import sys
import time

import pytest
from rich.console import Console
from small_run import evaluation_row, rollout_row, run_rows, step_row, sync_row

from megatron_vespo.observability.console import RunConsole
from megatron_vespo.observability.console_view import sparkline

HIDE_CURSOR, SHOW_CURSOR = "\x1b[?25l", "\x1b[?25h"


def plain_console(**settings) -> tuple[RunConsole, io.StringIO]:
    out = io.StringIO()
    return RunConsole("run", 12, 4, mode="plain", console=Console(file=out, width=80), **settings), out


def seen(console: RunConsole, width: int) -> str:
    out = io.StringIO()
    recorder = Console(file=out, width=width, force_terminal=False)
    console.console = recorder
    recorder.print(console._view())
    return out.getvalue()


def test_plain_mode_says_each_phase_event_and_row():
    console, out = plain_console()
    with console:
        console.phase("starting the engine")
        console.event("port 30000 is in use [took 30001]")
        for kind, step, values in run_rows(batches=1):
            console.update({"kind": kind, "step": step, **values})
    text = out.getvalue()
    for expected in (
        "starting the engine\n",
        "port 30000 is in use [took 30001]\n",
        "evaluation before: accuracy 0.250 on 64 prompts",
        "batch 0: reward 0.300, response 8.0 tokens (1% cut)",
        "step 1/12: loss -0.0100",
        "mismatch 1.0e-06",
        "drift 1.0e-02",
        "weights: version 4, 1.0 MB in 0.40 s, verified",
    ):
        assert expected in text
    assert text.count("step ") >= 4 and "\x1b" not in text


def test_plain_mode_never_stays_silent():
    console, out = plain_console(heartbeat_seconds=0.2)
    with console:
        console.phase("generating")
        console.progress(37, 64, "groups", "4,210 tokens")
        deadline = time.monotonic() + 5
        while out.getvalue().count("... generating: 37/64 groups, 4,210 tokens") < 2:
            assert time.monotonic() < deadline
            time.sleep(0.02)


def test_a_pipe_gets_plain_lines_and_a_terminal_the_live_view():
    assert not RunConsole("run", 1, console=Console(file=io.StringIO())).live_mode
    assert RunConsole("run", 1, console=Console(file=io.StringIO(), force_terminal=True)).live_mode


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_the_view_holds_the_measurements_and_fits(width):
    console, _ = plain_console()
    for kind, step, values in run_rows():
        console.state.take({"kind": kind, "step": step, **values})
    console.state.begin("generating")
    console.progress(37, 64, "groups", "4,210 tokens")
    text = seen(console, width)
    for expected in ("37/64 groups", "step 12/12", "0.700", "18.0 tokens", "1.0e-06", "40%", "0.90", "0.250"):
        assert expected in text
    assert max(len(line) for line in text.splitlines()) <= width
    assert "▁" in text and "█" in text


def test_the_view_works_before_anything_is_known():
    console, _ = plain_console()
    assert "step 0/12" in seen(console, 80)


def test_numbers_that_are_not_finite_are_shown_and_break_nothing():
    console, _ = plain_console()
    for step in (1, 2, 3):
        values = step_row(0, step % 2)
        broken = {
            name: float("nan") if isinstance(value, float) and step == 2 else value for name, value in values.items()
        }
        console.update({"kind": "step", "step": step, **broken})
        assert "step" in seen(console, 80)


def test_time_left_is_the_batches_left_and_the_last_evaluation():
    now = [0.0]
    console, _ = plain_console(clock=lambda: now[0])
    state = console.state
    state.take({"kind": "sync", "step": 0, **sync_row(0)})
    now[0] += 3  # the evaluation before: not part of a batch
    state.take({"kind": "evaluation", "step": 0, **evaluation_row("before", 0.2)})
    assert state.seconds_left is None
    for batch in range(2):
        now[0] += 6
        state.take({"kind": "rollout", "step": 4 * batch, **rollout_row(batch)})
        for age in range(4):
            now[0] += 1
            state.take({"kind": "step", "step": 4 * batch + age + 1, **step_row(batch, age)})
        state.take({"kind": "sync", "step": 4 * batch + 4, **sync_row(4 * batch + 4)})
    assert state.seconds_left == pytest.approx(10 + 3)  # one batch of 10 s and an evaluation of 3 s
    now[0] += 4
    assert state.seconds_left == pytest.approx(6 + 3)


def test_sparklines_span_least_to_largest():
    assert sparkline([1, 2, 3], 10) == "▁▄█" or sparkline([1, 2, 3], 10) == "▁▅█"
    assert sparkline([5, 5], 10) == "▁▁" and sparkline([], 10) == ""
    assert len(sparkline(range(1000), 14)) <= 14


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_the_terminal_is_restored_when_an_exception_passes(error):
    out = io.StringIO()
    before = sys.stdout, sys.stderr
    with pytest.raises(error), RunConsole("run", 12, console=Console(file=out, force_terminal=True)) as console:
        console.phase("generating")
        assert sys.stdout is not before[0]
        raise error
    assert (sys.stdout, sys.stderr) == before
    text = out.getvalue()
    assert text.rindex(SHOW_CURSOR) > text.rindex(HIDE_CURSOR)
    assert "while generating" in text


def test_ctrl_c_on_a_real_terminal_leaves_the_callers_message_last():
    code = (
        "import time\nfrom megatron_vespo.observability.console import RunConsole\n"
        "try:\n    with RunConsole('run', 12) as c:\n        c.phase('generating'); time.sleep(30)\n"
        "except KeyboardInterrupt:\n    print('stopped by the user')\n"
    )
    main, terminal = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "80", "LINES": "40"}
    child = subprocess.Popen(
        [sys.executable, "-c", code], stdin=terminal, stdout=terminal, stderr=terminal, env=environment
    )
    os.close(terminal)
    text = ""
    while "generating" not in text:
        text += os.read(main, 4096).decode(errors="replace")
    redrawn = text
    while redrawn.count("generating") < 3:  # it moves by itself
        redrawn += os.read(main, 4096).decode(errors="replace")
    child.send_signal(signal.SIGINT)
    text = redrawn
    try:
        while chunk := os.read(main, 4096):
            text += chunk.decode(errors="replace")
    except OSError:  # the terminal's other end is closed: the child has ended
        pass
    assert child.wait(timeout=10) == 0
    os.close(main)
    assert text.rindex(SHOW_CURSOR) > text.rindex(HIDE_CURSOR)
    assert text.rstrip().endswith("stopped by the user")

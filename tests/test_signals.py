"""SIGTERM and SIGINT: from a process's first line to its last, and as PID 1."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dvi.signals import SIGNAL_BASE, Interrupted, Signals, handled
from tests.support.paths import ROOT

NUMBERS = (signal.SIGINT, signal.SIGTERM)


def send(number: int = signal.SIGTERM) -> None:
    os.kill(os.getpid(), number)


@pytest.fixture(autouse=True)
def handlers_stay():
    """Catches handlers that are left behind."""
    before = [signal.getsignal(number) for number in (*NUMBERS, signal.SIGALRM)]
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before[2])
    assert [signal.getsignal(number) for number in NUMBERS] == before[:2]


@pytest.mark.parametrize("number", NUMBERS)
def test_a_handled_signal_runs_finally_blocks_and_ends_the_process_with_its_code(number: int, capfd):
    """Catches a traceback, a wrong exit code, and a child or a file that is left behind."""
    done = []
    with pytest.raises(SystemExit) as end, handled():
        try:
            send(number)
        finally:
            done.append("tidied")
    assert end.value.code == SIGNAL_BASE + number and done == ["tidied"]
    assert capfd.readouterr().err == f"interrupted by {number.name}\n"


def test_a_noted_signal_is_looked_at_when_the_work_is_ready_for_it():
    """Catches a round that is torn."""
    with Signals() as signals:
        send()
        assert signals.received == signal.SIGTERM
        with pytest.raises(Interrupted):
            signals.check()


def test_what_may_be_dropped_is_broken_off_at_once():
    """Catches a measurement that holds an end up, and a signal before it that is forgotten in it."""
    with Signals() as signals:
        with pytest.raises(Interrupted), signals.interrupting():
            send()
            raise AssertionError("it went on")
        with pytest.raises(Interrupted), signals.interrupting():
            raise AssertionError("it was begun")


def test_nobody_catches_an_interruption_with_the_errors():
    """Catches an arm's failure that was a signal: benchmarks and servers go on after any error."""
    with pytest.raises(SystemExit), handled():
        try:
            send()
        except Exception as error:
            raise AssertionError from error


def test_an_interruption_that_a_finalizer_swallowed_comes_again():
    """Catches a signal that is lost because the collector ran when it came."""

    class Finalized:
        def __del__(self) -> None:
            send()

    with pytest.raises(SystemExit) as end, handled():
        finalized = Finalized()
        del finalized
        while True:  # as work goes on that nobody told
            pass
    assert end.value.code == SIGNAL_BASE + signal.SIGTERM


def test_ranks_keep_the_default_actions(monkeypatch: pytest.MonkeyPatch):
    """Catches a rank that waits in a collective, deaf to its launcher."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    before = signal.getsignal(signal.SIGTERM)
    with handled():
        assert signal.getsignal(signal.SIGTERM) is before


# Processes


def start(script: str, *prefix: str) -> subprocess.Popen:
    return subprocess.Popen(
        [*prefix, sys.executable, "-c", script], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def end_of(process: subprocess.Popen, *, after: str, number: int = signal.SIGTERM) -> tuple[int, str]:
    """Exit code and stderr of a process that gets the signal when its stdout has said that."""
    try:
        assert any(line.startswith(after) for line in process.stdout)
        process.send_signal(number)
        _, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    return process.returncode, stderr


IMPORTING = """
import sys
sys.path.insert(0, "{folder}")
from dvi.signals import handled
with handled():
    import endless
"""


def test_an_import_is_ended_at_once(tmp_path: Path):
    """Catches a signal that a library's import swallows."""
    (tmp_path / "endless.py").write_text(
        "print('importing', flush=True)\ntry:\n    while True: pass\nexcept BaseException: pass\n", encoding="utf-8"
    )
    code, stderr = end_of(start(IMPORTING.format(folder=tmp_path)), after="importing")
    assert (code, stderr) == (SIGNAL_BASE + signal.SIGTERM, "interrupted by SIGTERM\n")


SLOW_TO_END = """
import os, signal
from dvi.signals import handled
with handled():
    try:
        os.kill(os.getpid(), signal.SIGTERM)
    finally:
        print("tidying", flush=True)
        while True: pass
"""

FIRST = """
import os
from dvi.signals import handled
with handled():
    print(os.getpid(), flush=True)
    while True: pass
"""
UNSHARE = ("unshare", "--user", "--map-root-user", "--pid", "--fork", "--kill-child")


@pytest.mark.skipif(
    shutil.which("unshare") is None or subprocess.run([*UNSHARE, "true"], capture_output=True).returncode != 0,
    reason="no namespaces here",
)
@pytest.mark.parametrize("num_signals", [1, 2])
def test_the_first_process_of_a_container_ends_too(num_signals: int):
    """Catches a signal that the kernel drops, since PID 1 has no default action."""
    script = FIRST if num_signals == 1 else SLOW_TO_END
    process = start(script, *UNSHARE)
    try:
        first = process.stdout.readline()
        assert num_signals == 2 or first == "1\n"
        [child] = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(child), signal.SIGTERM)
        _, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == SIGNAL_BASE + signal.SIGTERM
    assert num_signals == 2 or stderr == "interrupted by SIGTERM\n"


def test_a_second_signal_ends_the_process_where_it_is():
    """Catches a process that can only be killed because its end takes long."""
    code, _ = end_of(start(SLOW_TO_END), after="tidying")
    assert code == -signal.SIGTERM

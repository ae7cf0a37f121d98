"""Commands of kvpatch in forked children of one process that has loaded everything: each takes a second or less.

A child is a whole process: it can be killed, and what fails in it is gone with it. Its model is the parent's, and what
is asked of that model before its first trial, which writes nothing, is answered as the parent answered it.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import mmap
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.pop("KVPATCH_DEBUG", None)

import kvpatch.cli.progress  # everything is imported before the first child is made
import kvpatch.engine.loading
import kvpatch.report.build
import kvpatch.run
from kvpatch.cli import main as cli
from kvpatch.report.library import chart_library
from small import write_protocol
from tiny import tiny_model_dir

CONDITIONS = ("A", "B", "C", "N1")
LONGEST = 600.0
"""Seconds after which a child hangs."""


class Said(NamedTuple):
    """How a command ended: its exit code (minus the signal that ended it, None where it hung), and what it said."""

    code: int | None
    out: str
    err: str

    @property
    def is_one_line(self) -> bool:
        """Whether it ended with exit code 2 and one line that says why; lines of progress may stand before it."""
        told = [line for line in self.err.splitlines() if line.startswith("kvpatch: ")]
        return (
            self.code == 2 and len(told) == 1 and self.err.splitlines()[-1] == told[0] and "Traceback" not in self.err
        )


@dataclass(frozen=True)
class Child:
    """A command that is going on, and the files of what it says."""

    pid: int
    out: Path
    err: Path
    state: mmap.mmap
    """A byte that both processes see: 0 before the command begins, 1 while it goes on, 2 when it has ended."""

    @property
    def is_going(self) -> bool:
        """Whether the command goes on; of a child that was killed, whether it went on when the signal fell."""
        return self.state[0] == 1

    def ended(self, within: float = LONGEST) -> Said:
        """Wait for its end; one that takes longer is killed."""
        code, end = None, time.monotonic() + within
        while code is None and time.monotonic() < end:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            code = os.waitstatus_to_exitcode(status) if pid else None
            time.sleep(0 if pid else 0.002)
        if code is None:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        return Said(code, self.out.read_text(errors="replace"), self.err.read_text(errors="replace"))

    def killed(self, after: float, how: signal.Signals) -> Said:
        """Send a signal after some seconds, unless it has ended by then."""
        end = time.monotonic() + after
        while time.monotonic() < end:
            # WNOWAIT leaves its end to be read by `ended`.
            if os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
                return self.ended()
            time.sleep(min(0.002, max(0.0, end - time.monotonic())))
        os.kill(self.pid, how)
        return self.ended()


def begun(words: Sequence[object], folder: Path, prepare: Callable[[], None] | None = None) -> Child:
    """Begin a command in a child. folder: for what it says. prepare: called in the child before the command."""
    out, err, state = folder / "said.out", folder / "said.err", mmap.mmap(-1, 1)
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return Child(pid, out, err, state)
    code = 99
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # what comes before the command began comes too late
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        for number, path in ((1, out), (2, err)):
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            os.dup2(handle, number)
            os.close(handle)
        sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False, errors="replace") for number in (1, 2))
        sys.argv = ["kvpatch", *map(str, words)]
        if prepare is not None:
            prepare()
        code = _code_of(lambda: _interruptible(state))
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _interruptible(state: mmap.mmap) -> None:
    """The command, which Ctrl-C interrupts while it goes on, and neither before nor after."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    state[0] = 1
    try:
        cli.main()
    finally:
        state[0] = 2
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def _code_of(command: Callable[[], object]) -> int:
    try:
        command()
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
        return 98
    return 0


def command(words: Sequence[object], folder: Path, prepare: Callable[[], None] | None = None) -> Said:
    """Carry out a command in a child."""
    return begun(words, folder, prepare).ended()


def remember_models() -> None:
    """Load each model once, in the process that calls this, and remember what is asked of it before its first trial."""
    kvpatch.engine.loading.load = _once(kvpatch.engine.loading.load, lambda name, **_: str(name))
    of_model = lambda model, *_: id(model)  # noqa: E731
    for name in ("checked", "floor_of", "engine_of"):
        setattr(kvpatch.run, name, _once(getattr(kvpatch.run, name), of_model))
    chart_library()


def remember_pages() -> None:
    """Remember the first report that is made; for what asks of reports only that they are written."""
    kvpatch.report.build.report_page = _once(kvpatch.report.build.report_page, lambda *_, **__: None)


def _once(function: Callable[..., Any], key_of: Callable[..., Any]) -> Callable[..., Any]:
    known: dict[Any, Any] = {}

    @functools.wraps(function)
    def remembered(*args: Any, **settings: Any) -> Any:
        key = key_of(*args, **settings)
        if key not in known:
            known[key] = function(*args, **settings)
        return known[key]

    return remembered


class Small:
    """A small run on a tiny model: its command, what an undisturbed one leaves, and what another should have left.

    folder: where model, protocol and the undisturbed run are put; KVPATCH_CACHE is set to a folder in it.
    phases: how many, of two pairs each; the trials of the first are computed, and the others copy them, but for their
    last condition.
    """

    def __init__(self, folder: Path, phases: int = 1) -> None:
        self.folder, self.whole = folder, folder / "whole"
        os.environ["KVPATCH_CACHE"] = str(folder / "cache")
        watched = {"question": "?", "n": 2, "conditions": list(CONDITIONS), "attention": True}
        own = ("E1", "F2", "N2", "N3", "P", "D")
        more = {f"{i + 2}": {**watched, "conditions": [*CONDITIONS, own[i]]} for i in range(phases - 1)}
        self.protocol = write_protocol(
            folder,
            phases={"1": watched, **more},
            generation={"max_new_tokens": 5, "temperature": 0.7},
            readouts={"r_v": {"window": 4}, "forced_tokens": 6, "likelihood_tokens": 4, "js_positions": 2},
        )
        self.model = tiny_model_dir("llama", folder)
        remember_models()
        self._in_parent(self.whole)
        gc.collect()
        gc.freeze()
        self.expected = results(self.whole)

    def words(self, out: Path) -> list[object]:
        """The command of the run."""
        return ["run", self.protocol, "--model", self.model, "--out", out]

    def _in_parent(self, out: Path) -> None:
        before, sys.argv = sys.argv, ["kvpatch", *map(str, self.words(out))]
        with (
            open(os.devnull, "w") as nothing,
            contextlib.redirect_stdout(nothing),
            contextlib.redirect_stderr(nothing),
        ):
            assert _code_of(cli.main) == 0
        sys.argv = before

    def differs(self, out: Path) -> list[str]:
        """Files of a run that are not those of the undisturbed one, byte for byte, or that are left over."""
        found = results(out)
        return sorted(
            name for name in found.keys() | self.expected.keys() if found.get(name) != self.expected.get(name)
        )


TIMED = ("report.html", ".lock")
"""Files of a run that hold times, of which only the presence is compared, and the end of the report."""
OF_SESSIONS = ("created", "finished", "seconds", "tokens", "sessions", "command")
"""What run.json says of when and in how many sessions a run was made; the rest is compared."""


def results(out: Path) -> dict[str, bytes]:
    """Every file of a run directory, hidden ones too."""
    files = [path for path in out.rglob("*") if not path.is_dir()]
    return {str(p.relative_to(out)): _without_times(p) for p in files}


def _without_times(path: Path) -> bytes:
    content = path.read_bytes()
    if path.name == "run.json":
        return json.dumps({key: value for key, value in json.loads(content).items() if key not in OF_SESSIONS}).encode()
    return content if path.name not in TIMED else content.rstrip()[-7:] if path.name == "report.html" else b""

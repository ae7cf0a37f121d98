"""A disk that fails: every call of a run that writes fails once, with every error; the same command then goes on.

    python benchmarks/faults.py [--errors ENOSPC EIO ...] [--every 1] [--lasting] [--show 5]

A run of a tiny model, and the commands that write beside it, are carried out once to count the calls that write below
their folder: opening, writing, flushing, closing, renaming, deleting, locking, making directories. Then each of these
fails once with each error. Wanted is one line and exit code 2, or, where the run does not need the file, an end as if
nothing had been. Then the same command is given again, which must leave every file as the undisturbed run has it and no
other. Needs a C compiler and Linux. The whole takes about 25 minutes on one core.
"""

from __future__ import annotations

import argparse
import ctypes
import errno
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

TESTS = Path(__file__).parents[1] / "tests"
sys.path.insert(0, str(TESTS))
ERRORS = ("ENOSPC", "EIO", "EROFS", "EDQUOT", "ENOLCK")
OUTCOMES = ("one line", "borne", "traceback", "hang", "not resumed", "differs")


def preload() -> None:
    """Begin this process anew with the library that makes calls fail, which is built for it."""
    if "KVPATCH_FAULTS" in os.environ:
        return
    folder = tempfile.mkdtemp(prefix="kvpatch-faults-")
    library = Path(folder) / "faults.so"
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        sys.exit("no C compiler on this machine")
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, TESTS / "faults.c", "-ldl"], check=True)
    settings = {"LD_PRELOAD": str(library), "KVPATCH_FAULTS": folder}
    os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | settings)


class Shim:
    """The library within this process and its children."""

    def __init__(self, folder: Path) -> None:
        self._library = ctypes.CDLL(None)
        self._library.faults_hit.restype = ctypes.c_char_p
        self.folder = folder
        self._library.faults_watch(os.fsencode(folder))

    def arm(self, point: int, error: int, is_lasting: bool = False) -> None:
        """Let the call of this number fail; -1 for none."""
        self._library.faults_arm(point, error, is_lasting)

    @property
    def count(self) -> int:
        """Calls since it was last armed."""
        return self._library.faults_count()

    @property
    def hit(self) -> str:
        """The call that failed, and its path within the folder."""
        return self._library.faults_hit().decode().replace(f"{self.folder}/", "")


@dataclass(frozen=True)
class Scene:
    """A command that writes.

    before: puts what it needs into the folder. words: the command. differs: what is not as after an undisturbed one.
    """

    name: str
    before: Callable[[Path], None]
    words: Callable[[Path], list[object]]
    differs: Callable[[Path], list[str]]


def scenes(small: object) -> list[Scene]:
    """The run, and every command that writes into its directory or beside it."""
    from forked import Small, results

    assert isinstance(small, Small)

    def copied(folder: Path) -> None:
        shutil.copytree(small.whole, folder / "run")

    def without(*names: str) -> Callable[[Path], None]:
        def made(folder: Path) -> None:
            copied(folder)
            for name in names:
                (folder / "run" / name).unlink()

        return made

    def damaged(folder: Path) -> None:
        copied(folder)
        part = sorted((folder / "run" / "trials").iterdir())[0]
        part.write_bytes(part.read_bytes()[:100])

    def repaired(folder: Path) -> list[str]:
        shutil.rmtree(folder / "run" / "set-aside", ignore_errors=True)
        kept = results(folder / "run")
        return sorted(name for name in kept if "tmp" in name) + [n for n in kept if n not in small.expected]

    def beside(name: str) -> Callable[[Path], list[str]]:
        def differs(folder: Path) -> list[str]:
            left = [path.name for path in folder.iterdir() if path.name not in ("run", "cache", name)]
            return small.differs(folder / "run") + left + [name] * (not (folder / name).stat().st_size)

        return differs

    def same(folder: Path) -> list[str]:
        return small.differs(folder / "run")

    return [
        Scene("run", lambda _: None, lambda folder: small.words(folder / "run"), same),
        Scene(
            "run, resumed", without("verdicts.json"), lambda folder: small.words(folder / "run"), same
        ),
        Scene("verdicts", without("verdicts.json"), lambda folder: ["verdicts", folder / "run"], same),
        Scene("report", without("report.html"), lambda folder: ["report", folder / "run"], same),
        Scene(
            "report -o", copied, lambda folder: ["report", folder / "run", "-o", folder / "r.html"], beside("r.html")
        ),
        Scene("repair", damaged, lambda folder: ["repair", folder / "run"], repaired),
    ]  # fmt: skip


class Faults:
    """Tries faults, and counts what came of them."""

    def __init__(self, folder: Path, show: int, is_lasting: bool) -> None:
        from forked import Small, remember_pages

        self.show, self.is_lasting = show, is_lasting
        self.counts: dict[tuple[str, str], Counter[str]] = {}
        self.said = folder / "said"
        self.said.mkdir()
        remember_pages()
        self.small = Small(folder)
        self.shim = Shim(folder / "disk")
        os.environ["KVPATCH_CACHE"] = str(self.shim.folder / "cache")

    def _anew(self, scene: Scene) -> None:
        self.shim.arm(-1, 0)
        shutil.rmtree(self.shim.folder, ignore_errors=True)
        self.shim.folder.mkdir()
        scene.before(self.shim.folder)

    def points(self, scene: Scene) -> int:
        """How many calls of a command write."""
        from forked import command

        self._anew(scene)
        self.shim.arm(-1, 0)
        said = command(scene.words(self.shim.folder), self.said)
        assert said.code == 0, said.err
        count = self.shim.count
        assert scene.differs(self.shim.folder) == [], scene.differs(self.shim.folder)
        return count

    def fault(self, scene: Scene, point: int, name: str) -> None:
        """Let one call fail, carry the command out again, and count what came of it."""
        from forked import command

        folder = self.shim.folder
        self._anew(scene)
        self.shim.arm(point, getattr(errno, name), self.is_lasting)
        first = command(scene.words(folder), self.said)
        hit = self.shim.hit
        self.shim.arm(-1, 0)
        came = "one line" if first.is_one_line else "borne" if first.code == 0 else "traceback"
        came, why = "hang" if first.code is None else came, first.err[-600:]
        if came in ("one line", "borne"):
            again = command(scene.words(folder), self.said)
            if again.code != 0:
                came, why = "not resumed", again.err[-600:]
            elif wrong := scene.differs(folder):
                came, why = "differs", f"{wrong}\n{why}"
        counts = self.counts.setdefault((scene.name, name), Counter())
        counts[came] += 1
        if came not in ("one line", "borne") and sum(c[came] for c in self.counts.values()) <= self.show:
            print(f"{scene.name}, {name} at {point} ({hit}): {came}\n{why}", file=sys.stderr, flush=True)

    def print(self) -> None:
        """The table."""
        print(f"{'':16}{'':8}{'tried':>8}" + "".join(f"{outcome:>13}" for outcome in OUTCOMES))
        for (scene, name), counts in self.counts.items():
            print(f"{scene:16}{name:8}{counts.total():8}" + "".join(f"{counts[outcome]:13}" for outcome in OUTCOMES))

    @property
    def is_bad(self) -> bool:
        """Whether anything went wrong."""
        return any(counts[bad] for counts in self.counts.values() for bad in OUTCOMES[2:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--errors", nargs="+", default=list(ERRORS), choices=ERRORS)
    parser.add_argument("--every", type=int, default=1, help="try every so many of the points")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after so many")
    parser.add_argument("--scenes", nargs="+", help="of run, 'run, resumed', verdicts, report, 'report -o', repair")
    parser.add_argument("--lasting", action="store_true", help="every later call fails too")
    parser.add_argument("--show", type=int, default=5, help="examples of each that went wrong")
    options = parser.parse_args()
    preload()
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        faults = Faults(Path(name), options.show, options.lasting)
        chosen = [s for s in scenes(faults.small) if options.scenes is None or s.name in options.scenes]
        points = {scene.name: faults.points(scene) for scene in chosen}
        for scene, count in points.items():
            print(f"{scene}: {count} calls that write", flush=True)
        # In each round every point fails with another error, so that a part of the rounds still tries every point.
        tries = [(r, s, p) for r in range(len(options.errors)) for s in chosen for p in range(points[s.name])]
        tries = tries[:: options.every]
        for number, (round_, scene, point) in enumerate(tries):
            if time.monotonic() - start > 60 * options.minutes:
                print(f"stopped after {number} of {len(tries)}")
                break
            faults.fault(scene, point, options.errors[(point + round_) % len(options.errors)])
            if number % 100 == 99:
                print(f"{number + 1} of {len(tries)} tried, {time.monotonic() - start:.0f} s", flush=True)
    faults.print()
    print(f"{time.monotonic() - start:.0f} s")
    shutil.rmtree(os.environ["KVPATCH_FAULTS"])
    sys.exit(faults.is_bad)


if __name__ == "__main__":
    main()

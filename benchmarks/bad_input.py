"""Bad command lines, mutated protocols, damaged run directories and bad calls: what kvpatch makes of them.

    python benchmarks/bad_input.py [--share 0.1] [--seed 0] [--show 5]

Each is answered in one line (exit code 2, or a `KvpatchError`) or, where it turns out to be right, carried out. Counted
are tracebacks (any other error, and exit code 70), hangs over 5 s of processor time, and damages that were accepted
though what was read changed and nothing was said of it. After those that are "told", the reader said how many trials
are missing. Needs no model that is there; the whole takes about 20 minutes on one core.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import json
import math
import os
import random
import shutil
import signal
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
os.environ.pop("KVPATCH_DEBUG", None)

import kvpatch as kv
from bad_calls import VALUES, bad_calls
from forked import command as command_of
from kvpatch.cli import main as cli
from kvpatch.errors import KvpatchError
from kvpatch.protocols.load import parse_protocol
from synthetic import write_run

LIMIT = 5.0
COUNTS = {"command lines": 400, "protocols": 5_000, "damages": 300, "calls": 300}
TEXTS = [
    "", " ", "-", "--", "..", "/", "/dev/null", "/dev/zero", "nowhere", "nowhere.yaml", "a\x1b[2Jb", "[bold]", "\u202e",
    "é" * 300, "~no-such-user-here/x",
    "x" * 5_000, "~", "$HOME", "1e999", "nan", "-1", "0", "99999999999999999999", "1.5", "true", "None", "{}", "[]",
    "a,b", ",",
    "\udcff", "a=b", "=", "http://x", "organism-nowhere", "dec7", "demo.yaml", "%s%n", "'; --", "../../etc/passwd",
]  # fmt: skip


class Hang(BaseException):
    """More than `LIMIT` seconds."""


@contextlib.contextmanager
def limited() -> Iterator[None]:
    """Stop what takes more than `LIMIT` seconds of processor time."""

    def stop(*_: object) -> None:
        raise Hang

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, LIMIT)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


class Table:
    """What came of each kind of bad input."""

    def __init__(self, show: int) -> None:
        self.counts: dict[str, Counter[str]] = {}
        self.show = show

    def add(self, kind: str, came: str, what: object, why: str = "") -> None:
        """Count one; the first few that went wrong are shown."""
        counts = self.counts.setdefault(kind, Counter())
        counts[came] += 1
        if came in ("traceback", "hang", "accepted") and counts[came] <= self.show:
            print(f"{kind}, {came}: {what!r:.300}\n{why}", file=sys.stderr)

    def try_out(self, kind: str, what: object, call: Callable[[], object]) -> None:
        """Call, and count what came of it."""
        try:
            with limited(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                call()
        except KvpatchError as error:
            is_brief = max(map(len, str(error).splitlines() or [""])) < 5_000
            self.add(kind, "refused" if is_brief else "traceback", what, str(error)[:500])
        except Hang:
            self.add(kind, "hang", what)
        except Exception:
            self.add(kind, "traceback", what, "".join(traceback.format_exc().splitlines(keepends=True)[-5:]))
        else:
            self.add(kind, "carried out", what)

    def print(self) -> None:
        """The table."""
        columns = ("refused", "carried out", "told", "traceback", "hang", "accepted")
        print(f"{'':16}{'tried':>8}" + "".join(f"{column:>13}" for column in columns))
        for kind, counts in self.counts.items():
            print(f"{kind:16}{counts.total():8}" + "".join(f"{counts[column]:13}" for column in columns))


def said_by(words: list[str]) -> tuple[int, str, str]:
    """Exit code, standard output and error of a command line, in this process."""
    out, err = io.StringIO(), io.StringIO()
    before, sys.argv = sys.argv, ["kvpatch", *words]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            cli.main()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(bool(stop.code))
        return code, out.getvalue(), err.getvalue()
    finally:
        sys.argv = before
    return 0, out.getvalue(), err.getvalue()


# Command lines


def command_lines(rng: random.Random, n: int, table: Table, folder: Path) -> None:
    """Commands with wrong names, values and options, each in a forked child, so that no import is timed.

    None names a model that is there, so that nothing is computed.
    """
    commands = {
        "run": ["--model", "--out", "--n", "--phases", "--seed", "--other-model", "--on", "--device", "--dtype"],
        "plan": ["--model", "--n", "--phases", "--seed", "--other-model"],
        "power": ["--n", "--phases", "--effect", "--assume", "--pilot", "--draws", "--seed"],
        "preregister": ["--model", "--out", "--n", "--phases", "--calibration"],
        "status": [], "verdicts": ["--protocol", "--registered", "--exploratory"], "effects": ["--phase"],
        "report": ["--out"], "repair": [], "check": ["--dtype"], "bank": ["--model", "--group", "--lexicon"],
        "pull": [], "validate": ["--only", "--retrain", "--seed"], "nowhere": [], "view": ["--port"],
    }  # fmt: skip
    texts = [text for text in TEXTS if text not in ("-", "/dev/null")]
    for _ in range(n):
        command = rng.choice(list(commands))
        words = [command]
        if rng.random() < 0.9:
            words.append(rng.choice(texts) if command != "view" else "/nowhere/at/all")
        for option in rng.sample(commands[command], rng.randint(0, len(commands[command]))):
            words += [option, rng.choice(texts)]
        if "--only" not in words and command == "validate":
            words += ["--only", "nowhere"]  # the whole takes hours
        if "--draws" not in words and command == "power":
            words += ["--draws", "0"]
        if "--model" not in words and "--model" in commands[command]:
            words += ["--model", "no/such/model"]
        words = [str(folder / "out") if before == "--out" else word for before, word in zip(["", *words], words)]  # noqa: B905
        code, _, err = command_of(words, folder, lambda: limited().__enter__())
        told = [line for line in err.splitlines() if not line.startswith("warning: ")]
        # Each mistake of a protocol has a line of its own.
        is_told = code != 2 or (told and all(line.startswith("kvpatch: ") for line in told))
        is_bad = code not in (0, 1, 2) or "Traceback" in err or (set("\x1b\u202e") & set(err)) or not is_told
        came = "traceback" if is_bad else "refused" if code == 2 else "carried out"
        came = "hang" if code is None or Hang.__name__ in err else came
        table.add("command lines", came, words, f"exit code {code}\n{err[-700:]}")


# Protocols


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """(collection, key) of every place in a tree."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(pairs):
        yield value, key
        yield from places(inner)


def mutated(rng: random.Random, tree: Any, text: str) -> str:
    """The text of a shipped protocol with one to three things wrong: in its tree, or in its bytes."""
    if rng.random() < 0.3:
        letters = list(text)
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(len(letters))
            letters[at : at + rng.choice([0, 1, 1, 30])] = [
                rng.choice(["", "\t", ":", "[", "{", "&a ", "*a", "'", "\n", "\x00", "- ", "#"])
            ]
        return "".join(letters)
    tree = copy.deepcopy(tree)
    for _ in range(rng.randint(1, 3)):
        where, key = rng.choice(list(places(tree)))
        how = rng.choice(["value", "value", "drop", "rename", "swap", "repeat"])
        if how == "value":
            where[key] = rng.choice(VALUES)
        elif how == "drop":
            del where[key]
        elif how == "rename" and isinstance(where, dict):
            where[rng.choice([None, 1, True, "", "x", "calibration", "../x", "[b]", f"{key}x"])] = where.pop(key)
        elif how == "repeat" and isinstance(where, list):
            where.insert(key, copy.deepcopy(where[key]))
        else:
            other, at = rng.choice(list(places(tree)))
            where[key] = copy.deepcopy(other[at])
    return yaml.safe_dump(tree, sort_keys=False)


def protocols(rng: random.Random, n: int, table: Table) -> None:
    """Mutations of shipped protocols, validated in this process."""
    shipped = {}
    for name in ("demo", "validate", "dec7"):
        text = files("kvpatch.protocols").joinpath(f"{name}.yaml").read_text("utf-8")
        shipped[name] = (yaml.safe_load(text), text)
    for _ in range(n):
        name = rng.choices(list(shipped), [6, 3, 1])[0]
        text = mutated(rng, *shipped[name])
        table.try_out("protocols", text[:200], lambda text=text: parse_protocol(text, "mutated.yaml"))


# Run directories


def damages(rng: random.Random, n: int, table: Table, folder: Path) -> None:
    """Damages of a run, each read by every reader: it is refused, or what is read is what it was."""
    whole = write_run(folder / "whole", n=3, calibration=3, phases=["6"], heads=(2, 2)).directory
    readers: dict[str, Callable[[Path], tuple[int, str, str]]] = {
        "status": lambda run: said_by(["status", str(run), "--json"]),
        "verdicts": lambda run: said_by(["verdicts", str(run), "--json"]),
        "effects": lambda run: said_by(["effects", str(run), "--json"]),
        "Run": in_notebook,
        "view": viewed,
    }
    expected = {name: read(whole) for name, read in readers.items()}
    for _ in range(n):
        run = Path(shutil.copytree(whole, folder / "run"))
        told = damage(rng, run)
        name = rng.choice(list(readers))
        try:
            with limited(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                code, out, err = readers[name](run)
            lines = [line for line in err.splitlines() if not line.startswith("warning")]
            if code == 2 and len(lines) == 1:
                table.add("damages", "refused", told)
            elif code != 0:
                table.add("damages", "traceback", (name, told), f"exit code {code}\n{err[-700:]}")
            else:
                is_same = out == expected[name][1]
                came = "carried out" if is_same else "told" if is_short(name, out, err) else "accepted"
                table.add("damages", came, (name, told), out[:200])
        except KvpatchError:
            table.add("damages", "refused", told)
        except Hang:
            table.add("damages", "hang", (name, told))
        except Exception:
            table.add("damages", "traceback", (name, told), traceback.format_exc()[-700:])
        shutil.rmtree(run)


def is_short(reader: str, out: str, err: str) -> bool:
    """Whether a reader says that not all planned trials are stored, as after the loss of whole lines of parts.jsonl."""
    if reader == "status":
        return json.loads(out)["left"] > 0
    if reader == "Run":
        done, shown = json.loads(out)
        return f" {done} of " in shown and f" {done} of {done})" not in shown
    if reader == "view":
        done, planned, is_changed = json.loads(out)
        return done < planned and not is_changed
    return "planned trials are stored" in err


def in_notebook(run: Path) -> tuple[int, str, str]:
    """How many trials a notebook reads, and what it shows of the run."""
    shown = kv.Run(run)
    return 0, json.dumps([len(shown.trials("pandas")), repr(shown).partition(": ")[2]]), ""


def viewed(run: Path) -> tuple[int, str, str]:
    """What the view shows of a run: exit code 2 and its trouble, as other readers end, where it shows some."""
    from kvpatch.view.runs import LiveRun

    live = LiveRun("run", run)
    live.refresh()
    if live.record is None:
        return 2, "", "no run.json that can be read\n"
    counts = (live.progress().done, live.progress().planned, live.protocol is None)
    return (2, "", live.trouble + "\n") if live.trouble else (0, json.dumps(counts), "")


def damage(rng: random.Random, run: Path) -> str:
    """Damage one thing of a run; returns what."""
    parts = sorted((run / "trials").glob("*.parquet"))
    kinds = ["bytes", "cut", "delete", "swap", "copy", "line", "json", "directory", "link", "pipe", "entry"]
    kind, index = rng.choice(kinds), run / "parts.jsonl"
    file = rng.choice([*parts, *parts, *sorted((run / "attention").glob("*.parquet")), index, run / "run.json"])
    told = f"{kind} {file.relative_to(run)}"
    if kind == "bytes":
        data = bytearray(file.read_bytes())
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(len(data))] ^= rng.randint(1, 255)
        file.write_bytes(data)
    elif kind == "cut":
        file.write_bytes(file.read_bytes()[: rng.randrange(file.stat().st_size)])
    elif kind == "delete":
        file.unlink()
    elif kind == "swap":
        a, b = rng.sample(parts, 2)
        content = a.read_bytes()
        a.write_bytes(b.read_bytes())
        b.write_bytes(content)
    elif kind == "copy":
        shutil.copy(parts[0], run / "trials" / "copy.parquet")
        entry = next(e for e in map(json.loads, index.read_text().splitlines()) if e["part"] == parts[0].name)
        index.write_text(index.read_text() + json.dumps({**entry, "part": "copy.parquet"}) + "\n")
    elif kind == "line":
        lines = index.read_text().splitlines()
        lines.insert(
            rng.randrange(len(lines)), rng.choice(["null", "{}", "[1]", '"x"', "{", "\x00", '{"part": 1}', "[" * 5_000])
        )
        index.write_text("\n".join(lines) + "\n")
    elif kind == "json":
        content = json.loads((run / "run.json").read_text())
        known = ("protocol", "model", "planned_by_phase")
        inner = [place for k in known for place in places(content[k])]
        where, key = (content, rng.choice(known)) if rng.random() < 0.2 else rng.choice(inner)
        where[key] = rng.choice([None, [], {}, "x", -1, "[/]"])
        (run / "run.json").write_text(json.dumps(content))
    elif kind == "entry":
        lines = [json.loads(line) for line in index.read_text().splitlines()]
        entry = rng.choice(lines)
        key = rng.choice(list(entry))
        entry[key] = rng.choice(
            [None, "x", -1, 0, 10**9, "../../x.parquet", "0" * 64, [], lines[0].get(key), True, 1.0]
        )
        index.write_text("".join(json.dumps(line) + "\n" for line in lines))
    elif kind == "pipe":
        file.unlink()
        os.mkfifo(file)
    elif kind == "directory":
        file.unlink()
        file.mkdir()
    else:
        file.unlink()
        file.symlink_to(rng.choice(["/nowhere", "/dev/zero", str(run), file.name]))
    return told


# Calls


def calls(rng: random.Random, n: int, table: Table, folder: Path) -> None:
    """Functions of the package with arguments that can't be meant."""
    run = write_run(folder / "read", n=3, calibration=3, phases=["6"], heads=(2, 2)).directory
    (folder / "here").mkdir()
    os.chdir(folder / "here")  # where files go whose names are drawn
    for name, call in bad_calls(rng, n, folder, TEXTS, run):
        table.try_out("calls", name, call)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--share", type=float, default=1.0, help="of the counts to try")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--show", type=int, default=5, help="examples of each that went wrong")
    parser.add_argument("--only", choices=list(COUNTS))
    options = parser.parse_args()
    rng, table = random.Random(options.seed), Table(options.show)
    counts = {kind: math.ceil(count * options.share) for kind, count in COUNTS.items() if options.only in (None, kind)}
    _ = kv.load  # torch and transformers are imported before anything is timed
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["KVPATCH_CACHE"] = str(folder / "cache")
        kinds: dict[str, Callable[[int], None]] = {
            "damages": lambda n: damages(rng, n, table, folder),
            "command lines": lambda n: command_lines(rng, n, table, folder),
            "calls": lambda n: calls(rng, n, table, folder),
            "protocols": lambda n: protocols(rng, n, table),
        }
        for kind, carry_out in kinds.items():
            if kind in counts:
                carry_out(counts[kind])
                print(f"{kind}: {dict(table.counts[kind])}", flush=True)
        os.chdir("/")
    table.print()
    sys.exit(any(c[bad] for c in table.counts.values() for bad in ("traceback", "hang", "accepted")))


if __name__ == "__main__":
    main()

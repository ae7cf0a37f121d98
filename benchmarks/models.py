"""Which models does kvpatch patch rightly? One row per causal class of the installed transformers.

    python benchmarks/models.py [KIND ...] [--multimodal] [--rows FOLDER] [-o docs/models.md] [--seconds 60]
    python benchmarks/models.py [KIND ...] --transformers 5.17.0 --transformers 5.20.2    # what differs under these

Of every class a tiny random model is made, saved, and loaded with `kv.load`. What loads must give what transformers
alone gives: the identities of `kvpatch check`; natural caches of a batch of mixed lengths, past every window; a whole
cache swapped; some layers and slots of keys, of values and of both, in place; and a source appended, so that its keys
move. The slow reference is the model itself with eager attention and transformers' own cache, one row at a time; keys
at other positions are made by running the model at these positions. A row says one of

    right          all of that agrees
    refused        `kv.load` said in one line why not
    WRONG          it loaded, and something disagrees
    traceback      anything but one line
    out of time    it took longer than --seconds
    not built      the class can't be made so small, or not without an input besides token ids
    not there      this version of transformers has no such class

Another version of transformers goes into a folder of its own with what it needs in place of what is installed (an older
huggingface_hub, say); torch and all else stay what they are. With --rows, rows are kept in that folder, one file per
version, and a class whose row is there is not run again.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import torch  # noqa: E402
import transformers  # noqa: E402
from transformers.models.auto.configuration_auto import CONFIG_MAPPING  # noqa: E402

import kvpatch as kv  # noqa: E402
from kvpatch.checks.identities import check  # noqa: E402
from kvpatch.errors import KvpatchError  # noqa: E402
from slow_reference import BOUND, Slow, compare, random_tokens  # noqa: E402
from tiny import CHATML, tiny_tokenizer  # noqa: E402
from zoo import causal_types, multimodal_types, tiny_causal  # noqa: E402


@dataclass
class Row:
    """One model class's result. `works` names what was compared and agreed; `cannot` what kvpatch refuses on it."""

    kind: str
    model_class: str = ""
    verdict: str = ""
    why: str = ""
    works: list[str] = field(default_factory=list)
    cannot: list[str] = field(default_factory=list)
    seconds: float = 0.0


class OutOfTimeError(BaseException):
    """A model took longer than it may."""


@contextlib.contextmanager
def _within(seconds: int) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise OutOfTimeError

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def row_of(kind: str, home: Path, seconds: int) -> Row:
    """Build, load, check and compare one class."""
    row, began = Row(kind), time.perf_counter()
    try:
        with _within(seconds), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _fill(row, kind, home)
    except OutOfTimeError:
        row.verdict, row.why, row.works, row.cannot = "out of time", f"longer than {seconds} s", [], []
    row.seconds = round(time.perf_counter() - began, 1)
    return row


def _fill(row: Row, kind: str, home: Path) -> None:
    if kind not in CONFIG_MAPPING:
        row.verdict = "not there"
        return
    try:
        hf = tiny_causal(kind)
        row.model_class = type(hf).__name__
        with torch.no_grad():
            out = hf(input_ids=torch.tensor([random_tokens(0, 30)]), use_cache=False)[0]
        assert bool(out.isfinite().all()), "logits that are not finite"
        directory = home / kind
        hf.save_pretrained(directory)
        tiny_tokenizer(CHATML).save_pretrained(directory)
    except Exception as error:
        row.verdict, row.why = "not built", _one_line(error)
        return
    try:
        model = kv.load(directory, device="cpu")
    except KvpatchError as error:
        row.verdict, row.why = "refused", str(error).replace(f"{directory}: ", "").replace(str(directory), kind)
        return
    except Exception as error:
        row.verdict, row.why = "traceback", f"load: {_one_line(error)}{_where(error)}"
        return
    row.verdict = "right"
    faults = []
    for name, ask in (("check", lambda: _checked(model)), ("reference", lambda: _compared(model, hf, row))):
        try:
            faults += ask()
        except KvpatchError as error:
            faults.append(f"{name} refuses what was loaded: {error}")
        except Exception as error:
            row.verdict, row.why = "traceback", f"{name}: {_one_line(error)}{_where(error)}"
            return
    if faults:
        row.verdict, row.why = "WRONG", "; ".join(faults)


def _checked(model: kv.Model) -> list[str]:
    return [f"check: {i.identity} ({i.error:.2g})" for i in check(model) if i.holds is False]


def _compared(model: kv.Model, hf: Any, row: Row) -> list[str]:
    errors, refused = compare(model, Slow(hf))
    row.works = [name for name, error in errors.items() if error <= BOUND]
    row.cannot = [f"{name}: {why}" for name, why in refused.items()]
    return [f"{name} differs by {error:.2g}" for name, error in errors.items() if not error <= BOUND]


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _where(error: BaseException) -> str:
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f" ({Path(last.filename).name}:{last.lineno})"


def table(rows: Sequence[Row], others: Mapping[str, Sequence[Row]]) -> str:
    """The page for docs/models.md; `others` are the rows under other versions of transformers."""
    lines = [
        "# Which models work",
        "",
        f"transformers {transformers.__version__}. Made by `{_command(others)}`, which says what is compared: "
        "of every causal class a tiny random model, against transformers alone.",
        "",
        f"{_counted(rows)}.",
        "",
        *(line for version, there in others.items() for line in _section(rows, there, version)),
        *([f"## transformers {transformers.__version__}", ""] if others else []),
        "| `model_type` | class | | parts and alignments that agree | why, or what is refused |",
        "|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda r: (r.verdict != "right", r.verdict, r.kind)):
        why = _escaped(row.why or "; ".join(row.cannot))
        lines.append(f"| {row.kind} | {row.model_class} | {row.verdict} | {', '.join(row.works)} | {why} |")
    return "\n".join(lines) + "\n"


def _command(others: Mapping[str, Sequence[Row]]) -> str:
    versions = "".join(f" --transformers {version}" for version in others)
    return f"python benchmarks/models.py --multimodal{versions} -o docs/models.md"


def _counted(rows: Sequence[Row]) -> str:
    counts = Counter(row.verdict for row in rows if row.verdict != "not there")
    return ", ".join(f"{count} {verdict}" for verdict, count in counts.most_common())


def _section(rows: Sequence[Row], there: Sequence[Row], version: str) -> list[str]:
    """What differs under another version, as a section of the page."""
    found = differences(rows, there)
    absent = [here.kind for here, other in found if other.verdict == "not there"]
    changed = [(here, other) for here, other in found if other.verdict != "not there"]
    lines = [f"## What differs under transformers {version}", "", f"{_counted(there)}.", ""]
    if absent:
        lines += [f"Not in this version: {', '.join(absent)}.", ""]
    if not changed:
        return [*lines, "All other classes give the same.", ""]
    lines += ["| `model_type` | here | there | why |", "|---|---|---|---|"]
    lines += [
        f"| {here.kind} | {_told(here)} | {_told(other)} | {_escaped(_why(here, other))} |" for here, other in changed
    ]
    return [*lines, ""]


def _told(row: Row) -> str:
    return f"{row.verdict}: {', '.join(row.works)}" if row.works else row.verdict


def _why(here: Row, other: Row) -> str:
    """What the row that is not right says, or what one of both can't."""
    return other.why or here.why or "; ".join(other.cannot or here.cannot)


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")


def under_another(version: str, asked: Sequence[str], home: Path) -> list[Row]:
    """The rows under another version of transformers, which pip puts into a folder of its own."""
    place = home / f"transformers-{version}"
    if not place.exists():
        pip = [sys.executable, "-m", "pip", "install", "--quiet"]
        planned = home / "planned.json"
        subprocess.run([*pip, "--dry-run", "--report", str(planned), f"transformers=={version}"], check=True)
        needed = [item["metadata"] for item in json.loads(planned.read_text())["install"]]
        if any(item["name"] == "torch" for item in needed):
            raise SystemExit(f"transformers {version} wants another torch, which would compare two things at once")
        exact = [f"{item['name']}=={item['version']}" for item in needed]
        subprocess.run([*pip, "--no-deps", "--target", str(place), *exact], check=True)
    paths = os.pathsep.join([str(place), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    again = [sys.executable, __file__, *asked, "--rows", str(home)]
    subprocess.run(again, check=True, env={**os.environ, "PYTHONPATH": paths})
    return _kept(home, version)


def differences(here: Sequence[Row], there: Sequence[Row]) -> list[tuple[Row, Row]]:
    """The rows of every kind whose verdict, or whose ways that agree, differ between two versions."""
    rows, others = ({row.kind: row for row in of} for of in (here, there))
    pairs = [
        tuple(of.get(kind, Row(kind, verdict="not there")) for of in (rows, others)) for kind in {**rows, **others}
    ]
    return [(a, b) for a, b in pairs if (a.verdict, a.works) != (b.verdict, b.works)]


def _kept(home: Path, version: str) -> list[Row]:
    """The rows that a folder holds of a version."""
    place = home / f"rows-{version}.json"
    return [Row(**row) for row in json.loads(place.read_text())] if place.exists() else []


def all_rows(kinds: Sequence[str], seconds: int, home: Path) -> list[Row]:
    """The rows of these kinds under the transformers that is imported; each is kept as soon as it is there."""
    version = transformers.__version__
    rows = {row.kind: row for row in _kept(home, version)}
    with tempfile.TemporaryDirectory() as place:
        for kind in kinds:
            if kind in rows:
                continue
            rows[kind] = row = row_of(kind, Path(place), seconds)
            print(f"{kind:28} {row.verdict:10} {row.seconds:5.1f} s  {', '.join(row.works)}  {row.why}", flush=True)
            (home / f"rows-{version}.json").write_text(json.dumps([asdict(r) for r in rows.values()], indent=1))
    return [rows[kind] for kind in kinds]


def main() -> None:
    """Command line."""
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("kinds", nargs="*", help="model types; all causal ones if none is named")
    asked.add_argument("--multimodal", action="store_true", help="also classes that read images or the like")
    asked.add_argument("--rows", type=Path, help="keep the rows in this folder, and go on from those that are there")
    asked.add_argument("-o", "--out", type=Path, help="write the page here")
    asked.add_argument("--seconds", type=int, default=60, help="most time per model")
    asked.add_argument(
        "--transformers", metavar="VERSION", action="append", default=[], help="also run under this version; repeatable"
    )
    options = asked.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.manual_seed(0)
    kinds = options.kinds or [*causal_types(), *(multimodal_types() if options.multimodal else [])]
    again = [*options.kinds, *(["--multimodal"] if options.multimodal else []), "--seconds", str(options.seconds)]
    with tempfile.TemporaryDirectory() as temporary:
        home = options.rows or Path(temporary)
        home.mkdir(parents=True, exist_ok=True)
        rows = all_rows(kinds, options.seconds, home)
        print(f"transformers {transformers.__version__}: {_counted(rows)}")
        others = {version: under_another(version, again, home) for version in options.transformers}
    for version, there in others.items():
        found = differences(rows, there)
        print(f"{len(found)} of {len(rows)} differ under {version}")
        for here, other in found:
            print(f"    {here.kind}: {_told(here)} here, {_told(other)} there. {_why(here, other)}")
    if options.out:
        options.out.write_text(table(rows, others))


if __name__ == "__main__":
    main()

"""Which models does kvpatch patch rightly? One row per causal class of the installed transformers.

    python benchmarks/models.py [KIND ...] [--multimodal] [--json FILE] [-o docs/models.md] [--seconds 60]
    python benchmarks/models.py [KIND ...] --transformers 5.17.0    # the same under another version: the differences

Of every class a tiny random model is made, saved, and loaded with `kv.load`. What loads must give what transformers
alone gives: the identities of `kvpatch check`; natural caches of a batch of mixed lengths, past every window; a whole
cache swapped; some layers and slots of keys, of values and of both, in place; and a source appended, so that its keys
move. The slow reference is the model itself with eager attention and transformers' own cache, one row at a time; keys
at other positions are made by running the model at these positions. A row says one of

    right          all of that agrees
    refused        `kv.load` said in one line why not
    WRONG          it loaded, and something disagrees
    traceback      anything but one line
    not built      the class can't be made so small, or not without an input besides token ids
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
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import torch  # noqa: E402
import transformers  # noqa: E402

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
        row.verdict, row.why = row.verdict or "traceback", f"longer than {seconds} s"
    row.seconds = round(time.perf_counter() - began, 1)
    return row


def _fill(row: Row, kind: str, home: Path) -> None:
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


def table(rows: Sequence[Row]) -> str:
    """The page for docs/models.md."""
    counts = Counter(row.verdict for row in rows)
    lines = [
        "# Which models work",
        "",
        f"transformers {transformers.__version__}. Made by `python benchmarks/models.py`, which says what is compared: "
        "of every causal class a tiny random model, against transformers alone.",
        "",
        ", ".join(f"{count} {verdict}" for verdict, count in counts.most_common()) + ".",
        "",
        "| `model_type` | class | | parts and alignments that agree | why, or what is refused |",
        "|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda r: (r.verdict != "right", r.verdict, r.kind)):
        why = (row.why or "; ".join(row.cannot)).replace("|", "\\|")
        lines.append(f"| {row.kind} | {row.model_class} | {row.verdict} | {', '.join(row.works)} | {why} |")
    return "\n".join(lines) + "\n"


def under_another(version: str, kinds: Sequence[str], home: Path) -> list[Row]:
    """The rows under another version of transformers, which pip puts into a folder of its own."""
    place, written = home / f"transformers-{version}", home / "rows.json"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(place)]
    subprocess.run([*pip, f"transformers=={version}"], check=True)
    paths = os.pathsep.join([str(place), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    again = [sys.executable, __file__, *kinds, "--json", str(written)]
    subprocess.run(again, check=True, env={**os.environ, "PYTHONPATH": paths})
    return [Row(**row) for row in json.loads(written.read_text())]


def differences(here: Sequence[Row], there: Sequence[Row], version: str) -> list[str]:
    """A line per kind whose verdict, or whose ways that agree, differ between two versions."""
    others, lines = {row.kind: row for row in there}, []
    for row in here:
        other = others.get(row.kind, Row(row.kind, verdict="not there"))
        if (row.verdict, row.works) != (other.verdict, other.works):
            why = f" ({other.why})" if other.why else ""
            lines.append(f"{row.kind}: {row.verdict} here, {other.verdict} under {version}{why}")
    return lines


def main() -> None:
    """Command line."""
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("kinds", nargs="*", help="model types; all causal ones if none is named")
    asked.add_argument("--multimodal", action="store_true", help="also classes that read images or the like")
    asked.add_argument("--json", type=Path, help="also write the rows here")
    asked.add_argument("-o", "--out", type=Path, help="write the page here")
    asked.add_argument("--seconds", type=int, default=60, help="most time per model")
    asked.add_argument("--transformers", metavar="VERSION", help="also run under this version; list what differs")
    options = asked.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.manual_seed(0)
    kinds = options.kinds or [*causal_types(), *(multimodal_types() if options.multimodal else [])]
    rows = []
    with tempfile.TemporaryDirectory() as home:
        for kind in kinds:
            rows.append(row_of(kind, Path(home), options.seconds))
            row = rows[-1]
            print(f"{kind:28} {row.verdict:10} {row.seconds:5.1f} s  {', '.join(row.works)}  {row.why}", flush=True)
            if options.json:
                options.json.write_text(json.dumps([asdict(r) for r in rows], indent=1))
    print(dict(Counter(row.verdict for row in rows)))
    if options.transformers:
        with tempfile.TemporaryDirectory() as home:
            there = under_another(options.transformers, kinds, Path(home))
        differ = differences(rows, there, options.transformers)
        print("\n".join([f"{len(differ)} of {len(rows)} differ under {options.transformers}", *differ]))
    if options.out:
        options.out.write_text(table(rows))


if __name__ == "__main__":
    main()

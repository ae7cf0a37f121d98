"""Make the finished runs that the tests of the layout read, anew: one of each shipped organism, and one of the demo.

    python tests/layout/make_finished_runs.py [NAME ...]

Each is what `kvpatch run` leaves, without its report, packed as finished/NAME.tar.xz. An organism takes a minute or two
of one core, the demo about twenty minutes of two. To be run again when a run directory changes its form.
"""

from __future__ import annotations

import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from kvpatch.specs.organisms import ORGANISMS, PREFIX

FOLDER = Path(__file__).with_name("finished")
PAIRS = 4
DEMO = "demo"
COMMANDS = {name: ["validate", "--model", PREFIX + name] for name in ORGANISMS} | {
    DEMO: ["dec7", "--model", "smollm2-135m", "--dtype", "auto"]
}


def make(name: str) -> Path:
    """Carry out one run and pack it."""
    packed = FOLDER / f"{name}.tar.xz"
    with tempfile.TemporaryDirectory() as scratch:
        run = Path(scratch, name)
        command = [sys.executable, "-m", "kvpatch", "run", *COMMANDS[name], "--n", str(PAIRS), "--out", str(run)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        (run / "report.html").unlink()
        with tarfile.open(packed, "w:xz") as archive:
            archive.add(run, arcname=name)
    return packed


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for chosen in sys.argv[1:] or COMMANDS:
        print(make(chosen))

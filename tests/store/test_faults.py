"""Every call by which a run directory is written fails, with one error or another: one line, and the next try is equal.

The library of `faults.c` makes the calls fail, within a process of its own. `benchmarks/faults.py` does the same to
whole runs of a model and to the commands that write beside them.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
COMPILER = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
pytestmark = [
    pytest.mark.skipif(COMPILER is None, reason="no C compiler on this machine"),
    pytest.mark.skipif(sys.platform != "linux", reason="needs Linux, whose calls the library stands before"),
]

TRIES = """
import errno, json, os, shutil, sys
from collections import Counter
from pathlib import Path
from faults import ERRORS, Shim
from kvpatch.errors import KvpatchError
from kvpatch.store.directory import Store
from synthetic import attention_of, dec7, record_of, run_parts


def results(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if not p.is_dir()}


shim, disk = Shim(Path(sys.argv[1])), Path(sys.argv[1])
parts = [(name, rows[:4]) for name, rows in run_parts(dec7(), 1, 1, 1, phases=["1"])][:2]


def write():
    store = Store(disk / "run")
    store.refuse_unwritable()
    with store.locked():
        store.write_record(record_of(dec7(), {"1": 8}))
        for name, rows in parts:
            store.append(name, rows, attention_of(rows, 1, 1))
        store.write_text("verdicts.json", "[]")


def anew():
    shutil.rmtree(disk, ignore_errors=True)
    disk.mkdir()
    shim.arm(-1, 0)
    write()
    return shim.count


count, came = anew(), Counter()
expected = results(disk)
# In turn, since each try writes the directory twice: each call with one error once, and with another from then on.
tries = [(point, ERRORS[(point + shift) % len(ERRORS)], bool(shift)) for shift in (0, 2) for point in range(count)]
for point, name, lasting in tries:
    shutil.rmtree(disk)
    disk.mkdir()
    shim.arm(point, getattr(errno, name), lasting)
    try:
        write()
        told = "borne"
    except KvpatchError as error:
        told = "one line" if str(error).count("\\n") == 0 else "many lines"
    except BaseException as error:
        told = f"{type(error).__name__}: {error} at {point} of {name}, {shim.hit}"
    shim.arm(-1, 0)
    write()
    came[told if results(disk) == expected else f"differs at {point} of {name}, {shim.hit}"] += 1
print(json.dumps([count, came]))
"""


def test_every_call_that_writes_may_fail_once_or_from_then_on(tmp_path):
    library = tmp_path / "faults.so"
    subprocess.run([str(COMPILER), "-shared", "-fPIC", "-o", library, TESTS / "faults.c", "-ldl"], check=True)
    places = [str(TESTS.parent / "benchmarks"), str(TESTS), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-c", TRIES, str(tmp_path / "disk")],
        env={**os.environ, "LD_PRELOAD": str(library), "PYTHONPATH": os.pathsep.join(filter(None, places))},
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    count, came = json.loads(done.stdout)
    assert count > 50 and sum(came.values()) == 2 * count
    assert set(came) <= {"one line", "borne"}, came
    assert came["one line"] > came["borne"]

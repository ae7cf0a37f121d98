"""The faults of benchmarks/planted_defects.py have their place in the code as it is now."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_planted_fault_changes_something_that_is_there():
    spec = importlib.util.spec_from_file_location("planted_defects", ROOT / "benchmarks" / "planted_defects.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["planted_defects"] = module
    spec.loader.exec_module(module)
    gone = [
        (fault.name, before)
        for fault in module.FAULTS
        for before, after in fault.edits
        if before == after or before not in (ROOT / "src" / "kvpatch" / fault.file).read_text("utf-8")
    ]
    assert gone == [] and len(module.FAULTS) >= 24

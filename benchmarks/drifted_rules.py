"""Put back, one at a time, the five rules that once were written twice and had drifted apart, and see the tests of the
layout fail.

    python benchmarks/drifted_rules.py [--only NAME]

The sound copy is asked first, and must pass.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from planted_defects import Fault, fresh_copy, plant, search_path

TESTS = ("tests/layout/test_report_equals_verdicts.py", "tests/layout/test_view_equals_verdicts.py")
RULES = (
    Fault(
        "coherence", "the report stops a condition for its share of coherent outputs, not for the upper bound of it",
        "report/tables.py",
        (("outputs is not None and outputs.is_too_low",
          "outputs is not None and outputs.share < 0.9"),),
        "", TESTS[0],
    ),
    Fault(
        "gate_state", "the report calls a gate open only where each of its gatekeepers is supported",
        "report/judgements.py",
        (("    states = passing.gate_states(protocol, words)\n",
          "    keepers = [h for h in protocol.hypotheses if h.is_gatekeeper]\n"
          "    states = {g: 'no gatekeeper' for g in {h.gate for h in protocol.hypotheses}}\n"
          "    for h in keepers:\n"
          "        passed = words.get(h.id) == 'supported' and states[h.gate] != 'closed'\n"
          "        states[h.gate] = 'open' if passed else 'closed'\n"),),
        "", TESTS[0],
    ),
    Fault(
        "role", "the report takes a condition's role from its definition, whatever its phase lists it under",
        "report/tables.py",
        (("    return protocol.role(phase, name) if name in protocol.conditions else",
          "    return protocol.conditions[name].role if name in protocol.conditions else"),),
        "", TESTS[0],
    ),
    Fault(
        "rounding", "the report rounds numbers in a way of its own",
        "report/text.py",
        (("    out = wording.number(x)\n", '    out = f"{x:.2g}"\n'),),
        "", TESTS[0],
    ),
    Fault(
        "shared_prompts", "the live view takes pairs that share prompts for independent ones",
        "view/estimates.py",
        (("    units = {phase: units_of(protocol, part) for phase, part in parts.items()}\n",
          "    units = {phase: {pair: pair for pair in map(str, part['pair_id'].unique())}"
          " for phase, part in parts.items()}\n"),),
        "", TESTS[1],
    ),
)  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="names of rules, with commas")
    options = parser.parse_args()
    chosen = [rule for rule in RULES if options.only is None or rule.name in options.only.split(",")]
    missed = 0
    with tempfile.TemporaryDirectory(prefix="kvpatch-rules-") as folder:
        told = failing(fresh_copy(Path(folder, "sound")), " ".join(TESTS))
        print(f"sound copy: {told or 'passes'}", flush=True)
        if told:
            return 1
        for rule in chosen:
            copy = fresh_copy(Path(folder, rule.name))
            plant(rule, copy)
            told = failing(copy, rule.tests)
            missed += not told
            print(f"{rule.about}: {told or 'NOT CAUGHT'}", flush=True)
    print(f"{len(chosen) - missed} of {len(chosen)} caught")
    return 1 if missed else 0


def failing(copy: Path, tests: str) -> str:
    """The first test that fails on a copy, on runs made so that the rules differ; empty where none does."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", "small or dec7"]
    environment = {**os.environ, "PYTHONPATH": search_path(copy), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *tests.split()], cwd=copy, env=environment, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return "" if done.returncode == 0 else (lines or ["exit code"])[0].removeprefix("FAILED ").split(" - ")[0]


if __name__ == "__main__":
    sys.exit(main())

"""Files, functions and lists of arguments stay small, but for the functions that a decision names with its reason."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import kvpatch

PACKAGE = Path(kvpatch.__file__).parent
DECISION = PACKAGE.parents[1] / "docs" / "decisions" / "014-long-functions.md"
MOST_LINES_OF_A_FILE, MOST_LINES, MOST_ARGUMENTS = 400, 60, 7


def sources() -> Iterator[tuple[str, str]]:
    """Path inside the package, and text, of every module."""
    for path in sorted(PACKAGE.rglob("*.py")):
        yield path.relative_to(PACKAGE).as_posix(), path.read_text("utf-8")


def faults_of(function: ast.FunctionDef | ast.AsyncFunctionDef) -> set[str]:
    """Which of the limits a function is over."""
    given = [a.arg for a in (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs)]
    faults = set()
    if (function.end_lineno or 0) - function.lineno + 1 > MOST_LINES:
        faults.add("lines")
    if len(given) - (given[:1] in (["self"], ["cls"])) > MOST_ARGUMENTS:
        faults.add("arguments")
    return faults


def test_no_file_has_more_lines_than_a_reader_takes_in() -> None:
    assert [name for name, text in sources() if len(text.splitlines()) > MOST_LINES_OF_A_FILE] == []


def test_a_function_over_the_limits_is_named_in_the_decision_with_the_limit_that_it_is_over() -> None:
    found = {}
    for name, text in sources():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and (faults := faults_of(node)):
                found[f"{name}:{node.name}"] = faults
    rows = re.findall(r"^\| `([^`]+)` \| ([^|]+) \| (.+) \|$", DECISION.read_text("utf-8"), re.M)
    assert found == {name: set(over.strip().split(", ")) for name, over, why in rows if why.strip()}

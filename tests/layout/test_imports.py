"""The table of docs/architecture.md, held by a machine: which package may import which, and no circle."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import kvpatch

PACKAGE = Path(kvpatch.__file__).parent

# A package may import itself, what stands here, and whatever those may import.
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "files": {"errors"},
    "crash": {"files"},
    "specs": {"files"},
    "caches": {"specs"},
    "models": {"caches"},
    "organisms": {"models"},
    "engine": {"models"},
    "readouts": {"caches"},
    "interventions": {"engine", "readouts"},
    "offline": {"errors"},
    "sweeps": {"interventions", "offline"},
    "store": {"specs"},
    "prompts": {"specs"},
    "protocols": {"prompts", "readouts", "store"},
    "planning": {"protocols", "interventions"},
    "executors": {"planning", "store", "crash"},
    "statistics": set(),
    "verdicts": {"statistics", "protocols", "store"},
    "report": {"verdicts", "readouts", "offline"},
    "view": {"report"},
    "checks": {"engine", "interventions"},
    "check": {"checks"},
    "rope": {"caches"},
    "provenance": {"executors", "checks", "crash"},
    "readiness": {"executors", "checks"},
    "planned": {"provenance"},
    "run": {"planned", "readiness", "report", "verdicts", "notebook"},
    "validation": {"run", "organisms"},
    "notebook": {"report", "view"},
    "cli": {"run", "validation", "notebook"},
    "__init__": {"run", "engine", "organisms", "sweeps"},
    "__main__": {"cli"},
}

EXCEPTIONS = {
    # What a notebook calls on a patch is carried out further up; the import waits until it is called.
    ("specs/patch.py", "kvpatch.interventions.splice"),
    ("engine/model.py", "kvpatch.sweeps.sweep"),
    ("engine/model.py", "kvpatch.interventions.from_notebook"),
    # So is what it calls on a cache, to hand it to transformers or to a file.
    ("caches/kvcache.py", "kvpatch.models.exchange"),
    ("caches/kvcache.py", "kvpatch.caches.cache_files"),
}
"""(file, imported module): each with its reason above."""


def modules() -> Iterator[tuple[str, str, ast.Module]]:
    """Path, dotted name and syntax tree of every module of the package."""
    for path in sorted(PACKAGE.rglob("*.py")):
        inside = path.relative_to(PACKAGE).as_posix()
        dotted = "kvpatch." + inside.removesuffix(".py").replace("/", ".")
        yield inside, dotted.removesuffix(".__init__"), ast.parse(path.read_text("utf-8"))


def imported(tree: ast.Module) -> Iterator[tuple[str, bool]]:
    """(dotted name, whether it is imported for type checking alone) of every import from kvpatch, functions' too."""
    for_types = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            if node.module == "kvpatch":
                yield from ((f"kvpatch.{alias.name}", id(node) in for_types) for alias in node.names)
            elif node.module and node.module.startswith("kvpatch."):
                yield node.module, id(node) in for_types
        elif isinstance(node, ast.Import):
            yield from ((a.name, id(node) in for_types) for a in node.names if a.name.split(".")[0] == "kvpatch")


def reach(room: str) -> set[str]:
    """Every package that a package may import."""
    found, waiting = {room}, [room]
    while waiting:
        new = MAY_IMPORT[waiting.pop()] - found
        found |= new
        waiting += new
    return found | {"errors"}


def room_of(dotted: str) -> str | None:
    """The package that a dotted name of kvpatch lies in; None for the version and other names of the top."""
    parts = dotted.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in MAY_IMPORT else None


def test_every_import_follows_the_table():
    uphill = []
    for inside, _, tree in modules():
        room = inside.split("/")[0].removesuffix(".py")
        for dotted, is_for_types in imported(tree):
            target = room_of(dotted)
            if target is None or target in reach(room) or (inside, dotted) in EXCEPTIONS or is_for_types:
                continue
            uphill.append(f"{inside} imports {dotted}, and {room} may not import {target}")
    assert not uphill, "\n".join(uphill)


def test_every_module_stands_in_the_table():
    rooms = {inside.split("/")[0].removesuffix(".py") for inside, _, _ in modules()}
    assert rooms == set(MAY_IMPORT)


def test_the_table_has_no_circle():
    list(TopologicalSorter(MAY_IMPORT).static_order())


def test_no_modules_import_each_other_in_a_circle():
    known = {dotted: tree for _, dotted, tree in modules()}
    graph = {}
    for inside, dotted, tree in modules():
        names = {name for name, is_for_types in imported(tree) if not is_for_types and (inside, name) not in EXCEPTIONS}
        graph[dotted] = {name for name in names if name in known and name != dotted}
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(f"these modules import each other in a circle: {' -> '.join(error.args[1])}")


def test_the_table_of_the_documentation_is_this_one():
    text = (Path(__file__).parents[2] / "docs" / "architecture.md").read_text("utf-8")
    rows = dict(
        (cells[1].strip(" `"), {name.strip(" `") for name in cells[3].split(",")} - {"nothing"})
        for line in text.splitlines()
        if line.startswith("| `") and len(cells := line.split("|")) == 6
    )
    assert rows == {room: MAY_IMPORT[room] for room in MAY_IMPORT if not room.startswith("__")}

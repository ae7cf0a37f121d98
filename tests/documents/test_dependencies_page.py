"""docs/dependencies.md says what every package that kvpatch asks for is for, and names no other as one."""

from __future__ import annotations

import re
import shutil
import subprocess
import tomllib
from datetime import date, timedelta
from pathlib import Path

import pytest
from blocks import REPOSITORY

PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text("utf-8"))["project"]
PAGE = (REPOSITORY / "docs" / "dependencies.md").read_text("utf-8")
PLUGINS = {"pytest-xdist", "mkdocs"}
"""Told by the package they belong to."""


def asked(lines: list[str]) -> set[str]:
    found = {re.split(r"[=<>\[; ]", line, maxsplit=1)[0] for line in lines}
    return {name for name in found if name != "kvpatch"} - PLUGINS


def section(title: str) -> str:
    return PAGE.split(f"\n## {title}")[1].split("\n## ")[0]


def test_every_package_of_the_base_install_has_a_row() -> None:
    cells = re.findall(r"^\| ([^|]*) \|", section("The base install"), re.MULTILINE)
    assert asked(PROJECT["dependencies"]) == {name for cell in cells[1:] for name in cell.split(", ")} - {"---"}


def test_every_package_of_an_extra_is_named_with_its_extra() -> None:
    rows = [line for line in section("Extras").splitlines() if line.startswith("| ")]
    for extra, lines in PROJECT["optional-dependencies"].items():
        told = " ".join(row for row in rows if extra in row.split("|")[1])
        for name in asked(lines):
            assert name in told, f"{name} of the extra {extra}"


def test_the_extras_are_those_that_are_promised() -> None:
    assert {"report", "run", "view", "gguf", "ray", "semantic", "docs", "dev"} <= set(PROJECT["optional-dependencies"])
    everywhere = [*PROJECT["dependencies"], *(line for v in PROJECT["optional-dependencies"].values() for line in v)]
    assert not asked(everywhere) & {"pingouin"}
    assert "polars" not in asked(PROJECT["dependencies"])


def test_what_is_asked_for_is_pinned() -> None:
    lines = (REPOSITORY / "constraints.txt").read_text("utf-8").splitlines()
    pinned = {line.partition("==")[0].lower().replace("_", "-") for line in lines if "==" in line}
    extras = PROJECT["optional-dependencies"].values()
    for line in [*PROJECT["dependencies"], *(line for lines in extras for line in lines)]:
        (name, *_) = asked([line]) or {"numpy"}
        assert name.lower().replace("_", "-") in pinned | {"pip"}, name


@pytest.mark.parametrize(("days", "code"), [(0, 0), (360, 0), (370, 1), (-3, 1), (None, 1)])
def test_lock_that_nobody_looked_over_for_a_year_is_refused_by_ci(tmp_path: Path, days: int | None, code: int) -> None:
    looked = "" if days is None else f"# Last looked over: {date.today() - timedelta(days=days)}\n"
    (tmp_path / "constraints.txt").write_text(f"# Versions.\n{looked}a==1\n")
    (tmp_path / ".ci").mkdir()
    script = shutil.copy(REPOSITORY / ".ci" / "lock-date", tmp_path / ".ci")
    assert subprocess.run(["bash", script], capture_output=True, timeout=60).returncode == code


@pytest.mark.parametrize("day", ["2026-13-45", "yesterday"])
def test_lock_with_a_day_that_is_none_is_refused_by_ci(tmp_path: Path, day: str) -> None:
    (tmp_path / "constraints.txt").write_text(f"# Last looked over: {day}\n")
    (tmp_path / ".ci").mkdir()
    script = shutil.copy(REPOSITORY / ".ci" / "lock-date", tmp_path / ".ci")
    assert subprocess.run(["bash", script], capture_output=True, timeout=60).returncode == 1


def test_audit_fails_where_a_package_was_not_looked_up() -> None:
    assert "pip-audit --strict " in (REPOSITORY / "Makefile").read_text("utf-8")


def test_lock_says_when_it_was_looked_over_and_ci_asks() -> None:
    assert re.search(
        r"^# Last looked over: \d{4}-\d\d-\d\d$", (REPOSITORY / "constraints.txt").read_text(), re.MULTILINE
    )
    assert ".ci/lock-date\n" in (REPOSITORY / ".ci" / "run").read_text()

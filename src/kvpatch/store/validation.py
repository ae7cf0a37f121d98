"""What a validation leaves behind: its findings, and the newest one of this version for gate 0. Needs no torch."""

from __future__ import annotations

import ast
import functools
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from kvpatch.errors import StoreError
from kvpatch.files import read_json, write_whole
from kvpatch.specs.base import Frozen

PACKAGE = Path(__file__).parent.parent
NOT_MEASURING = ("__main__.py", "cli", "notebook.py", "report", "view", "organisms", "validation")
"""Parts of the package whose change leaves a validation what it was: they show, or are the validation itself."""


class Finding(Frozen):
    """One thing that was planted, and what the pipeline said of it."""

    organism: str
    asked: str
    planted: str
    found: str
    holds: bool


class Validation(Frozen):
    """validation.json."""

    version: str
    code_sha256: str = Field(description="of the package's source, what shows results left out")
    scope: str = Field(description="'quick', 'full', or the organisms it was cut down to")
    seed: int
    created: str
    seconds: float
    findings: list[Finding]
    measured: dict[str, Any] = Field(description="figures behind the findings: coverage, false positives, power")

    @property
    def passed(self) -> bool:
        """Whether everything planted was recovered."""
        return all(finding.holds for finding in self.findings)

    def summary(self) -> dict[str, Any]:
        """What run.json keeps."""
        failed = [f"{f.organism}: {f.asked}" for f in self.findings if not f.holds]
        kept = self.model_dump(include={"version", "code_sha256", "scope", "seed", "created"})
        return {"passed": self.passed, **kept, "findings": len(self.findings), "failed": failed}


def gate_zero(summary: Mapping[str, Any] | None) -> str:
    """Whether the tool itself can be trusted, which is asked before any hypothesis (gate 0): what the validation that a
    run recorded found on models with planted truth, or that there was none."""
    asked = "Can kvpatch itself be trusted (gate 0)?"
    if not summary or not isinstance(summary.get("passed"), bool):
        return (
            f"{asked} This version was not validated where the run was made: it was not tried on models whose truth is "
            "known. kvpatch validate --quick does that in a few minutes."
        )
    when = f"{str(summary.get('created'))[:10]}, {summary.get('scope')}"
    which = f"{asked} kvpatch {summary.get('version')} was tried on models whose truth is known ({when})."
    if summary["passed"]:
        return f"{which} It recovered everything planted, {summary.get('findings')} findings."
    failed = list(summary.get("failed") or ["not recorded"])
    more = f" and {len(failed) - 1} more" if len(failed) > 1 else ""
    return f"{which} It FAILED ({failed[0]}{more}), so no verdict of this run can be trusted."


@functools.cache
def code_sha256() -> str:
    """Hash of the source that a validation speaks for; comments do not count."""
    total = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*")):
        place = path.relative_to(PACKAGE)
        if path.suffix in (".py", ".yaml") and place.parts[0] not in NOT_MEASURING:
            content = path.read_bytes()
            told = ast.dump(ast.parse(content)).encode() if path.suffix == ".py" else content
            total.update(f"{place.as_posix()}\n".encode() + told)
    return total.hexdigest()


def write_validation(validation: Validation, folder: Path) -> Path:
    """Write validation.json into a folder.

    Raises:
        StoreError: where it can't be written.
    """
    path = folder / "validation.json"
    text = json.dumps({"passed": validation.passed, **validation.model_dump()}, indent=1) + "\n"
    try:
        write_whole(path, text.encode())
    except OSError as error:
        raise StoreError(f"{path} can't be written: {error.strerror or error}") from error
    return path


def place_in(cache: Path, validation: Validation) -> Path:
    """Where a validation is kept in the user's cache."""
    return cache / "validations" / validation.created.replace(":", "")


def newest_validation(cache: Path, version: str) -> Validation | None:
    """The newest validation of this version and this very code, or None."""
    found = []
    for path in (cache / "validations").glob("*/validation.json"):
        try:
            content = read_json(path)
            content.pop("passed", None)
            validation = Validation.model_validate(content)
        except (OSError, ValueError, AttributeError, TypeError, ValidationError):
            continue  # of another version, or damaged: as if it were not there
        if validation.version == version and validation.code_sha256 == code_sha256():
            found.append(validation)
    return max(found, key=lambda v: v.created, default=None)

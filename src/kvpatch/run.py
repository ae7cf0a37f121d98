"""`kvpatch run`: plan, check, execute, store, decide, report. Where the rooms meet."""

from __future__ import annotations

import gc
import inspect
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

import kvpatch
from kvpatch.crash import write_crash
from kvpatch.engine.loading import load
from kvpatch.engine.model import Model
from kvpatch.errors import KvpatchError, ModelError, ProtocolError, StoreError, visible
from kvpatch.executors.host import Here, Host, How
from kvpatch.executors.specificity import calibrate_readouts, rule_of
from kvpatch.files import cache_directory
from kvpatch.notebook import Run
from kvpatch.offline import is_watched
from kvpatch.planned import Models, other_models, plan_for
from kvpatch.planning.listener import ProgressListener
from kvpatch.planning.plan import Batch, Plan, chosen_phases
from kvpatch.prompts.bank import Bank, load_bank
from kvpatch.protocols.load import load_protocol
from kvpatch.protocols.schema import Protocol, calibration_of
from kvpatch.protocols.stored import stored_protocol
from kvpatch.provenance import hardware, now, record_of
from kvpatch.readiness import checked, engine_of, floor_of, named, refuse_other_mode
from kvpatch.readouts.scorer import names_code
from kvpatch.report.build import write_report
from kvpatch.specs.arguments import path, plain, whole
from kvpatch.store.directory import Store
from kvpatch.store.objects import Place, place_of
from kvpatch.store.readout_calibration import ReadoutCalibration
from kvpatch.store.record import ModelRecord, RunRecord, Session, with_session
from kvpatch.store.validation import newest_validation
from kvpatch.verdicts.deviations import stated
from kvpatch.verdicts.outcome import Outcome, outcome_of, write_verdicts
from kvpatch.verdicts.procedures import refuse_unknown


def run(
    protocol: Protocol,
    models: Models | Host,
    out: Place,
    *,
    seed: int = 0,
    n: int | None = None,
    phases: Sequence[str] | None = None,
    command: Sequence[str] = (),
    listener: ProgressListener | None = None,
) -> Outcome:
    """Run a protocol, or what is left of it, and write verdicts and report.

    models: in this process, or a host that has them elsewhere, such as the workers of `executors.crew`.

    Raises:
        KvpatchError: before anything is written, where something can't be right. Any other error leaves crash.txt in
            the run directory.
    """
    told, asked = _Stages(listener or ProgressListener()), _Asked(seed, n, phases, command)
    try:
        host = Here(models) if isinstance(models, Mapping) else models
        return _run(protocol, host, out, asked, told)
    except KvpatchError:
        raise
    except Exception as error:
        home = out if isinstance(out, Path) else cache_directory()  # a crash may be the store's own
        if (place := write_crash(home, told.last, error)) is not None:
            error.add_note(f"{place} holds what a bug report needs, and nothing private")
            vars(error)["crash_report"] = place
        raise


@dataclass(frozen=True)
class _Asked:
    seed: int
    n: int | None
    phases: Sequence[str] | None
    command: Sequence[str]


class _Stages(ProgressListener):
    """Passes everything on, and remembers the last stage."""

    def __init__(self, listener: ProgressListener) -> None:
        self.listener, self.last = listener, "planning"
        self.planned, self.tokens, self.batch = listener.planned, listener.tokens, listener.batch

    def stage(self, what: str) -> None:
        self.last = what
        self.listener.stage(what)


def _run(protocol: Protocol, host: Host, out: Place, asked: _Asked, listener: ProgressListener) -> Outcome:
    refuse_unknown(protocol.hypotheses)
    store = Store(out)
    store.refuse_unwritable()
    bank = load_bank(protocol.bank, protocol.folder)
    grown_from = store.read_record().grown_to(asked.n) if store.has_record() else ()
    plan, records, machine = host.ask(_planned, protocol, bank, asked, grown_from, listener=listener)
    listener.planned(plan)
    with store.locked():
        record = record_of(protocol, bank, plan, records, asked.seed, asked.n, asked.phases, asked.command, machine)
        if store.has_record():
            stored = store.read_record()
            stored_protocol(stored)  # one that was changed after the run is told before anything is computed
            record = record.continued(stored)
        else:
            _refuse_parts_of_another_run(store, plan)
        newest = newest_validation(cache_directory(), kvpatch.__version__)
        validation = None if newest is None else newest.summary()
        told = stated(protocol, asked.n, record.phases, record.grown_from) | {"validation": validation}
        record = record.model_copy(update=told)
        record = host.ask(_checked, record, records, plan, listener=listener)
        store.write_record(record)
        record = host.ask(_with_readouts, record, plan, protocol, listener=listener)
        store.write_record(record)
        record = _execute(plan, host, store, record, listener)
        listener.stage("deciding and writing the report")
        outcome = replace(outcome_of(store), record=record)
        if told := write_verdicts(store, outcome):
            listener.stage(told)
        store.write_record(record)
        write_report(store, outcome)
    return outcome


def _planned(
    models: Models,
    listener: ProgressListener,
    protocol: Protocol,
    bank: Bank,
    asked: _Asked,
    grown_from: Sequence[int | None],
) -> tuple[Plan, dict[str | None, ModelRecord], dict[str, object]]:
    """The plan, what run.json says of each model, and of the machine that they are on."""
    plan, records = plan_for(
        models, protocol, bank, seed=asked.seed, n=asked.n, phases=asked.phases, grown_from=grown_from
    )
    return plan, records, hardware()


def _checked(
    models: Models,
    listener: ProgressListener,
    record: RunRecord,
    records: Mapping[str | None, ModelRecord],
    plan: Plan,
) -> RunRecord:
    """The record with the checks of the models that were not checked yet, and with how each is decoded."""
    others = dict(record.other_models)
    unchecked = [None] * (record.check is None) + [key for key, other in others.items() if other.check is None]
    machine = record.hardware
    checks = {key: checked(models[key], records[key], machine, listener) for key in unchecked}
    refuse_other_mode(models, record.engine)
    engine = record.engine or {named(key): engine_of(model, plan, key, listener) for key, model in models.items()}
    for key, (found, floor) in checks.items():
        more = floor_of(models[key], records[key], machine, plan, key, engine)
        measured = {"check": found, "noise_floor": floor | more}
        if key is None:
            record = record.model_copy(update=measured)
        else:
            others[key] = others[key].model_copy(update=measured)
    return record.model_copy(update={"other_models": others, "engine": engine})


def _refuse_parts_of_another_run(store: Store, plan: Plan) -> None:
    """Stored parts of a run whose run.json was set aside are taken up where the plan has them, by their names, which
    hold a hash of what was planned.

    Raises:
        StoreError: where the plan lacks one of them.
    """
    planned = {batch.batch_id for batch in plan.batches}
    if stray := [part.part for part in store.parts() if part.batch not in planned]:
        raise StoreError(
            f"{store.directory} has no run.json, and its part {stray[0]} is not one of this run; give the same command "
            "as before, or another --out"
        )


def _readouts_of(record: RunRecord, key: str | None) -> ReadoutCalibration | None:
    """What the calibration of a model's readouts found."""
    return record.readout_calibration if key is None else record.other_models[key].readout_calibration


def _with_readouts(
    models: Models, listener: ProgressListener, record: RunRecord, plan: Plan, protocol: Protocol
) -> RunRecord:
    """The record with the calibration of every model's readouts, found now or by an earlier run."""
    known = {key: calibration for key in models if (calibration := _readouts_of(record, key)) is not None}

    def on_model(model: Model) -> None:
        listener.stage(f"calibrating the likelihood readouts of {model.loaded.name}")

    found = calibrate_readouts(models, plan, protocol.calibration, known, on_model)
    others = {
        key: other.model_copy(update={"readout_calibration": found.get(key)})
        for key, other in record.other_models.items()
    }
    return record.model_copy(update={"readout_calibration": found.get(None), "other_models": others})


def _execute(plan: Plan, host: Host, store: Store, record: RunRecord, listener: ProgressListener) -> RunRecord:
    start, written = time.monotonic(), [0]
    store.done()  # a stored part that is damaged is told before the run says that it begins
    listener.stage("running")
    sessions = [*record.sessions]

    def on_batch(batch: Batch, tokens: int) -> None:
        written[0] += tokens
        listener.batch(batch, tokens)

    def on_change(session: Session) -> None:
        sessions[len(record.sessions) :] = [session]
        store.write_record(record.model_copy(update={"sessions": sessions}))

    rows = {key: int(record.engine.get(named(key), {}).get("rows", 0)) or None for key in host.keys}
    # Whatever was imported and read so far stays; the collector need not look through it again and again.
    gc.collect()
    gc.freeze()
    rules = {key: rule_of(_readouts_of(record, key)) for key in host.keys}
    floors = {key: (record if key is None else record.other_models[key]).noise_floor or {} for key in host.keys}
    known = {key: floor["trials"] for key, floor in floors.items() if "trials" in floor}
    threads = record.engine.get(named(None), {}).get("threads")
    executor = host.executor(How(rows, rules, known, threads), on_change)
    limits = executor.run(plan, store, on_tokens=listener.tokens, on_batch=on_batch)
    found = {phase: asdict(limit) for phase, limit in limits.items()}
    noise = {
        key: floor | {"trials": executor.noise[key]} if key in executor.noise else floor
        for key, floor in floors.items()
    }
    others = {
        key: other.model_copy(
            update={
                "coherence_limits": found.get(calibration_of(key), other.coherence_limits),
                "noise_floor": noise.get(key, other.noise_floor),
            }
        )
        for key, other in record.other_models.items()
    }
    return record.model_copy(
        update={
            "finished": now(),
            "seconds": round(record.seconds + time.monotonic() - start, 1),
            "tokens": record.tokens + written[0],
            "sessions": with_session(record.sessions, sessions[-1] if written[0] else None),
            "coherence_limits": found.get(calibration_of(None), record.coherence_limits),
            "noise_floor": noise.get(None, record.noise_floor),
            "other_models": others,
        }
    )


def run_in_notebook(
    protocol: str | os.PathLike[str] | Protocol,
    model: Model | str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    n: int | None = None,
    phases: str | int | Sequence[str | int] | None = None,
    seed: int = 0,
    allow_code: bool = False,
) -> Run:
    """Run a protocol on a model, resuming where a previous run stopped: `kv.run("dec7", model, out="results", n=20)`.

    It writes what `kvpatch run` writes, verdicts and report included.

    Args:
        protocol: a shipped protocol's name, a YAML file, or a protocol that is loaded.
        model: a model as `kv.load` gives it, or a name. The further models of a protocol are loaded by their names.
        out: the run directory.
        n: pairs per condition; the number that each phase names if None.
        phases: one or more phases, such as "1", "1,2" or ["1", "2"]; all if None.
        seed: decides the order of the pairs and the trials' random numbers.
        allow_code: also score with a function that the protocol names, which runs its code.
    Returns:
        The run, as `kv.Run(out)` reads it.
    Raises:
        KvpatchError: before anything is written, where something can't be right.
    """
    place_of(out)  # what is no path is told before anything is loaded
    if not isinstance(protocol, Protocol):
        protocol = load_protocol(path("protocol", protocol, error=ProtocolError), needs_files=True)
    chosen = protocol
    if names_code(name := chosen.readouts.lexicon) and not allow_code:
        raise ProtocolError(
            f"{chosen.protocol} scores with the function {name}; allow_code=True runs it, if you trust it"
        )
    names = _phase_names(phases)
    chosen_phases(chosen, names, None if n is None else whole("n", n, error=ProtocolError))
    if not isinstance(model, Model | str | os.PathLike):
        raise ModelError(f"model must be a Model of kv.load or a name, got a {type(model).__name__}")
    models: dict[str | None, Model] = {None: model if isinstance(model, Model) else load(model)}
    models |= {key: load(other) for key, other in other_models(chosen, names).items()}
    threads = torch.get_num_threads()
    with _NotebookBar() as listener:
        try:
            run(chosen, models, place_of(out), seed=whole("seed", seed), n=n, phases=names, listener=listener)
        finally:
            torch.set_num_threads(threads)
            gc.unfreeze()
    return Run(out)


def _phase_names(phases: object) -> list[str] | None:
    """Phases by name, however they were given."""
    if phases is None:
        return None
    given = plain(phases)
    listed = given.split(",") if isinstance(given, str) else given if isinstance(given, (list, tuple)) else [given]
    return [str(name).strip() for name in listed]


class _NotebookBar(ProgressListener):
    """A bar of the batches, named by the stage, where somebody can see it."""

    def __enter__(self) -> _NotebookBar:
        from tqdm import tqdm

        self.bar = tqdm(unit="batch", delay=1, leave=False, disable=not is_watched())
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def stage(self, what: str) -> None:
        self.bar.set_description(visible(what))

    def planned(self, plan: Plan) -> None:
        self.bar.total = len(plan.batches)

    def batch(self, batch: Batch, tokens: int) -> None:
        self.bar.update()


class _Callable(ModuleType):
    """This module, which may be called: `kvpatch.run` is both where a run is carried out and what a notebook calls."""

    __signature__ = inspect.signature(run_in_notebook)

    def __call__(self, *args: Any, **settings: Any) -> Run:
        return run_in_notebook(*args, **settings)


_Callable.__call__.__doc__ = run_in_notebook.__doc__
sys.modules[__name__].__class__ = _Callable

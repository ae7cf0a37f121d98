"""`kvpatch run`: plan, check, execute, store, decide, report. Where the rooms meet."""

from __future__ import annotations

import functools
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch

import kvpatch
from kvpatch.check import check
from kvpatch.errors import ModelError, ProtocolError
from kvpatch.executors.local import LocalExecutor
from kvpatch.fit import refuse_misfits
from kvpatch.model import Model
from kvpatch.models.load import template_sha256, tokenizer_sha256, weights_sha256
from kvpatch.models.template import has_template
from kvpatch.outcome import Outcome, outcome_of, write_report, write_verdicts
from kvpatch.prompts.bank import Bank, load_bank
from kvpatch.protocols.plan import Batch, Plan, make_plan
from kvpatch.protocols.schema import Protocol
from kvpatch.readouts.behavior import Lexicon
from kvpatch.readouts.geometry import layer_at
from kvpatch.store import ModelRecord, RunRecord, Store


class Watcher:
    """What a run tells whoever watches; every method may be replaced."""

    def stage(self, what: str) -> None:
        """A new stage has begun."""

    def planned(self, plan: Plan) -> None:
        """The plan is made."""

    def tokens(self, rows_going: int) -> None:
        """A decoding step wrote this many tokens."""

    def batch(self, batch: Batch, tokens: int) -> None:
        """A batch is stored, or found stored; it wrote this many tokens now."""


def plan_for(
    model: Model, protocol: Protocol, bank: Bank, *, seed: int, n: int | None, phases: Sequence[str] | None
) -> tuple[Plan, ModelRecord]:
    """The plan of a protocol on a model, and the record of the model.

    Raises:
        ProtocolError: where the protocol can't run on this model or bank.
    """
    for layer in (protocol.readouts.r_v.early, protocol.readouts.r_v.late):
        layer_at(layer, model.geometry.layers)
    Lexicon.load(protocol.readouts.lexicon)
    record = model_record(model)
    encode = functools.cache(lambda text: model.encode(text, may_be_empty=not text))
    longest = max(len(encode(prompt.text).token_ids) for prompt in bank.prompts)
    readouts = protocol.readouts
    room = max(protocol.generation.max_new_tokens, readouts.forced_tokens, readouts.likelihood_tokens)
    if longest + room > model.geometry.context:
        raise ProtocolError(
            f"the longest prompt has {longest} tokens and {room} are to follow; "
            f"the model's context is {model.geometry.context}"
        )
    plan = make_plan(
        protocol,
        bank,
        body_length=lambda text: encode(text).body_length,
        model_key=f"{record.weights_sha256}:{record.tokenizer_sha256}:{record.template_sha256}:{record.dtype}",
        kv_heads=model.geometry.kv_heads,
        has_template=has_template(model.tokenizer),
        can_move_keys=all(rope.layout != "absolute" for rope in model.geometry.rope),
        seed=seed,
        n=n,
        phases=phases,
    )
    refuse_misfits(plan, model.geometry, encode, model.continuation_ids, room)
    return plan, record


def run(
    protocol: Protocol,
    model: Model,
    out: Path,
    *,
    seed: int = 0,
    n: int | None = None,
    phases: Sequence[str] | None = None,
    command: Sequence[str] = (),
    watcher: Watcher | None = None,
) -> Outcome:
    """Run a protocol, or what is left of it, and write verdicts and report.

    Raises:
        KvpatchError: before anything is written, where something can't be right.
    """
    watcher = watcher or Watcher()
    bank = load_bank(protocol.bank)
    plan, model_info = plan_for(model, protocol, bank, seed=seed, n=n, phases=phases)
    watcher.planned(plan)
    store = Store(out)
    with store.locked():
        record = _record(protocol, bank, plan, model_info, seed, n, phases, command)
        if store.has_record():
            stored = store.read_record()
            if reason := record.differs_from(stored):
                raise ProtocolError(f"{out} belongs to another run: it has {reason}; give another --out")
            phases_of_both = [*stored.phases, *(p for p in record.phases if p not in stored.phases)]
            record = stored.model_copy(update={"phases": phases_of_both, "planned": max(stored.planned, plan.n_trials)})
        if record.check is None:
            watcher.stage("checking that this model is patched correctly")
            found = check(model)
            if bad := [i for i in found if i.holds is False]:
                raise ModelError(
                    f"{model.loaded.name} fails '{bad[0].identity}': error {bad[0].error:.2g} > {bad[0].bound:.2g}"
                )
            noise = next(i for i in found if i.identity.startswith("batched rows"))
            floor = {
                "logits_relative": noise.error,
                "how": "largest logit difference of one row alone and among others",
            }
            record = record.model_copy(update={"check": [i.model_dump() for i in found], "noise_floor": floor})
        store.write_record(record)
        record = _execute(plan, model, store, record, watcher)
        watcher.stage("deciding and writing the report")
        outcome = replace(outcome_of(store), record=record)
        write_verdicts(store, outcome)
        store.write_record(record)
        write_report(store, outcome)
    return outcome


def _execute(plan: Plan, model: Model, store: Store, record: RunRecord, watcher: Watcher) -> RunRecord:
    start, written = time.monotonic(), [0]
    watcher.stage("running")

    def on_batch(batch: Batch, tokens: int) -> None:
        written[0] += tokens
        watcher.batch(batch, tokens)

    limits = LocalExecutor(model).run(plan, store, on_tokens=watcher.tokens, on_batch=on_batch)
    return record.model_copy(
        update={
            "finished": _now(),
            "seconds": round(record.seconds + time.monotonic() - start, 1),
            "tokens": record.tokens + written[0],
            "coherence_limits": limits and {"nll_target": limits.nll_target, "repetition_4": limits.repetition_4},
        }
    )


def model_record(model: Model) -> ModelRecord:
    """What run.json says of a model."""
    g = model.geometry
    return ModelRecord(
        name=model.loaded.name,
        architecture=g.architecture,
        layers=g.layers,
        kv_heads=g.kv_heads,
        query_heads=g.query_heads,
        head_dim=g.head_dim,
        dtype=str(model.backbone.dtype).removeprefix("torch."),
        device=str(model.backbone.device.type),
        weights_sha256=weights_sha256(model.loaded),
        tokenizer_sha256=tokenizer_sha256(model.tokenizer),
        template_sha256=template_sha256(model.tokenizer),
    )


def _record(
    protocol: Protocol,
    bank: Bank,
    plan: Plan,
    model: ModelRecord,
    seed: int,
    n: int | None,
    phases: Sequence[str] | None,
    command: Sequence[str],
) -> RunRecord:
    return RunRecord(
        kvpatch_version=kvpatch.__version__,
        protocol=protocol.model_dump(mode="json", by_alias=True),
        protocol_sha256=protocol.sha256,
        bank_sha256=bank.sha256,
        model=model,
        seed=seed,
        n=n,
        phases=list(protocol.phases) if phases is None else list(phases),
        planned=plan.n_trials,
        versions={name: version(name) for name in ("torch", "transformers", "numpy", "scipy", "pyarrow")},
        git=_git(),
        hardware=_hardware(),
        command=list(command),
        created=_now(),
        skipped=[s.model_dump() for s in plan.skipped],
        dropped_pairs=plan.dropped_pairs,
    )


def _now() -> str:
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


def _hardware() -> dict[str, object]:
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

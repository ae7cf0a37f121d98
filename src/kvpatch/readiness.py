"""What is asked of a model before its first trial: is it patched correctly, how noisy, and what runs it fastest.

What a check found is kept in the user's cache, since it can only come out the same for the same weights, settings,
tokenizer, code, libraries and hardware. A run takes it from there and says when it was measured. `kvpatch check`
measures anew, and so does a run where KVPATCH_CHECK_AGAIN is set, or where a model has code of its own; these keep
nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from kvpatch.checks.identities import check
from kvpatch.checks.noise_floor import noise_floor
from kvpatch.engine.backend import fast_of
from kvpatch.engine.calibration import calibrate
from kvpatch.engine.model import Model
from kvpatch.errors import ModelError, StoreError
from kvpatch.files import cache_directory, read_json, write_whole
from kvpatch.planning.listener import ProgressListener
from kvpatch.planning.plan import Plan
from kvpatch.protocols.schema import Generation
from kvpatch.store.record import ModelRecord
from kvpatch.store.validation import code_sha256

WORTH_CALIBRATING = 1500
"""Trials from which on a run on a processor begins with a calibration of a few seconds."""

SWITCHES = ("MKL_", "OMP_", "ATEN_", "DNNL_", "ONEDNN_", "CUBLAS_", "NVIDIA_TF32", "TORCH_")
"""Beginnings of the names of environment variables that change how products are computed."""


def checked(
    model: Model, record: ModelRecord, hardware: Mapping[str, object], listener: ProgressListener
) -> tuple[list[dict[str, object]], dict[str, object]]:
    """What the check of a model found, and how far its logits change among others; of an earlier run where it can't
    differ. `measured` in the second says when.

    record, hardware: what run.json says of the model and the machine.

    Raises:
        ModelError: naming the identity that fails, or where nothing says which token ends a reply.
    """
    if not model.end_tokens:
        raise ModelError(
            f"{model.loaded.name} names no token that ends a reply, so that none would end: set eos_token_id in its "
            "generation_config.json or config.json, or the tokenizer's eos_token"
        )

    def measure() -> dict[str, Any]:
        listener.stage(f"checking that {model.loaded.name} is patched correctly")
        found = check(model)
        if bad := [i for i in found if i.holds is False]:
            raise ModelError(
                f"{model.loaded.name} fails '{bad[0].identity}': error {bad[0].error:.2g} > {bad[0].bound:.2g}"
            )
        noise = next(i for i in found if i.identity.startswith("batched rows"))
        return {"check": [i.model_dump() for i in found], "logits_relative": noise.error}

    found = _kept("check", model, record, hardware, {}, measure)
    floor = {
        "logits_relative": found["logits_relative"],
        "how": "largest logit difference alone and among others",
        "measured": found["measured"],
    }
    return found["check"], floor


def floor_of(
    model: Model,
    record: ModelRecord,
    hardware: Mapping[str, object],
    plan: Plan,
    key: str | None,
    engine: Mapping[str, Mapping[str, object]],
) -> dict[str, Any]:
    """A model's noise floor at the batch size and the threads that its trials run with."""
    batches = [batch for batch in plan.batches if batch.model == key]
    how = engine.get(named(key), {})
    together = max((len(batch.trials) for batch in batches), default=0)
    before = torch.get_num_threads()
    threads = int(str(how.get("threads", 0))) or before
    # Float32 does not depend on the batch's size, so that a few rows tell enough, and cost little.
    rows = 0 if model.backbone.is_exact else int(str(how.get("rows", 0))) or together
    generation = batches[0].generation if batches else Generation()
    asked: dict[str, Any] = {
        "rows": rows,
        "temperature": generation.temperature,
        "new_tokens": generation.max_new_tokens,
    }

    def measure() -> dict[str, Any]:
        try:
            torch.set_num_threads(threads)
            return noise_floor(model, **asked)
        finally:
            torch.set_num_threads(before)

    found = _kept("noise_floor", model, record, hardware, asked | {"threads": threads}, measure)
    return {name: value for name, value in found.items() if name != "measured"}


def _kept(
    what: str,
    model: Model,
    record: ModelRecord,
    hardware: Mapping[str, object],
    asked: Mapping[str, object],
    measure: Callable[[], dict[str, Any]],
) -> dict[str, Any]:
    """What was measured before of the same model, code, libraries and machine, or is measured now and kept."""

    def measured() -> dict[str, Any]:
        return measure() | {"measured": datetime.now(UTC).isoformat(timespec="seconds")}

    has_own_code = model.loaded.is_held or not type(model.loaded.hf).__module__.startswith("transformers.")
    if has_own_code or os.environ.get("KVPATCH_CHECK_AGAIN"):
        return measured()  # not kept either: what it rests on is not all in the key
    settings = model.loaded.hf.config.to_dict() | {"_name_or_path": ""}
    same = {
        "what": what,
        "asked": dict(asked) | {"batch_invariant": model.batch_invariant},
        "model": record.model_dump(exclude={"name"}),
        "settings": hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest(),
        "hardware": dict(hardware),
        "libraries": {name: version(name) for name in ("torch", "transformers", "numpy")},
        "code": code_sha256(),
        "switches": {name: value for name, value in sorted(os.environ.items()) if name.startswith(SWITCHES)},
    }
    told = json.dumps(same, sort_keys=True)
    place = cache_directory() / "checks" / f"{hashlib.sha256(told.encode()).hexdigest()}.json"
    if (found := _read(place, same)) is None:
        found = measured()
        with suppress(OSError):  # a cache that can't be written costs time, and nothing else
            write_whole(place, json.dumps({"of": same, "found": found}).encode())
    return found


def _read(place: Path, same: Mapping[str, object]) -> dict[str, Any] | None:
    try:
        kept = read_json(place)
    except (OSError, ValueError):
        return None
    is_whole = isinstance(kept, dict) and kept.get("of") == same and isinstance(kept.get("found"), dict)
    return kept["found"] if is_whole else None


def named(key: str | None) -> str:
    """What `RunRecord.engine` calls a model: its key, "own" for the run's own."""
    return key or "own"


def refuse_other_mode(models: Mapping[str | None, Model], engine: Mapping[str, Mapping[str, object]]) -> None:
    """Refuse to go on without batch invariance with a GPU's run that was begun with it.

    Raises:
        StoreError: naming the way on.
    """
    for key, model in models.items():
        begun = engine.get(named(key), {}).get("batch_invariant")
        if model.backbone.device.type == "cuda" and begun and not model.batch_invariant:
            raise StoreError("this run was begun batch-invariant; go on without --fast, or give another --out")


def engine_of(model: Model, plan: Plan, key: str | None, listener: ProgressListener) -> dict[str, object]:
    """How a model's trials are decoded: what carries out a step, and on a processor threads and rows at a time, found
    by timing where a run is long enough to gain from it."""
    fast = fast_of(model.backbone)
    generation = next((batch.generation for batch in plan.batches if batch.model == key), Generation())
    found: dict[str, object] = {
        "step": fast.ops,
        "note": fast.note,
        "difference": fast.error,
        "batch_invariant": fast.is_batch_invariant and (generation.top_p == 1 or generation.temperature == 0),
    }
    if sum(len(batch.trials) for batch in plan.batches if batch.model == key) < WORTH_CALIBRATING:
        return found
    listener.stage(f"finding how to run {model.loaded.name} fastest")
    how = calibrate(model.backbone)
    return found if how is None else found | asdict(how)

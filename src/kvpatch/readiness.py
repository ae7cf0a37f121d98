"""What is asked of a model before its first trial: is it patched correctly, how noisy, and what runs it fastest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict

import torch

from kvpatch.checks.identities import check
from kvpatch.checks.noise_floor import noise_floor
from kvpatch.engine.backend import fast_of
from kvpatch.engine.calibration import calibrate
from kvpatch.engine.model import Model
from kvpatch.errors import ModelError
from kvpatch.planning.listener import ProgressListener
from kvpatch.planning.plan import Plan

WORTH_CALIBRATING = 1500
"""Trials from which on a run on a processor begins with a calibration of a few seconds."""


def checked(model: Model, listener: ProgressListener) -> tuple[list[dict[str, object]], dict[str, object]]:
    """What the check of a model found, and how far its logits change among others.

    Raises:
        ModelError: naming the identity that fails, or where nothing says which token ends a reply.
    """
    if not model.end_tokens:
        raise ModelError(
            f"{model.loaded.name} names no token that ends a reply, so that none would end: set eos_token_id in its "
            "generation_config.json or config.json, or the tokenizer's eos_token"
        )
    listener.stage(f"checking that {model.loaded.name} is patched correctly")
    found = check(model)
    if bad := [i for i in found if i.holds is False]:
        raise ModelError(
            f"{model.loaded.name} fails '{bad[0].identity}': error {bad[0].error:.2g} > {bad[0].bound:.2g}"
        )
    noise = next(i for i in found if i.identity.startswith("batched rows"))
    floor: dict[str, object] = {
        "logits_relative": noise.error,
        "how": "largest logit difference alone and among others",
    }
    return [i.model_dump() for i in found], floor


def floor_of(
    model: Model, plan: Plan, key: str | None, engine: Mapping[str, Mapping[str, object]]
) -> dict[str, object]:
    """A model's noise floor at the batch size and the threads that its trials run with."""
    batches = [batch for batch in plan.batches if batch.model == key]
    how = engine.get(named(key), {})
    together = max((len(batch.trials) for batch in batches), default=0)
    threads, before = int(str(how.get("threads", 0))), torch.get_num_threads()
    try:
        torch.set_num_threads(threads or before)
        # Float32 does not depend on the batch's size, so that a few rows tell enough, and cost little.
        rows = 0 if model.backbone.dtype == torch.float32 else int(str(how.get("rows", 0))) or together
        return noise_floor(model, rows=rows, temperature=batches[0].generation.temperature if batches else 0.7)
    finally:
        torch.set_num_threads(before)


def named(key: str | None) -> str:
    """What `RunRecord.engine` calls a model: its key, "own" for the run's own."""
    return key or "own"


def engine_of(model: Model, plan: Plan, key: str | None, listener: ProgressListener) -> dict[str, object]:
    """How a model's trials are decoded: what carries out a step, and on a processor threads and rows at a time, found
    by timing where a run is long enough to gain from it."""
    fast = fast_of(model.backbone)
    found: dict[str, object] = {"step": fast.ops, "note": fast.note, "difference": fast.error}
    if sum(len(batch.trials) for batch in plan.batches if batch.model == key) < WORTH_CALIBRATING:
        return found
    listener.stage(f"finding how to run {model.loaded.name} fastest")
    how = calibrate(model.backbone)
    return found if how is None else found | asdict(how)

"""Run a plan in this process: every batch that is not stored yet, in the order of the plan."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol as Interface

import numpy as np
import pyarrow as pa

from kvpatch.executors.batch import OnTokens, run_batch
from kvpatch.model import Model
from kvpatch.protocols.plan import Batch, Plan
from kvpatch.readouts.fluency import CoherenceLimits, coherence_limits
from kvpatch.store import Store

OnBatch = Callable[[Batch, int], None]
"""Called when a batch is stored (or found stored): the batch, and the tokens it wrote now."""


class Executor(Interface):
    """Carries out a plan; what it has stored already is not run again."""

    def run(
        self, plan: Plan, store: Store, *, on_tokens: OnTokens, on_batch: OnBatch
    ) -> dict[str, CoherenceLimits]: ...


class LocalExecutor:
    """One process, and a model for each key that batches name (None for the run's own)."""

    def __init__(self, models: Mapping[str | None, Model]) -> None:
        self.models = models

    def run(self, plan: Plan, store: Store, *, on_tokens: OnTokens, on_batch: OnBatch) -> dict[str, CoherenceLimits]:
        """Run what is left of a plan, in its order: the calibration of each model comes before what it judges.

        Args:
            store: a run directory this process holds.
            on_tokens, on_batch: told of progress.
        Returns:
            The coherence limits of each calibration, by its phase.
        """
        done = store.done()
        limits: dict[str, CoherenceLimits] = {}
        for batch in plan.batches:
            if batch.split == "test" and batch.calibration not in limits:
                limits[batch.calibration] = stored_limits(store, batch.calibration)
            tokens = 0
            if batch.batch_id not in done:
                judged_by = limits.get(batch.calibration)
                heads: list[pa.Table] = []
                rows = run_batch(
                    self.models[batch.model], batch, limits=judged_by, on_tokens=on_tokens, on_attention=heads.append
                )
                store.append(batch.batch_id, rows, heads[0] if heads else None)
                tokens = sum(row["n_tokens"] for row in rows)
            on_batch(batch, tokens)
        return limits


def stored_limits(store: Store, calibration: str) -> CoherenceLimits:
    """Coherence limits: the larger of the 95th percentiles of the natural target's and the natural source's outputs.

    Each is read under the natural prompt of the target, as the patched conditions are: an output in the source's style
    is no less fluent for being unlikely after the target.
    """
    table = store.read().to_pandas()
    rows = table[(table["phase"] == calibration) & table["error"].isna()]
    per_condition = [
        coherence_limits(part["nll_target"].to_numpy(), part["repetition_4"].to_numpy())
        for _, part in rows.groupby("condition")
    ]
    return CoherenceLimits(
        nll_target=float(np.max([limit.nll_target for limit in per_condition])),
        repetition_4=float(np.max([limit.repetition_4 for limit in per_condition])),
    )

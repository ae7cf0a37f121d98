"""Run a plan in this process: calibration first, then every batch that is not stored yet."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol as Interface

import numpy as np

from kvpatch.executors.batch import OnTokens, run_batch
from kvpatch.model import Model
from kvpatch.protocols.plan import CALIBRATION, Batch, Plan
from kvpatch.readouts.fluency import CoherenceLimits, coherence_limits
from kvpatch.store import Store

OnBatch = Callable[[Batch, int], None]
"""Called when a batch is stored (or found stored): the batch, and the tokens it wrote now."""


class Executor(Interface):
    """Carries out a plan; what it has stored already is not run again."""

    def run(self, plan: Plan, store: Store, *, on_tokens: OnTokens, on_batch: OnBatch) -> CoherenceLimits | None: ...


class LocalExecutor:
    """One process, one model."""

    def __init__(self, model: Model) -> None:
        self.model = model

    def run(self, plan: Plan, store: Store, *, on_tokens: OnTokens, on_batch: OnBatch) -> CoherenceLimits | None:
        """Run what is left of a plan.

        Args:
            store: a run directory this process holds.
            on_tokens, on_batch: told of progress.
        Returns:
            The coherence limits, from the calibration.
        """
        done = store.done()
        calibration = [batch for batch in plan.batches if batch.phase == CALIBRATION]
        rest = [batch for batch in plan.batches if batch.phase != CALIBRATION]
        self._run(calibration, done, store, None, on_tokens, on_batch)
        limits = stored_limits(store) if calibration else None
        self._run(rest, done, store, limits, on_tokens, on_batch)
        return limits

    def _run(
        self,
        batches: list[Batch],
        done: set[str],
        store: Store,
        limits: CoherenceLimits | None,
        on_tokens: OnTokens,
        on_batch: OnBatch,
    ) -> None:
        for batch in batches:
            tokens = 0
            if batch.batch_id not in done:
                rows = run_batch(self.model, batch, limits=limits, on_tokens=on_tokens)
                store.append(batch.batch_id, rows)
                tokens = sum(row["n_tokens"] for row in rows)
            on_batch(batch, tokens)


def stored_limits(store: Store) -> CoherenceLimits:
    """Coherence limits: the larger of the 95th percentiles of the natural target's and the natural source's outputs.

    Each is read under the natural prompt of the target, as the patched conditions are: an output in the source's style
    is no less fluent for being unlikely after the target.
    """
    table = store.read().to_pandas()
    rows = table[(table["split"] == "calibration") & table["error"].isna()]
    per_condition = [
        coherence_limits(part["nll_target"].to_numpy(), part["repetition_4"].to_numpy())
        for _, part in rows.groupby("condition")
    ]
    return CoherenceLimits(
        nll_target=float(np.max([limit.nll_target for limit in per_condition])),
        repetition_4=float(np.max([limit.repetition_4 for limit in per_condition])),
    )

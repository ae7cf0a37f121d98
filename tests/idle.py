"""Batches whose trials do nothing, and workers that hold no model: what is left is what an executor itself costs.

Rows are made with every column, written as parts and named as always.
"""

from __future__ import annotations

import os
import platform
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import kvpatch
from kvpatch.executors.rows import failed_rows
from kvpatch.executors.worker import Arrived, Failure, Number, Task, Worker
from kvpatch.planning.plan import Batch, Plan, PlannedPair, PlannedTrial
from kvpatch.protocols.load import load_protocol
from kvpatch.readouts.fluency import CoherenceLimits
from kvpatch.readouts.scorer import read_scorer
from kvpatch.store.parts import Part
from small import write_protocol


class IdleWorker(Worker):
    """Gives rows without numbers."""

    def load(self) -> Arrived | Failure:
        return Arrived({}, kvpatch.__version__, "", platform.node(), os.getpid())

    def measure(self, task: Task) -> dict[str, Any] | Failure | None:
        self.tasks = {**getattr(self, "tasks", {}), task.number: task}
        return None

    def write(
        self, number: Number, limits: CoherenceLimits | None, sources: Mapping[str, Part]
    ) -> list[tuple[Part, int]] | Failure:
        task: Task = self.tasks.pop(number)
        written = []
        for batch in task.batches:
            rows = [row | {"error": None, "text": "nothing"} for row in failed_rows(batch, "", None)]
            written.append((self.store.write_part(batch.batch_id, rows), 0))
        return written


def idle_plan(trials: int, per_batch: int) -> Plan:
    """A plan of one phase whose trials all differ."""
    protocol = load_protocol(str(write_protocol(Path(tempfile.mkdtemp()))))
    scorer = read_scorer(protocol.readouts.lexicon, protocol.folder)
    pair = PlannedPair(
        pair_id="p",
        number=0,
        target_id="t",
        source_id="s",
        texts={"target": "Explain bread.", "source": "Watch your words."},
        continuations=[["a"], ["b"], ["c"], ["d"]],
        masked_by=["target", "source"],
    )
    whole = Batch(
        batch_id="idle",
        model=None,
        phase="idle",
        split="calibration",
        calibration="idle",
        pairs=[pair],
        conditions={"A": protocol.conditions["A"]},
        roles={"A": "experiment"},
        trials=[],
        generation=protocol.generation,
        readouts=protocol.readouts,
        scorer=scorer,
        reference_texts=[],
        reference_targets=[],
    )

    def batch(place: int) -> Batch:
        made = [
            PlannedTrial.model_construct(
                trial_id=f"{number:032x}",
                content_id=f"{number:032x}",
                pair=0,
                condition="A",
                sample=number,
                seed=number,
            )
            for number in range(place * per_batch, (place + 1) * per_batch)
        ]
        return whole.model_copy(update={"batch_id": f"idle-{place:04d}-{place:012x}", "trials": made})

    batches = [batch(place) for place in range(trials // per_batch)]
    plan = Plan(drafts=[], scorer=scorer, skipped=[], dropped_pairs=[])
    return plan.model_copy(update={"batches": batches, "forced": []})

"""Ask the real pipeline where a mode is: one condition a layer, a KV head, a slot and a part; planner to verdict.

A place is recovered as a carrier where its patch, against the natural target, passes a quarter of the natural gap. The
share of the gap that it covers is its transfer fraction.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from kvpatch.engine.model import Model
from kvpatch.executors.local import LocalExecutor
from kvpatch.executors.specificity import calibrate_readouts, rule_of
from kvpatch.organisms.language import BODY, BODY_STARTS
from kvpatch.planned import Models, plan_for
from kvpatch.prompts.bank import load_bank
from kvpatch.protocols.conditions import Condition
from kvpatch.protocols.hypotheses import Hypothesis, Margin
from kvpatch.protocols.schema import Phase, Protocol
from kvpatch.specs.base import Frozen
from kvpatch.specs.organisms import Plant
from kvpatch.specs.readouts import MODE
from kvpatch.store.directory import Store
from kvpatch.verdicts.decide import Verdict, verdicts

MARGIN = Margin(natural_gap=0.25)


class Place(Frozen):
    """One place that was asked about: the share of the natural gap that it carries, and whether it is a carrier."""

    kind: str
    index: int | str
    carries: bool
    fraction: float | None
    low: float | None
    high: float | None


class Found(Frozen):
    """Every place that was asked about, on one readout."""

    places: list[Place]

    def carriers(self, kind: str) -> list[int | str]:
        """Indices of the places of a kind that carry the mode."""
        return [p.index for p in self.places if p.kind == kind and p.carries]


def decide(
    protocol: Protocol,
    models: Models,
    folder: Path,
    *,
    seed: int,
    n: int | None = None,
    phases: Sequence[str] | None = None,
) -> tuple[pd.DataFrame, list[Verdict]]:
    """Plan, execute, store and decide, as `kvpatch run` does, coherence gate and all; without check and report.

    Returns the stored trials and the verdicts.
    """
    plan, _ = plan_for(models, protocol, load_bank(protocol.bank, protocol.folder), seed=seed, n=n, phases=phases)
    store = Store(folder)
    with store.locked():
        found = calibrate_readouts(models, plan, protocol.calibration)
        rules = {key: rule_of(calibration) for key, calibration in found.items()}
        LocalExecutor(models, rules=rules).run(plan, store, on_tokens=lambda _: None, on_batch=lambda *_: None)
    rows = store.read().to_pandas()
    return rows, verdicts(protocol, rows)


def localising(base: Protocol, bank: Path, model: Model, *, pairs: int, calibration: int) -> Protocol:
    """A protocol that asks for every layer, KV head, slot of the body and part by itself.

    base: lends its settings of generation and readouts.
    """
    geometry = model.geometry
    asked: dict[str, dict[str, Any]] = {f"layer_{i}": {"layers": [i], "slots": "body"} for i in range(geometry.layers)}
    asked |= {f"head_{i}": {"kv_heads": [i], "slots": "body"} for i in range(geometry.kv_heads)}
    asked |= {f"slot_{i}": {"slots": [BODY_STARTS + i]} for i in range(BODY)}
    asked |= {f"part_{part}": {"parts": part, "slots": "body"} for part in ("k", "v", "kv")}
    conditions = {name: {"about": name, "from": "source", "patch": patch} for name, patch in asked.items()}
    conditions["A"] = {"about": "natural target", "role": "experiment"}
    conditions["B"] = {"about": "natural source", "into": "source", "role": "experiment"}
    hypotheses = [
        Hypothesis(
            id=name,
            claim=f"{name} carries the mode",
            phase="where",
            contrast=f"{name} - A",
            readout=MODE,
            test="much_greater",
            margin=MARGIN,
            family=name.split("_")[0],
            gate=1,
        )
        for name in asked
    ]
    return base.model_copy(
        update={
            "bank": str(bank),
            "models": {},
            "pairing": base.pairing.model_copy(update={"also": []}),
            "calibration": base.calibration.model_copy(update={"pairs": calibration}),
            "conditions": {name: Condition.model_validate(c) for name, c in conditions.items()},
            "phases": {"where": Phase(question="Where is the mode?", n=pairs, conditions=list(conditions))},
            "hypotheses": hypotheses,
            "corrections": {},
            "families": {},
            "expected": {},
        }
    )


def locate(base: Protocol, bank: Path, model: Model, folder: Path, *, seed: int, pairs: int, calibration: int) -> Found:
    """Where the pipeline finds the mode of a model."""
    protocol = localising(base, bank, model, pairs=pairs, calibration=calibration)
    _, decided = decide(protocol, {None: model}, folder, seed=seed)
    return Found(places=[_place(verdict) for verdict in decided])


def _place(verdict: Verdict) -> Place:
    kind, _, index = verdict.id.partition("_")
    return Place(
        kind=kind,
        index=int(index) if index.isdigit() else index,
        carries=_carries(verdict),
        fraction=verdict.transfer_fraction,
        low=verdict.transfer_fraction_low,
        high=verdict.transfer_fraction_high,
    )


def _carries(verdict: Verdict) -> bool:
    """Whether a place carries the mode. A patch that makes the source's own text does so by construction, which is no
    evidence about a cache and still the right answer here; its numbers decide."""
    if verdict.verdict == "tautological" and verdict.ci_low is not None and verdict.margin is not None:
        return verdict.ci_low > verdict.margin
    return verdict.verdict == "supported"


def expected_carriers(plant: Plant) -> dict[str, list[int | str]]:
    """Kind of place -> the indices that should be found."""
    return {
        "layer": list(plant.layers),
        "head": list(plant.kv_heads),
        "slot": list(plant.slots),
        "part": [*plant.parts, "kv"],
    }

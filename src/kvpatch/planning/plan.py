"""From protocol to work: pairs, trials with content-hashed ids, and batches.

A batch is a self-contained piece of work: plain data with every text, condition and setting in it, so that it can be
sent to another process and gives the same rows there. All conditions of a pair are in one batch, and a batch's
make-up depends on the plan alone, never on what was done before, so that a resumed run repeats it exactly.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from pydantic import ConfigDict, Field, SkipValidation

from kvpatch.errors import ProtocolError, ProtocolMistakes
from kvpatch.planning.batches import Batch, Draft, PlannedPair, PlannedTrial
from kvpatch.planning.names import hashed, number_of
from kvpatch.planning.pairing import Pair, Pairs, form_pairs, told_of_dropped
from kvpatch.planning.planning_model import PlanningModel, why_not
from kvpatch.planning.trial_ids import ConditionIds, Content
from kvpatch.prompts.bank import Bank, shuffled_words
from kvpatch.protocols.conditions import NATURAL_SOURCE, NATURAL_TARGET
from kvpatch.protocols.names import wrong_readouts
from kvpatch.protocols.schema import Having, Phase, Protocol, calibration_of
from kvpatch.readouts.scorer import Scorer, read_scorer
from kvpatch.specs.base import Frozen
from kvpatch.specs.nearest import instead

__all__ = [
    "Batch",
    "Draft",
    "Plan",
    "PlannedPair",
    "PlannedTrial",
    "PlanningModel",
    "Skipped",
    "chosen_phases",
    "make_plan",
]
ROWS_PER_BATCH = 120
"""Trials in a batch, about; on two CPU cores the matrix products stop gaining from more."""


class Skipped(Frozen):
    """A condition the model can't take, with the reason."""

    phase: str
    condition: str
    reason: str


class Plan(Frozen):
    """Everything a run will do. `passed_over`: phase -> pairs that lack what the phase asks of its pairs.

    `drafts` tell of the batches what is known without their trials; `batches` are made of them when they are first
    asked for, since millions of trials take time and memory.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)

    drafts: SkipValidation[list[Draft]] = Field(repr=False)
    forced_drafts: SkipValidation[list[Draft]] = Field(default=[], repr=False)
    scorer: Scorer
    skipped: list[Skipped]
    dropped_pairs: list[str]
    passed_over: dict[str, int] = Field(default={})

    @functools.cached_property
    def batches(self) -> list[Batch]:
        """All batches, with every trial."""
        return [draft.batch() for draft in self.drafts]

    @functools.cached_property
    def forced(self) -> list[Batch]:
        """The calibration's neutral and destroyed caches beside the natural ones, which are forced on held-out
        continuations before any trial runs, and write nothing."""
        return [draft.batch() for draft in self.forced_drafts]

    @property
    def n_trials(self) -> int:
        """Number of trials."""
        return sum(draft.size for draft in self.drafts)

    @property
    def trial_ids(self) -> list[str]:
        """Ids of all trials, in order."""
        return [trial.trial_id for batch in self.batches for trial in batch.trials]


def chosen_phases(protocol: Protocol, phases: Sequence[str] | None, n: int | None = None) -> list[str]:
    """Names of the phases to run, all if None, on `n` pairs each.

    Raises:
        ProtocolError: for a phase the protocol does not have, or an n below 1.
    """
    chosen = list(protocol.phases) if phases is None else list(dict.fromkeys(phases))
    for name in chosen:
        if name not in protocol.phases:
            told = instead(name, protocol.phases, "it has")
            raise ProtocolError(f"no phase {name!r} in {protocol.protocol}; {told}")
    if n is not None and n < 1:
        raise ProtocolError(f"n must be at least 1, got {n}")
    return chosen


def make_plan(
    protocol: Protocol,
    bank: Bank,
    models: Mapping[str | None, PlanningModel],
    *,
    seed: int,
    n: int | None = None,
    phases: Sequence[str] | None = None,
    grown_from: Sequence[int | None] = (),
) -> Plan:
    """Plan a run.

    Args:
        models: the run's own model under None, the protocol's further ones by their keys.
        seed: orders the pairs and seeds the trials.
        n: pairs per condition, in place of each phase's own. A phase with a pairing of its own takes what that gives.
        phases: names of the phases to run; all if None.
        grown_from: every n that the same run had before, so that batches which are stored are planned as they were.
    Raises:
        ProtocolError: for an unknown phase or readout, a scorer that can't be read, or more pairs than the bank gives.
    """
    chosen = chosen_phases(protocol, phases, n)
    if wrong := list(wrong_readouts(protocol)):
        raise ProtocolMistakes([f"{protocol.protocol}, {'.'.join(map(str, each.loc))}: {each}" for each in wrong])
    if len(bank.by_id) == 0:
        raise ProtocolError(f"bank {bank.name!r} is empty")
    scorer = read_scorer(protocol.readouts.lexicon, protocol.folder)
    drafts: list[Draft] = []
    forced: list[Draft] = []
    skipped: list[Skipped] = []
    dropped: list[str] = []
    passed_over: dict[str, int] = {}
    planners: dict[str | None, _Planner] = {}
    for name in chosen:
        phase = protocol.phases[name]
        if phase.model not in planners:
            planner = planners[phase.model] = _Planner(protocol, bank, scorer, phase.model, models[phase.model], seed)
            drafts += planner.calibration()
            forced += planner.forced()
            dropped += planner.formed.dropped
        planner = planners[phase.model]
        pairs, left_out, passed = planner.pairs_of(name, phase, n)
        dropped += left_out
        passed_over |= {name: passed} if passed else {}
        drafts += planner.drafts(name, "test", pairs, phase.all_conditions, [old or phase.n for old in grown_from])
    for planner in planners.values():
        skipped += planner.skipped
    return Plan(
        drafts=drafts,
        forced_drafts=forced,
        scorer=scorer,
        skipped=skipped,
        dropped_pairs=dropped,
        passed_over=passed_over,
    )


class _Planner:
    """What the batches of one model share."""

    def __init__(
        self, protocol: Protocol, bank: Bank, scorer: Scorer, key: str | None, model: PlanningModel, seed: int
    ) -> None:
        self.protocol, self.bank, self.scorer = protocol, bank, scorer
        self.key, self.model, self.seed = key, model, seed
        self.lengths = {p.id: model.body_length(p.text) for p in bank.prompts}
        self.formed = form_pairs(bank, protocol, self.lengths, seed)
        self.held_out = self.formed.pairs[: protocol.calibration.pairs]
        self.reference = [[p.source.text for p in self.held_out], [p.target.text for p in self.held_out]]
        self.calibration_phase = calibration_of(key)
        self.skipped: list[Skipped] = []
        used = [*protocol.calibration.neutral, *protocol.calibration.destroyed]
        made = [protocol.conditions[name].model_dump(mode="json", by_alias=True) for name in used]
        self.fitted_on = hashed(
            {"pairs": [p.id for p in self.held_out], "conditions": dict(zip(used, made, strict=True))}
        )

        self.content = Content(
            model=model.key,
            generation=protocol.generation.model_dump(mode="json"),
            readouts=protocol.readouts.model_dump(mode="json"),
            scorer=scorer.sha256,
            reference=self.reference,
            fitted_on=self.fitted_on if protocol.calibration.destroyed else None,  # the mode readout is, on these
            seed=seed,
        )

    def calibration(self) -> list[Draft]:
        """Batches of the natural runs of the held-out pairs."""
        names = self.protocol.calibration.conditions
        return self.drafts(self.calibration_phase, "calibration", self.held_out, names)

    def forced(self) -> list[Draft]:
        """Batches of the natural, neutral and destroyed caches of the held-out pairs; none where none is destroyed."""
        asked = self.protocol.calibration
        if not asked.destroyed:
            return []
        names = list(dict.fromkeys([NATURAL_TARGET, NATURAL_SOURCE, *asked.neutral, *asked.destroyed]))
        known = len(self.skipped)
        found = self.drafts(f"{self.calibration_phase}-forced", "calibration", self.held_out, names)
        del self.skipped[known:]  # the calibration itself tells what it rests on
        for draft in found:
            draft.is_once = True  # nothing is sampled
        return found

    def pairs_of(self, name: str, phase: Phase, n: int | None) -> tuple[Sequence[Pair], Sequence[str], int]:
        """The pairs a phase runs on, what its own pairing dropped, and how many pairs were passed over."""
        wanted = n or phase.n
        if phase.pairing is not None:
            own: Pairs = form_pairs(self.bank, self.protocol, self.lengths, self.seed, phase.pairing)
            if not own.pairs:
                raise ProtocolError(f"phase {name}: its pairing forms no pair ({'; '.join(own.dropped[:1])})")
            fitting, passed = self._fitting(phase, own.pairs, wanted)
            if not fitting:
                told = f"all {passed} lack what it asks of its pairs under 'having'"
                raise ProtocolError(f"phase {name}: no pair can be used; {told}")
            return fitting, own.dropped, passed
        rest = self.formed.pairs[len(self.held_out) :]
        fitting, passed = self._fitting(phase, rest, wanted)
        if wanted > len(fitting):
            without = f", and {passed} that lack what it asks of its pairs under 'having'" if passed else ""
            raise ProtocolError(
                f"phase {name} wants n={wanted}, and bank {self.bank.name!r} gives {len(fitting)} pairs for this model "
                f"({len(self.formed.pairs)} less {len(self.held_out)} held out for calibration{without})"
                f"{told_of_dropped(self.formed, self.protocol.pairing.max_length_difference)}"
            )
        return fitting, [], passed

    def _fitting(self, phase: Phase, pairs: Sequence[Pair], wanted: int) -> tuple[Sequence[Pair], int]:
        """The first pairs, as many as are wanted, whose prompts have what the phase asks for; and how many before them
        were passed over."""
        found: list[Pair] = []
        passed = 0
        for pair in pairs:
            if len(found) == wanted:
                break
            if self._has(phase.having, pair):
                found.append(pair)
            else:
                passed += 1
        return found, passed

    def _has(self, having: Having | None, pair: Pair) -> bool:
        """Whether the pair's prompts have the slots that a phase asks for; a role that the pair lacks is not asked."""
        if having is None or self.model.has is None:
            return True
        texts = self._pair(pair, 0).texts
        return all(self.model.has(texts[role], having) for role in having.roles if role in texts)

    def drafts(
        self, phase: str, split: str, pairs: Sequence[Pair], names: Sequence[str], cuts: Sequence[int] = ()
    ) -> list[Draft]:
        """Batches of one phase; none holds pairs from both sides of a cut."""
        conditions = {name: self.protocol.conditions[name] for name in names if self._is_possible(phase, name, pairs)}
        asked = self.protocol.phases.get(phase)  # a calibration is no phase of the protocol
        per_pair = len(conditions) * self.protocol.generation.samples
        step = max(1, ROWS_PER_BATCH // max(1, per_pair))
        needs_reference = any(c.change is not None and c.change.is_fitted for c in conditions.values())
        watched = asked.watched if asked else None
        of_phase = (watched and watched.model_dump(mode="json"), asked.geometry) if asked else None
        shared: dict[str, Any] = {
            "model": self.key,
            "phase": phase,
            "split": split,
            "calibration": self.calibration_phase,
            "conditions": conditions,
            "roles": {name: self.protocol.role(phase, name) for name in conditions},
            "generation": self.protocol.generation,
            "readouts": self.protocol.readouts,
            "scorer": self.scorer,
            "reference_texts": self.reference[0] if needs_reference else [],
            "reference_targets": self.reference[1] if needs_reference else [],
            "watched": watched,
            "geometry": asked is not None and asked.geometry,
        }
        ids = {name: ConditionIds(self.content, phase, of_phase, name, of) for name, of in conditions.items()}
        ends = sorted({cut for cut in cuts if cut < len(pairs)} | {len(pairs)})
        lows = [
            (segment, low, min(low + step, end))
            for segment, (start, end) in enumerate(pairwise([0, *ends]))
            for low in range(start, end, step)
        ]
        out: list[Draft] = []
        for place, (segment, low, high) in enumerate(lows):
            planned = [self._pair(pair, low + index) for index, pair in enumerate(pairs[low:high])]
            out.append(Draft({**shared, "pairs": planned, "segment": segment}, place, ids, self.seed))
        return out

    def _is_possible(self, phase: str, name: str, pairs: Sequence[Pair]) -> bool:
        reason = why_not(self.protocol.conditions[name], self.model, pairs)
        if reason:
            self.skipped.append(Skipped(phase=phase, condition=name, reason=reason))
        return reason is None

    def _pair(self, pair: Pair, number: int) -> PlannedPair:
        texts = {
            "target": pair.target.text,
            "source": pair.source.text,
            "neutral": "",
            "shuffled_words": shuffled_words(pair.source.text, number_of(self.seed, pair.id, "words")),
        }
        if pair.foreign is not None:
            texts["foreign"] = pair.foreign.text
        if pair.foreign_matched is not None:
            texts["foreign_matched"] = pair.foreign_matched.text
        texts |= {group: prompt.text for group, prompt in pair.others.items()}
        return PlannedPair(
            pair_id=pair.id,
            number=number,
            target_id=pair.target.id,
            source_id=pair.source.id,
            texts=texts,
            continuations=[[c.text for c in cell] for cell in pair.continuations],
            masked_by=[role for role in pair.masked_by if role in texts],
            domains={"target": pair.target.continuation_domain, "source": pair.source.continuation_domain},
        )

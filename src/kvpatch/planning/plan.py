"""From protocol to work: pairs, trials with content-hashed ids, and batches.

A batch is a self-contained piece of work: plain data with every text, condition and setting in it, so that it can be
sent to another process and gives the same rows there. All conditions of a pair are in one batch, and a batch's
make-up depends on the plan alone, never on what was done before, so that a resumed run repeats it exactly.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from pydantic import Field

from kvpatch.errors import ProtocolError, ProtocolMistakes
from kvpatch.planning.names import hashed, number_of
from kvpatch.planning.pairing import Pair, Pairs, form_pairs, told_of_dropped
from kvpatch.planning.planning_model import PlanningModel, why_not
from kvpatch.prompts.bank import Bank, shuffled_words
from kvpatch.protocols.conditions import NATURAL_SOURCE, NATURAL_TARGET, ROLES, Condition
from kvpatch.protocols.names import wrong_readouts
from kvpatch.protocols.schema import AttentionSettings, Generation, Having, Phase, Protocol, Readouts, calibration_of
from kvpatch.readouts.scorer import Scorer, read_scorer
from kvpatch.specs.base import Frozen
from kvpatch.specs.nearest import instead

ROWS_PER_BATCH = 120
"""Trials in a batch, about; on two CPU cores the matrix products stop gaining from more."""


class PlannedPair(Frozen):
    """A pair's texts, by role, and its held-out continuations by cell (`pairing.cells_of`).

    `number` counts a run's pairs. `domains` gives those of the continuations on the target's and on the source's topic,
    by role: pairs of one domain share continuations.
    """

    pair_id: str
    number: int
    target_id: str
    source_id: str
    texts: dict[str, str]
    continuations: list[list[str]]
    masked_by: list[str]
    domains: dict[str, str] = Field(default_factory=dict)

    @property
    def forced(self) -> str:
        """The fixed continuation that every condition of the pair is forced on: plain, on the target's topic."""
        return self.continuations[1][0]


class PlannedTrial(Frozen):
    """One pair, one condition, one sample. `content_id` names all of its content but the phase: trials that share it
    are one computation."""

    trial_id: str
    content_id: str
    pair: int
    condition: str
    sample: int
    seed: int


class Batch(Frozen):
    """A piece of work that stands on its own.

    `model` is a key of the protocol's `models`, None for the run's own; `calibration` the phase whose natural runs set
    the coherence limits; `roles` what each condition is in this phase; `segment` counts how often the run had grown
    when the batch came to it.
    """

    batch_id: str
    model: str | None
    phase: str
    split: str
    calibration: str
    pairs: list[PlannedPair]
    conditions: dict[str, Condition]
    roles: dict[str, str]
    trials: list[PlannedTrial]
    generation: Generation
    readouts: Readouts
    scorer: Scorer
    reference_texts: list[str]
    reference_targets: list[str]
    watched: AttentionSettings | None = None
    geometry: bool = False
    segment: int = 0


class Skipped(Frozen):
    """A condition the model can't take, with the reason."""

    phase: str
    condition: str
    reason: str


class Plan(Frozen):
    """Everything a run will do. `passed_over`: phase -> pairs that lack what the phase asks of its pairs. `forced`: the
    calibration's neutral and destroyed caches beside the natural ones, which are forced on held-out continuations
    before any trial runs, and write nothing."""

    batches: list[Batch]
    forced: list[Batch] = Field(default=[])
    scorer: Scorer
    skipped: list[Skipped]
    dropped_pairs: list[str]
    passed_over: dict[str, int] = Field(default={})

    @property
    def n_trials(self) -> int:
        """Number of trials."""
        return sum(len(batch.trials) for batch in self.batches)

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
    batches: list[Batch] = []
    forced: list[Batch] = []
    skipped: list[Skipped] = []
    dropped: list[str] = []
    passed_over: dict[str, int] = {}
    planners: dict[str | None, _Planner] = {}
    for name in chosen:
        phase = protocol.phases[name]
        if phase.model not in planners:
            planner = planners[phase.model] = _Planner(protocol, bank, scorer, phase.model, models[phase.model], seed)
            batches += planner.calibration()
            forced += planner.forced()
            dropped += planner.formed.dropped
        planner = planners[phase.model]
        pairs, left_out, passed = planner.pairs_of(name, phase, n)
        dropped += left_out
        passed_over |= {name: passed} if passed else {}
        batches += planner.batches(name, "test", pairs, phase.all_conditions, [old or phase.n for old in grown_from])
    for planner in planners.values():
        skipped += planner.skipped
    return Plan(
        batches=batches, forced=forced, scorer=scorer, skipped=skipped, dropped_pairs=dropped, passed_over=passed_over
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

    def calibration(self) -> list[Batch]:
        """Batches of the natural runs of the held-out pairs."""
        names = self.protocol.calibration.conditions
        return self.batches(self.calibration_phase, "calibration", self.held_out, names)

    def forced(self) -> list[Batch]:
        """Batches of the natural, neutral and destroyed caches of the held-out pairs; none where none is destroyed."""
        asked = self.protocol.calibration
        if not asked.destroyed:
            return []
        names = list(dict.fromkeys([NATURAL_TARGET, NATURAL_SOURCE, *asked.neutral, *asked.destroyed]))
        known = len(self.skipped)
        found = self.batches(f"{self.calibration_phase}-forced", "calibration", self.held_out, names)
        del self.skipped[known:]  # the calibration itself tells what it rests on
        once = [[trial for trial in batch.trials if trial.sample == 0] for batch in found]  # nothing is sampled
        return [batch.model_copy(update={"trials": trials}) for batch, trials in zip(found, once, strict=True)]

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

    def batches(
        self, phase: str, split: str, pairs: Sequence[Pair], names: Sequence[str], cuts: Sequence[int] = ()
    ) -> list[Batch]:
        """Batches of one phase; none holds pairs from both sides of a cut."""
        conditions = {name: self.protocol.conditions[name] for name in names if self._is_possible(phase, name, pairs)}
        asked = self.protocol.phases.get(phase)  # a calibration is no phase of the protocol
        per_pair = len(conditions) * self.protocol.generation.samples
        step = max(1, ROWS_PER_BATCH // max(1, per_pair))
        needs_reference = any(c.change is not None and c.change.is_fitted for c in conditions.values())
        out = []
        ends = sorted({cut for cut in cuts if cut < len(pairs)} | {len(pairs)})
        lows = [
            (segment, low, min(low + step, end))
            for segment, (start, end) in enumerate(pairwise([0, *ends]))
            for low in range(start, end, step)
        ]
        for place, (segment, low, high) in enumerate(lows):
            planned = [self._pair(pair, low + index) for index, pair in enumerate(pairs[low:high])]
            trials = [
                self._trial(phase, name, condition, index, pair, sample)
                for name, condition in conditions.items()
                for index, pair in enumerate(planned)
                if condition.giver in pair.texts
                for sample in range(self.protocol.generation.samples)
            ]
            content = "".join(trial.trial_id for trial in trials)
            out.append(
                Batch(
                    batch_id=f"{phase}-{place:04d}-{hashlib.sha256(content.encode()).hexdigest()[:12]}",
                    model=self.key,
                    phase=phase,
                    split=split,
                    calibration=self.calibration_phase,
                    pairs=planned,
                    conditions=conditions,
                    roles={name: self.protocol.role(phase, name) for name in conditions},
                    trials=trials,
                    generation=self.protocol.generation,
                    readouts=self.protocol.readouts,
                    scorer=self.scorer,
                    reference_texts=self.reference[0] if needs_reference else [],
                    reference_targets=self.reference[1] if needs_reference else [],
                    watched=asked.watched if asked else None,
                    geometry=asked is not None and asked.geometry,
                    segment=segment,
                )
            )
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

    def _trial(
        self, phase: str, name: str, condition: Condition, index: int, pair: PlannedPair, sample: int
    ) -> PlannedTrial:
        # Conditions of a pair share their seed, and so their noise.
        seed = number_of(self.seed, pair.pair_id, sample)
        content = {
            "model": self.model.key,
            "condition": condition.model_dump(mode="json", by_alias=True),
            "name": name,
            "pair": _what_counts_of(pair, condition),
            "sample": sample,
            "seed": seed,
            "generation": self.protocol.generation.model_dump(mode="json"),
            "reference": self.reference if condition.change is not None and condition.change.is_fitted else [],
            "readouts": self.protocol.readouts.model_dump(mode="json"),
            "scorer": self.scorer.sha256,
        }
        if self.protocol.calibration.destroyed:  # the mode readout is fitted on these
            content["fitted_on"] = self.fitted_on
        if asked := self.protocol.phases.get(phase):
            watched = None if asked.watched is None else asked.watched.model_dump(mode="json")
            content |= {"watched": watched, "geometry": asked.geometry}
        return PlannedTrial(
            trial_id=hashed({**content, "phase": phase}),
            content_id=hashed(content),
            pair=index,
            condition=name,
            sample=sample,
            seed=seed,
        )


def _what_counts_of(pair: PlannedPair, condition: Condition) -> dict[str, Any]:
    """What of a pair can change a trial: its number and its prompts of other groups only where the condition asks."""
    content = pair.model_dump(mode="json", exclude={"domains"})  # a name for what the continuations say themselves
    if condition.change is None or not condition.change.uses_pair_number:
        del content["number"]
    used = {*ROLES, *pair.masked_by, condition.from_, condition.text_of}
    content["texts"] = {role: text for role, text in pair.texts.items() if role in used}
    return content

"""Pieces of work: a batch, plain data with every text and setting in it; and its draft, which lacks its trials."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator
from typing import Any

from pydantic import Field

from kvpatch.planning.names import number_of
from kvpatch.planning.trial_ids import ConditionIds, PairTexts, batch_name
from kvpatch.protocols.conditions import Condition
from kvpatch.protocols.schema import AttentionSettings, Generation, Readouts
from kvpatch.readouts.scorer import Scorer
from kvpatch.specs.base import Frozen


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


class Draft:
    """What a batch will be, before its trials are made: all that it holds but those, and how many there are.

    A plan of millions of trials is counted, checked and named by its drafts; `batch` makes the batch itself.
    """

    def __init__(self, shared: dict[str, Any], place: int, ids: dict[str, ConditionIds], seed: int) -> None:
        self._shared, self.place, self._ids, self._seed = shared, place, ids, seed
        self.is_once = False
        """Whether only the first sample of each is kept, though the batch is named by all."""
        self.model: str | None = shared["model"]
        self.phase: str = shared["phase"]
        self.split: str = shared["split"]
        self.pairs: list[PlannedPair] = shared["pairs"]
        self.conditions: dict[str, Condition] = shared["conditions"]
        self.roles: dict[str, str] = shared["roles"]
        self.generation: Generation = shared["generation"]
        self.readouts: Readouts = shared["readouts"]
        self.watched: AttentionSettings | None = shared["watched"]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Draft) and (self._shared, self.batch_id) == (other._shared, other.batch_id)

    __hash__ = None  # pyright: ignore[reportAssignmentType]

    @functools.cached_property
    def counts(self) -> dict[str, int]:
        """Condition -> trials. Those whose prompt a pair lacks are left out for it."""
        by_giver = Counter(role for pair in self.pairs for role in pair.texts)
        samples = 1 if self.is_once else self.generation.samples
        return {name: by_giver[of.giver] * samples for name, of in self.conditions.items()}

    @functools.cached_property
    def size(self) -> int:
        """Number of trials."""
        return sum(self.counts.values())

    def seed_of(self, pair: PlannedPair) -> int:
        """The seed of a pair's last sample."""
        return number_of(self._seed, pair.pair_id, self.generation.samples - 1)

    def trial_ids(self) -> Iterator[str]:
        """Ids of all trials, in their order, the further samples among them."""
        texts = self._texts()
        for of in self._ids.values():
            for each in texts:
                if of.condition.giver in each.pair.texts:
                    yield from of.of_trials(each)

    def _texts(self) -> list[PairTexts]:
        return [PairTexts(pair, self._seed, self.generation.samples) for pair in self.pairs]

    @property
    def batch_id(self) -> str:
        """The batch's id, for which all ids of its trials are computed."""
        return batch_name(self.phase, self.place, self.trial_ids())

    def batch(self) -> Batch:
        """The batch, with its trials."""
        texts = self._texts()
        trials = [
            PlannedTrial(trial_id=trial, content_id=content, pair=index, condition=name, sample=sample, seed=seed)
            for name, of in self._ids.items()
            for index, each in enumerate(texts)
            if of.condition.giver in each.pair.texts
            for trial, content, sample, seed in of.both(each)
        ]
        name = batch_name(self.phase, self.place, (trial.trial_id for trial in trials))
        if self.is_once:
            trials = [trial for trial in trials if trial.sample == 0]
        return Batch(batch_id=name, trials=trials, **self._shared)

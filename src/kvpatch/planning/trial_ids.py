"""Ids of trials: hashes of all that a trial is made of, computed in pieces.

A trial's id is the SHA-256 of its content as canonical JSON: keys in alphabetical order, no spaces. What stands before
the pair is the condition's and is hashed once for a phase; the pair's own text once for the batch; what follows once
for a condition and pair. What is left for each sample are its number and its seed. The ids are those of
`names.hashed` on the whole.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvpatch.planning.names import number_of
from kvpatch.protocols.conditions import ROLES, Condition

if TYPE_CHECKING:
    from kvpatch.planning.plan import PlannedPair

LENGTH = 32
"""Hex digits of an id."""


def _written(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


@dataclass(frozen=True)
class Content:
    """What of a trial's content all trials of a model share, as plain data.

    reference: texts that fitted conditions are made of. fitted_on: names what the mode readout is fitted on, or None.
    """

    model: str
    generation: dict[str, Any]
    readouts: dict[str, Any]
    scorer: str
    reference: list[list[str]]
    fitted_on: str | None
    seed: int

    @functools.cached_property
    def written(self) -> dict[str, str]:
        """Each of them as JSON."""
        fields = ("model", "generation", "readouts", "scorer", "reference", "fitted_on")
        return {name: _written(getattr(self, name)) for name in fields}


class PairTexts:
    """A pair as its trials' ids have it, and the seeds of its samples."""

    def __init__(self, pair: PlannedPair, seed: int, samples: int) -> None:
        self.pair = pair
        self.seeds = [number_of(seed, pair.pair_id, sample) for sample in range(samples)]
        self._content: dict[str, Any] | None = None
        self._known: dict[tuple[bool, frozenset[str | None]], bytes] = {}

    def of(self, condition: Condition) -> bytes:
        """What of the pair can change a trial of a condition: its number and its prompts of other groups only where the
        condition asks."""
        has_number = condition.change is not None and condition.change.uses_pair_number
        key = has_number, frozenset((condition.from_, condition.text_of))
        if key not in self._known:
            if self._content is None:  # "domains" names what the continuations say themselves
                self._content = self.pair.model_dump(mode="json", exclude={"domains"})
            content = dict(self._content)
            if not has_number:
                del content["number"]
            used = {*ROLES, *self.pair.masked_by, *key[1]}
            content["texts"] = {role: text for role, text in self.pair.texts.items() if role in used}
            self._known[key] = _written(content).encode()
        return self._known[key]


class ConditionIds:
    """The ids of one condition's trials in one phase.

    asked: what the phase asks to be watched and whether it reads geometry; None for a calibration.
    """

    def __init__(
        self, content: Content, phase: str, asked: tuple[dict[str, Any] | None, bool] | None, name: str, of: Condition
    ) -> None:
        self.condition = of
        own, is_fitted = content.written, of.change is not None and of.change.is_fitted
        head = f'{{"condition":{_written(of.model_dump(mode="json", by_alias=True))}'
        if content.fitted_on is not None:
            head += f',"fitted_on":{own["fitted_on"]}'
        head += f',"generation":{own["generation"]}'
        if asked is not None:
            head += f',"geometry":{_written(asked[1])}'
        head += f',"model":{own["model"]},"name":{_written(name)},"pair":'
        middle = f',"readouts":{own["readouts"]},"reference":{own["reference"] if is_fitted else "[]"},"sample":'
        self._head = head.encode()
        self._middle = middle.encode()
        self._middle_of_phase = f',"phase":{_written(phase)}{middle}'.encode()
        self._scorer = f',"scorer":{own["scorer"]},"seed":'
        self._end = "}" if asked is None else f',"watched":{_written(asked[0])}}}'

    def of_trials(self, pair: PairTexts) -> list[str]:
        """Trial ids of a pair's samples."""
        return self._ids(self._of_pair(pair), self._middle_of_phase, pair)

    def both(self, pair: PairTexts) -> Iterator[tuple[str, str, int, int]]:
        """(trial id, content id, sample, seed) of a pair's samples; the content is all but the phase."""
        hashed = self._of_pair(pair)
        trials = self._ids(hashed, self._middle_of_phase, pair)
        return zip(trials, self._ids(hashed, self._middle, pair), range(len(trials)), pair.seeds, strict=True)

    @functools.cached_property
    def _hashed_head(self) -> Any:
        return hashlib.sha256(self._head)

    def __getstate__(self) -> dict[str, Any]:
        return {
            name: value for name, value in self.__dict__.items() if name != "_hashed_head"
        }  # which can't be sent to another process

    def _of_pair(self, pair: PairTexts) -> Any:
        hashed = self._hashed_head.copy()
        hashed.update(pair.of(self.condition))
        return hashed

    def _ids(self, hashed: Any, middle: bytes, pair: PairTexts) -> list[str]:
        hashed = hashed.copy()
        hashed.update(middle)
        found: list[str] = []
        for sample, seed in enumerate(pair.seeds):
            each = hashed.copy()
            each.update(f"{sample}{self._scorer}{seed}{self._end}".encode())
            found.append(each.hexdigest()[:LENGTH])
        return found


def batch_name(phase: str, place: int, trial_ids: Sequence[str] | Iterator[str]) -> str:
    """A batch's id: its phase, its place in it, and a hash of its trials' ids."""
    content = hashlib.sha256()
    for trial_id in trial_ids:
        content.update(trial_id.encode())
    return f"{phase}-{place:04d}-{content.hexdigest()[:12]}"

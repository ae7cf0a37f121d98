"""Build the cache of every trial of a batch: each distinct prompt prefilled once, each condition made from them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from kvpatch.caches.kvcache import KVCache
from kvpatch.caches.selection import Touched
from kvpatch.engine.model import Model
from kvpatch.engine.prefill import prefill
from kvpatch.errors import KvpatchError
from kvpatch.interventions.build import Made, Trials, build
from kvpatch.interventions.steering import RowSteering
from kvpatch.models.template import EncodedPrompt
from kvpatch.planning.plan import Batch, PlannedPair
from kvpatch.protocols.conditions import Condition
from kvpatch.readouts.geometry import layer_at

MOST_KEPT = 1 << 30
"""Bytes of copied natural caches that a batch keeps."""


@dataclass(frozen=True)
class Natural:
    """Natural caches of a batch: one row a distinct prompt, and which row is whose."""

    cache: KVCache
    prompts: list[EncodedPrompt]
    row: dict[tuple[int, str], int]  # (pair, role) -> row
    kept: dict[tuple[int, ...], KVCache] = field(default_factory=dict)

    def rows(self, pairs: Sequence[int], role: str) -> KVCache:
        """The caches of one role for some pairs; small ones are kept, since most conditions start from the same."""
        rows = tuple(self.row[pair, role] for pair in pairs)
        if rows in self.kept:
            return self.kept[rows]
        found = self.cache[rows]
        if found.nbytes + sum(cache.nbytes for cache in self.kept.values()) <= MOST_KEPT:
            self.kept[rows] = found
        return found

    def prompts_of(self, pairs: Sequence[int], role: str) -> list[EncodedPrompt]:
        """The prompts of one role for some pairs."""
        return [self.prompts[self.row[pair, role]] for pair in pairs]


@dataclass
class Built:
    """What the trials of a batch start from, one entry a trial in the order of the batch.

    touched: slots, layers and KV heads of the trial's cache that its condition touched; see `caches.selection.Touched`.
    """

    cache: KVCache
    errors: list[str | None]
    planned: list[int]
    fired: list[int]
    touched: list[tuple[int, int, int]]
    steering: RowSteering | None


def giver_role(condition: Condition) -> str:
    """The role of the prompt that gives a condition what is put in; the receiver's own where nothing is."""
    if condition.text_of:
        return f"text of {condition.text_of} into {condition.into}"
    return condition.from_ or condition.into


def prefill_all(model: Model, batch: Batch) -> Natural:
    """Every distinct prompt of the batch, once."""
    needed = {"target", "source"} | {c.from_ for c in batch.conditions.values() if c.from_}
    prompts: dict[EncodedPrompt, int] = {}
    row: dict[tuple[int, str], int] = {}

    def add(pair: int, role: str, prompt: EncodedPrompt) -> None:
        row[pair, role] = prompts.setdefault(prompt, len(prompts))

    for index, pair in enumerate(batch.pairs):
        for role in sorted(needed & set(pair.texts)):
            add(index, role, model.encode(pair.texts[role], may_be_empty=role == "neutral"))
        for condition in batch.conditions.values():
            if condition.text_of:
                add(index, giver_role(condition), _swapped_text(model, pair, condition))
    return Natural(prefill(model.backbone, list(prompts)), list(prompts), row)


def _swapped_text(model: Model, pair: PlannedPair, condition: Condition) -> EncodedPrompt:
    """The text a full swap equals: one prompt's cached tokens, then the other's pending token."""
    cached = model.encode(pair.texts[str(condition.text_of)], may_be_empty=condition.text_of == "neutral")
    pending = model.encode(pair.texts[condition.into])
    return EncodedPrompt(
        (*cached.token_ids[:-1], pending.token_ids[-1]),
        (*cached.segments[:-1], pending.segments[-1]),
        (*cached.pieces[:-1], pending.pieces[-1]),
    )


def build_all(model: Model, batch: Batch, natural: Natural) -> Built:
    """The cache of every trial, and what kept a trial from its cache."""
    parts: list[KVCache] = []
    order: list[int] = []  # place in the batch of every row of the parts
    count = len(batch.trials)
    errors: list[str | None] = [None] * count
    planned, fired, touched = [0] * count, [0] * count, [(0, 0, 0)] * count
    steps: dict[int, Tensor] = {}
    for name, condition in batch.conditions.items():
        places = [i for i, trial in enumerate(batch.trials) if trial.condition == name]
        if not places:
            continue
        try:
            part = _build(model, batch, natural, condition, places)
        except KvpatchError as error:
            # The rows stay in the batch, as natural runs marked as failed, so that nothing else changes shape.
            own = natural.rows([batch.trials[i].pair for i in places], condition.into)
            part = Made(own, Touched.none(own.batch))
            for place in places:
                errors[place] = str(error)
        parts.append(part.cache)
        order += places
        for row, place in enumerate(places):
            planned[place], fired[place] = part.planned, part.fired
            touched[place] = part.touched.of_row(row)
        for layer, step in part.steps.items():
            whole = steps.setdefault(layer, step.new_zeros(count, *step.shape[1:]))
            whole[places] = step
    cache = parts[0] if len(parts) == 1 else KVCache.concat(parts)
    if order != list(range(count)):
        cache = cache[sorted(range(count), key=order.__getitem__)]
    return Built(cache, errors, planned, fired, touched, RowSteering(steps) if steps else None)


def _build(model: Model, batch: Batch, natural: Natural, condition: Condition, places: Sequence[int]) -> Made:
    """One condition, for the trials at these places of the batch."""
    trials = [batch.trials[i] for i in places]
    pairs = [trial.pair for trial in trials]
    giver = condition.from_ or condition.into
    r_v = batch.readouts.r_v.of_model(model.loaded.name)
    return build(
        condition.change,
        Trials(
            model=model,
            own=natural.rows(pairs, giver_role(condition) if condition.text_of else condition.into),
            receivers=natural.prompts_of(pairs, condition.into),
            givers=natural.prompts_of(pairs, giver),
            giver_caches=functools.partial(natural.rows, pairs, giver),
            seeds=[trial.seed for trial in trials],
            pair_numbers=[batch.pairs[pair].number for pair in pairs],
            calibration=(tuple(batch.reference_texts), tuple(batch.reference_targets)),
            r_v_window=r_v.window,
            r_v_late=layer_at(r_v.late, model.geometry.layers),
            may_be_empty=condition.may_be_empty,
        ),
    )

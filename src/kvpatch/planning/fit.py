"""Does every condition of a plan fit the model and the prompts? Asked before a run spends anything.

Each intervention is asked, by way of `interventions.build`, on caches of the right shape that hold nothing, pair by
pair, so that whatever would fail while the run goes on fails now: a layer, KV head or slot that does not exist, a
selection that is empty or too small, keys that would have to move and can't, a cache longer than the context.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from kvpatch.caches.selection import slot_mask, told
from kvpatch.errors import CacheError, EmptySelection, ProtocolError
from kvpatch.interventions.build import Fitting, is_of_shape, layout_of, refuse_misfit_model, refuse_misfit_prompts
from kvpatch.interventions.kinds import empty_caches
from kvpatch.models.geometry import Geometry
from kvpatch.models.template import EncodedPrompt
from kvpatch.planning.batches import Draft, PlannedPair
from kvpatch.protocols.conditions import Condition
from kvpatch.protocols.schema import Having


def slots_are_had(geometry: Geometry, encode: Callable[[str], EncodedPrompt]) -> Callable[[str, Having], bool]:
    """What tells whether the prompt of a text has the slots that a phase asks of its pairs; see `Having`."""

    def has(text: str, having: Having) -> bool:
        cache = empty_caches([encode(text)], geometry)
        found = slot_mask(cache, having.slots)
        return bool((found & ~slot_mask(cache, "sinks")).any() if having.beyond_sinks else found.any())

    return has


@dataclass(frozen=True)
class _Place:
    """Where conditions must fit: a model's shape, its tokenizer, and the tokens that will follow a cache."""

    geometry: Geometry
    encode: Callable[[str], EncodedPrompt]
    continuation_ids: Callable[[str], Sequence[int]]
    room: int
    shapes: dict[str, int] = field(default_factory=dict[str, int])
    known: dict[tuple[int, ...], int] = field(default_factory=dict[tuple[int, ...], int])

    def shape(self, text: str) -> int:
        """A number for what the segments of a text's prompt are, token by token."""
        if text not in self.shapes:
            self.shapes[text] = self.known.setdefault(tuple(self.encode(text).segments), len(self.known))
        return self.shapes[text]


def refuse_misfits(
    drafts: Sequence[Draft],
    geometry: Geometry,
    encode: Callable[[str], EncodedPrompt],
    continuation_ids: Callable[[str], Sequence[int]],
    room: int,
) -> None:
    """Check every condition of a plan on every pair that it runs on.

    Conditions that lay their slots out alike are checked once for a pair; and where the words of a prompt have no part
    in that, once for all pairs of the same shape.

    Args:
        encode: tokenises the text of a prompt; the neutral scaffold's is empty.
        continuation_ids: tokenises text as it is (the separator of joined prompts).
        room: tokens that will follow the cache.
    Raises:
        ProtocolError: naming the condition that does not fit, its phase, and the pair where it is a pair's.
    """
    place = _Place(geometry, encode, continuation_ids, room)
    of_phase: dict[str, list[_Asked]] = {}
    for draft in drafts:
        if draft.phase not in of_phase:
            of_phase[draft.phase] = _asked_of(draft, geometry)
        for asked in of_phase[draft.phase]:
            pairs = asked.left([pair for pair in draft.pairs if asked.condition.giver in pair.texts], place)
            seeded = [(pair, draft.seed_of(pair)) for pair in pairs]
            if seeded:
                _refuse_misfit_pairs(asked.where, asked.condition, seeded, draft.readouts.r_v.window, place)
        _refuse_unmarked(draft, place)


class _Asked:
    """A condition that is checked, for itself and for those that lay their slots out alike."""

    def __init__(self, where: str, condition: Condition) -> None:
        self.where, self.condition = where, condition
        self.is_of_shape = condition.change is not None and is_of_shape(condition.change)
        self._seen: set[tuple[int, int]] = set()

    def left(self, pairs: Sequence[PlannedPair], place: _Place) -> Sequence[PlannedPair]:
        """The pairs of which none was checked that has their shape."""
        if not self.is_of_shape:
            return pairs
        left: list[PlannedPair] = []
        for pair in pairs:
            into, giver = pair.texts[self.condition.into], pair.texts[self.condition.giver]
            shape = place.shape(into), place.shape(giver)
            if shape not in self._seen:
                self._seen.add(shape)
                left.append(pair)
        return left


def _asked_of(draft: Draft, geometry: Geometry) -> list[_Asked]:
    """Check the conditions of a phase on the model itself; returns those that are checked on prompts."""
    found: list[_Asked] = []
    laid_out: set[tuple[object, ...]] = set()
    for name, condition in draft.conditions.items():
        where = f"condition {name} of phase {draft.phase}"
        try:
            refuse_misfit_model(condition.change, geometry, may_be_empty=condition.may_be_empty)
        except CacheError as error:
            raise ProtocolError(f"{where}: {error}") from error
        layout = _layout_of(condition)
        if condition.change is not None and (layout is None or layout not in laid_out):
            found.append(_Asked(where, condition))
        laid_out |= set() if layout is None else {layout}
    return found


def _layout_of(condition: Condition) -> tuple[object, ...] | None:
    """What conditions share that lay their slots out alike; None where that is not known."""
    layout = None if condition.change is None else layout_of(condition.change)
    return None if layout is None else (layout, condition.from_, condition.into, condition.may_be_empty)


Seeded = Sequence[tuple[PlannedPair, int]]
"""Pairs, each with the seed of a trial."""


def _refuse_misfit_pairs(where: str, condition: Condition, pairs: Seeded, window: int, place: _Place) -> None:
    """Check a condition on its pairs, all together; where that fails, one by one, to name the pair."""
    try:
        _check_pairs(condition, pairs, window, place)
    except CacheError as together:
        for pair in pairs:
            try:
                _check_pairs(condition, [pair], window, place)
            except CacheError as error:
                message = error.without_row if isinstance(error, EmptySelection) else error
                raise ProtocolError(f"{where}: {message}{_advice(error)} (pair {pair[0].pair_id})") from error
        raise ProtocolError(f"{where}: {together}") from together


def _advice(error: CacheError) -> str:
    return ", or say may_be_empty: true of the condition" if isinstance(error, EmptySelection) else ""


def _check_pairs(condition: Condition, pairs: Seeded, window: int, place: _Place) -> None:
    if condition.change is None:
        return
    receivers = [place.encode(pair.texts[condition.into]) for pair, _ in pairs]
    givers = [place.encode(pair.texts[condition.from_]) for pair, _ in pairs] if condition.from_ else receivers
    fitting = Fitting(
        geometry=place.geometry,
        receivers=receivers,
        givers=givers,
        seeds=[seed for _, seed in pairs],
        r_v_window=window,
        may_be_empty=condition.may_be_empty,
        room=place.room,
        continuation_ids=place.continuation_ids,
    )
    refuse_misfit_prompts(condition.change, fitting)


def _refuse_unmarked(draft: Draft, place: _Place) -> None:
    """Refuse a pair in none of whose prompts the phase finds a slot to mark: its attention there would be 0."""
    if draft.watched is None or draft.watched.marked is None:
        return
    for pair in draft.pairs:
        conditions = [condition for condition in draft.conditions.values() if condition.giver in pair.texts]
        roles = {role for c in conditions for role in (c.into, c.giver)}
        prompts = [place.encode(pair.texts[role]) for role in sorted(roles)]
        if prompts and not slot_mask(empty_caches(prompts, place.geometry), draft.watched.marked).any():
            raise ProtocolError(
                f"phase {draft.phase}: its marked {told(draft.watched.marked)} find no slot in any prompt of a pair, "
                f"so attention on them would be 0; mark slots that they have (pair {pair.pair_id})"
            )

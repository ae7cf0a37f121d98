"""The one door to interventions: does one fit a model and its prompts, and the caches that it makes.

Planning and the executors ask here and know no kind by its name. A kind of this package has a file of its own and one
entry in `OWN`; a kind from outside is made known with `register`, or by an entry point of the group
`kvpatch.interventions` that has the kind's name and leads to its `Kind`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar, cast

from kvpatch.caches.kvcache import KVCache
from kvpatch.caches.selection import Touched
from kvpatch.errors import CacheError, ExtensionError, KvpatchError
from kvpatch.interventions.cache_steering import CACHE_STEERING
from kvpatch.interventions.in_prefill import IN_PREFILL
from kvpatch.interventions.joined import JOINED
from kvpatch.interventions.kinds import Fitting, Kind, Made, Trials, fits_any_model, fits_any_prompts
from kvpatch.interventions.reshape import RESHAPE
from kvpatch.interventions.splice import SPLICE
from kvpatch.interventions.steering import VALUE_STEERING
from kvpatch.models.geometry import Geometry
from kvpatch.specs import outside_interventions
from kvpatch.specs.base import Change
from kvpatch.specs.interventions import InterventionSpec

__all__ = [
    "Fitting",
    "Kind",
    "Made",
    "Trials",
    "build",
    "fits_any_model",
    "fits_any_prompts",
    "is_of_shape",
    "kind_of",
    "layout_of",
    "prompts_in_cache",
    "refuse_misfit_model",
    "refuse_misfit_prompts",
    "register",
]

OWN: tuple[Kind[Any], ...] = (SPLICE, IN_PREFILL, JOINED, RESHAPE, VALUE_STEERING, CACHE_STEERING)
_BY_SETTINGS: dict[type[Change], Kind[Any]] = {kind.settings: kind for kind in OWN}
T = TypeVar("T")


def register(kind: Kind[Any]) -> None:
    """Make a kind from outside the package known by the name that its settings have.

    Raises:
        ExtensionError: where it is no `Kind`, or its name is taken or can't be one.
    """
    if not isinstance(kind, Kind) or not issubclass(kind.settings, InterventionSpec):
        raise ExtensionError(
            f"an intervention is registered as a Kind whose settings are an InterventionSpec, not {kind!r}"
        )
    outside_interventions.register(kind.settings.kind, kind)


def kind_of(change: Change) -> Kind[Any]:
    """The kind that carries a change out.

    Raises:
        ExtensionError: where no such kind is registered.
    """
    own = _BY_SETTINGS.get(type(change))
    if own is not None:
        return own
    if not isinstance(change, InterventionSpec):
        raise ExtensionError(f"{type(change).__name__} is no intervention that kvpatch knows")
    kind = cast("Kind[Any]", outside_interventions.registered(change.said()["kind"]))
    if not isinstance(change, kind.settings):
        raise ExtensionError(
            f"the intervention {kind.settings.kind!r} was read with other code than is registered now; load the "
            "protocol again"
        )
    return kind


def refuse_misfit_model(change: Change | None, geometry: Geometry, *, may_be_empty: bool) -> None:
    """Refuse a change that no trial on this model could make, whatever the prompts; None is a natural cache.

    Raises:
        CacheError: saying what does not fit.
    """
    if change is not None:
        kind = kind_of(change)
        _asked(change, lambda: kind.refuse_model(change, geometry, may_be_empty))


def refuse_misfit_prompts(change: Change, fitting: Fitting) -> None:
    """Refuse a change that one of these prompts can't take.

    Raises:
        CacheError: saying what does not fit; EmptySelection where nothing would change.
    """
    kind = kind_of(change)
    _asked(change, lambda: kind.refuse_prompts(change, fitting))


def layout_of(change: Change) -> str | None:
    """What changes share that fit the same prompts alike; None where that is not known."""
    layout = kind_of(change).layout
    return None if layout is None else layout(change)


def is_of_shape(change: Change) -> bool:
    """Whether prompts that have the same segments, token by token, take a change alike, whatever their words."""
    asked = kind_of(change).is_of_shape
    return asked is not None and asked(change)


def prompts_in_cache(change: Change | None) -> int:
    """Prompts whose slots can stand together in a cache that the change makes."""
    return 1 if change is None else kind_of(change).prompts_in_cache


def build(change: Change | None, trials: Trials) -> Made:
    """Make the caches of a condition's trials; None leaves them natural.

    Raises:
        KvpatchError: what keeps these trials from their caches.
    """
    if change is None:
        return Made(trials.own, Touched.none(trials.own.batch))
    kind = kind_of(change)
    if type(change) in _BY_SETTINGS:
        return kind.build(change, trials)
    copies = replace(trials, own=trials.own[:], giver_caches=lambda: trials.giver_caches()[:])
    made = _asked(change, lambda: kind.build(change, copies))  # other conditions have the same natural caches
    _refuse_useless(kind, made, trials)
    return made


def _asked(change: Change, ask: Callable[[], T]) -> T:
    """What the code of a kind answers; what it raises besides our own errors is told as one."""
    try:
        return ask()
    except KvpatchError:
        raise
    except Exception as error:
        if type(change) in _BY_SETTINGS or not isinstance(change, InterventionSpec):
            raise
        told = " ".join(str(error).split())
        raise CacheError(f"the intervention {change.kind!r} failed: {type(error).__name__}: {told}") from error


def _refuse_useless(kind: Kind[Any], made: object, trials: Trials) -> None:
    """Refuse what code from outside made where no trial could run from it, or where it changed nothing."""
    named, rows = f"the intervention {kind.settings.kind!r}", trials.own.batch
    if not isinstance(made, Made) or not isinstance(made.cache, KVCache):
        raise CacheError(f"{named} must return a Made that holds a KVCache, not {type(made).__name__}")
    counted = len(made.touched.slots)
    if made.cache.batch != rows or counted != rows:
        raise CacheError(
            f"{named} must return one row per trial; of {rows} trials it gave {made.cache.batch} rows and counted "
            f"the slots of {counted}"
        )
    if made.cache.model != trials.own.model:
        raise CacheError(f"{named} returned a cache of another model")
    if not kind.runs_prompts and (made.planned or made.fired):
        raise CacheError(f"{named} counts changes that it made while prompts ran; its Kind must say runs_prompts=True")
    if not trials.may_be_empty and not all(all(made.touched.of_row(row)) for row in range(rows)):
        raise CacheError(
            f"{named} found nothing to change in a prompt; choose what every prompt has, or say may_be_empty: true of "
            "the condition"
        )

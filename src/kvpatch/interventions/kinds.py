"""What a kind of intervention is made of: whether it fits, asked of `Fitting`, and how it changes caches, `Trials`.

Each kind stands in a file of its own, ends it with a `Kind`, and has one entry in `build.py`, the one door to all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from kvpatch.caches.kvcache import KVCache
from kvpatch.caches.selection import Touched, chosen_layers
from kvpatch.engine.model import Model
from kvpatch.engine.prefill import labels_of
from kvpatch.errors import CacheError, ExtensionError
from kvpatch.interventions.directions import mean_directions, reference_caches
from kvpatch.models.geometry import Geometry
from kvpatch.models.template import EncodedPrompt
from kvpatch.specs.base import Change
from kvpatch.specs.interventions import InterventionSpec

C = TypeVar("C", bound=Change)


@dataclass(frozen=True)
class Made:
    """What the trials of one condition start from.

    Attributes:
        cache: one row per trial.
        touched: slots, layers and KV heads that were changed, whatever the strength.
        planned, fired: changes that were planned while prompts ran, and those that were made; 0 for a kind that
            changes finished caches. Where they differ, the trials count as failed.
        steps: what is added to the values of every token that is decoded, layer -> [rows, kv_heads, head_dim].
    """

    cache: KVCache
    touched: Touched
    planned: int = 0
    fired: int = 0
    steps: dict[int, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Trials:
    """The trials of one condition, one row per trial: everything that a cache can be made from.

    Attributes:
        model: the model they run on.
        own: natural caches of the prompts that receive. Not to be changed in place.
        receivers, givers: the prompts that receive, and those that something is taken from (the receivers themselves
            where the kind takes nothing from another prompt).
        giver_caches: gives the natural caches of `givers`.
        seeds: what random draws of each row go by; conditions of a pair share them.
        pair_numbers: the number of each row's pair in the run.
        calibration: texts of the calibration pairs, sources and targets; empty unless the settings say `is_fitted`.
        r_v_window: the window of the protocol's R_V, in tokens. r_v_late: its late layer in this model.
        may_be_empty: whether a row may be left as it is where nothing is found to change.
    """

    model: Model
    own: KVCache
    receivers: Sequence[EncodedPrompt]
    givers: Sequence[EncodedPrompt]
    giver_caches: Callable[[], KVCache]
    seeds: Sequence[int]
    pair_numbers: Sequence[int]
    calibration: tuple[tuple[str, ...], tuple[str, ...]]
    r_v_window: int
    r_v_late: int
    may_be_empty: bool

    def reference(self) -> KVCache | None:
        """Natural caches of the calibration sources; None where there are none."""
        sources, _ = self.calibration
        return reference_caches(self.model, sources) if sources else None

    def directions(self) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        """Mean difference of keys (before RoPE) and values over the calibration pairs, sources less targets:
        layer -> [kv_heads, head_dim]."""
        return mean_directions(self.model, *self.calibration)


@dataclass(frozen=True)
class Fitting:
    """The prompts of some trials that a condition must fit, before anything is run.

    Attributes:
        geometry: the model's shape.
        receivers, givers, seeds, r_v_window, may_be_empty: as `Trials` has them.
        room: tokens that will follow the cache.
        continuation_ids: turns text into tokens as it stands, without a template.
    """

    geometry: Geometry
    receivers: Sequence[EncodedPrompt]
    givers: Sequence[EncodedPrompt]
    seeds: Sequence[int]
    r_v_window: int
    may_be_empty: bool
    room: int
    continuation_ids: Callable[[str], Sequence[int]]

    def empty_caches(self, prompts: Sequence[EncodedPrompt]) -> KVCache:
        """Caches with the labels of these prompts that hold zeros; see `empty_caches`."""
        return empty_caches(prompts, self.geometry)

    def refuse_too_long(self, what: str, tokens: int, room: int | None = None) -> None:
        """Refuse a cache that would outgrow the context.

        Args:
            tokens: the cache's length with its pending token.
            room: tokens to follow; `Fitting.room` if not given.
        """
        room = self.room if room is None else room
        if tokens + room > self.geometry.context:
            why = f"; {self.geometry.limit}" if self.geometry.ends_because else ""
            raise CacheError(
                f"{what} of {tokens} tokens and the {room} to follow are more than the context, "
                f"{self.geometry.context}{why}"
            )


def empty_caches(prompts: Sequence[EncodedPrompt], geometry: Geometry) -> KVCache:
    """Caches with the labels of these prompts, one head per layer, and one layer for each way that keys are turned."""
    labels = labels_of(prompts, "cpu")
    ropes = tuple(dict.fromkeys(geometry.rope))
    batch, slots = labels["positions"].shape
    nothing = tuple(torch.zeros(batch, 1, slots, geometry.head_dim) for _ in ropes)
    return KVCache(keys=nothing, values=nothing, rope=ropes, **labels)


def fits_any_model(settings: Change, geometry: Geometry, may_be_empty: bool) -> None:
    """For a kind that every model can take."""


def refuse_missing_layers(settings: Any, geometry: Geometry, may_be_empty: bool) -> None:
    """For a kind with `layers`: refuse one that the model does not have, or a choice that is empty."""
    chosen_layers(settings.layers, geometry.layers, may_be_empty=may_be_empty)


def fits_any_prompts(settings: Change, fitting: Fitting) -> None:
    """For a kind that all prompts can take."""


@dataclass(frozen=True)
class Kind(Generic[C]):
    """One kind of intervention.

    Attributes:
        settings: what a protocol says of it, and what is known of it from that alone (`specs.base.Change`).
        build: makes the caches of a condition's trials.
        refuse_model: raises `CacheError` where it does not fit a model, given its shape and `may_be_empty`.
        refuse_prompts: raises `CacheError` where it does not fit prompts of the trials. Both are asked before a run.
        runs_prompts: whether it is done while prompts run; else it changes finished caches, and plans no changes.
        prompts_in_cache: prompts whose slots can stand together in one cache.
        layout: what of the settings decides which slots go where. Conditions that share it are laid out once.
        is_of_shape: whether prompts that have the same segments, token by token, take it alike, whatever their words.
    """

    settings: type[C]
    build: Callable[[C, Trials], Made]
    refuse_model: Callable[[C, Geometry, bool], None] = fits_any_model
    refuse_prompts: Callable[[C, Fitting], None] = fits_any_prompts
    runs_prompts: bool = False
    prompts_in_cache: int = 1
    layout: Callable[[C], str] | None = None
    is_of_shape: Callable[[C], bool] | None = None

    def __post_init__(self) -> None:
        settings: Any = self.settings
        if not (isinstance(settings, type) and issubclass(settings, Change)):
            raise ExtensionError(f"settings of a kind of intervention must be an InterventionSpec, got {settings!r}")
        if issubclass(settings, InterventionSpec) and not isinstance(getattr(settings, "kind", None), str):
            raise ExtensionError(f"{settings.__name__} needs its name: kind: ClassVar[str] = 'some_name'")

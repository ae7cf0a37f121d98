"""A condition of a protocol: how the cache is made that a trial runs from, and which part it plays."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from kvpatch.specs.base import Change, Frozen, is_false, is_none
from kvpatch.specs.interventions import (
    OWN_KEYS,
    CacheSteering,
    InPrefill,
    InterventionSpec,
    Joined,
    Reshape,
    ValueSteering,
)
from kvpatch.specs.outside_interventions import Said, Unregistered
from kvpatch.specs.patch import Patch

Side = Literal["target", "source"]
ROLES = ("target", "source", "foreign", "foreign_matched", "neutral", "shuffled_words")
"""Prompts every pair has, or can have; groups named by `also` come on top."""
NATURAL_TARGET, NATURAL_SOURCE = "A", "B"
"""The conditions whose difference is the natural gap, by their names in every protocol."""
Role = Literal["experiment", "control", "integrity"]


class Condition(Frozen):
    """One way to build the cache a trial runs from.

    Without more the cache is the natural one of `into`. `patch` splices `from`'s cache in; `text_of` is the text a full
    swap equals: that prompt's cached tokens, then `into`'s last token, prefilled; `in_prefill` and `joined` take from
    `from` while prompts run; `reshape` takes `from`'s participation ratio; `steer_values` and `steer_cache` add a
    direction of the calibration pairs; `intervention` is of a kind from outside the package.
    """

    about: str
    into: Side = "target"
    from_: str | None = Field(default=None, alias="from", description="a role of ROLES, or a group of `also`")
    patch: Patch | None = None
    text_of: str | None = None
    in_prefill: InPrefill | None = None
    joined: Joined | None = None
    reshape: Reshape | None = None
    steer_values: ValueSteering | None = None
    steer_cache: CacheSteering | None = None
    outside: Said | None = Field(
        default=None,
        alias="intervention",
        exclude_if=is_none,
        description="an intervention from outside the package: its kind, and the settings of that kind",
    )
    role: Role = "control"
    min_kv_heads: int = Field(default=1, ge=1, description="the condition is left out, by name, on models with fewer")
    needs_template: bool = Field(
        default=False,
        exclude_if=is_false,
        description="the condition is left out, by name, on models without a chat template, whose prompts have no "
        "slots before and behind the user's words",
    )
    may_be_empty: bool = Field(
        default=False,
        exclude_if=is_false,
        description="allow pairs in which the condition finds no slot, layer or KV head to change: they run as they "
        "are, and their n_slots_patched is 0. Otherwise such a pair is an error before the run",
    )

    @model_validator(mode="after")
    def _is_one_way(self) -> Condition:
        given = [way for way, what in self._ways().items() if what is not None]
        if len(given) > 1:
            raise ValueError(f"a condition is made in one way; it has {' and '.join(repr(way) for way in given)}")
        if isinstance(self.outside, Unregistered):
            return self  # what it takes, the code that is not there knew
        takes_giver = self.change is not None and self.change.takes_giver
        if (self.from_ is None) == takes_giver:
            if self.outside is not None:
                told = "needs 'from'" if takes_giver else "takes nothing from another prompt; leave 'from' out"
                raise ValueError(f"an intervention of kind {self.outside.kind!r} {told}")
            raise ValueError("'from' goes with 'patch', 'in_prefill', 'joined' or 'reshape', and each of them needs it")
        return self

    def _ways(self) -> dict[str, object]:
        """Every key that says how the cache is made, with what is said of it."""
        own = {key: getattr(self, key) for key in OWN_KEYS}
        return {"patch": self.patch, "text_of": self.text_of, **own, "intervention": self.outside}

    @property
    def intervention(self) -> InterventionSpec | None:
        """What is done, where it is not a splice."""
        return self.outside or next((spec for key in OWN_KEYS if (spec := getattr(self, key)) is not None), None)

    @property
    def change(self) -> Change | None:
        """What is done, a splice or another intervention; None for a natural cache."""
        return self.patch or self.intervention

    @property
    def giver(self) -> str:
        """The role of the prompt that something is taken from; the receiver's own where nothing is."""
        return self.from_ or self.text_of or self.into

    @property
    def recipe(self) -> str | None:
        """What is done, as JSON; None for a natural cache."""
        return None if self.change is None else self.change.to_json()

    @property
    def is_natural(self) -> bool:
        """Whether the cache is a prompt's own."""
        return self.change is None

    @property
    def is_text_of_pair(self) -> bool:
        """Whether the trial is, by construction, a natural run of the pair's own target or source text."""
        prompt = self.text_of or self.from_
        if self.intervention is not None:
            return False
        if self.patch is not None and not self.patch.is_full_swap:
            return False
        return prompt in (None, "target", "source")

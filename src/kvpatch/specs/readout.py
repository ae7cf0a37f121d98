"""What a readout is: one number that is measured on a trial, with all that a page, a table or a sentence says of it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from kvpatch.errors import ExtensionError

Asks = Literal["attention", "attention.marked", "geometry", "semantic"]
Transform = Literal["none", "log"]
Place = Literal["effects", "report", "maps", "dose", "across", "trials", "newest", "r_v", "copying"]
"""Where a readout is shown.

effects: the effects of every condition, in the report, the command line and the notebook.
report: a chart and a column of means for each phase of the report.
maps, dose, across: the report's maps of layers and tokens, its dose curves, and its charts of several models.
trials, newest: the live view's table of trials, and its list of the newest ones.
r_v, copying: the report's question on R_V, and its objection that words were copied from the source; a hypothesis on
    the readout bears on it.
"""
_NAME = re.compile(r"[a-z][a-z0-9_]*")


@dataclass(frozen=True)
class TrialRecord:
    """What a readout from outside is measured on: one trial after it ran.

    text: the continuation, special tokens left out; may be empty.
    output_token_ids: [tokens], the tokens that the trial wrote, end token included; at least one.
    output_logprobs: [tokens], log-probability of each at temperature 1, natural logarithm, in nats.
    stopped: "eos" where the model ended its reply, "length" where the limit of new tokens did.
    source_text, target_text: words of the pair's source and target prompt, without the chat template.
    source_token_ids: tokens of the prompt whose cache was put in, chat template included, pending token last.
    target_token_ids: tokens of the prompt that received it, in the same way.
    cache_token_ids: [slots + 1], the token that each slot of the trial's cache stands for, pending token last.
    """

    text: str
    output_token_ids: tuple[int, ...]
    output_logprobs: tuple[float, ...]
    stopped: str
    source_text: str
    target_text: str
    source_token_ids: tuple[int, ...]
    target_token_ids: tuple[int, ...]
    cache_token_ids: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class Readout:
    """One readout: a number that is measured on every trial, or on the trials of a phase that asks for it.

    name: its column in the stored trials, and its name in a protocol: lower-case letters, digits and underscores.
    label: its title in plain words.
    about: what the number is; the documentation of its column.
    unit: what a sentence says after the number, such as "nats"; "" where a number stands alone.
    axis: what the axis of a chart says; the unit where not given.
    explained: what the report says of it; `about` where not given.
    headings: for a place, the heading of its column there; the name where none is given.
    direction: what more of it means; None where more is neither.
    transform: "log" where conditions are compared by the logarithm, so that an effect is a ratio.
    asks: what a phase must say for it to be measured; None where every phase measures it. "semantic" is said once for
        the whole protocol, under `readouts`.
    is_positive: whether it is above 0 by its definition, so that it has a logarithm.
    may_be_evidence: whether a difference in it may serve as evidence about the protocol's mode.
    is_of_sampled_text: whether it is measured on the text that a trial wrote. Such a readout is read only where the
        texts are coherent; one of forced text, or of the cache, needs no coherent text.
    places: where it is shown.
    kind: type of its column.
    is_stored: whether it is a column of the stored trials; the others are made of a column when trials are read.
    measure: for a readout from outside, the function that measures a trial that ran without an error. It must return a
        finite number, or NaN where the trial can't be measured, and the same number for the same trial. None for a
        readout that kvpatch measures itself.

    Raises:
        ExtensionError: for a name that can't be a column, an unknown place, or settings that contradict each other.
    """

    name: str
    label: str
    about: str
    unit: str = ""
    axis: str = ""
    explained: str = ""
    headings: Mapping[Place, str] = field(default_factory=dict[Any, str])
    direction: str | None = None
    transform: Transform = "none"
    asks: Asks | None = None
    is_positive: bool = False
    may_be_evidence: bool = False
    is_of_sampled_text: bool = True
    places: frozenset[Place] = frozenset({"effects", "report", "trials"})
    kind: Literal["float64", "int32"] = "float64"
    is_stored: bool = True
    measure: Callable[[TrialRecord], float] | None = None

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ExtensionError(
                f"readout {self.name!r}: a name has only lower-case letters, digits and underscores, "
                "and starts with a letter"
            )
        # A set or a list of places is taken as well; nothing may change it afterwards.
        object.__setattr__(self, "places", frozenset(self.places))
        known = get_args(Place)
        for place in sorted({*self.places, *self.headings} - set(known)):
            raise ExtensionError(f"readout {self.name!r}: no place {place!r}; a readout is shown in {', '.join(known)}")
        if self.transform not in get_args(Transform):
            raise ExtensionError(f"readout {self.name!r}: transform is 'none' or 'log', not {self.transform!r}")
        if self.transform == "log" and not self.is_positive:
            raise ExtensionError(
                f"readout {self.name!r} is compared by its logarithm, which only a readout above 0 has; "
                "give is_positive=True, or leave transform out"
            )
        if self.places & {"maps", "across"} and "effects" not in self.places:
            raise ExtensionError(
                f"readout {self.name!r}: maps and charts across models show effects; add 'effects' to its places"
            )

    @property
    def scale(self) -> str:
        """What an effect is measured in: the name, or "log NAME" where effects are compared by the logarithm."""
        return f"log {self.name}" if self.transform == "log" else self.name

    def heading(self, place: Place) -> str:
        """The heading of its column in a place; effects are headed by their scale where no heading is given."""
        return self.headings.get(place, self.scale if place == "effects" else self.name)

    @property
    def said(self) -> str:
        """What the report says of it."""
        return self.explained or self.about

    @property
    def axis_title(self) -> str:
        """What the axis of a chart says."""
        return self.axis or self.unit or self.name

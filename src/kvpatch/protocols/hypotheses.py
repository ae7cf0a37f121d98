"""Hypotheses of a protocol: a contrast of conditions, its test, its margin and its family."""

from __future__ import annotations

import graphlib
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator
from pydantic_core import PydanticKnownError

from kvpatch.specs.base import Frozen, is_none
from kvpatch.specs.nearest import instead
from kvpatch.specs.test_kinds import TestKind, find, kind_named, kinds

Transform = Literal["none", "log"]
Correction = Literal["holm", "benjamini_hochberg"]


def _of_a_kind(value: Any) -> Any:
    if find(value) is not None:
        return value
    *names, last = map(repr, kinds())
    raise PydanticKnownError("literal_error", {"expected": f"{', '.join(names)} or {last}"})


def _list_kinds(schema: dict[str, Any]) -> None:
    schema["enum"] = list(kinds())


Test = Annotated[str, BeforeValidator(_of_a_kind), Field(json_schema_extra=_list_kinds)]
"""The id of a kind of test (`specs/test_kinds.py`)."""


class Misplaced(ValueError):
    """What is wrong with a part of a protocol, and the keys that lead to that part."""

    def __init__(self, message: str, *loc: str | int) -> None:
        super().__init__(message)
        self.loc = loc


class Margin(Frozen):
    """How large an effect must be, or how small: the largest of the parts that are given.

    `natural_gap`: share of |mean(B - A)| on the calibration pairs. `dz`: in standard deviations of the pair
    differences. `value`: in the readout's own unit.
    """

    natural_gap: float | None = Field(default=None, gt=0)
    dz: float | None = Field(default=None, gt=0)
    value: float | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _says_something(self) -> Margin:
        if self.natural_gap is None and self.dz is None and self.value is None:
            raise ValueError("a margin gives natural_gap, dz or value")
        return self


_COUNTS = {1: "one", 2: "two", 3: "three"}
_TERM = re.compile(r"\s*([+-])?\s*([A-Za-z][A-Za-z0-9_]*)\s*")
_ORDER = re.compile(r"\s*([<>])?\s*([A-Za-z][A-Za-z0-9_]*)\s*")


def parse_contrast(contrast: str) -> dict[str, int]:
    """Condition -> +1 or -1, from a contrast such as "C - N1".

    Raises:
        Misplaced: where it does not read so.
    """
    return dict(_terms(contrast))


@lru_cache(maxsize=4096)
def _terms(contrast: str) -> tuple[tuple[str, int], ...]:
    out: dict[str, int] = {}
    at = 0
    while at < len(contrast):
        term = _TERM.match(contrast, at)
        if term is None or (out and term[1] is None):
            raise Misplaced(f"contrast {contrast!r} must read like 'C - N1'", "contrast")
        if term[2] in out:
            raise Misplaced(f"contrast {contrast!r} names condition {term[2]!r} twice", "contrast")
        out[term[2]] = -1 if term[1] == "-" else 1
        at = term.end()
    if not out:
        raise Misplaced(f"contrast {contrast!r} must read like 'C - N1'", "contrast")
    return tuple(out.items())


def parse_order(contrast: str) -> tuple[list[str], list[str]]:
    """Conditions in order and the signs between them, from an ordering such as "L1 < L2 < L3 > L4".

    Raises:
        Misplaced: where it does not read so.
    """
    names: list[str] = []
    signs: list[str] = []
    at = 0
    while at < len(contrast):
        term = _ORDER.match(contrast, at)
        if term is None or bool(names) != bool(term[1]) or term[2] in names:
            raise Misplaced(f"ordering {contrast!r} must read like 'L1 < L2 < L3', each condition once", "contrast")
        names.append(term[2])
        signs += [term[1]] if term[1] else []
        at = term.end()
    if len(names) < 3:
        raise Misplaced(f"ordering {contrast!r} needs at least three conditions, such as 'L1 < L2 < L3'", "contrast")
    return names, signs


def _goes_with(tests: list[str]) -> str:
    """ "test 'correlates', which needs", of one kind of test or of several."""
    if len(tests) == 1:
        return f"test {tests[0]!r}, which needs"
    return f"tests {', '.join(map(repr, tests[:-1]))} and {tests[-1]!r}, which need"


class Variable(Frozen):
    """One number a pair: a readout of one condition, or of several combined."""

    contrast: str = Field(description="one condition, such as 'B', or several, such as 'C - N1'")
    readout: str
    transform: Transform = "none"

    @model_validator(mode="after")
    def _reads(self) -> Variable:
        self.weights()
        return self

    def weights(self) -> dict[str, int]:
        """Condition -> +1 or -1, from the contrast."""
        return parse_contrast(self.contrast)


class Hypothesis(Frozen):
    """A claim, and the test that decides it.

    `contrast` combines pair means ('C - N1'); for "trend" and "umbrella" it orders conditions ('L1 < L2 < L3',
    'L1 < L2 > L3'). "correlates" relates it over pairs to `against`, given `controlling`. "rank_correlates" ranks the
    readout over ordered conditions, within each pair, beside their order or beside the readout `ranked_with`.
    "replicates" asks whether it repeats the hypothesis `of`, in a phase on another model.

    `needs` names what must have passed before this one is read. One without it waits for the gatekeepers of earlier
    gates.
    """

    id: Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_]*$")]
    claim: str
    phase: str
    contrast: str = Field(description="conditions joined by - and +, such as 'C - N1', or an ordering with < and >")
    readout: str
    transform: Transform = "none"
    test: Test
    direction: Literal["positive", "negative"] | None = Field(default=None, description="of a correlation")
    against: Variable | None = Field(default=None, description="what the contrast correlates with, over pairs")
    controlling: list[Variable] = Field(default=[], description="what is held constant in a correlation")
    ranked_with: str | None = Field(
        default=None,
        exclude_if=is_none,
        description="readout whose ranks over the same conditions are correlated; their order where it is not given",
    )
    of: str | None = Field(default=None, description="the hypothesis that is replicated")
    margin: Margin | None = None
    alpha: float = Field(default=0.05, gt=0, lt=1)
    family: str = Field(description="hypotheses of one family share a correction for multiplicity")
    needs: list[str] | None = Field(
        default=None,
        exclude_if=is_none,
        description="ids of the hypotheses that must have passed before this one may be read; [] for none. Where it is "
        "given, gates do not apply to the hypothesis",
    )
    gate: int = Field(default=1, ge=1, le=5, description="asked for where 'needs' is not given")
    is_gatekeeper: bool = Field(default=False, description="if it is not supported, later gates can't be interpreted")
    criterion: str | None = Field(default=None, description="claim of the row of the plan's table that this answers")
    expected: str | None = Field(
        default=None, exclude_if=is_none, description="what the plan said, where its row does not say it"
    )
    confirmatory: bool = True

    @model_validator(mode="after")
    def _says_what_it_waits_for(self) -> Hypothesis:
        if self.needs is None and "gate" not in self.model_fields_set:
            raise Misplaced(
                "give 'needs', the ids of the hypotheses that must have passed before it ([] for none)", "needs"
            )
        if self.needs is not None and self.is_gatekeeper:
            raise Misplaced(
                "'is_gatekeeper' goes with 'gate'; a hypothesis with 'needs' keeps no gate", "is_gatekeeper"
            )
        return self

    @model_validator(mode="after")
    def _is_complete(self) -> Hypothesis:
        kind = self.kind
        names = self._ordered() if kind.order is not None else list(self.weights())
        if len(names) < kind.least_conditions:
            what, least = "contrast" if kind.order is None else "ordering", kind.least_conditions
            many = f"{_COUNTS.get(least, least)} condition{'' if least == 1 else 's'}"
            raise Misplaced(f"{what} {self.contrast!r} needs at least {many}", "contrast")
        if "margin" in kind.needs and self.margin is None:
            raise Misplaced(f"test {self.test!r} needs a margin, such as {{natural_gap: 0.2}}", "margin")
        for key in ("against", "direction", "of"):
            if (getattr(self, key) is not None) != (key in kind.needs):
                goes = _goes_with([each.id for each in kinds().values() if key in each.needs])
                raise Misplaced(f"{key!r} goes with {goes} it; the test is {self.test!r}", key)
        if self.controlling and kind.measures != "correlation":
            tests = [each.id for each in kinds().values() if each.measures == "correlation"]
            named = " or ".join(map(repr, tests))
            raise Misplaced(f"'controlling' goes with test {named}; the test is {self.test!r}", "controlling")
        if self.ranked_with is not None and kind.measures != "ranks":
            tests = [each.id for each in kinds().values() if each.measures == "ranks"]
            named = " or ".join(map(repr, tests))
            raise Misplaced(f"'ranked_with' goes with test {named}; the test is {self.test!r}", "ranked_with")
        return self

    def _ordered(self) -> list[str]:
        names, signs = parse_order(self.contrast)
        changes = sum(a != b for a, b in pairwise(signs))
        if self.kind.order == "monotone" and changes:
            raise Misplaced(f"a trend goes one way, such as 'L1 < L2 < L3'; {self.contrast!r} turns", "contrast")
        if self.kind.measures == "ranks" and signs[0] != "<":
            raise Misplaced(
                f"levels are ranked from the first to the last, such as 'L1 < L2 < L3', not {self.contrast!r}; "
                "'direction' says which way the readout goes",
                "contrast",
            )
        if self.kind.order == "peaked" and (changes != 1 or signs[0] != "<"):
            raise Misplaced(
                f"an umbrella rises and then falls, such as 'L1 < L2 > L3', not {self.contrast!r}", "contrast"
            )
        return names

    def weights(self) -> dict[str, int]:
        """Condition -> +1 or -1, from a contrast that is no ordering."""
        return parse_contrast(self.contrast)

    @property
    def kind(self) -> TestKind:
        """What the test needs, measures, claims and is called."""
        return kind_named(self.test)

    @property
    def sign(self) -> int | None:
        """+1 or -1, the side of 0 that a contrast is claimed to lie on; None for tests of another kind."""
        return self.kind.side

    @property
    def claimed_side(self) -> int:
        """+1 or -1, the side of 0 that the estimate is claimed to lie on: a contrast, a slope or a correlation."""
        return -1 if self.sign == -1 or self.direction == "negative" else 1

    @property
    def is_ordering(self) -> bool:
        """Whether the contrast orders conditions."""
        return self.kind.order is not None

    def order(self) -> tuple[list[str], int]:
        """Conditions in rising order up to the peak, as written, and the index of the peak.

        A falling trend is given from its lowest to its highest, so that the last is always the peak of a trend.
        """
        names, signs = parse_order(self.contrast)
        if self.kind.order == "monotone":
            return (names if signs[0] == "<" else names[::-1]), len(names) - 1
        return names, signs.index(">")

    def conditions_by_place(self) -> list[tuple[list[str], tuple[str | int, ...]]]:
        """The conditions of each contrast of the hypothesis, and the keys that lead to it."""
        own = parse_order(self.contrast)[0] if self.is_ordering else list(self.weights())
        return [(own, ()), *((list(variable.weights()), loc) for variable, loc in self.others())]

    def others(self) -> list[tuple[Variable, tuple[str | int, ...]]]:
        """What the contrast is held against, and the keys that lead to each."""
        against: list[tuple[Variable, tuple[str | int, ...]]] = []
        if self.against is not None:
            against.append((self.against, ("against",)))
        return against + [(variable, ("controlling", place)) for place, variable in enumerate(self.controlling)]

    @property
    def readouts(self) -> list[str]:
        """Every readout the hypothesis reads, each once, its own first."""
        others = [variable.readout for variable, _ in self.others()]
        return list(dict.fromkeys([self.readout, *others, *([self.ranked_with] if self.ranked_with else [])]))

    @property
    def conditions(self) -> list[str]:
        """Every condition the hypothesis reads, each once."""
        return list(dict.fromkeys(name for names, _ in self.conditions_by_place() for name in names))


def waits_for(hypotheses: Sequence[Hypothesis]) -> dict[str, list[str]]:
    """Id -> the ids it needs, of the hypotheses that have `needs`."""
    return {h.id: h.needs for h in hypotheses if h.needs is not None}


def wrong_needs(hypotheses: Sequence[Hypothesis]) -> Iterator[Misplaced]:
    """What is wrong with `needs`: a name that there is not, or that is given twice, a hypothesis' own, a circle."""
    known = [h.id for h in hypotheses]
    for place, h in enumerate(hypotheses):
        for index, name in enumerate(h.needs or ()):
            at = ("hypotheses", place, "needs", index)
            if name not in known:
                yield Misplaced(f"no hypothesis {name!r}; {instead(name, [i for i in known if i != h.id])}", *at)
            elif name == h.id:
                yield Misplaced(f"hypothesis {name!r} needs itself, so it could never be read", *at)
            elif name in (h.needs or ())[:index]:
                yield Misplaced(f"{h.id!r} names hypothesis {name!r} twice", *at)
    circle = _circle({name: [n for n in needs if n != name] for name, needs in waits_for(hypotheses).items()})
    if circle:
        told = " needs ".join(map(repr, circle))
        yield Misplaced(
            f"{told}, a circle, so none of them could be read", "hypotheses", known.index(circle[0]), "needs"
        )


def _circle(needs: Mapping[str, Sequence[str]]) -> list[str]:
    """Ids of which each needs the next, the first one again at the end; empty where there is no circle."""
    try:
        graphlib.TopologicalSorter(needs).prepare()
    except graphlib.CycleError as error:
        return list(reversed(error.args[1]))  # graphlib lists them the other way: each is needed by the next
    return []

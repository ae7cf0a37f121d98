"""What a protocol file may say. Data only; reading one needs no torch.

A protocol names a prompt bank, how to generate, conditions (ways to build the cache a trial runs from), phases (which
conditions on how many pairs) and hypotheses (what must hold between conditions for a claim to stand).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, PrivateAttr, ValidationInfo, field_validator, model_validator

from kvpatch import arguments
from kvpatch.interventions import CacheSteering, InPrefill, Intervention, Joined, Reshape, ValueSteering
from kvpatch.nearest import instead
from kvpatch.patch import Frozen, NamedSlots, Patch, SlotQuery

Side = Literal["target", "source"]
ROLES = ("target", "source", "foreign", "neutral", "shuffled_words")
"""Prompts every pair has, or can have; groups named by `also` come on top."""
Role = Literal["experiment", "control", "integrity"]
Transform = Literal["none", "log"]
Test = Literal[
    "greater", "less", "much_greater", "much_less", "equivalent", "trend", "umbrella", "correlates", "replicates"
]
Correction = Literal["holm", "benjamini_hochberg"]
Mode = Annotated[str, Field(pattern=r"^\w[\w-]*$")]
PLAIN = "plain"
"""What is not in the protocol's mode."""


class Misplaced(ValueError):
    """What is wrong with a part of a protocol, and the keys that lead to that part."""

    def __init__(self, message: str, *loc: str | int) -> None:
        super().__init__(message)
        self.loc = loc


class Generation(Frozen):
    """How every trial goes on from its cache."""

    max_new_tokens: int = Field(default=64, ge=1)
    temperature: Annotated[float, AfterValidator(arguments.temperature)] = Field(default=0.7, ge=0, allow_inf_nan=False)
    top_p: float = Field(default=1.0, gt=0, le=1)
    samples: int = Field(default=1, ge=1, description="continuations per pair and condition")


class RVSettings(Frozen):
    """R_V: participation ratio of cached values, late layer over early; layers as fractions of depth or as indices."""

    early: float | int = 0.125
    late: float | int = 0.75
    window: int = Field(default=16, ge=2)


class Readouts(Frozen):
    """Settings of the readouts; which numbers they give is fixed (see the trial columns)."""

    lexicon: str = Field(
        default="recursion",
        description="what scores a text: a shipped lexicon, a lexicon's YAML file, or a function as file.py:function "
        "or package.module:function; paths are relative to the protocol file",
    )
    r_v: RVSettings = RVSettings()
    forced_tokens: int = Field(default=24, ge=2, description="tokens of the fixed continuation R_V is forced on")
    likelihood_tokens: int = Field(default=8, ge=1, description="first tokens of a held-out continuation that count")
    continuations_per_cell: int = Field(default=4, ge=1)
    js_positions: int = Field(default=8, ge=1, description="first positions of the fixed continuation js_pull uses")


class Calibration(Frozen):
    """Held-out pairs that fix the equivalence bounds and the coherence limits before any test."""

    pairs: int = Field(default=30, ge=2)
    conditions: list[str] = Field(default=["A", "B"])


class Pairing(Frozen):
    """Which groups (or levels) of the bank become targets and sources, and how far apart in tokens a pair may be.

    `by` length: optimal assignment on token length. `by` subject: all groups are written on the same subjects; a pair
    takes its target on one subject, and its source and the prompts of `also` on one other.
    """

    targets: str = "plain"
    sources: str = "recursive"
    by: Literal["length", "subject"] = "length"
    also: list[str] = Field(default=[], description="further groups that lend a pair a prompt in its source's place")
    max_length_difference: float = Field(default=0.1, ge=0, description="share of the longer prompt's body tokens")


def _is_false(value: object) -> bool:
    """A switch that came later and is off is left out of what is hashed, so that what lacks it keeps its hash."""
    return value is False


class Condition(Frozen):
    """One way to build the cache a trial runs from.

    Without more the cache is the natural one of `into`. `patch` splices `from`'s cache in; `text_of` is the text a full
    swap equals: that prompt's cached tokens, then `into`'s last token, prefilled; `in_prefill` and `joined` take from
    `from` while prompts run; `reshape` takes `from`'s participation ratio; `steer_values` and `steer_cache` add a
    direction of the calibration pairs.
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
    role: Role = "control"
    min_kv_heads: int = Field(default=1, ge=1, description="the condition is left out, by name, on models with fewer")
    needs_template: bool = Field(
        default=False,
        exclude_if=_is_false,
        description="the condition is left out, by name, on models without a chat template, whose prompts have no "
        "slots before and behind the user's words",
    )
    may_be_empty: bool = Field(
        default=False,
        exclude_if=_is_false,
        description="allow pairs in which the condition finds no slot, layer or KV head to change: they run as they "
        "are, and their n_slots_patched is 0. Otherwise such a pair is an error before the run",
    )

    @model_validator(mode="after")
    def _is_one_way(self) -> Condition:
        ways = ("patch", "text_of", "in_prefill", "joined", "reshape", "steer_values", "steer_cache")
        given = [way for way in ways if getattr(self, way) is not None]
        if len(given) > 1:
            raise ValueError(f"a condition is made in one way; it has {' and '.join(repr(way) for way in given)}")
        takes = [way for way in given if way in ("patch", "in_prefill", "joined", "reshape")]
        if (self.from_ is None) == bool(takes):
            raise ValueError("'from' goes with 'patch', 'in_prefill', 'joined' or 'reshape', and each of them needs it")
        return self

    @property
    def intervention(self) -> Intervention | None:
        """What is done, where it is not a splice."""
        return self.in_prefill or self.joined or self.reshape or self.steer_values or self.steer_cache

    @property
    def recipe(self) -> str | None:
        """What is done, as JSON; None for a natural cache."""
        chosen = self.patch or self.intervention
        return chosen.to_json() if chosen else None

    @property
    def is_natural(self) -> bool:
        """Whether the cache is a prompt's own."""
        return self.patch is None and self.intervention is None

    @property
    def is_text_of_pair(self) -> bool:
        """Whether the trial is, by construction, a natural run of the pair's own target or source text."""
        prompt = self.text_of or self.from_
        if self.intervention is not None:
            return False
        if self.patch is not None and not self.patch.is_full_swap:
            return False
        return prompt in (None, "target", "source")


class Watched(Frozen):
    """What of attention a phase watches beside the statistics that it always gets (see `heads.STATISTICS`).

    `marked`: slots of a trial's cache whose share of attention is read, such as self-referential words.
    """

    marked: NamedSlots | SlotQuery | None = None

    @model_validator(mode="after")
    def _needs_no_chance(self) -> Watched:
        if isinstance(self.marked, SlotQuery) and self.marked.matched_to is not None:
            raise ValueError("marked slots are chosen by meaning; matched_to draws them at random")
        return self


class Phase(Frozen):
    """One question: which conditions, on how many pairs.

    `conditions` are the question's own; `controls` run beside them. A phase may form its pairs in its own way, and may
    run on another model, by a key of the protocol's `models`. `attention` (true, or what to mark) and `geometry` add
    readouts that other phases do not pay for.
    """

    question: str
    n: int = Field(ge=1)
    conditions: list[str]
    controls: list[str] = Field(default=[])
    pairing: Pairing | None = None
    model: str | None = None
    attention: bool | Watched = Field(default=False, description="read every attention head of every trial")
    geometry: bool = Field(default=False, description="read the whole cache's geometry, not R_V alone")

    @property
    def watched(self) -> Watched | None:
        """What of attention is watched, None for nothing."""
        return Watched() if self.attention is True else self.attention or None

    @property
    def all_conditions(self) -> list[str]:
        """The question's own conditions, then the controls."""
        return [*self.conditions, *self.controls]


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


_TERM = re.compile(r"\s*([+-])?\s*([A-Za-z][A-Za-z0-9_]*)\s*")
_ORDER = re.compile(r"\s*([<>])?\s*([A-Za-z][A-Za-z0-9_]*)\s*")


def parse_contrast(contrast: str) -> dict[str, int]:
    """Condition -> +1 or -1, from a contrast such as "C - N1".

    Raises:
        Misplaced: where it does not read so.
    """
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
    return out


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
    'L1 < L2 > L3'). "correlates" relates it over pairs to `against`, given `controlling`. "replicates" asks whether
    it repeats the hypothesis `of`, in a phase on another model.
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
    of: str | None = Field(default=None, description="the hypothesis that is replicated")
    margin: Margin | None = None
    alpha: float = Field(default=0.05, gt=0, lt=1)
    family: str = Field(description="hypotheses of one family share a correction for multiplicity")
    gate: int = Field(ge=1, le=5)
    is_gatekeeper: bool = Field(default=False, description="if it is not supported, later gates can't be interpreted")
    criterion: str | None = Field(default=None, description="row of the success-criteria table this decides")
    confirmatory: bool = True

    @model_validator(mode="after")
    def _is_complete(self) -> Hypothesis:
        if self.test in ("trend", "umbrella"):
            self._check_order()
        elif len(self.weights()) < 2:
            raise Misplaced(f"contrast {self.contrast!r} needs at least two conditions", "contrast")
        if self.test in ("much_greater", "much_less", "equivalent") and self.margin is None:
            raise Misplaced(f"test {self.test!r} needs a margin, such as {{natural_gap: 0.2}}", "margin")
        needs = {"against": "correlates", "direction": "correlates", "of": "replicates"}
        for key, test in needs.items():
            if (getattr(self, key) is not None) != (self.test == test):
                raise Misplaced(f"{key!r} goes with test {test!r}, which needs it; the test is {self.test!r}", key)
        if self.controlling and self.test != "correlates":
            raise Misplaced(f"'controlling' goes with test 'correlates'; the test is {self.test!r}", "controlling")
        return self

    def _check_order(self) -> None:
        _, signs = parse_order(self.contrast)
        changes = sum(a != b for a, b in pairwise(signs))
        if self.test == "trend" and changes:
            raise Misplaced(f"a trend goes one way, such as 'L1 < L2 < L3'; {self.contrast!r} turns", "contrast")
        if self.test == "umbrella" and (changes != 1 or signs[0] != "<"):
            raise Misplaced(
                f"an umbrella rises and then falls, such as 'L1 < L2 > L3', not {self.contrast!r}", "contrast"
            )

    def weights(self) -> dict[str, int]:
        """Condition -> +1 or -1, from a contrast that is no ordering."""
        return parse_contrast(self.contrast)

    @property
    def sign(self) -> int | None:
        """+1 or -1, the side of 0 that a contrast is claimed to lie on; None for tests of another kind."""
        return {"greater": 1, "much_greater": 1, "less": -1, "much_less": -1}.get(self.test)

    @property
    def is_ordering(self) -> bool:
        """Whether the contrast orders conditions."""
        return self.test in ("trend", "umbrella")

    def order(self) -> tuple[list[str], int]:
        """Conditions in rising order up to the peak, as written, and the index of the peak.

        A falling trend is given from its lowest to its highest, so that the last is always the peak of a trend.
        """
        names, signs = parse_order(self.contrast)
        if self.test == "trend":
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
    def conditions(self) -> list[str]:
        """Every condition the hypothesis reads, each once."""
        return list(dict.fromkeys(name for names, _ in self.conditions_by_place() for name in names))


def calibration_of(model: str | None) -> str:
    """The phase under which the calibration of a model is stored; None is the run's own model."""
    return "calibration" if model is None else f"calibration-{model}"


def dumped_sha256(dumped: dict[str, Any]) -> str:
    """Hash of a protocol as run.json holds it; stays what it was when a later schema knows more fields."""
    return hashlib.sha256(json.dumps(dumped, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


class Protocol(Frozen):
    """A whole protocol."""

    protocol: str
    title: str
    question: str
    bank: str = Field(
        default="recursion", description="a directory of YAML files, relative to the protocol file, or a shipped bank"
    )
    models: dict[str, str] = Field(default={}, description="further models by key; a phase names one of them")
    pairing: Pairing = Pairing()
    mode: Mode = Field(
        default_factory=lambda data: data["pairing"].sources if "pairing" in data else "",
        description="a word for what the sources evoke, as the bank's continuations name it; if not given, the group "
        "of the sources",
    )
    generation: Generation = Generation()
    readouts: Readouts = Readouts()
    calibration: Calibration = Calibration()
    conditions: dict[str, Condition]
    phases: dict[str, Phase]
    hypotheses: list[Hypothesis]
    corrections: dict[str, Correction] = Field(default={}, description="family -> correction; Holm where not named")
    expected: dict[str, dict[str, list[str]]] = Field(
        default={},
        description="organism -> verdict (or several, joined by 'or') -> the hypotheses that must get it in validation",
    )
    _folder: Path | None = PrivateAttr(default=None)

    @field_validator("mode")
    @classmethod
    def _is_not_plain(cls, mode: str) -> str:
        if mode == PLAIN:
            raise ValueError(f"{PLAIN!r} is what is not in the mode; give the mode a word of its own")
        return mode

    @model_validator(mode="after")
    def _names_exist(self, info: ValidationInfo) -> Protocol:
        """Whoever reads a file gives a list as context, and tells all that is wrong at once."""
        wrong = list(self._wrong_names())
        if isinstance(info.context, list):
            info.context.extend(wrong)
        elif wrong:
            raise wrong[0]
        return self

    def _wrong_names(self) -> Iterator[Misplaced]:
        for name, phase in self.phases.items():
            yield from self._phase_fits(name, phase)
        for place, condition in enumerate(self.calibration.conditions):
            yield from self._is_condition(condition, "calibration", "conditions", place)
        roles = [*ROLES, *sorted({role for pairing in self.pairings for role in pairing.also})]
        for name, condition in self.conditions.items():
            for key, role in (("from", condition.from_), ("text_of", condition.text_of)):
                if role is not None and role not in roles:
                    yield Misplaced(f"no prompt {role!r}; {instead(role, roles)}", "conditions", name, key)
        families = list(dict.fromkeys(h.family for h in self.hypotheses))
        for family in self.corrections:
            if family not in families:
                told = instead(family, families)
                yield Misplaced(f"no hypothesis has family {family!r}; {told}", "corrections", family)
        yield from self._hypotheses_fit()
        known = [h.id for h in self.hypotheses]
        for organism, verdicts in self.expected.items():
            for verdict, names in verdicts.items():
                for name in names:
                    if name not in known:
                        told = instead(name, known)
                        yield Misplaced(f"no hypothesis {name!r}; {told}", "expected", organism, verdict)

    def _phase_fits(self, name: str, phase: Phase) -> Iterator[Misplaced]:
        for key in ("conditions", "controls"):
            for place, condition in enumerate(getattr(phase, key)):
                yield from self._is_condition(condition, "phases", name, key, place)
        seen: set[str] = set()
        for key in ("conditions", "controls"):
            for place, condition in enumerate(getattr(phase, key)):
                if condition in seen:
                    yield Misplaced(f"condition {condition!r} is named twice", "phases", name, key, place)
                seen.add(condition)
        if phase.model is not None and phase.model not in self.models:
            told = instead(phase.model, self.models)
            yield Misplaced(f"no model {phase.model!r} in 'models'; {told}", "phases", name, "model")

    def _is_condition(self, name: str, *loc: str | int) -> Iterator[Misplaced]:
        if name not in self.conditions:
            yield Misplaced(f"no condition {name!r}; {instead(name, self.conditions)}", *loc)

    def _hypotheses_fit(self) -> Iterator[Misplaced]:
        seen: dict[str, Hypothesis] = {}
        known = [h.id for h in self.hypotheses]
        for place, h in enumerate(self.hypotheses):
            at = ("hypotheses", place)
            if h.id in seen:
                yield Misplaced(f"hypothesis {h.id!r} is defined twice", *at, "id")
            if h.phase not in self.phases:
                yield Misplaced(f"no phase {h.phase!r}; {instead(h.phase, self.phases)}", *at, "phase")
            else:
                yield from self._contrasts_fit(h, at)
            if h.of is not None and h.of not in known:
                yield Misplaced(f"no hypothesis {h.of!r}; {instead(h.of, known)}", *at, "of")
            elif h.of is not None and (h.of not in seen or seen[h.of].sign is None):
                yield Misplaced(f"{h.of!r} is no contrast with a direction that is defined above", *at, "of")
            seen[h.id] = h

    def _contrasts_fit(self, h: Hypothesis, at: tuple[str | int, ...]) -> Iterator[Misplaced]:
        there = self.phases[h.phase].all_conditions
        if any(name not in self.conditions for name in there):
            return  # the phase's own list is wrong, and is told of
        for names, loc in h.conditions_by_place():
            for name in names:
                if name not in there:
                    told = instead(name, there, "it has")
                    message = f"condition {name!r} is not in phase {h.phase!r}; {told}"
                    yield Misplaced(message, *at, *loc, "contrast")

    @property
    def folder(self) -> Path | None:
        """Where the protocol's file lies, to which its paths are relative; no part of what the protocol says."""
        return self._folder

    def placed(self, folder: Path) -> Protocol:
        """The same protocol, with its paths relative to a folder."""
        out = self.model_copy()
        out._folder = folder
        return out

    @property
    def mode_name(self) -> str:
        """The mode's word as it reads in a sentence."""
        return self.mode.replace("_", " ")

    def hypothesis(self, name: str) -> Hypothesis:
        """The hypothesis of an id."""
        return next(h for h in self.hypotheses if h.id == name)

    @property
    def pairings(self) -> list[Pairing]:
        """Every way in which pairs are formed, the protocol's own first."""
        return [self.pairing, *(phase.pairing for phase in self.phases.values() if phase.pairing is not None)]

    @property
    def sha256(self) -> str:
        """Hash of the canonical JSON: what the protocol says, whatever the file's layout and comments."""
        return dumped_sha256(self.model_dump(mode="json", by_alias=True))

    def role(self, phase: str, condition: str) -> Role:
        """What a condition is in a phase: the experiment's own, a control, or an integrity check."""
        own = self.conditions[condition].role
        is_control = phase in self.phases and condition in self.phases[phase].controls
        return "control" if is_control and own == "experiment" else own

    def is_tautological(self, hypothesis: Hypothesis) -> bool:
        """Whether every condition of the hypothesis is, by construction, a natural run of the pair's own texts."""
        conditions = [self.conditions[name] for name in hypothesis.conditions]
        return all(c.is_text_of_pair for c in conditions) and any(not c.is_natural for c in conditions)

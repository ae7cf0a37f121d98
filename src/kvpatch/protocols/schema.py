"""What a protocol file may say. Data only; reading one needs no torch.

A protocol names a prompt bank, how to generate, conditions (ways to build the cache a trial runs from), phases (which
conditions on how many pairs) and hypotheses (what must hold between conditions for a claim to stand).
"""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatchcase
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, PrivateAttr, ValidationInfo, field_validator, model_validator

from kvpatch.protocols.conditions import NATURAL_SOURCE, NATURAL_TARGET, ROLES, Condition, Role
from kvpatch.protocols.families import Family, with_alphas, wrong_families
from kvpatch.protocols.hypotheses import Correction, Hypothesis, Misplaced, wrong_needs
from kvpatch.protocols.naming import MOST_WRONG, misnamed
from kvpatch.protocols.plan_rows import PlanRow, completed, said_of, wrong_rows
from kvpatch.specs import arguments
from kvpatch.specs.base import PLAIN, Frozen, Mode, is_empty, is_none
from kvpatch.specs.nearest import instead
from kvpatch.specs.outside_interventions import AS_STORED
from kvpatch.specs.selectors import NamedSlots, SlotQuery
from kvpatch.store.record import dumped_sha256


class Generation(Frozen):
    """How every trial goes on from its cache."""

    max_new_tokens: int = Field(default=64, ge=1)
    temperature: Annotated[float, AfterValidator(arguments.temperature)] = Field(default=0.7, ge=0, allow_inf_nan=False)
    top_p: float = Field(default=1.0, gt=0, le=1)
    samples: int = Field(default=1, ge=1, description="continuations per pair and condition")


class RVLayers(Frozen):
    """The layers of R_V for one model, where they are not the protocol's; as fractions of depth or as indices."""

    early: float | int | None = None
    late: float | int | None = None

    @model_validator(mode="after")
    def _says_something(self) -> RVLayers:
        if self.early is None and self.late is None:
            raise ValueError("give the model a layer of its own, 'early' or 'late', or leave it out")
        return self


class RVSettings(Frozen):
    """R_V: participation ratio of cached values, late layer over early; layers as fractions of depth or as indices.

    `per_model` gives models layers of their own. The window is the same for all: what a ratio says depends on it.
    """

    early: float | int = 0.125
    late: float | int = 0.75
    window: int = Field(default=16, ge=2)
    per_model: dict[str, RVLayers] = Field(
        default={},
        exclude_if=is_empty,
        description="name of a model -> its own layers. A name is what --model gets, or the last part of a path or of "
        "a repository's name, whatever its case; '*' stands for any letters. The first that fits counts",
    )

    def of_model(self, name: str) -> RVSettings:
        """The settings for a model, by the name or the path that it was loaded by."""
        whole = name.casefold()
        last = whole.replace("\\", "/").rstrip("/").rpartition("/")[2]
        for pattern, own in self.per_model.items():
            if whole == pattern.casefold() or fnmatchcase(last, pattern.casefold()):
                given = own.model_dump(exclude_none=True)
                return self.model_copy(update={**given, "per_model": {}})
        return self.model_copy(update={"per_model": {}})


class Readouts(Frozen):
    """Settings of the readouts; which numbers they give is fixed (see the trial columns)."""

    lexicon: str = Field(
        default="recursion",
        description="what scores a text: a shipped lexicon, a lexicon's YAML file, or a function as file.py:function "
        "or package.module:function; paths are relative to the protocol file",
    )
    semantic: Literal["recursion"] | None = Field(
        default=None,
        description="score the meaning of each output along this direction (column semantic_score); needs the extra "
        "'semantic', and is null where that is not installed",
    )
    r_v: RVSettings = RVSettings()
    forced_tokens: int = Field(default=24, ge=2, description="tokens of the fixed continuation R_V is forced on")
    likelihood_tokens: int = Field(default=8, ge=1, description="first tokens of a held-out continuation that count")
    continuations_per_cell: int = Field(default=4, ge=1)
    js_positions: int = Field(default=8, ge=1, description="first positions of the fixed continuation js_pull uses")


class Calibration(Frozen):
    """Held-out pairs that fix the equivalence bounds, the coherence limits and the mode readout before any test.

    The conditions of `neutral` and `destroyed` are forced on held-out continuations alone, and write nothing. They say
    how far caches without a mode, and destroyed ones, move each likelihood readout, and the mode readout is fitted so
    that they move it little. Where `destroyed` names none, neither is done.
    """

    pairs: int = Field(default=30, ge=2)
    conditions: list[str] = Field(default=["A", "B"])
    neutral: list[str] = Field(default=[], exclude_if=is_empty, description="whole caches that hold no mode")
    destroyed: list[str] = Field(default=[], exclude_if=is_empty, description="caches of the source, destroyed")


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
    max_partner_difference: float | None = Field(
        default=None,
        ge=0,
        exclude_if=is_none,
        description="the same between a target or source and its foreign partner; a pair over it is dropped. If not "
        "given, it is not looked at",
    )


class AttentionSettings(Frozen):
    """What of attention a phase watches beside the statistics that it always gets (see `specs.attention.STATISTICS`).

    `marked`: slots of a trial's cache whose share of attention is read, such as self-referential words.
    """

    marked: NamedSlots | SlotQuery | None = None

    @model_validator(mode="after")
    def _needs_no_chance(self) -> AttentionSettings:
        if isinstance(self.marked, SlotQuery) and self.marked.draws:
            key = "at_most" if self.marked.matched_to is None else "matched_to"
            raise ValueError(f"marked slots are chosen by meaning; {key} draws them at random")
        return self


class Having(Frozen):
    """What prompts of a pair must have for a phase to run on it: a slot of `slots`, in the prompt of each role of
    `roles` that the pair has. `beyond_sinks`: slots that serve as attention sinks do not count."""

    slots: NamedSlots | SlotQuery
    roles: list[str] = Field(min_length=1)
    beyond_sinks: bool = False


class Phase(Frozen):
    """One question: which conditions, on how many pairs.

    `conditions` are the question's own; `controls` run beside them. A phase may form its pairs in its own way, and may
    run on another model, by a key of the protocol's `models`. `attention` (true, or what to mark) and `geometry` add
    readouts that other phases do not pay for. `having` passes over pairs whose prompts lack what the phase compares;
    they are counted, and others take their place.
    """

    question: str
    n: int = Field(ge=1)
    conditions: list[str]
    controls: list[str] = Field(default=[])
    pairing: Pairing | None = None
    model: str | None = None
    having: Having | None = Field(
        default=None, exclude_if=is_none, description="what the prompts of a pair must have to be one of this phase's"
    )
    attention: bool | AttentionSettings = Field(default=False, description="read every attention head of every trial")
    geometry: bool = Field(default=False, description="read the whole cache's geometry, not R_V alone")

    @property
    def watched(self) -> AttentionSettings | None:
        """What of attention is watched, None for nothing."""
        return AttentionSettings() if self.attention is True else self.attention or None

    @property
    def all_conditions(self) -> list[str]:
        """The question's own conditions, then the controls."""
        return [*self.conditions, *self.controls]


def calibration_of(model: str | None) -> str:
    """The phase under which the calibration of a model is stored; None is the run's own model."""
    return "calibration" if model is None else f"calibration-{model}"


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
    families: dict[str, Family] = Field(
        default={},
        exclude_if=is_empty,
        description="family -> its alpha, its correction, and to whom it passes its alpha. A family that is not named "
        "has the alpha that its hypotheses give",
    )
    hypotheses: list[Hypothesis]
    corrections: dict[str, Correction] = Field(default={}, description="family -> correction; Holm where not named")
    expected: dict[str, dict[str, list[str]]] = Field(
        default={},
        description="organism -> verdict (or several, joined by 'or') -> the hypotheses that must get it in validation",
    )
    plan: list[PlanRow] = Field(
        default=[], exclude_if=is_empty, description="what the experiment's plan claimed and expected, row by row"
    )
    _folder: Path | None = PrivateAttr(default=None)

    @field_validator("mode")
    @classmethod
    def _is_not_plain(cls, mode: str) -> str:
        if mode == PLAIN:
            raise ValueError(f"{PLAIN!r} is what is not in the mode; give the mode a word of its own")
        return mode

    @field_validator("hypotheses")
    @classmethod
    def _have_the_alpha_of_their_family(cls, hypotheses: list[Hypothesis], info: ValidationInfo) -> list[Hypothesis]:
        return with_alphas(hypotheses, info.data.get("families", {}))

    @model_validator(mode="after")
    def _names_exist(self, info: ValidationInfo) -> Protocol:
        """Whoever reads a file gives a list as context, and tells all that is wrong at once."""
        # A stored run keeps the names that it has: nothing is written under them any more.
        is_stored = info.context is AS_STORED
        wrong = [*([] if is_stored else misnamed(self)), *islice(self._wrong_names(), MOST_WRONG)]
        if isinstance(info.context, list):
            info.context.extend(wrong)
        elif wrong:
            raise wrong[0]
        return self

    def _wrong_names(self) -> Iterator[Misplaced]:
        for name, phase in self.phases.items():
            yield from self._phase_fits(name, phase)
        yield from self._calibration_fits()
        roles = self._roles
        for name, condition in self.conditions.items():
            for key, role in (("from", condition.from_), ("text_of", condition.text_of)):
                if role is not None and role not in roles:
                    yield Misplaced(f"no prompt {role!r}; {instead(role, roles)}", "conditions", name, key)
        yield from wrong_families(self.families, self.corrections, self.hypotheses)
        yield from self._hypotheses_fit()
        yield from wrong_needs(self.hypotheses)
        yield from wrong_rows(self.plan, self.hypotheses)
        known = [h.id for h in self.hypotheses]
        for organism, verdicts in self.expected.items():
            for verdict, name in ((v, name) for v, names in verdicts.items() for name in names if name not in known):
                yield Misplaced(f"no hypothesis {name!r}; {instead(name, known)}", "expected", organism, verdict)

    @property
    def _roles(self) -> list[str]:
        """Every role that a prompt of some pair may have."""
        return [*ROLES, *sorted({role for pairing in self.pairings for role in pairing.also})]

    def _calibration_fits(self) -> Iterator[Misplaced]:
        for key in ("conditions", "neutral", "destroyed"):
            for place, condition in enumerate(getattr(self.calibration, key)):
                yield from self._is_condition(condition, "calibration", key, place)
        for natural in (NATURAL_TARGET, NATURAL_SOURCE):
            if self.calibration.destroyed and natural not in self.conditions:
                told = f"no condition {natural!r}, from which shifts of destroyed caches are measured"
                yield Misplaced(told, "calibration", "destroyed")

    def _phase_fits(self, name: str, phase: Phase) -> Iterator[Misplaced]:
        for place, role in enumerate(phase.having.roles if phase.having else ()):
            if role not in self._roles:
                yield Misplaced(
                    f"no prompt {role!r}; {instead(role, self._roles)}", "phases", name, "having", "roles", place
                )
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

    @classmethod
    def as_stored(cls, content: dict[str, Any]) -> Protocol:
        """The protocol of a stored run, read without the code of what it uses from outside the package.

        Raises:
            pydantic.ValidationError: where the content is no protocol.
        """
        return cls.model_validate(content, context=AS_STORED)

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
    def plan_rows(self) -> list[PlanRow]:
        """Every row of the plan's table, each with the hypotheses that answer it."""
        return completed(self.plan, self.hypotheses)

    def expected_of(self, hypothesis: Hypothesis) -> str | None:
        """What the plan said of a hypothesis, None where it said nothing."""
        return said_of(hypothesis, self.plan_rows)

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

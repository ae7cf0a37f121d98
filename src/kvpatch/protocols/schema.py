"""What a protocol file may say. Data only; reading one needs no torch.

A protocol names a prompt bank, how to generate, conditions (ways to build the cache a trial runs from), phases (which
conditions on how many pairs) and hypotheses (what must hold between conditions for a claim to stand).
"""

from __future__ import annotations

import hashlib
import json
import re
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from kvpatch.interventions import CacheSteering, InPrefill, Joined, ValueSteering
from kvpatch.patch import Frozen, Patch

Side = Literal["target", "source"]
PromptRole = Literal["target", "source", "foreign", "neutral", "shuffled_words", "pseudo_recursive", "zero_lexicon"]
Role = Literal["experiment", "control", "integrity"]
Test = Literal["greater", "less", "much_greater", "much_less", "equivalent"]


class Generation(Frozen):
    """How every trial goes on from its cache."""

    max_new_tokens: int = Field(default=64, ge=1)
    temperature: float = Field(default=0.7, ge=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    samples: int = Field(default=1, ge=1, description="continuations per pair and condition")


class RVSettings(Frozen):
    """R_V: participation ratio of cached values, late layer over early; layers as fractions of depth or as indices."""

    early: float | int = 0.125
    late: float | int = 0.75
    window: int = Field(default=16, ge=2)


class Readouts(Frozen):
    """Settings of the readouts; which numbers they give is fixed (see the trial columns)."""

    lexicon: str = "recursion"
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
    """Which groups of the bank become targets and sources, and how far apart in tokens a pair may be."""

    targets: str = "plain"
    sources: str = "recursive"
    max_length_difference: float = Field(default=0.1, ge=0, description="share of the longer prompt's body tokens")


class Condition(Frozen):
    """One way to build the cache a trial runs from.

    Without more the cache is the natural one of `into`. `patch` splices `from`'s cache in; `text_of` is the text a full
    swap equals: that prompt's cached tokens, then `into`'s last token, prefilled; `in_prefill` and `joined` take from
    `from` while prompts run; `steer_values` and `steer_cache` add a direction of the calibration pairs.
    """

    about: str
    into: Side = "target"
    from_: PromptRole | None = Field(default=None, alias="from")
    patch: Patch | None = None
    text_of: PromptRole | None = None
    in_prefill: InPrefill | None = None
    joined: Joined | None = None
    steer_values: ValueSteering | None = None
    steer_cache: CacheSteering | None = None
    role: Role = "control"
    min_kv_heads: int = Field(default=1, ge=1, description="the condition is left out, by name, on models with fewer")

    @model_validator(mode="after")
    def _is_one_way(self) -> Condition:
        ways = ("patch", "text_of", "in_prefill", "joined", "steer_values", "steer_cache")
        given = [way for way in ways if getattr(self, way) is not None]
        if len(given) > 1:
            raise ValueError(f"a condition is made in one way; it has {' and '.join(repr(way) for way in given)}")
        takes = [way for way in given if way in ("patch", "in_prefill", "joined")]
        if (self.from_ is None) == bool(takes):
            raise ValueError("'from' goes with 'patch', 'in_prefill' or 'joined', and each of them needs it")
        return self

    @property
    def intervention(self) -> InPrefill | Joined | ValueSteering | CacheSteering | None:
        """What is done, where it is not a splice."""
        return self.in_prefill or self.joined or self.steer_values or self.steer_cache

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


class Phase(Frozen):
    """One question: which conditions, on how many pairs."""

    question: str
    n: int = Field(ge=1)
    conditions: list[str]


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


class Hypothesis(Frozen):
    """A claim, and the test that decides it."""

    id: Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_]*$")]
    claim: str
    phase: str
    contrast: str = Field(description="conditions joined by - and +, such as 'C - N1'; pair means are combined so")
    readout: str
    transform: Literal["none", "log"] = "none"
    test: Test
    margin: Margin | None = None
    alpha: float = Field(default=0.05, gt=0, lt=1)
    family: str = Field(description="hypotheses of one family share Holm's correction")
    gate: int = Field(ge=1, le=5)
    is_gatekeeper: bool = Field(default=False, description="if it is not supported, later gates can't be interpreted")
    criterion: str | None = Field(default=None, description="row of the success-criteria table this decides")
    confirmatory: bool = True

    @model_validator(mode="after")
    def _is_complete(self) -> Hypothesis:
        self.weights()
        if self.test in ("much_greater", "much_less", "equivalent") and self.margin is None:
            raise ValueError(f"test {self.test!r} needs a margin")
        return self

    def weights(self) -> dict[str, int]:
        """Condition -> +1 or -1, from the contrast."""
        out: dict[str, int] = {}
        at = 0
        while at < len(self.contrast):
            term = _TERM.match(self.contrast, at)
            if term is None or (out and term[1] is None):
                raise ValueError(f"contrast {self.contrast!r} must read like 'C - N1'")
            out[term[2]] = -1 if term[1] == "-" else 1
            at = term.end()
        if len(out) < 2:
            raise ValueError(f"contrast {self.contrast!r} needs at least two conditions")
        return out


def dumped_sha256(dumped: dict[str, Any]) -> str:
    """Hash of a protocol as run.json holds it; stays what it was when a later schema knows more fields."""
    return hashlib.sha256(json.dumps(dumped, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


class Protocol(Frozen):
    """A whole protocol."""

    protocol: str
    title: str
    question: str
    bank: str = "recursion"
    pairing: Pairing = Pairing()
    generation: Generation = Generation()
    readouts: Readouts = Readouts()
    calibration: Calibration = Calibration()
    conditions: dict[str, Condition]
    phases: dict[str, Phase]
    hypotheses: list[Hypothesis]

    @model_validator(mode="after")
    def _names_exist(self) -> Protocol:
        for name, phase in self.phases.items():
            for condition in phase.conditions:
                if condition not in self.conditions:
                    raise ValueError(f"phase {name!r} names condition {condition!r}, which is not defined")
        for condition in self.calibration.conditions:
            if condition not in self.conditions:
                raise ValueError(f"calibration names condition {condition!r}, which is not defined")
        seen: set[str] = set()
        for hypothesis in self.hypotheses:
            if hypothesis.id in seen:
                raise ValueError(f"hypothesis {hypothesis.id!r} is defined twice")
            seen.add(hypothesis.id)
            if hypothesis.phase not in self.phases:
                raise ValueError(f"hypothesis {hypothesis.id!r} names phase {hypothesis.phase!r}, which is not defined")
            for condition in hypothesis.weights():
                if condition not in self.phases[hypothesis.phase].conditions:
                    raise ValueError(
                        f"hypothesis {hypothesis.id!r}: condition {condition!r} is not in phase {hypothesis.phase!r}"
                    )
        return self

    @property
    def sha256(self) -> str:
        """Hash of the canonical JSON: what the protocol says, whatever the file's layout and comments."""
        return dumped_sha256(self.model_dump(mode="json", by_alias=True))

    def is_tautological(self, hypothesis: Hypothesis) -> bool:
        """Whether every condition of the contrast is, by construction, a natural run of the pair's own texts."""
        conditions = [self.conditions[name] for name in hypothesis.weights()]
        return all(c.is_text_of_pair for c in conditions) and any(not c.is_natural for c in conditions)

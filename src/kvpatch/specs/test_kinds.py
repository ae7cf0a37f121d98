"""The kinds of test that a hypothesis may ask for, and the words that a verdict may say.

One entry per kind says what it needs, what it measures, what it claims and how it is said. Whoever wants to know any of
this of a hypothesis asks `Hypothesis.kind`. How a kind is computed and simulated stands in `verdicts/procedures.py`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import ClassVar, Literal, get_args

from kvpatch.errors import ExtensionError
from kvpatch.specs import extensions
from kvpatch.specs.nearest import instead

GROUP = "kvpatch.test_kinds"
"""Entry points of this group name functions without arguments that register kinds of test."""
Word = Literal[
    "supported", "contradicted", "not supported", "equivalent", "inconclusive", "not interpretable", "tautological"
]
"""What a verdict may say. "contradicted" is said where the data speak against the claim; a protocol without `families`
says "not supported" of the same."""
AGAINST: tuple[Word, ...] = ("contradicted", "not supported")
Measures = Literal["difference", "slope", "correlation", "ranks", "heads"]
Claims = Literal["beyond", "apart", "within", "repeated"]
Needed = Literal["margin", "against", "direction", "of"]
_FINDING = "{contrast} in {readout} is {estimate} on average"
_MEAN = "Mean of the contrast over pairs, in the readout's unit."
_SLOPE = "Mean slope of a pair over the ordered conditions, in the readout's unit a step."
_SLOPE_FINDING = "{contrast} in {readout} has a mean slope of {estimate} a step"
_SLOPE_POWER = "dz is that of the pairs' slopes, for noise that is normal and alike at every level"
_FIELDS = {
    "claim": (),
    "finding": ("contrast", "readout", "estimate", "number", "against", "held"),
    "limit": ("quantity", "number"),
    "axis": ("readout",),
    "scale": (),
}


@dataclass(frozen=True)
class Words:
    """How a kind of test is said. Parts in braces are filled in.

    claim: what a table says behind the contrast. finding: the start of a verdict's reason; it may hold {contrast},
    {readout}, {estimate} (with the readout's unit), {number} (the estimate alone), {against} and {held}. limit: what an
    estimate is held against; {quantity} has the readout's unit, {number} has none. axis: the name of a chart's axis; it
    may hold {readout}. scale: one sentence that says what the axis shows. power: what the figures of the power table
    mean, where that is not the dz of the pair differences.
    """

    claim: str
    finding: str = _FINDING
    limit: str = "{quantity}"
    axis: str = "{readout}"
    scale: str = _MEAN
    power: str | None = None


@dataclass(frozen=True)
class TestKind:
    """One kind of test.

    measures: what one number per pair is: the "difference" of a contrast, the "slope" over ordered conditions, two
    numbers whose "correlation" over pairs is asked for, the correlation of "ranks" over a pair's ordered conditions, or
    the difference in attention "heads" that other pairs chose.
    claims: that the effect lies "beyond" 0 on one side, "apart" from 0 on either side, "within" the margin, or is
    "repeated" from another hypothesis. The rule that decides follows from it.
    side: +1 or -1, the side of 0 that a difference is claimed to lie on. A correlation has its side from the
    hypothesis' `direction`, a slope from its order.
    order: "monotone" or "peaked", the form that an ordering must have; None where the contrast is no ordering.
    needs: keys that a hypothesis must give. All but `margin` may be given for no other kind.
    least_conditions: how many conditions a contrast must have.
    beyond_margin: whether the effect has to lie beyond the margin and not only beyond 0.
    level: of the interval.
    is_mean: whether the estimate is the mean over pairs.
    is_in_unit: whether the estimate is in the readout's unit. If not, a margin counts by its `value` alone, since the
    natural gap and dz are on another scale.

    Raises:
        ExtensionError: where the parts do not fit each other.
    """

    __test__: ClassVar[bool] = False  # pytest takes what is called Test... for a class of tests

    id: str
    words: Words
    measures: Measures = "difference"
    claims: Claims = "beyond"
    side: Literal[1, -1] | None = None
    order: Literal["monotone", "peaked"] | None = None
    needs: frozenset[Needed] = field(default_factory=frozenset)
    least_conditions: int = 2
    beyond_margin: bool = False
    level: float = 0.95
    is_mean: bool = True
    is_in_unit: bool = True

    def __post_init__(self) -> None:
        if wrong := _misfit(self):
            raise ExtensionError(f"test kind {self.id!r}: {wrong}")

    @property
    def certifies_absence(self) -> bool:
        """Whether it holds where there is no effect to speak of."""
        return self.claims == "within"

    @property
    def passes(self) -> Word:
        """The verdict of a hypothesis that passes."""
        return "equivalent" if self.certifies_absence else "supported"

    @property
    def has_margin_on_both_sides(self) -> bool:
        """Whether the margin lies on either side of 0, and not on the claim's alone."""
        return self.claims in ("within", "apart")


def _misfit(kind: TestKind) -> str | None:
    """The first thing in which the parts of a kind do not fit each other, as the end of a sentence; None if they do."""
    if not isinstance(kind.id, str) or not re.fullmatch(r"[a-z][a-z0-9_]*", kind.id):
        return "an id has small letters, digits and underscores, and starts with a letter"
    for name, value, known in (
        ("measures", kind.measures, get_args(Measures)),
        ("claims", kind.claims, get_args(Claims)),
        ("side", kind.side, (1, -1, None)),
        ("order", kind.order, ("monotone", "peaked", None)),
        *(("needs", key, get_args(Needed)) for key in sorted(kind.needs, key=str)),
    ):
        if value not in known:
            return f"{name} can't be {value!r}; it may be {', '.join(map(repr, known))}"
    has_side = kind.measures in ("difference", "heads") and kind.claims == "beyond"
    correlates = kind.measures in ("correlation", "ranks")
    checks = (
        (
            (kind.order is not None) == (kind.measures in ("slope", "ranks")),
            "'order' goes with what measures a slope or ranks, and with nothing else",
        ),
        (
            ("against" in kind.needs) == (kind.measures == "correlation"),
            "'against' is needed by what measures a correlation, and by nothing else",
        ),
        (
            ("direction" in kind.needs) == (correlates and kind.claims == "beyond"),
            "'direction' is needed by a correlation that is claimed to lie beyond 0, and by nothing else",
        ),
        (
            (kind.side is not None) == has_side,
            "'side' is 1 or -1 for a difference that is claimed to lie beyond 0, and None for all else",
        ),
        (("of" in kind.needs) == (kind.claims == "repeated"), "'of' is needed by what claims a repetition"),
        (
            "margin" in kind.needs or not (kind.beyond_margin or kind.certifies_absence),
            "what is held against a margin needs 'margin'",
        ),
        (isinstance(kind.least_conditions, int) and kind.least_conditions > 0, "'least_conditions' is at least 1"),
        (0 < kind.level < 1, f"the level of an interval lies between 0 and 1, not at {kind.level}"),
    )
    return next((wrong for holds, wrong in checks if not holds), None) or _unfillable(kind.words)


def _unfillable(words: Words) -> str | None:
    for name, fields in _FIELDS.items():
        template = getattr(words, name)
        try:
            template.format(**dict.fromkeys(fields, ""))
        except (AttributeError, LookupError, ValueError):
            may = " and ".join("{" + key + "}" for key in fields) or "nothing in braces"
            return f"words.{name} may hold {may}, got {template!r}"
    return None


_MARGIN: frozenset[Needed] = frozenset({"margin"})
_SLOPES = Words("in this order", _SLOPE_FINDING, axis="slope of {readout} a step", scale=_SLOPE, power=_SLOPE_POWER)
_CORRELATION = Words(
    "correlates",
    "{contrast} in {readout} correlates with {against}{held}: r = {number}",
    axis="correlation",
    scale="Correlation over pairs, given what is held constant.",
    power="the figures are correlations",
)
_RHO = Words(
    "rank correlates",
    "Spearman's rho of {against} with {readout} over {contrast} is {number} on average",
    axis="Spearman's rho",
    scale="Mean over pairs of Spearman's rho within each pair.",
    power=f"{_SLOPE_POWER}; what is ranked with another readout is taken to follow it as a level",
)
_HEADS = Words(
    "> 0 in chosen heads",
    "{contrast} in {readout} of heads that other pairs chose is {estimate}, turned the way it went there,",
    axis="{readout} of chosen heads",
    scale="Mean over chosen heads and over the pairs that did not choose them, turned the way the others went.",
    power="half of the pairs test what the other half chose; dz is that of the chosen heads",
)
_OWN: dict[str, TestKind] = {
    kind.id: kind
    for kind in (
        TestKind("greater", Words("> 0"), side=1),
        TestKind("less", Words("< 0"), side=-1),
        TestKind("much_greater", Words("> margin"), side=1, needs=_MARGIN, beyond_margin=True),
        TestKind("much_less", Words("< \u2212margin"), side=-1, needs=_MARGIN, beyond_margin=True),
        TestKind("equivalent", Words("within ± margin"), claims="within", needs=_MARGIN, level=0.90),
        TestKind("trend", _SLOPES, "slope", order="monotone", least_conditions=3),
        TestKind(
            "umbrella",
            Words("rises, then falls", _SLOPE_FINDING, axis=_SLOPES.axis, scale=_SLOPE, power=_SLOPE_POWER),
            "slope",
            order="peaked",
            least_conditions=3,
        ),
        TestKind(
            "correlates",
            _CORRELATION,
            "correlation",
            needs=frozenset({"against", "direction"}),
            is_mean=False,
            is_in_unit=False,
        ),
        TestKind(
            "rank_correlates",
            _RHO,
            "ranks",
            order="monotone",
            needs=frozenset({"direction"}),
            least_conditions=3,
            is_in_unit=False,
        ),
        TestKind("chosen_heads", _HEADS, "heads", side=1),
        TestKind(
            "replicates",
            Words("replicates", power="the second model's own test alone; that the intervals overlap is not counted"),
            claims="repeated",
            needs=frozenset({"of"}),
        ),
    )
}
_FROM_OUTSIDE: dict[str, TestKind] = {}


def register(kind: TestKind) -> None:
    """Add a kind of test from outside the package; its procedure is added by `kvpatch.verdicts.procedures.register`.

    Raises:
        ExtensionError: if it is no kind of test, or another kind of this id is there.
    """
    if not isinstance(kind, TestKind):
        raise ExtensionError(f"a kind of test is registered as a TestKind, got {kind!r}")
    known = _OWN.get(kind.id) or _FROM_OUTSIDE.get(kind.id)
    if known is not None and known != kind:
        raise ExtensionError(f"there is another test kind {kind.id!r} already; give this one another id")
    _FROM_OUTSIDE.setdefault(kind.id, kind)


def kinds() -> dict[str, TestKind]:
    """Every kind of test by its id, those of installed packages among them.

    Raises:
        ExtensionError: if an installed package's kind can't be used.
    """
    extensions.load(GROUP)
    return {**_OWN, **_FROM_OUTSIDE}


def find(name: object) -> TestKind | None:
    """The kind of test of this id; None where there is none.

    Raises:
        ExtensionError: if it is not known, and an installed package's kind can't be used.
    """
    if not isinstance(name, str):
        return None
    return _OWN.get(name) or _FROM_OUTSIDE.get(name) or kinds().get(name)


def kind_named(name: str) -> TestKind:
    """The kind of test of this id.

    Raises:
        ExtensionError: where there is none, or an installed package's kind can't be used.
    """
    kind = find(name)
    if kind is None:
        raise ExtensionError(f"no kind of test {name!r}; {instead(str(name), kinds())}")
    return kind

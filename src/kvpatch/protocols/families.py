"""Families of hypotheses: the chance of a false claim that each may take, and to whom it passes that chance on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from pydantic import Field

from kvpatch.protocols.hypotheses import Correction, Hypothesis, Misplaced
from kvpatch.specs.base import Frozen, is_empty
from kvpatch.specs.nearest import instead

_ROUNDING = 1e-9


class Family(Frozen):
    """Hypotheses that share an alpha and a correction.

    `passes_to`: once every hypothesis of the family is rejected, its alpha is free, and these families are tested at as
    much more (Bretz, Maurer, Brannath & Posch 2009). A share that no family gets is given up.
    """

    alpha: float = Field(default=0.05, gt=0, lt=1, description="chance that any of its claims is false, at most")
    correction: Correction = "holm"
    passes_to: dict[str, float] = Field(
        default={},
        exclude_if=is_empty,
        description="family -> share of this one's alpha that it gets once all of this one's hypotheses are rejected",
    )


def with_alphas(hypotheses: Sequence[Hypothesis], families: Mapping[str, Family]) -> list[Hypothesis]:
    """The hypotheses, each with the alpha of its family where `families` names that.

    Raises:
        Misplaced: where a hypothesis gives another alpha than its family.
    """
    out = []
    for place, h in enumerate(hypotheses):
        family = families.get(h.family)
        if family is None or h.alpha == family.alpha:
            out.append(h)
        elif "alpha" in h.model_fields_set:
            raise Misplaced(
                f"{h.id!r} has alpha {h.alpha:g}, and its family {h.family!r} has {family.alpha:g}; leave the "
                "hypothesis' alpha out",
                place, "alpha",
            )  # fmt: skip
        else:
            out.append(h.model_copy(update={"alpha": family.alpha}))
    return out


def wrong_families(
    families: Mapping[str, Family], corrections: Mapping[str, Correction], hypotheses: Sequence[Hypothesis]
) -> Iterator[Misplaced]:
    """What is wrong with families: names that there are not, shares of more than all, chances that can't be passed."""
    known = list(dict.fromkeys(h.family for h in hypotheses))
    for name in corrections:
        if name not in known:
            yield Misplaced(f"no hypothesis has family {name!r}; {instead(name, known)}", "corrections", name)
        if name in families:
            told = f"family {name!r} has its correction under 'families'; leave it out here"
            yield Misplaced(told, "corrections", name)
    for name, family in families.items():
        if name not in known:
            yield Misplaced(f"no hypothesis has family {name!r}; {instead(name, known)}", "families", name)
        yield from _wrong_passes(name, family, families)


def _wrong_passes(name: str, family: Family, families: Mapping[str, Family]) -> Iterator[Misplaced]:
    at = ("families", name, "passes_to")
    for other, share in family.passes_to.items():
        if other == name:
            yield Misplaced(f"family {name!r} passes its alpha to itself", *at, other)
        elif other not in families:
            told = instead(other, [each for each in families if each != name])
            yield Misplaced(f"no family {other!r} under 'families'; {told}", *at, other)
        elif "benjamini_hochberg" in (family.correction, families[other].correction):
            yield Misplaced(
                f"{name!r} can't pass alpha to {other!r}: Benjamini-Hochberg bounds a share of false claims and "
                "not the chance of any, so that there is no alpha to pass; both need 'holm'",
                *at, other,
            )  # fmt: skip
        if not share > 0:
            yield Misplaced(f"a share of alpha lies above 0 and is at most 1, got {share:g}", *at, other)
    total = sum(family.passes_to.values())
    if total > 1 + _ROUNDING:
        yield Misplaced(f"family {name!r} passes on {total:g} of its alpha; the shares may sum to 1 at most", *at)

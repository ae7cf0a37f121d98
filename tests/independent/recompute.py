"""The verdicts of a run directory, worked out once more from its Parquet files and docs/statistics.md.

    python tests/independent/recompute.py DIR

prints every hypothesis of which the numbers or the word differ from verdicts.json, and exits with 1 where one does. It
takes numpy, scipy, pyarrow and json, and nothing of kvpatch, so that a mistake in kvpatch is not made here again.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import numpy as np
from recompute_heads import of_chosen_heads
from recompute_numbers import (
    adjusted,
    bca,
    equivalence,
    grid_of_table,
    mean_rho,
    on_grid,
    ordered,
    partial_correlation,
    passed_on,
    past_margin,
    rare_bounds,
    rhos,
    sd,
    sign_flips,
    slopes,
)
from recompute_rows import Run, combined, differences, means, of_condition, order, table, terms
from recompute_rules import decide_all
from scipy import stats

ORDERINGS = ("trend", "umbrella")
NUMBERS = ("n", "estimate", "ci_low", "ci_high", "effect_size", "p", "p_adjusted", "p_margin", "margin")


def natural_gap(run, h):
    """What the natural gap is at least, over the calibration pairs of the model; None where it fixes nothing."""
    found = means(run.calibration(h["phase"]), h["readout"], h["transform"])
    gap = on_grid(table([combined(found, {"B": 1, "A": -1})], {})[:, 0])
    if len(gap) < 3:
        return None
    half = float(stats.t.ppf(0.975, len(gap) - 1)) * sd(gap) / math.sqrt(len(gap))
    least = abs(float(gap.mean())) - half
    return least if least > 0 else None


def margins(margin, gap, values, in_unit=True):
    """The whole margin, and its part that is fixed before the test; None for what is not there."""
    if margin is None:
        return None, None
    if not in_unit:
        return margin["value"], margin["value"]
    if margin["natural_gap"] is not None and gap is None:
        return None, margin["value"]
    fixed = [margin["value"]] if margin["value"] is not None else []
    fixed += [margin["natural_gap"] * gap] if margin["natural_gap"] is not None else []
    whole = list(fixed)
    if margin["dz"] is not None:
        if math.isnan(sd(values)):
            return None, max(fixed, default=None)
        whole.append(margin["dz"] * sd(values))
    return (max(whole) if max(whole) > 0 else None), max(fixed, default=None)


def measured_as(run, h):
    """A repetition is measured by the test, and against the margin, of what it repeats."""
    first = run.hypotheses[h["of"]] if h["of"] else h
    return {**h, "test": first["test"], "margin": first["margin"]}


def floor(run, h, rows, units):
    """The one value that every pair has under every condition, or the exact bounds for rare hits; None and None where
    neither is so."""
    weights = terms(h["contrast"])
    found = means(rows, h["readout"], h["transform"])
    values = grid_of_table(table([of_condition(found, name) for name in weights], units))
    if values.size > 1 and (values == values.flat[0]).all():
        return float(values.flat[0]), None
    if h["transform"] != "none" or not values.size or (values < 0).any() or np.mean(values == 0) <= 0.5:
        return None, None
    held_out = means(run.calibration(), h["readout"])
    known = np.array([v for v in held_out.values() if math.isfinite(v) and v > 0])
    return None, rare_bounds([(w, values[:, i]) for i, w in enumerate(weights.values())], known)


def measure(run, h, rows):
    """The numbers of one hypothesis. rows: the test rows of its phase."""
    asked, units = measured_as(run, h), run.units[h["phase"]]
    m = {"asked": asked, "p_margin": math.nan, "constant": None, "bounds": None, "small": math.nan, "level": 0.95}
    if asked["test"] in ORDERINGS:
        names, peak = order(asked)
        found = means(rows, h["readout"], h["transform"])
        of_levels = table([of_condition(found, name) for name in names], units)
        values = on_grid(slopes(of_levels, peak))
        gap = natural_gap(run, h) if run.protocol.get("families") else None
        m["margin"], _ = margins(asked["margin"], gap, values)
        if gap is not None:
            m["small"] = 0.2 * gap / max(peak, len(names) - 1 - peak)
        m["p"] = ordered(of_levels, peak) if len(values) else math.nan
    elif asked["test"] == "correlates":
        variables = [h, h["against"], *h["controlling"]]
        columns = [combined(means(rows, v["readout"], v["transform"]), terms(v["contrast"])) for v in variables]
        xs = table(columns, units)
        values = on_grid(xs[:, 0])
        m["margin"], _ = margins(asked["margin"], None, values, in_unit=False)
        r, above, below, (m["ci_low"], m["ci_high"]) = partial_correlation(xs[:, 0], xs[:, 1], xs[:, 2:])
        m["estimate"] = m["effect_size"] = r
        m["p"] = below if h["direction"] == "negative" else above
    elif asked["test"] == "rank_correlates":
        beside, own = ranked(asked, rows, units)
        values = rhos(beside, own)
        m["margin"], _ = margins(asked["margin"], None, values, in_unit=False)
        m["p"] = mean_rho(beside, own, -1 if h["direction"] == "negative" else 1) if len(values) else math.nan
        m["effect_size"] = float(values.mean()) if len(values) else math.nan
    elif asked["test"] == "chosen_heads":
        values = of_chosen_heads(run.directory, rows, h, units)
        m["margin"], _ = margins(asked["margin"], None, values)
        m["p"] = sign_flips(values, 1)
    else:
        values = differences(rows, h, units)
        gap = natural_gap(run, h)
        m["margin"], fixed = margins(asked["margin"], gap, values)
        m["constant"], m["bounds"] = floor(run, h, rows, units)
        if asked["margin"] is None:
            m["small"] = math.nan if gap is None else 0.2 * gap
        _test(m, asked, values, fixed)
    if asked["margin"] is not None:
        m["small"] = math.nan if m["margin"] is None else m["margin"]
    m["n"], m["values"] = len(values), values
    if "estimate" not in m:
        m["estimate"] = float(values.mean()) if len(values) else math.nan
        m["ci_low"], m["ci_high"] = bca(values, m["level"])
        m.setdefault("effect_size", m["estimate"] / sd(values) if sd(values) > 0 else math.nan)
    return m


def ranked(h, rows, units):
    """What is ranked with the readout, the levels' numbers or `ranked_with`, and the readout: both [units, levels]."""
    names, _ = order(h)
    found = means(rows, h["readout"], h["transform"])
    columns = [of_condition(found, name) for name in names]
    if h.get("ranked_with"):
        others = means(rows, h["ranked_with"])
        columns = [*(of_condition(others, name) for name in names), *columns]
    both = table(columns, units)
    own = both[:, -len(names) :]
    return (both[:, : len(names)] if h.get("ranked_with") else np.tile(np.arange(len(names)), (len(own), 1))), own


def _test(m, asked, values, fixed):
    """p of a contrast, and p against its margin."""
    side = -1 if asked["test"] in ("less", "much_less") else 1
    if asked["test"] == "equivalent":
        m["level"] = 0.90
        m["p"] = equivalence(values, m["margin"]) if m["margin"] is not None and len(values) else math.nan
        return
    m["p"] = sign_flips(values, side)
    if asked["test"].startswith("much_") and m["margin"] is not None and len(values):
        m["p_margin"] = past_margin(values, side, fixed, asked["margin"]["dz"])


def adjusted_by_family(run, p):
    """Hypothesis -> adjusted p. Each hypothesis of a family counts, whatever became of it. Families that pass alpha
    on, or are passed some, are corrected together; p is then told on the scale of the family's own alpha."""
    stated = run.protocol.get("families", {})
    heirs = {heir for family in stated.values() for heir in family.get("passes_to", {})}
    linked = [name for name, family in stated.items() if family.get("passes_to") or name in heirs]
    members = {}
    for name, h in run.hypotheses.items():
        members.setdefault(h["family"], []).append(name)
    out = {}
    for family, names in members.items():
        correction = run.protocol.get("corrections", {}).get(family, "holm")
        correction = stated[family]["correction"] if family in stated else correction
        out |= dict(zip(names, adjusted([p[name] for name in names], correction), strict=True))
    alphas = [stated[family]["alpha"] for family in linked]
    shares = [[stated[a].get("passes_to", {}).get(b, 0.0) for b in linked] for a in linked]
    found = passed_on([[p[name] for name in members[family]] for family in linked], alphas, shares)
    for family, alpha, parts in zip(linked, alphas, found, strict=True):
        for name, part in zip(members[family], parts, strict=True):
            out[name] = math.nan if math.isnan(p[name]) else min(1.0, part * alpha)
    return out


def recompute(directory: Path) -> dict[str, dict]:
    """Hypothesis -> its numbers and its word."""
    run = Run(directory)
    measured = {name: measure(run, h, run.of["test", h["phase"]]) for name, h in run.hypotheses.items()}
    p = {name: m["p"] for name, m in measured.items()}
    for name, value in adjusted_by_family(run, p).items():
        measured[name]["p_adjusted"] = value
    if run.protocol.get("families"):  # what has no margin names in its place up to where its effect counts as none
        for name, m in measured.items():
            m["margin"] = m["margin"] if run.hypotheses[name]["margin"] else m["small"]
    tools = {"measure": measure, "adjust": lambda name, value: adjusted_by_family(run, {**p, name: value})[name]}
    words = decide_all(run, measured, tools)
    return {name: {key: m[key] for key in NUMBERS} | {"verdict": words[name]} for name, m in measured.items()}


def disagreements(found: dict[str, dict], stored: list[dict]) -> list[str]:
    """What differs between the recomputed and the stored verdicts, a line each. Numbers are stored with 10 digits."""
    wrong = [] if list(found) == [v["id"] for v in stored] else ["the hypotheses are others"]
    for v in stored:
        own = found.get(v["id"], {})
        for key in (*NUMBERS, "verdict"):
            mine, theirs = own.get(key), v[key]
            if isinstance(mine, float):
                mine = mine if math.isfinite(mine) else None
            is_number = isinstance(mine, float | int) and isinstance(theirs, float | int)
            if not (math.isclose(mine, theirs, rel_tol=1e-8, abs_tol=1e-12) if is_number else mine == theirs):
                wrong.append(f"{v['id']}: {key} is {mine} here and {theirs} there")
    return wrong


if __name__ == "__main__":
    where = Path(sys.argv[1])
    told = disagreements(recompute(where), json.loads((where / "verdicts.json").read_text("utf-8")))
    print("\n".join(told) or "every estimate, interval, p, adjusted p and word is the same")
    sys.exit(bool(told))

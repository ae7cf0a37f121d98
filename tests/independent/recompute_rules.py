"""The words of docs/statistics.md, decided once more from that page alone."""

from __future__ import annotations

import math
from collections import Counter, defaultdict

from recompute_numbers import scores
from recompute_rows import LEVEL, ORDERED, giver, is_natural, order, recipe, roles, terms, value_of
from scipy import stats

PASSED = ("supported", "equivalent", "tautological")
FORCED = {
    "rv_prompt", "rv_output", "mode_llr", "mode_llr_unweighted", "content_llr", "register_llr", "js_pull",
    "source_tokens", "angle_target", "angle_source",
}  # fmt: skip
"""Readouts that need no coherent text, beside those whose names start with attention_, pr_v_ or pr_k_."""


def decide_all(run, measured, tools):
    """Hypothesis -> word, each decided after all that it waits for."""
    words = {}
    for name in waiting_order(run):
        h, m = run.hypotheses[name], measured[name]
        first = measured[h["of"]] if h["of"] else None
        words[name] = blocked(run, h, words)
        if words[name] is not None:
            continue
        words[name] = said(run, h, m, m["p_adjusted"], first)
        lacks = lacking(run, h, m)
        if lacks:
            words[name] = at_worst(run, h, m, words[name], first, tools)
    return words


def waiting_order(run):
    """By gate those that have one, then the others after what they need."""
    by_gate = [h for h in run.hypotheses.values() if h.get("needs") is None]
    out = [h["id"] for h in sorted(by_gate, key=lambda h: h["gate"])]
    left = [h for h in run.hypotheses.values() if h.get("needs") is not None]
    while left:
        ready = [h for h in left if set(h["needs"]) <= set(out)]
        out += [h["id"] for h in ready]
        left = [h for h in left if h not in ready]
    return out


def blocked(run, h, words):
    """The word of a hypothesis that is not read by its numbers; None of one that is."""
    if is_tautological(run, h):
        return "tautological"
    checks = [i for m in (run.record, *run.record.get("other_models", {}).values()) for i in m.get("check") or ()]
    is_broken = any(identity["holds"] is False for identity in checks)
    if h.get("needs") is None:
        keepers = [k for k in run.hypotheses.values() if k.get("is_gatekeeper") and k["gate"] < h["gate"]]
        waits = [k["id"] for k in keepers]
    else:
        waits = h["needs"]
    is_waiting = any(words[name] not in PASSED for name in waits)
    if is_broken or is_waiting or is_incoherent(run, h) or is_unspecific(run, h):
        return "not interpretable"
    return None


def is_tautological(run, h):
    """Whether it compares a text with itself, or swaps stand in it for the pair's own natural runs."""
    found = roles(run, h)
    own_runs = all(is_natural(c) and not c.get("text_of") for c in (run.conditions[name] for name in found))
    if None in found.values() or own_runs:
        return False
    return set(found.values()) <= {"target", "source"} or len(set(found.values())) == 1


def needs_coherent_text(readout):
    return not (readout in FORCED or readout.startswith(("attention_", "pr_v_", "pr_k_")))


def is_incoherent(run, h):
    """Whether a condition whose sampled texts are read has too few coherent ones, beyond chance."""
    variables = [h, *(v for v in (h["against"], *h["controlling"]) if v)]
    names = set()
    for v in variables:
        if needs_coherent_text(v["readout"]):
            names |= set(order(h)[0] if v is h and h["test"] in ORDERED else terms(v["contrast"]))
    if h.get("ranked_with") and needs_coherent_text(h["ranked_with"]):
        names |= set(order(h)[0])
    found = roles(run, h)
    read, too_few = [], False  # share of the outputs that are coherent and number of pairs, of each condition
    for name in names:
        by_pair = defaultdict(list)
        for row in run.of["test", h["phase"]]:
            if row["condition"] == name:
                by_pair[row["pair_id"]] += [] if row["failed"] else [bool(row["coherent"])]
        by_pair = {pair: of for pair, of in by_pair.items() if of}
        good = math.fsum(sum(of) / len(of) for of in by_pair.values())
        bad = len(by_pair) - good
        outputs = [one for of in by_pair.values() for one in of]
        read.append((sum(outputs) / len(outputs) if outputs else math.nan, len(by_pair)))
        is_text = run.protocol.get("families") and found[name] is not None
        too_few |= bool(by_pair) and bad > 1e-9 and stats.beta.ppf(0.95, good + 1, bad) < 0.9 and not is_text
    return too_few and not (run.protocol.get("families") and are_alike(read))


def are_alike(shares):
    """Whether each of several conditions has half of its outputs coherent, and the 95% interval of the largest
    difference (Newcombe 1998, method 10, of Wilson's intervals) ends below 0.2."""
    if len(shares) < 2 or not all(n > 0 and share >= 0.5 for share, n in shares):
        return False
    (low, n_low), (high, n_high) = min(shares), max(shares)
    below, above = wilson(low, n_low)[0], wilson(high, n_high)[1]
    return high - low + math.hypot(low - below, above - high) < 0.2


def wilson(share, n):
    z = stats.norm.ppf(0.975)
    middle, half = share + z**2 / (2 * n), z * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    return (middle - half) / (1 + z**2 / n), (middle + half) / (1 + z**2 / n)


def is_unspecific(run, h):
    """Whether destroyed caches move the readout, and the contrast is one of unequally damaged conditions."""
    model = run.protocol["phases"][h["phase"]].get("model")
    record = run.record if model is None else run.record["other_models"].get(model, {})
    found = record.get("readout_calibration")
    if not found or h["readout"] not in found["readouts"]:
        return False
    names = order(h)[0] if h["test"] in ORDERED else terms(h["contrast"])
    ways = {name: recipe(run.conditions[name]) for name in names}
    balance = Counter()
    for name, weight in ({} if h["test"] in ORDERED else terms(h["contrast"])).items():
        balance[ways[name]] += weight
    is_even = h["test"] not in ORDERED and not any(balance.values())
    if is_even or len(set(ways.values())) == 1:
        return False
    of = found["readouts"][h["readout"]]
    moved = {name: abs(of["shares"][name]) for name in found["destroyed"] if name in of["shares"]}
    if of["gap"] is None or of["gap"] <= 0 or not moved:
        return True
    beyond = {name: share for name, share in moved.items() if share > 0.25}
    return bool(beyond) and not explains_little(run, h, model, beyond)


def explains_little(run, h, model, beyond):
    """Whether the difference in damage between the sides of a contrast explains at most a twentieth of the gap."""
    if h["test"] in ORDERED:
        return False
    of_pairs = pair_numbers(run, h["phase"], terms(h["contrast"]), LEVEL)
    units = defaultdict(list)
    for pair, number in of_pairs.items():
        units[run.units[h["phase"]].get(pair, pair)].append(number)
    differences = [math.fsum(of) / len(of) for of in units.values()]
    n = len(differences)
    if n < 2:
        return False
    mean = math.fsum(differences) / n
    error = math.sqrt(math.fsum((d - mean) ** 2 for d in differences) / (n - 1) / n)
    most = abs(mean) + stats.t.ppf(0.975, n - 1) * error
    natural = next(name for name, c in run.conditions.items() if is_natural(c) and giver(c) == c["into"] == "target")
    for name, share in beyond.items():
        for phase, settings in run.protocol["phases"].items():
            shifts = pair_numbers(run, phase, {name: 1, natural: -1}, LEVEL) if settings.get("model") == model else {}
            if shifts:
                level = abs(math.fsum(shifts.values()) / len(shifts))
                if not level or share * most / level > 0.05:
                    return False
                break
        else:
            return False
    return True


def pair_numbers(run, phase, weights, readout):
    """Pair -> weighted sum of its means of a readout under several conditions, for pairs that have all of them."""
    found = defaultdict(lambda: defaultdict(list))
    for row in run.of["test", phase]:
        if row["condition"] in weights and not row["failed"]:
            number = row.get(readout)
            found[row["pair_id"]][row["condition"]].append(math.nan if number is None else number)
    sums = {
        pair: math.fsum(weights[name] * math.fsum(of[name]) / len(of[name]) for name in weights)
        for pair, of in found.items()
        if set(of) == set(weights)
    }
    return {pair: number for pair, number in sums.items() if math.isfinite(number)}


def said(run, h, m, p_adjusted, first):
    """The word by the numbers. A protocol with `families` says "contradicted" of what the data speak against, and also
    of a repetition whose effect is shown to be too small to count."""
    found = word(h, m, p_adjusted, first)
    if not run.protocol.get("families"):
        return found
    if found == "inconclusive" and first is not None:
        side = side_of(first["asked"])
        limits = (-m["small"], math.inf) if side < 0 else (-math.inf, m["small"])
        if max(side * m["ci_low"], side * m["ci_high"]) <= m["small"] and within(m, *limits):
            return "contradicted"
    return "contradicted" if found == "not supported" else found


def word(h, m, p_adjusted, first):
    """The word by the numbers."""
    if m["n"] == 0 or m["constant"] is not None or 2.0 ** -m["n"] >= h["alpha"]:
        return "inconclusive"
    asked = m["asked"]
    needs_margin = asked["test"].startswith("much_") or asked["test"] == "equivalent"
    if needs_margin and m["margin"] is None:
        return "inconclusive"
    is_significant = p_adjusted < h["alpha"]
    if first is not None:
        return repeated(m, first, is_significant)
    if asked["test"] == "equivalent":
        return equivalent(m, is_significant)
    return directional(h, m, is_significant)


def side_of(h):
    return -1 if h["test"] in ("less", "much_less") or h["direction"] == "negative" else 1


def within(m, low, high):
    """Whether the exact bounds for rare hits lie between two limits; True where hits are not rare."""
    return m["bounds"] is None or (low < m["bounds"][0] and m["bounds"][1] < high)


def directional(h, m, is_significant):
    side = side_of(m["asked"])
    near, far = sorted((side * m["ci_low"], side * m["ci_high"]))
    is_much = m["asked"]["test"].startswith("much_")
    bound = m["margin"] if is_much else 0.0
    if is_significant and near > bound and (not is_much or m["p_margin"] < 0.025):
        return "supported"
    limits = (-m["small"], math.inf) if side < 0 else (-math.inf, m["small"])
    if far < 0 or (far <= m["small"] and within(m, *limits)):
        return "not supported"
    return "inconclusive"


def equivalent(m, is_significant):
    low, high, margin = m["ci_low"], m["ci_high"], m["margin"]
    if is_significant and -margin < low and high < margin and within(m, -margin, margin):
        return "equivalent"
    return "not supported" if low > margin or high < -margin else "inconclusive"


def repeated(m, first, is_significant):
    """A second study, held against the first: each beyond its own bound, with intervals of dz that overlap."""
    side = side_of(first["asked"])
    bounds = [0.0 if first["asked"]["margin"] is None or x["margin"] is None else x["margin"] for x in (first, m)]
    (low1, high1), (low2, high2) = (sorted((side * x["ci_low"], side * x["ci_high"])) for x in (first, m))
    if not all(map(math.isfinite, (low1, high1, low2, high2))):
        return "inconclusive"
    if high2 < 0 or (bounds[1] > 0 and high2 <= bounds[1]):
        return "not supported"
    (below1, above1), (below2, above2) = (dz_interval(x) for x in (first, m))
    overlap = below2 <= above1 and below1 <= above2  # False of NaN, where one of the two has no dz
    holds = low1 > bounds[0] and low2 > bounds[1] and overlap
    return "supported" if holds and is_significant else "inconclusive"


def dz_interval(m):
    """The 95% interval of dz, or the 90% of an equivalence: standard error sqrt(1/n + dz^2 / 2n), Student's t."""
    dz, n = m["effect_size"], m["n"]
    level = 0.9 if m["asked"]["test"] == "equivalent" else 0.95
    half = stats.t.ppf(0.5 + level / 2, n - 1) * math.sqrt(1 / n + dz**2 / (2 * n))
    return dz - half, dz + half


def is_partial(run, name):
    """Whether a condition takes a prompt that only some pairs have."""
    return giver(run.conditions[name]) not in STANDARD


STANDARD = ("target", "source", "foreign", "foreign_matched", "neutral", "shuffled_words")


def has_value(row, readout, transform):
    return not row["failed"] and math.isfinite(value_of(row, readout, transform))


def lacking(run, h, m):
    """Whether a condition lacks more than a tenth of its planned rows."""
    if m["n"] == 0 or m["constant"] is not None:
        return False
    own = order(h)[0] if h["test"] in ORDERED else list(terms(h["contrast"]))
    variables = [(own, h), *((list(terms(v["contrast"])), v) for v in (h["against"], *h["controlling"]) if v)]
    if h.get("ranked_with"):
        variables.append((own, {"readout": h["ranked_with"], "transform": "none"}))
    for names, v in variables:
        rows = [row for row in run.of["test", h["phase"]] if row["condition"] in names]
        pairs = len(planned_pairs(run, h, rows))
        for name in names:
            mine = [row for row in rows if row["condition"] == name]
            met = len({row["pair_id"] for row in mine})
            if not met:
                if pairs:
                    return True
                continue
            samples = {(row["pair_id"], row["sample"]) for row in mine}
            good = {(r["pair_id"], r["sample"]) for r in mine if has_value(r, v["readout"], v["transform"])}
            planned = len(samples) if is_partial(run, name) else len(samples) * pairs / met
            if 1 - len(good) / planned > 0.1:
                return True
    return False


def planned_pairs(run, h, rows):
    """Ids of the pairs that the conditions of a contrast are planned for: in a protocol with `families` all of the
    phase, else those that one of these rows has."""
    return {row["pair_id"] for row in (run.of["test", h["phase"]] if run.protocol.get("families") else rows)}


def at_worst(run, h, m, found, first, tools):
    """The word, where it is the same with the missing values at either end of what was seen."""
    if m["asked"]["test"] in ("correlates", "rank_correlates", "chosen_heads"):
        return "not interpretable"
    if m["asked"]["test"] in ORDERED:
        names, peak = order(m["asked"])
        signs = dict(zip(names, scores(len(names), peak), strict=True))
    else:
        signs = terms(m["asked"]["contrast"])
    words = {found}
    for toward in (-1, 1):
        again = tools["measure"](run, h, filled(run, h, signs, toward))
        words.add(said(run, h, again, tools["adjust"](h["id"], again["p"]), first))
    return found if len(words) == 1 else "not interpretable"


def filled(run, h, signs, toward):
    """The test rows of a phase with every missing value of a contrast at one end of what was seen."""
    rows, given = run.of["test", h["phase"]], (h["readout"], h["transform"])
    own = [row for row in rows if row["condition"] in signs]
    good = [row for row in own if has_value(row, *given)]
    if not good:
        return rows
    seen = [r[h["readout"]] for r in [*good, *(r for r in run.calibration() if has_value(r, *given))]]
    have = {(row["pair_id"], row["sample"], row["condition"]) for row in good}
    made = []
    for name, sign in signs.items():
        mine = [row for row in own if row["condition"] == name]
        planned = {(row["pair_id"], row["sample"]) for row in mine}
        if not is_partial(run, name):
            planned |= {(p, 0) for p in planned_pairs(run, h, own) - {row["pair_id"] for row in mine}}
        end = max(seen) if sign * toward > 0 else min(seen)
        made += [
            {"pair_id": pair, "sample": sample, "condition": name, "failed": False, h["readout"]: end}
            for pair, sample in planned
            if (pair, sample, name) not in have
        ]
    kept = [row for row in rows if row["condition"] not in signs or has_value(row, *given)]
    return [*kept, *made]

"""Small tables behind the charts of attention and geometry: pure functions of trials and heads that bear gaps.

`trajectory_figures` and `attention_figures` give every chart that a run's trials can fill, in the order to show them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import pandas as pd
from scipy import stats

from kvpatch.protocols.schema import Phase, Protocol
from kvpatch.report import head_charts as charts
from kvpatch.report.figure import Figure, figure, rounded
from kvpatch.report.head_tokens import over_tokens
from kvpatch.report.tables import natural_run, normalised, values
from kvpatch.verdicts.head_contrasts import head_means, head_values, heads_standing_out, map_of

MAPPED = {
    "entropy": "entropy of attention, 0 to 1",
    "mass_body": "attention on the prompt's words",
    "mass_marked_each": "attention on each marked word",
    "induction": "induction-like attention",
    "previous_token": "attention on the token before",
}
"""Statistics whose maps the report shows, with their titles."""
ATTENTION_PARTS = {
    "origin": {
        "sinks": "attention_sinks",
        "own prompt": "attention_own",
        "put in": "attention_patched",
        "generated": "attention_generated",
    },
    "segment": {
        "sinks": "attention_sinks",
        "template": "attention_template",
        "words": "attention_body",
        "trailer": "attention_trailer",
        "generated": "attention_generated",
    },
}
"""Parts of where attention goes -> the trial column of each; the parts of either way add to 1."""
COMPARED = " Every small chart repeats the natural runs."
RANKED = 10
"""Heads that a ranking names."""
CONTRASTS = ("C - N1", "C - N1y", "M1 - M1n", "C - A", "B - A")


@dataclass
class AttentionFigures:
    """Charts of attention. maps: one per statistic, of the first contrast. ranked: the heads that differ most in each.
    more: where attention goes, the other contrasts, and the statistics themselves."""

    maps: list[Figure] = field(default_factory=list)
    ranked: list[Figure] = field(default_factory=list)
    more: list[Figure] = field(default_factory=list)

    @property
    def all(self) -> list[Figure]:
        """Every figure."""
        return [*self.maps, *self.ranked, *self.more]


def attention_shares(trials: pd.DataFrame, phase: str, by: Literal["segment", "origin"] = "origin") -> pd.DataFrame:
    """Columns condition, part, share: mean over pairs of where attention goes, see `attention_charts.PARTS`; the parts
    of a condition add to 1."""
    rows = _rows_of(trials, phase)
    parts = []
    for condition in dict.fromkeys(rows["condition"]):
        own = rows[rows["condition"] == condition]
        for part, column in ATTENTION_PARTS[by].items():
            share = values(own, column).groupby(own["pair_id"]).mean().mean()
            parts.append({"condition": condition, "part": part, "share": share})
    table = pd.DataFrame(parts, columns=pd.Index(["condition", "part", "share"]))
    return table[table["share"].notna()].reset_index(drop=True)


def trajectories(trials: pd.DataFrame, phase: str, column: str = "rv_forced_trajectory", window: int = 16):
    """Columns condition, token, mean, low, high, n: R_V of the window that ends at each token, over pairs.

    Means are of log R_V, given back as R_V; the interval is 95% by Student's t. A token that fewer than two pairs reach
    is left out.
    """
    rows = _rows_of(trials, phase)
    parts = []
    if column in rows:
        for condition in dict.fromkeys(rows["condition"]):
            own = rows[(rows["condition"] == condition) & rows[column].notna()]
            longest = max((len(line) for line in own[column]), default=0)
            lines = [np.asarray(line, dtype=float) for line in own[column]]
            padded = [np.pad(line, (0, longest - len(line)), constant_values=np.nan) for line in lines]
            table = pd.DataFrame(padded, index=own["pair_id"]).map(lambda x: np.log(x) if x > 0 else np.nan)
            table = table.groupby(level=0).mean()
            for place in table.columns:
                at = table[place].dropna()
                if len(at) < 2:
                    continue
                half = stats.t.ppf(0.975, len(at) - 1) * at.std() / np.sqrt(len(at))
                mean = at.mean()
                ends = {"mean": np.exp(mean), "low": np.exp(mean - half), "high": np.exp(mean + half)}
                parts.append({"condition": condition, "token": int(place) + window, **ends, "n": len(at)})
    return pd.DataFrame(parts, columns=pd.Index(["condition", "token", "mean", "low", "high", "n"]))


def trajectory_figures(protocol: Protocol, trials: pd.DataFrame) -> list[Figure]:
    """Charts of R_V along the tokens, for every phase that reads geometry. trials: rows of trials/*.parquet."""
    window = protocol.readouts.r_v.window
    out = []
    for phase in _phases(protocol, trials, lambda p: p.geometry):
        for column, title, told in (
            (
                "rv_forced_trajectory",
                "R_V along the fixed continuation",
                "Every condition reads the same words; a band is the 95% interval over pairs.",
            ),
            (
                "rv_trajectory",
                "R_V along the output",
                "Each condition's own words, which R_V follows too; fewer pairs reach the later tokens.",
            ),
        ):
            found = trajectories(trials, phase, column, window)
            if not found.empty:
                natural = [name for s in ("target", "source") if (name := natural_run(protocol, s)) is not None]
                chart = charts.trajectory_chart(rounded(found, 4), references=natural)
                out.append(figure(f"{column}-{phase}", title, told + COMPARED, chart))
    return out


def attention_figures(
    protocol: Protocol, trials: pd.DataFrame, attention: pd.DataFrame, by_slot: pd.DataFrame | None = None
) -> AttentionFigures:
    """Charts of attention, for every phase that watches it.

    trials: rows of trials/*.parquet. attention: rows of attention/*.parquet, none where no phase asked. by_slot: what
    `head_tokens.stored_by_slot` gives, for the heads that a ranking names.
    """
    out = AttentionFigures()
    if not attention.empty:
        for phase in _phases(protocol, trials, lambda p: p.watched is not None):
            _add_shares(out, trials, phase)
            for statistic, title in MAPPED.items():
                _add_maps(out, trials, attention, by_slot, phase, statistic, title)
    return out


def _phases(protocol: Protocol, trials: pd.DataFrame, asks: Callable[[Phase], bool]) -> list[str]:
    present = set(trials["phase"].astype(str).unique()) if "phase" in trials else set()
    return [name for name, phase in protocol.phases.items() if name in present and asks(phase)]


def _add_shares(out: AttentionFigures, trials: pd.DataFrame, phase: str) -> None:
    told = "Mean over all heads while every condition reads the same continuation."
    for by, title, shares in (
        ("origin", "whose activations", attention_shares(trials, phase, "origin")),
        ("segment", "which part of the prompt", attention_shares(trials, phase, "segment")),
    ):
        if not shares.empty:
            name, chart = f"Where attention goes: {title}", charts.attention_shares_chart(rounded(shares))
            out.more.append(figure(f"attention-{phase}-{by}", name, told, chart))


def _add_maps(
    out: AttentionFigures,
    trials: pd.DataFrame,
    attention: pd.DataFrame,
    by_slot: pd.DataFrame | None,
    phase: str,
    statistic: str,
    title: str,
) -> None:
    """Add a statistic's figures: the map and the ranking of the first contrast that can be had, and the rest."""
    found = head_values(trials, attention, phase=phase, statistic=statistic)
    if not found or all(table.isna().all(axis=None) for table in found.values()):
        return
    has_main = False
    for contrast in CONTRASTS:
        heads = map_of(found, trials, phase=phase, contrast=contrast)
        if heads.empty:
            continue
        name = f"heads-{phase}-{statistic}-{contrast.replace(' ', '')}"
        chart = charts.head_map_chart(rounded(heads), f"{title}, {contrast}")
        drawn = figure(name, f"Heads: {title}, {contrast}", _told(heads), chart)
        if has_main:
            out.more.append(drawn)
            continue
        has_main = True
        out.maps.append(drawn)
        largest = ranking(heads)
        ranked = charts.ranked_heads_chart(rounded(largest), f"difference in {title}")
        told = f"The {RANKED} heads that differ most in {contrast}, with 95% intervals. Filled: it stands out."
        drawn = figure(f"ranked-{phase}-{statistic}", f"Largest: {title}, {contrast}", told, ranked)
        shown = None if by_slot is None else over_tokens(by_slot, phase, contrast, largest)
        out.ranked.append(replace(drawn, heads=shown))
    chart = charts.head_means_chart(rounded(head_means(found)), title)
    out.more.append(figure(f"heads-{phase}-{statistic}", f"Heads: {title}", "Mean over pairs.", chart))


def ranking(heads: pd.DataFrame) -> pd.DataFrame:
    """The heads of a map that differ most, those that stand out first, the largest first."""
    known = heads[heads["estimate"].notna()]
    ordered = known.assign(size=known["estimate"].abs()).sort_values(["stands_out", "size"], ascending=False)
    return ordered.drop(columns="size").head(RANKED)


def _told(heads: pd.DataFrame) -> str:
    count = int(heads["is_significant"].sum())
    out = heads_standing_out(heads)
    named = ", ".join(f"layer {layer} head {head}" for layer, head in out[:6]) or "none"
    return (
        f"Dots: {count} of {len(heads)} heads differ after Benjamini-Hochberg over the map. Rings stand out from the"
        f" other heads as well: {named}{' and more' if len(out) > 6 else ''}. Exploratory."
    )


def _rows_of(trials: pd.DataFrame, phase: str) -> pd.DataFrame:
    rows = normalised(trials)
    return rows[(rows["phase"] == phase) & ~rows["failed"]]

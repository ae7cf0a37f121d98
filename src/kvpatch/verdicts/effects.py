"""Every condition of a phase on one scale: its mean pair difference from the natural run of the prompt it went into."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pandas as pd

from kvpatch.protocols.schema import Protocol
from kvpatch.specs.base import Frozen
from kvpatch.specs.readout import Transform
from kvpatch.statistics.grid import on_grid
from kvpatch.statistics.intervals import bca_interval
from kvpatch.statistics.paired_tests import cohens_dz, dz_interval
from kvpatch.verdicts.measure import units_of
from kvpatch.verdicts.pairs import contrast_table, pair_means, prepare, rows_of, shown_of
from kvpatch.verdicts.prerequisites import coherence_shares


class Effect(Frozen):
    """One readout of one condition, less the natural run of the same prompt. `n` counts pairs, or groups of pairs that
    share a prompt, as a verdict does. `coherent` is the share of the condition's outputs within the coherence limits;
    `is_incoherent` is the coherence gate's word on it, which stops readouts of sampled text. `dz` is the estimate in
    standard deviations of the pair differences, with its 95% interval: on it models can be compared, which share no
    unit."""

    phase: str
    condition: str
    about: str
    natural: str
    readout: str
    n: int
    estimate: float | None
    ci_low: float | None
    ci_high: float | None
    dz: float | None
    dz_low: float | None
    dz_high: float | None
    coherent: float | None
    is_incoherent: bool


def effects(
    protocol: Protocol, trials: pd.DataFrame, phase: str, readouts: Sequence[tuple[str, Transform]] | None = None
) -> list[Effect]:
    """Effects of every condition of a phase that is not natural, in the protocol's order.

    readouts: name and transform of each; None for those that the catalogue shows as effects.

    The interval is BCa at 95%, over pairs; pairs that share a prompt are averaged first. A condition put into the
    source is compared with the natural source.
    """
    rows = prepare(trials)
    shares = coherence_shares(rows)
    rows = rows_of(rows, split="test", phase=phase)
    if readouts is None:
        readouts = [(readout.name, readout.transform) for readout in shown_of("effects", rows)]
    natural: dict[str, str] = {}
    for name, condition in protocol.conditions.items():
        if condition.is_natural and condition.text_of is None:
            natural.setdefault(condition.into, name)
    present = set(rows["condition"].unique())
    compared: dict[str, str] = {}
    for name in protocol.phases[phase].all_conditions:
        condition = protocol.conditions[name]
        is_own = condition.is_natural and condition.text_of is None
        base = natural.get(condition.into)
        if not is_own and base is not None and name in present:
            compared[name] = base
    wanted = list(dict.fromkeys([*compared, *compared.values()]))
    units = units_of(protocol, rows)
    means = {readout: pair_means(rows, wanted, readout, transform) for readout, transform in readouts}
    out = []
    for name, base in compared.items():
        outputs = shares.get((phase, name))
        for readout, _ in readouts:
            table = contrast_table(means[readout][[name, base]], {"change": {name: 1, base: -1}}, units)
            values = on_grid(table["change"].to_numpy(dtype=float))
            interval, spread = bca_interval(values), dz_interval(values)
            out.append(
                Effect(
                    phase=phase,
                    condition=name,
                    about=protocol.conditions[name].about,
                    natural=base,
                    readout=readout,
                    n=len(values),
                    estimate=math.fsum(values) / len(values) if len(values) else None,
                    ci_low=_known(interval.low),
                    ci_high=_known(interval.high),
                    dz=_known(cohens_dz(values)),
                    dz_low=_known(spread.low),
                    dz_high=_known(spread.high),
                    coherent=None if outputs is None else _known(outputs.share),
                    is_incoherent=outputs is not None and outputs.is_too_low,
                )
            )
    return out


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None

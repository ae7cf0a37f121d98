"""Heads over the tokens of one pair: what the page needs to show where a head looked, under two conditions.

A run stores the attention on every slot for one pair of a phase (`by_slot` in attention/*.parquet). The page's script
shows one head at a time, so that what it needs of all heads is numbers alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from kvpatch.report.tokens import decoder
from kvpatch.specs.attention import STAGES
from kvpatch.store.directory import Store
from kvpatch.store.record import ModelRecord

DIGITS = 3
"""Significant digits of a share of attention that are shown; as many as are stored."""
LIMITS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2)
"""Shares of attention at which the colour of a token changes."""
_OF_HEADS = ["trial_id", "stage", "layer", "head", "by_slot"]
_OF_TRIALS = ["trial_id", "phase", "condition", "pair_id", "model", "cache_token_ids"]


def stored_by_slot(store: Store, models: Sequence[ModelRecord]) -> pd.DataFrame:
    """What a run stored of heads by slot.

    Args:
        store: the run. models: those it ran on, whose tokenizers are looked for on this machine.
    Returns:
        One row per trial, stage, layer and head that has it: phase, condition, pair_id, `by_slot` (a number a slot) and
        `tokens` (the slots' texts; ids where the tokenizer is not here). No rows for a run made before it was stored.
    Raises:
        StoreError: where a part is missing or damaged.
    """
    found = [pd.DataFrame(columns=pd.Index([*_OF_HEADS, *_OF_TRIALS[1:], "tokens"]))]
    decoders = {model.name: decoder(model) for model in models}
    for part in store.each_once():
        heads = store.heads_of(part, _OF_HEADS)
        heads = heads.filter(heads["by_slot"].is_valid())
        if len(heads):
            trials = store.rows_of(part, _OF_TRIALS).to_pandas()
            trials = trials[trials["trial_id"].isin(set(heads["trial_id"].to_pylist()))]
            texts = [
                texts_of(decoders.get(model), ids)
                for model, ids in zip(trials["model"], trials["cache_token_ids"], strict=True)
            ]
            trials = trials.assign(tokens=pd.Series(texts, index=trials.index, dtype=object))
            found.append(heads.to_pandas().merge(trials, on="trial_id"))
    return pd.concat(found[1:] or found, ignore_index=True)


def texts_of(decode: Any, ids: Any) -> list[str]:
    """Texts of tokens; their ids where there is no decoder, and none where there are no ids."""
    numbers = [] if ids is None else [int(i) for i in ids]
    return [str(i) for i in numbers] if decode is None else decode(numbers)


def over_tokens(by_slot: pd.DataFrame, phase: str, contrast: str, heads: pd.DataFrame) -> dict[str, Any] | None:
    """What the page's script shows of some heads in the conditions of a contrast such as "C - N1".

    Args:
        by_slot: as `stored_by_slot` gives it.
        heads: columns layer and head, in the order to offer them.
    Returns:
        `pair`, `limits` (`LIMITS`), `sides` (condition and tokens), and `heads`: a name, and for each side one list of
        numbers a stage of `STAGES`. None where the run has not stored both conditions of one pair.
    """
    names = contrast.split(" - ")
    rows = by_slot[(by_slot["phase"] == phase) & by_slot["condition"].isin(names)]
    pair = next((p for p, own in rows.groupby("pair_id", sort=False) if set(own["condition"]) == set(names)), None)
    if pair is None:
        return None
    rows = rows[rows["pair_id"] == pair].drop_duplicates(["condition", "stage", "layer", "head"])
    tokens = {name: rows.loc[rows["condition"] == name, "tokens"].iloc[0] for name in names}
    at = {(r.condition, r.stage, r.layer, r.head): r.by_slot for r in rows.itertuples(index=False)}
    shown = [
        {
            "name": f"layer {layer} head {head}",
            "sides": [[_numbers(at, (name, stage, layer, head)) for stage in STAGES] for name in names],
        }
        for layer, head in zip(heads["layer"], heads["head"], strict=True)
    ]
    sides = [{"condition": name, "tokens": list(tokens[name])} for name in names]
    return {"pair": pair, "limits": LIMITS, "sides": sides, "heads": shown}


def _numbers(at: Mapping[Any, Any], key: tuple[Any, ...]) -> list[float] | None:
    values = at.get(key)
    return None if values is None else [float(f"{value:.{DIGITS}g}") for value in values]

"""One trial's page: its patch, its prompts and output, its tokens with their log-probabilities, and every number."""

from __future__ import annotations

import json
import math
from typing import Any

import pyarrow.compute as pc

from kvpatch.files import parse_json
from kvpatch.report import tokens
from kvpatch.report.head_maps import MAPPED
from kvpatch.report.head_tokens import LIMITS, texts_of
from kvpatch.report.samples import Marker, shown_text
from kvpatch.report.text import number, plain
from kvpatch.report.token_pairs import TOKEN_TEXTS, strip_html, token_pair
from kvpatch.store.columns import TRIAL_COLUMNS
from kvpatch.store.record import ModelRecord
from kvpatch.view.runs import LiveRun

STEPS = (-0.1, -0.5, -1.0, -2.0, -4.0, -8.0)
"""Log-probabilities at which the strip's colour changes; 0 is certain."""
_ELSEWHERE = {
    "text", "source_text", "target_text", "patch", "error", "output_token_ids", "output_logprobs", "mode_hits", "part",
}  # fmt: skip


def stored_row(run: LiveRun, trial_id: str) -> dict[str, Any] | None:
    """Return every column of a trial, unknown ones too, and `part`, the file that holds it; of several, the newest.

    Raises:
        StoreError: where that file is no longer what was stored.
    """
    found = run.ask("select part from trials where trial_id = ? order by place desc limit 1", [trial_id])
    if not found:
        return None
    table = run.store.rows_of(run.store.part(found[0]["part"].removesuffix(".parquet")), None)
    rows = table.filter(pc.equal(table["trial_id"], trial_id)).to_pylist()  # pyright: ignore[reportAttributeAccessIssue]
    return {**rows[-1], "part": found[0]["part"]} if rows else None


def page(
    run: LiveRun, row: dict[str, Any], mark: Marker, beside: dict[str, Any] | None = None, head: str | None = None
) -> dict[str, Any]:
    """Return what the trial's page shows. beside: another trial of the pair, to be compared token by token. head: the
    one to show over the tokens of the trial's cache, such as "12.3", layer and head."""
    text, source, target = (row.get(name) or "" for name in ("text", "source_text", "target_text"))
    abouts = {name: about for name, (_, about) in TRIAL_COLUMNS.items()}
    numbers = [
        {"name": name, "value": _cell(value), "about": abouts.get(name, "a column this version does not know")}
        for name, value in row.items()
        if name not in _ELSEWHERE and not isinstance(value, list)
    ]
    lists = [
        {"name": name, "value": ", ".join(_cell(v) for v in value), "about": abouts.get(name, ""), "n": len(value)}
        for name, value in row.items()
        if name not in _ELSEWHERE and isinstance(value, list)
    ]
    return {
        "row": row,
        "text": shown_text(text, source, mark, row.get("mode_hits")),
        "prompts": {"source": shown_text(source, "", None), "target": shown_text(target, "", None)},
        "patch": _patch(row.get("patch")),
        "strip": strip(run, row),
        "numbers": numbers,
        "lists": lists,
        "attention": heads(run, row),
        "slots": over_slots(run, row, head),
        "beside": None if beside is None else side_by_side(run, row, beside),
        "others": run.ask(
            "select trial_id, condition, sample from trials where pair_id = ? and phase = ? order by place",
            [row.get("pair_id"), row.get("phase")],
        ),
    }


def strip(run: LiveRun, row: dict[str, Any]) -> dict[str, Any]:
    """Return the output's tokens, each with its text, id, log-probability and a step of colour, 0 (certain) to 6."""
    ids, chances = row.get("output_token_ids") or [], row.get("output_logprobs") or []
    record = model_of(run, row.get("model"))
    decode = None if record is None else tokens.decoder(record)
    texts = decode(ids) if decode is not None else [str(i) for i in ids]
    padded = [*chances, *[None] * (len(ids) - len(chances))]
    out = [
        {
            "text": text,
            "id": i,
            "logprob": chance,
            "step": None if chance is None else sum(chance < limit for limit in STEPS),
        }
        for text, i, chance in zip(texts, ids, padded, strict=False)
    ]
    return {"tokens": out, "is_text": decode is not None, "steps": len(STEPS)}


def side_by_side(run: LiveRun, row: dict[str, Any], other: dict[str, Any]) -> dict[str, Any] | None:
    """Return two trials of a pair token by token; None where one has no tokens."""
    record = model_of(run, row.get("model"))
    names = (str(row.get("condition")), str(other.get("condition")))
    decode = None if record is None else tokens.decoder(record)
    rows = [
        one if decode is None else {**one, TOKEN_TEXTS: decode(one.get("output_token_ids") or [])}
        for one in (row, other)
    ]
    found = token_pair(rows[0], rows[1], names)
    if found is None:
        return None
    sides = zip(names, (found.one, found.other), strict=True)
    strips = [(name, strip_html(side, found.shared, found.is_text)) for name, side in sides]
    return {"told": found.told, "strips": strips, "trial_id": other["trial_id"]}


def model_of(run: LiveRun, name: Any) -> ModelRecord | None:
    """Return the record of a run's model by its name."""
    if run.record is None:
        return None
    models = [run.record.model, *(other.model for other in run.record.other_models.values())]
    return next((model for model in models if model.name == name), None)


def _patch(stored: Any) -> str | None:
    try:
        return json.dumps(parse_json(stored), indent=1, ensure_ascii=False)
    except (TypeError, ValueError):
        return stored if isinstance(stored, str) else None


def _cell(value: Any) -> str:
    return number(value) if isinstance(value, float) else plain(value)


def heads(run: LiveRun, row: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a map of every statistic of MAPPED, layer by head, while the trial read the fixed continuation: each cell
    with a step of shade, 0 to 6. None where the trial was not watched."""
    stored = run.store.read_attention(stage="forced", batches=[row["part"].removesuffix(".parquet")])
    table = stored.filter(pc.equal(stored["trial_id"], row["trial_id"])).to_pandas()  # pyright: ignore[reportAttributeAccessIssue]
    out = []
    for statistic, title in MAPPED.items():
        if statistic in table and table[statistic].notna().any():
            grid = table.pivot_table(index="layer", columns="head", values=statistic)
            out.append(_map(title, grid.index.tolist(), grid.to_numpy().tolist()))
    return out


def over_slots(run: LiveRun, row: dict[str, Any], head: str | None) -> dict[str, Any] | None:
    """Return the heads whose attention on every slot of the trial's cache is stored, and of the chosen one each token
    with its share and a step of colour, 0 to 6; None where none is stored."""
    columns = ["trial_id", "stage", "layer", "head", "by_slot"]
    stored = run.store.read_attention(columns, stage="forced", batches=[row["part"].removesuffix(".parquet")])
    is_shown = pc.and_(pc.equal(stored["trial_id"], row["trial_id"]), stored["by_slot"].is_valid())  # pyright: ignore[reportAttributeAccessIssue]
    by_name = {f"{own['layer']}.{own['head']}": own["by_slot"] for own in stored.filter(is_shown).to_pylist()}
    if not by_name:
        return None
    ids, record = row.get("cache_token_ids") or [], model_of(run, row.get("model"))
    decode = None if record is None else tokens.decoder(record)
    shown = [
        {"text": text, "share": share, "step": sum(share >= limit for limit in LIMITS)}
        for text, share in zip(texts_of(decode, ids), by_name.get(head or "", []), strict=False)
    ]
    return {"heads": list(by_name), "chosen": head, "tokens": shown, "is_text": decode is not None}


def _map(title: str, layers: list[int], values: list[list[float]]) -> dict[str, Any]:
    flat = [value for line in values for value in line if math.isfinite(value)]
    low, high = min(flat), max(flat)
    width = (high - low) or 1.0
    lines = [
        {
            "layer": layer,
            "cells": [
                {"value": number(v), "step": round(6 * (v - low) / width) if math.isfinite(v) else 0} for v in line
            ],
        }
        for layer, line in zip(layers, values, strict=True)
    ]
    return {"name": title, "rows": lines, "low": number(low), "high": number(high)}

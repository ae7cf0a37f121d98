"""The columns of stored trials and of watched attention, with their types and meanings.

What the columns of readouts are is said in the catalogue of readouts, which other packages may add to. The columns of a
trial are therefore looked up when they are asked for, and never kept from the time of an import.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from kvpatch.specs.attention import STAGES, STATISTICS
from kvpatch.specs.readouts import BUILT_IN, Readout, from_outside

if TYPE_CHECKING:
    TRIAL_SCHEMA: pa.Schema
    """What `trial_schema` gives at the time when the name is looked up."""

Column = tuple[pa.DataType, str]
"""A column's type and meaning."""

_TOKENS = pa.list_(pa.int32())
_NUMBERS = pa.list_(pa.float32())
_SPANS = pa.list_(pa.struct([("start", pa.int32()), ("end", pa.int32())]))

_FIRST: dict[str, Column] = {
    "trial_id": (pa.string(), "hash of the trial's content: model, pair, condition, seed and settings"),
    "content_id": (
        pa.string(),
        "the same hash without the phase: rows that share it are one computation, copied into each phase that has it",
    ),
    "phase": (pa.string(), "phase of the protocol; 'calibration' or 'calibration-<model>' for held-out pairs"),
    "split": (pa.string(), "'test' or 'calibration'"),
    "model": (pa.string(), "name of the model the trial ran on"),
    "condition": (pa.string(), "id of the condition"),
    "condition_role": (pa.string(), "experiment, control or integrity"),
    "pair_id": (pa.string(), "target and source of the pair; the unit of analysis"),
    "source_id": (pa.string(), "bank id of the pair's source prompt"),
    "target_id": (pa.string(), "bank id of the pair's target prompt"),
    "source_domain": (
        pa.string(),
        "domain of the continuations on the source's topic, which pairs of this domain share; null in older runs",
    ),
    "target_domain": (pa.string(), "the same of the target's topic"),
    "sample": (pa.int32(), "number of the continuation within pair and condition"),
    "seed": (pa.int64(), "seed of the trial's random numbers; shared by the conditions of a pair"),
    "patch": (pa.string(), "the patch or other intervention as JSON; null for a natural cache"),
    "changes_planned": (pa.int32(), "changes of activations that hooks were to make for this trial"),
    "changes_fired": (pa.int32(), "changes they made; where the two differ the trial is an error"),
    "n_slots_patched": (
        pa.int32(),
        "slots of the trial's cache that the condition put in, added to or computed anew, whatever its strength: those "
        "selected; of joined prompts all from the giver's first word on. 0 for a natural cache; null in older runs",
    ),
    "n_layers_patched": (pa.int32(), "layers in which it did"),
    "n_kv_heads_patched": (pa.int32(), "KV heads in each of these layers"),
    "equals_text": (
        pa.string(),
        "role of the prompt whose natural run the trial's cache equals, by its numbers; null where no text of the pair "
        "does, and in older runs",
    ),
    "source_text": (pa.string(), "words of the pair's source prompt"),
    "target_text": (pa.string(), "words of the pair's target prompt"),
    "source_token_ids": (_TOKENS, "tokens of the prompt whose cache was put in, pending token last"),
    "target_token_ids": (_TOKENS, "tokens of the prompt that received it, pending token last"),
    "cache_token_ids": (_TOKENS, "token each slot of the trial's cache stands for, pending token last"),
    "output_token_ids": (_TOKENS, "tokens written, end token included"),
    "output_logprobs": (_NUMBERS, "log-probability of each, temperature 1, natural logarithm"),
    "text": (pa.string(), "the continuation, special tokens left out"),
    "stopped": (pa.string(), "'eos' or 'length'"),
}
_BEHIND: dict[str, dict[str, Column]] = {
    "recursive_score_masked": {
        "mode_hits": (
            _SPANS,
            "characters of each hit, in the text as Unicode NFC; null where a scorer gave only a number",
        ),
    },
    "content_llr": {
        "mode_llr_damage": (
            _NUMBERS,
            "what damage shows in, in the order of the calibration's covariates, less the natural targets' means; "
            "mode_llr_unweighted less these times the coefficients in run.json is mode_llr. Null where "
            "nothing was fitted",
        ),
        "mode_llr_by_position": (_NUMBERS, "mode_llr_unweighted at each position of the continuations"),
        "content_llr_by_position": (_NUMBERS, "content_llr at each position of the continuations"),
        "rv_trajectory": (
            _NUMBERS,
            "R_V of every window of the trial's own tokens, the first window first; see `geometry`",
        ),
        "rv_forced_trajectory": (_NUMBERS, "the same over the fixed continuation"),
    },
    "pr_k_late_corrected": {
        "pr_v": (_NUMBERS, "participation ratio of the cached values of each KV head alone, layer after layer"),
        "pr_v_corrected": (_NUMBERS, "the same without the bias of a small window"),
        "pr_k": (_NUMBERS, "participation ratio of the cached keys of each KV head alone, before RoPE"),
        "pr_k_corrected": (_NUMBERS, "the same without the bias of a small window"),
    },
}
"""Readout -> the lists that stand behind it and give it in detail."""
_LAST: dict[str, Column] = {
    "coherent": (
        pa.bool_(),
        "whether excess_context and repetition are within the limits that the natural target's runs set; null in "
        "calibration. In runs without excess_context: nll_target, and limits of both natural runs",
    ),
    "cache_checksum_before": (pa.string(), "checksum of the trial's cache before it was used"),
    "cache_checksum_after": (pa.string(), "the same after decoding and all readouts"),
    "error": (pa.string(), "what went wrong with this trial; null if nothing did"),
}


class _TrialColumns(Mapping[str, Column]):
    """The columns of a trial: those of kvpatch in a fixed order, then the readouts that came from outside by now."""

    def __getitem__(self, name: str) -> Column:
        return _columns(from_outside())[name]

    def __iter__(self) -> Iterator[str]:
        return iter(_columns(from_outside()))

    def __len__(self) -> int:
        return len(_columns(from_outside()))


@functools.lru_cache(maxsize=8)
def _columns(outside: tuple[Readout, ...]) -> dict[str, Column]:
    measured: dict[str, Column] = {}
    for readout in BUILT_IN:
        if readout.is_stored:
            measured |= {readout.name: _column(readout), **_BEHIND.get(readout.name, {})}
    return {**_FIRST, **measured, **_LAST, **{readout.name: _column(readout) for readout in outside}}


def _column(readout: Readout) -> Column:
    return {"float64": pa.float64(), "int32": pa.int32()}[readout.kind], readout.about


TRIAL_COLUMNS: Mapping[str, Column] = _TrialColumns()
"""Every column of a trial row: its type and meaning. With the catalogue of readouts (`specs/readouts.py`), this is the
documentation of the file format."""


def trial_schema() -> pa.Schema:
    """The schema of trials, with the readouts that are registered by now."""
    return _schema(from_outside())


@functools.lru_cache(maxsize=8)
def _schema(outside: tuple[Readout, ...]) -> pa.Schema:
    return pa.schema([pa.field(k, t, metadata={"doc": doc}) for k, (t, doc) in _columns(outside).items()])


ATTENTION_COLUMNS: dict[str, tuple[pa.DataType, str]] = {
    "trial_id": (pa.string(), "the trial; see its row for phase, condition and pair"),
    "stage": (pa.string(), "; ".join(f"'{name}': {about}" for name, about in STAGES.items())),
    "layer": (pa.int16(), "layer, from 0"),
    "head": (pa.int16(), "query head, from 0"),
    "queries": (pa.int32(), "queries counted"),
    **{name: (pa.float32(), about) for name, about in STATISTICS.items()},
    "by_slot": (
        _NUMBERS,
        "attention on every slot of the prompt, in the order of the trial's cache_token_ids, to three digits; the mean "
        "over the same queries. Only in the first sample of each condition in the phase's first pair; else null, and "
        "in older runs",
    ),
}
"""Every column of a row of attention/*.parquet, a mean over queries; null where no query has the statistic."""

ATTENTION_SCHEMA = pa.schema([pa.field(k, t, metadata={"doc": doc}) for k, (t, doc) in ATTENTION_COLUMNS.items()])
NEEDED = ("trial_id", "phase", "condition", "pair_id")
NEEDED_OF_HEADS = ("trial_id", "stage", "layer", "head")
"""Columns that every version stored, and without which a row means nothing."""


def __getattr__(name: str) -> Any:
    if name == "TRIAL_SCHEMA":
        return trial_schema()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

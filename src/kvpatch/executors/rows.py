"""From what was measured on a trial to its row: readouts of text and tokens, and the columns of the store. No model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import pyarrow as pa

from kvpatch.crash import without_private
from kvpatch.engine.attention import Attention
from kvpatch.executors.optional_columns import OPTIONAL_COLUMNS, attention_table
from kvpatch.planning.plan import Batch
from kvpatch.readouts.behavior import ngram_overlap
from kvpatch.readouts.fluency import CoherenceLimits, is_coherent, repetition_profile
from kvpatch.readouts.likelihood import log_likelihood_ratios
from kvpatch.readouts.outside import measure_outside
from kvpatch.readouts.specific_mode import SpecificMode
from kvpatch.specs.attention import STAGES
from kvpatch.specs.readouts import TrialRecord, from_outside
from kvpatch.store.columns import TRIAL_COLUMNS
from kvpatch.store.record import ModelRecord


@dataclass(frozen=True)
class Measured:
    """What the model gave for one trial, as plain numbers and text; the names are those of the store's columns.

    cells: [4 or 8, positions], mean log-probabilities of the cells of held-out continuations (`pairing.cells_of`).
    touched: slots, layers and KV heads that the condition touched.
    equals_text: role of the prompt whose natural run the trial's cache equals.
    error: what kept the trial from its cache.
    asked: columns that only a phase that asks for them has. attention: statistics of the trial's heads by stage, where
        the phase watches them, one row each.
    """

    model: str
    source_token_ids: list[int]
    target_token_ids: list[int]
    cache_token_ids: list[int]
    output_token_ids: list[int]
    output_logprobs: list[float]
    text: str
    semantic_score: float | None
    stopped: str
    rv_prompt: float
    rv_output: float
    rv_own: float
    nll_target: float
    nll_context: float
    excess_context: float
    js_pull: float
    cells: np.ndarray
    checksum_before: str
    checksum_after: str
    changes_planned: int
    changes_fired: int
    touched: tuple[int, int, int]
    equals_text: str | None
    error: str | None
    asked: Mapping[str, Any]
    attention: Mapping[str, Attention]


def rows_of(
    batch: Batch, measured: Sequence[Measured], limits: CoherenceLimits | None, rule: SpecificMode | None = None
) -> list[dict[str, Any]]:
    """One row per trial, with the columns of `store.columns.TRIAL_COLUMNS`; `rule` as in `batch.run_batch`.

    Raises:
        ProtocolError: where the protocol's scorer fails.
        ExtensionError: where a readout from outside fails.
    """
    rows = []
    recipes = {name: condition.recipe for name, condition in batch.conditions.items()}
    counts = ("n_slots_patched", "n_layers_patched", "n_kv_heads_patched")
    for index, of in enumerate(measured):
        row = {
            **_identity(batch, index, recipes),
            **_output(of),
            **_scores(batch, index, of),
            **forced_readouts(batch, of, rule),
        }
        row |= {
            "rv_own": of.rv_own,
            "nll_target": of.nll_target,
            "nll_context": of.nll_context,
            "excess_context": of.excess_context,
            "cache_checksum_before": of.checksum_before,
            "cache_checksum_after": of.checksum_after,
            "changes_planned": of.changes_planned,
            "changes_fired": of.changes_fired,
            "equals_text": of.equals_text,
            **dict(zip(counts, of.touched, strict=True)),
            "error": _error(of, row["nll_own"]),
        }
        row |= dict.fromkeys(OPTIONAL_COLUMNS) | dict(of.asked) | {"semantic_score": of.semantic_score}
        row |= _from_outside(row)
        row["coherent"] = limits and is_coherent(row["excess_context"], row["repetition_4"], limits)
        rows.append(row)
    return rows


def attention_of(batch: Batch, measured: Sequence[Measured]) -> pa.Table | None:
    """The table of heads of the batch's trials, with the columns of `store.columns.ATTENTION_COLUMNS`; None where
    none was watched."""
    if batch.watched is None or not measured:
        return None
    stages = {stage: Attention.concat([of.attention[stage] for of in measured]) for stage in STAGES}
    return attention_table([trial.trial_id for trial in batch.trials], stages)


def failed_rows(batch: Batch, told: str, models: Mapping[str | None, ModelRecord] | None) -> list[dict[str, Any]]:
    """Rows of a batch that could not be measured: which trials they are, and why they have no numbers."""
    empty = dict.fromkeys(TRIAL_COLUMNS) | {"text": "", "output_token_ids": [], "output_logprobs": [], "n_tokens": 0}
    empty |= {"changes_planned": 0, "changes_fired": 0, "mode_hits": [], "error": without_private(told)}
    if models:
        empty["model"] = models[batch.model].name
    recipes = {name: condition.recipe for name, condition in batch.conditions.items()}
    return [empty | _identity(batch, index, recipes) for index in range(len(batch.trials))]


def _error(of: Measured, nll: float) -> str | None:
    """What makes a trial's row unusable, or None."""
    if of.error:
        return without_private(of.error)  # an exception may quote a path, and a run is published
    if of.changes_planned != of.changes_fired:
        return f"{of.changes_fired} of {of.changes_planned} planned changes were made"
    if of.checksum_before != of.checksum_after:
        return "the cache changed while the trial ran"
    if math.isnan(nll):
        return "the model gave no finite probabilities"
    return None


def _identity(batch: Batch, index: int, recipes: Mapping[str, str | None]) -> dict[str, Any]:
    """Which trial it is; `recipes` are those of the batch's conditions, which many trials share."""
    trial = batch.trials[index]
    pair = batch.pairs[trial.pair]
    return {
        "trial_id": trial.trial_id,
        "content_id": trial.content_id,
        "phase": batch.phase,
        "split": batch.split,
        "condition": trial.condition,
        "condition_role": batch.roles[trial.condition],
        "pair_id": pair.pair_id,
        "source_id": pair.source_id,
        "target_id": pair.target_id,
        "source_domain": pair.domains.get("source"),
        "target_domain": pair.domains.get("target"),
        "sample": trial.sample,
        "seed": trial.seed,
        "patch": recipes[trial.condition],
        "source_text": pair.texts["source"],
        "target_text": pair.texts["target"],
    }


def _output(of: Measured) -> dict[str, Any]:
    length = len(of.output_token_ids)
    return {
        "model": of.model,
        "source_token_ids": of.source_token_ids,
        "target_token_ids": of.target_token_ids,
        "cache_token_ids": of.cache_token_ids,
        "output_token_ids": of.output_token_ids,
        "output_logprobs": of.output_logprobs,
        "text": of.text,
        "stopped": of.stopped,
        "n_tokens": length,
        "nll_own": -sum(of.output_logprobs) / length,
    }


def _scores(batch: Batch, index: int, of: Measured) -> dict[str, Any]:
    """Readouts of the text alone. Every condition of a pair is masked by the same prompts, so that none is favoured."""
    pair = batch.pairs[batch.trials[index].pair]
    seen = "\n".join(pair.texts[role] for role in pair.masked_by)
    scored = batch.scorer.score(of.text, seen)
    hits = None if scored.hits is None else [{"start": start, "end": end} for start, end in scored.hits]
    repeated = {f"repetition_{n}": share for n, share in repetition_profile(of.output_token_ids).items()}
    return {
        "recursive_score": scored.score,
        "recursive_score_masked": scored.masked,
        "mode_hits": hits,
        "overlap_4gram": ngram_overlap(of.text, pair.texts["source"]),
        "repetition": repeated["repetition_4"],
        **repeated,
    }


def _from_outside(row: Mapping[str, Any]) -> dict[str, float | None]:
    """Readouts of other packages; null for a trial that is an error, which no test reads."""
    outside = from_outside()
    if row["error"] is not None or not outside:
        return {readout.name: None for readout in outside}
    given: dict[str, Any] = {}
    for field in fields(TrialRecord):
        value = row[field.name]
        given[field.name] = tuple(value) if isinstance(value, list) else value
    return dict(measure_outside(TrialRecord(**given)))


def forced_readouts(batch: Batch, of: Measured, rule: SpecificMode | None) -> dict[str, Any]:
    """The columns that do not depend on the text which a trial wrote; `rule` as in `batch.run_batch`."""
    first = batch.readouts.likelihood_tokens
    ratios = log_likelihood_ratios(of.cells, first=first)
    specific, damage = (ratios.mode, None) if rule is None else rule.told(of.cells, ratios, first=first)
    return {
        "rv_prompt": of.rv_prompt,
        "rv_output": of.rv_output,
        "js_pull": of.js_pull,
        "mode_llr": specific,
        "mode_llr_unweighted": ratios.mode,
        "content_llr": ratios.content,
        "register_llr": ratios.register,
        "mode_llr_damage": damage,
        "mode_llr_by_position": ratios.mode_by_position,
        "content_llr_by_position": ratios.content_by_position,
    }

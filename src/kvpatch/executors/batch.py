"""Run one batch: plain data in, trial rows out.

texts -> prefill, each distinct prompt once -> conditions spliced -> all trials decoded in one batch
      -> readouts that force given text: the fixed continuation, the 2x2 of held-out ones, the trial's own output
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from kvpatch.cache import PAD, KVCache
from kvpatch.engine.attention import Attention, Look
from kvpatch.engine.decode import Continuations, decode
from kvpatch.engine.score import score
from kvpatch.executors.conditions import Built, Natural, build_all, giver_role, prefill_all
from kvpatch.executors.shape import (
    OPTIONAL_COLUMNS,
    attention_means,
    attention_table,
    cache_geometry,
    output_geometry,
    what_to_watch,
)
from kvpatch.model import Model
from kvpatch.models.hf import Edits
from kvpatch.protocols.plan import Batch
from kvpatch.readouts.behavior import ngram_overlap
from kvpatch.readouts.fluency import CoherenceLimits, is_coherent, repetition_profile
from kvpatch.readouts.geometry import layer_at, r_v, r_v_of, r_v_trajectory
from kvpatch.readouts.likelihood import js_pull, log_likelihood_ratios

OnTokens = Callable[[int], None]
OnAttention = Callable[[pa.Table], None]


@dataclass(frozen=True)
class _Forced:
    """What the fixed and the held-out continuations gave, one entry a trial."""

    rv_output: list[float]
    js_pull: list[float]
    cells: Tensor  # [trials, 4, positions], mean log-probabilities
    geometry: list[dict[str, Any]]
    attention: Attention | None


def run_batch(
    model: Model,
    batch: Batch,
    *,
    limits: CoherenceLimits | None = None,
    on_tokens: OnTokens | None = None,
    on_attention: OnAttention | None = None,
) -> list[dict[str, Any]]:
    """Run every trial of a batch.

    Args:
        model: the model the batch was planned for.
        batch: what to run.
        limits: coherence limits from the calibration; None leaves `coherent` empty.
        on_tokens: called with the number of tokens a decoding step wrote.
        on_attention: called with a table of `store.ATTENTION_SCHEMA`, where the phase watches attention.
    Returns:
        One row a trial, with the columns of `store.TRIAL_COLUMNS`.
    """
    natural = prefill_all(model, batch)
    built = build_all(model, batch, natural)
    mixed = built.cache
    before = mixed.checksums()
    layers = _rv_layers(model, batch)
    steering = built.steering.edits() if built.steering else {}
    look = None if batch.watched is None else what_to_watch(batch.watched, mixed)
    written = decode(
        model.backbone,
        mixed,
        max_new_tokens=batch.generation.max_new_tokens,
        temperature=batch.generation.temperature,
        top_p=batch.generation.top_p,
        seeds=[trial.seed for trial in batch.trials],
        end_tokens=model.end_tokens,
        keep_values=layers,
        on_step=on_tokens,
        edits=steering,
        look=look,
    )
    _count_steered_steps(built, steering, max(written.lengths))
    forced = _force(model, batch, natural, built, layers, look)
    nll_target = _nll_target(model, batch, natural, written)
    after = mixed.checksums()
    window = batch.readouts.r_v.window
    rv_prompt = r_v(mixed, early=layers[1], late=layers[0], window=window).tolist()
    texts = model.texts(written.token_ids)
    of_cache = cache_geometry(mixed, layers, window) if batch.geometry else [{}] * mixed.batch
    heads = attention_means(forced.attention, mixed, look) if forced.attention and look else [{}] * mixed.batch
    if on_attention is not None and written.attention is not None and forced.attention is not None:
        ids = [trial.trial_id for trial in batch.trials]
        on_attention(attention_table(ids, {"own": written.attention, "forced": forced.attention}))
    rows = []
    for index in range(len(batch.trials)):
        row: dict[str, Any] = {"model": model.loaded.name, **_identity(batch, index, natural, mixed)}
        row |= _output(written, index, texts[index])
        row |= _scores(batch, index, texts[index], row["output_token_ids"])
        row |= _likelihoods(forced, index, batch.readouts.likelihood_tokens)
        row |= {
            "rv_prompt": rv_prompt[index],
            "rv_own": _rv_own(written, index, layers, window),
            "nll_target": nll_target[index],
            "cache_checksum_before": before[index],
            "cache_checksum_after": after[index],
            "changes_planned": built.planned[index],
            "changes_fired": built.fired[index],
            "error": _error(built, index, before[index] == after[index], row["nll_own"]),
        }
        row |= dict.fromkeys(OPTIONAL_COLUMNS) | of_cache[index] | forced.geometry[index] | heads[index]
        if batch.geometry:
            row["rv_trajectory"] = _own_trajectory(written, index, layers, window)
        row["coherent"] = limits and is_coherent(row["nll_target"], row["repetition_4"], limits)
        rows.append(row)
    return rows


def _count_steered_steps(built: Built, edits: Edits, steps: int) -> None:
    """Add to the counts of steered trials what was planned and made while decoding."""
    for layer, edit in edits.items():
        assert built.steering is not None
        for index in built.steering.steps[layer].flatten(1).any(dim=1).nonzero().flatten().tolist():
            built.planned[index] += steps
            built.fired[index] += edit.fired


def _error(built: Built, index: int, is_unchanged: bool, nll: float) -> str | None:
    """What makes a trial's row unusable, or None."""
    if built.errors[index]:
        return built.errors[index]
    if built.planned[index] != built.fired[index]:
        return f"{built.fired[index]} of {built.planned[index]} planned changes were made"
    if not is_unchanged:
        return "the cache changed while the trial ran"
    if math.isnan(nll):
        return "the model gave no finite probabilities"
    return None


def _rv_layers(model: Model, batch: Batch) -> tuple[int, int]:
    settings, layers = batch.readouts.r_v, model.geometry.layers
    return layer_at(settings.late, layers), layer_at(settings.early, layers)


def _force(
    model: Model, batch: Batch, natural: Natural, built: Built, layers: tuple[int, int], look: Look | None
) -> _Forced:
    """Force the fixed continuation and the held-out ones on every trial, and the fixed one on the natural prompts."""
    settings = batch.readouts
    forced = [model.continuation_ids(pair.forced)[: settings.forced_tokens] for pair in batch.pairs]
    held_out = [
        [[model.continuation_ids(text)[: settings.likelihood_tokens] for text in cell] for cell in pair.continuations]
        for pair in batch.pairs
    ]
    n_pairs = len(batch.pairs)
    sides = KVCache.concat([natural.rows(range(n_pairs), "target"), natural.rows(range(n_pairs), "source")])
    reading = score(
        model.backbone,
        sides,
        [[ids] for ids in forced * 2],
        keep_values=layers[:1] if batch.geometry else (),
        keep_logits=settings.js_positions,
    )
    assert reading.logits is not None
    rv_output: list[float] = []
    pulls: list[float] = []
    cells: list[Tensor] = []
    geometry: list[dict[str, Any]] = []
    watched: list[Attention] = []
    step = max(1, n_pairs)
    for low in range(0, len(batch.trials), step):
        trials = batch.trials[low : low + step]
        wanted = [[forced[t.pair], *(ids for cell in held_out[t.pair] for ids in cell)] for t in trials]
        cache = built.cache[low : low + step]
        part = score(
            model.backbone,
            cache,
            wanted,
            keep_values=layers,
            keep_logits=settings.js_positions,
            edits=_edits_from(built, low),
            look=None if look is None else look.of_rows(slice(low, low + step), cache.slots),
        )
        assert part.logits is not None
        watched += [part.attention] if part.attention else []
        window = settings.r_v.window
        for row, trial in enumerate(trials):
            length = len(forced[trial.pair])
            late, early = (part.values[layer][row : row + 1, :, :length] for layer in layers)
            last = slice(max(0, length - window), length)
            has_window = length >= window
            rv_output.append(float(r_v_of(late[:, :, last], early[:, :, last])) if has_window else float("nan"))
            if batch.geometry:
                natural_late = reading.values[layers[0]][[trial.pair, n_pairs + trial.pair], :, :length]
                geometry.append(output_geometry(late, early, natural_late, window))
            positions = min(settings.js_positions, length)
            of_target, of_source = reading.logits[trial.pair], reading.logits[n_pairs + trial.pair]
            pulls.append(js_pull(part.logits[row][:positions], of_target[:positions], of_source[:positions]))
            cells.append(_cell_means(part.logprobs[row, 1:], held_out[trial.pair], settings.likelihood_tokens))
    return _Forced(
        rv_output,
        pulls,
        torch.stack(cells),
        geometry or [{}] * len(batch.trials),
        Attention.concat(watched) if watched else None,
    )


def _edits_from(built: Built, low: int) -> Callable[[slice], Edits] | None:
    """What steers the rows of a stretch of trials that starts at `low`."""
    steering = built.steering
    if steering is None:
        return None
    return lambda rows: steering.edits(slice(low + rows.start, low + rows.stop))


def _cell_means(logprobs: Tensor, cells: Sequence[Sequence[Sequence[int]]], positions: int) -> Tensor:
    """[4, positions]: mean over the continuations of a cell, of those long enough to have the position."""
    out, at = [], 0
    for cell in cells:
        part = logprobs[at : at + len(cell), :positions]
        out.append(torch.nn.functional.pad(part.nanmean(dim=0), (0, positions - part.shape[1]), value=float("nan")))
        at += len(cell)
    return torch.stack(out).cpu()


def _nll_target(model: Model, batch: Batch, natural: Natural, written: Continuations) -> list[float]:
    """Mean negative log-likelihood of every output under the natural cache of its pair's target prompt."""
    outputs = [[t for t in row if t != PAD] for row in written.token_ids.tolist()]
    of_pair = [[i for i, trial in enumerate(batch.trials) if trial.pair == pair] for pair in range(len(batch.pairs))]
    targets = natural.rows(range(len(batch.pairs)), "target")
    logprobs = score(model.backbone, targets, [[outputs[i] for i in indices] for indices in of_pair]).logprobs
    out = [float("nan")] * len(batch.trials)
    for pair, indices in enumerate(of_pair):
        for place, index in enumerate(indices):
            out[index] = -float(logprobs[pair, place].nanmean())
    return out


def _identity(batch: Batch, index: int, natural: Natural, mixed: KVCache) -> dict[str, Any]:
    trial = batch.trials[index]
    condition, pair = batch.conditions[trial.condition], batch.pairs[trial.pair]
    return {
        "trial_id": trial.trial_id,
        "phase": batch.phase,
        "split": batch.split,
        "condition": trial.condition,
        "condition_role": batch.roles[trial.condition],
        "pair_id": pair.pair_id,
        "source_id": pair.source_id,
        "target_id": pair.target_id,
        "sample": trial.sample,
        "seed": trial.seed,
        "patch": condition.recipe,
        "source_text": pair.texts["source"],
        "target_text": pair.texts["target"],
        "source_token_ids": natural.cache.row_token_ids(natural.row[trial.pair, giver_role(condition)]),
        "target_token_ids": natural.cache.row_token_ids(natural.row[trial.pair, condition.into]),
        "cache_token_ids": mixed.row_token_ids(index),
    }


def _output(written: Continuations, index: int, text: str) -> dict[str, Any]:
    length = written.lengths[index]
    logprobs = written.logprobs[index, :length].tolist()
    return {
        "output_token_ids": written.token_ids[index, :length].tolist(),
        "output_logprobs": logprobs,
        "text": text,
        "stopped": written.stopped[index],
        "n_tokens": length,
        "nll_own": -sum(logprobs) / length,
    }


def _scores(batch: Batch, index: int, text: str, token_ids: list[int]) -> dict[str, Any]:
    """Readouts of the text alone. Every condition of a pair is masked by the same prompts, so that none is favoured."""
    pair = batch.pairs[batch.trials[index].pair]
    seen = "\n".join(pair.texts[role] for role in pair.masked_by)
    scored = batch.scorer.score(text, seen)
    hits = None if scored.hits is None else [{"start": start, "end": end} for start, end in scored.hits]
    repeated = {f"repetition_{n}": share for n, share in repetition_profile(token_ids).items()}
    return {
        "recursive_score": scored.score,
        "recursive_score_masked": scored.masked,
        "mode_hits": hits,
        "overlap_4gram": ngram_overlap(text, pair.texts["source"]),
        "repetition": repeated["repetition_4"],
        **repeated,
    }


def _likelihoods(forced: _Forced, index: int, first: int) -> dict[str, Any]:
    ratios = log_likelihood_ratios(forced.cells[index], first=first)
    return {
        "rv_output": forced.rv_output[index],
        "js_pull": forced.js_pull[index],
        "mode_llr": ratios.mode,
        "content_llr": ratios.content,
        "mode_llr_by_position": ratios.mode_by_position,
        "content_llr_by_position": ratios.content_by_position,
    }


def _rv_own(written: Continuations, index: int, layers: tuple[int, int], window: int) -> float:
    """R_V over the last `window` tokens the trial wrote and fed; NaN where it wrote fewer."""
    fed = written.lengths[index] - 1
    if fed < window:
        return float("nan")
    late, early = (written.values[layer][index : index + 1, :, fed - window : fed] for layer in layers)
    return float(r_v_of(late, early))


def _own_trajectory(written: Continuations, index: int, layers: tuple[int, int], window: int) -> list[float]:
    """R_V of every window of the tokens the trial wrote and fed."""
    fed = written.lengths[index] - 1
    late, early = (written.values[layer][index : index + 1, :, :fed] for layer in layers)
    return r_v_trajectory(late, early, window)[0].tolist()

"""Run one batch: plain data in, trial rows out.

texts -> prefill, each distinct prompt once -> conditions spliced -> all trials decoded in one batch
      -> readouts that force given text: the fixed continuation, the 2x2 of held-out ones, the trial's own output
      -> everything to the host at once -> rows

`measure` is what needs the model; `rows.rows_of` makes rows of what it measured and needs none, so that another thread
can do it while the next batch decodes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from kvpatch.caches.devices import sent
from kvpatch.engine.attention import Attention, AttentionRequest
from kvpatch.engine.backend import left_alone
from kvpatch.engine.decode import Continuations, decode
from kvpatch.engine.model import Model
from kvpatch.engine.score import score
from kvpatch.executors.conditions import Built, Natural, build_all, giver_role, prefill_all
from kvpatch.executors.contexts import fluency, held_prompts
from kvpatch.executors.distinct import distinct
from kvpatch.executors.equal_texts import equal_texts
from kvpatch.executors.optional_columns import (
    attention_means,
    attention_request,
    cache_geometry,
    each_trial_s,
    output_geometries,
)
from kvpatch.executors.rows import Measured, attention_of, rows_of
from kvpatch.models.hf import Edits
from kvpatch.planning.plan import Batch
from kvpatch.readouts.fluency import CoherenceLimits
from kvpatch.readouts.geometry import layer_at, r_v, r_v_of, r_v_trajectory
from kvpatch.readouts.likelihood import js_pulls
from kvpatch.readouts.semantic import semantic_scores
from kvpatch.readouts.specific_mode import SpecificMode

OnTokens = Callable[[int], None]
OnAttention = Callable[[pa.Table], None]
LOGITS_AT_ONCE = 1 << 27
"""Numbers of distributions over the whole vocabulary that are held at a time."""
MOST_ROWS_AT_ONCE = 256


@dataclass(frozen=True)
class _Forced:
    """What the fixed and the held-out continuations gave, one entry a trial.

    cells: [trials, cells, positions], mean log-probabilities of the held-out continuations. geometry: the columns that
    `Batch.geometry` asks for, of some trials at a time, which are still being computed on the host.
    """

    rv_output: list[float]
    js_pull: list[float]
    cells: np.ndarray
    geometry: list[Future[list[dict[str, Any]]]]
    attention: Attention | None


def run_batch(
    model: Model,
    batch: Batch,
    *,
    limits: CoherenceLimits | None = None,
    rule: SpecificMode | None = None,
    on_tokens: OnTokens | None = None,
    on_attention: OnAttention | None = None,
) -> list[dict[str, Any]]:
    """Run every trial of a batch.

    Args:
        model: the model the batch was planned for.
        batch: what to run.
        limits: coherence limits from the calibration; None leaves `coherent` empty.
        rule: the mode readout that was fitted on the calibration pairs; None subtracts nothing.
        on_tokens: called with the number of tokens a decoding step wrote.
        on_attention: called with a table of `store.columns.ATTENTION_SCHEMA`, where the phase watches attention.
    Returns:
        One row a trial, with the columns of `store.columns.TRIAL_COLUMNS`.
    """
    measured = measure(model, batch, on_tokens=on_tokens)
    heads = attention_of(batch, measured)
    if on_attention is not None and heads is not None:
        on_attention(heads)
    return rows_of(batch, measured, limits, rule)


def measure(
    model: Model, batch: Batch, *, on_tokens: OnTokens | None = None, places: int | None = None
) -> list[Measured]:
    """Run every trial of a batch and measure it; `places` as in `decode`."""
    with left_alone(model.backbone):
        return _measured(model, batch, on_tokens, places)


def _measured(model: Model, batch: Batch, on_tokens: OnTokens | None, places: int | None) -> list[Measured]:
    natural = prefill_all(model, batch)
    built = build_all(model, batch, natural)
    before = built.cache.checksums()
    equal = equal_texts(batch, natural, built.cache)
    own = distinct(batch, built, before)
    mixed = own.built.cache
    layers = _rv_layers(model, batch)
    steering = own.built.steering.edits() if own.built.steering else {}
    to_capture = attention_request(own.batch, mixed)
    written = decode(
        model.backbone,
        mixed,
        max_new_tokens=batch.generation.max_new_tokens,
        temperature=batch.generation.temperature,
        top_p=batch.generation.top_p,
        seeds=[trial.seed for trial in own.batch.trials],
        end_tokens=model.end_tokens,
        keep_values=layers,
        on_step=on_tokens,
        edits=steering,
        places=places,
    )
    lengths = written.lengths
    outputs = [row[:length] for row, length in zip(written.token_ids.tolist(), lengths, strict=True)]
    _count_steered_steps(built, steering, max(lengths))
    logprobs = written.logprobs.tolist()
    rv_own = _rv_own(written, lengths, layers, batch.readouts.r_v.window).tolist()
    rv_prompt = r_v(mixed, early=layers[1], late=layers[0], window=batch.readouts.r_v.window).tolist()
    await_forced = _force(model, own.batch, natural, own.built, layers, to_capture)
    texts = model.texts(outputs)
    source_ids, target_ids = _prompt_ids(batch, natural)
    held = held_prompts(batch, built, equal)
    own_attention = None if to_capture is None else _own_attention(model, own.built, outputs, to_capture)
    read = fluency(model, batch, natural, [outputs[at] for at in own.of], held)
    forced = await_forced()
    after = mixed.checksums()
    direction = batch.readouts.semantic
    by_meaning = [None] * len(texts) if direction is None else semantic_scores(direction, texts, model.backbone.device)
    asked, heads = _asked_for(own.batch, own.built, to_capture, layers, written, forced, own_attention)
    return [
        Measured(
            model=model.loaded.published_name,
            source_token_ids=source_ids[i],
            target_token_ids=target_ids[i],
            cache_token_ids=built.cache.row_token_ids(i),
            output_token_ids=outputs[at],
            output_logprobs=logprobs[at][: lengths[at]],
            text=texts[at],
            semantic_score=by_meaning[at],
            stopped=written.stopped[at],
            rv_prompt=rv_prompt[at],
            rv_output=forced.rv_output[at],
            rv_own=rv_own[at],
            nll_target=read.nll_target[i],
            nll_context=read.nll_context[i],
            excess_context=read.excess_context[i],
            js_pull=forced.js_pull[at],
            cells=forced.cells[at],
            checksum_before=before[i],
            checksum_after=after[at],
            changes_planned=built.planned[i],
            changes_fired=built.fired[i],
            touched=built.touched[i],
            equals_text=equal[i],
            error=built.errors[i],
            asked=asked[at],
            attention=heads[at],
        )
        for i, at in enumerate(own.of)
    ]


def _asked_for(
    batch: Batch,
    built: Built,
    to_capture: AttentionRequest | None,
    layers: tuple[int, int],
    written: Continuations,
    forced: _Forced,
    own_attention: Attention | None,
) -> tuple[list[dict[str, Any]], list[dict[str, Attention]]]:
    """What the phase asks for, for every trial: columns of its row, and statistics of its heads by stage."""
    window, cache = batch.readouts.r_v.window, built.cache
    columns: list[dict[str, Any]] = [{} for _ in batch.trials]
    heads: list[dict[str, Attention]] = [{} for _ in batch.trials]
    if batch.geometry:
        own = _own_trajectories(written, layers, window)
        of_outputs = [row for part in forced.geometry for row in part.result()]
        for row, of_cache, of_output, trajectory in zip(
            columns, cache_geometry(cache, layers, window), of_outputs, own, strict=True
        ):
            row |= of_cache | of_output | {"rv_trajectory": trajectory}
    if to_capture is not None:
        assert own_attention is not None and forced.attention is not None
        heads = each_trial_s({"own": own_attention, "forced": forced.attention})
        for row, means in zip(columns, attention_means(forced.attention, cache, to_capture), strict=True):
            row |= means
    return columns, heads


def _prompt_ids(batch: Batch, natural: Natural) -> tuple[list[list[int]], list[list[int]]]:
    """For every trial the tokens of the prompt that gives and of the one that receives."""

    def ids(pair: int, role: str) -> list[int]:
        return list(natural.prompts[natural.row[pair, role]].token_ids)

    conditions = [batch.conditions[trial.condition] for trial in batch.trials]
    both = list(zip(batch.trials, conditions, strict=True))
    return [ids(t.pair, giver_role(c)) for t, c in both], [ids(t.pair, c.into) for t, c in both]


def _count_steered_steps(built: Built, edits: Edits, steps: int) -> None:
    """Add to the counts of steered trials what was planned and made while decoding."""
    for layer, edit in edits.items():
        assert built.steering is not None
        for index in built.steering.steps[layer].flatten(1).any(dim=1).nonzero().flatten().tolist():
            built.planned[index] += steps
            built.fired[index] += edit.fired


def _rv_layers(model: Model, batch: Batch) -> tuple[int, int]:
    settings, layers = batch.readouts.r_v.of_model(model.loaded.name), model.geometry.layers
    return layer_at(settings.late, layers), layer_at(settings.early, layers)


def _force(
    model: Model,
    batch: Batch,
    natural: Natural,
    built: Built,
    layers: tuple[int, int],
    to_capture: AttentionRequest | None,
) -> Callable[[], _Forced]:
    """Force the fixed continuation and the held-out ones on every trial, and the fixed one on the natural prompts.

    Returns:
        What waits for the device and gives what it found; until it is called the device has work, and the host is free.
    """
    settings = batch.readouts
    ids = functools.cache(model.continuation_ids)  # many pairs have a text in common
    forced = [ids(pair.forced)[: settings.forced_tokens] for pair in batch.pairs]
    held_out = [
        [[ids(text)[: settings.likelihood_tokens] for text in cell] for cell in pair.continuations]
        for pair in batch.pairs
    ]
    n_pairs, positions = len(batch.pairs), settings.js_positions
    sides = [natural.row[pair, role] for role in ("target", "source") for pair in range(n_pairs)]
    reading = score(
        model.backbone,
        natural.cache,
        [[ids] for ids in forced * 2],
        of=sides,
        keep_values=layers[:1] if batch.geometry else (),
        keep_logits=positions,
    )
    assert reading.logits is not None
    natural_late = reading.values[layers[0]] if batch.geometry else None
    lengths, window = [len(ids) for ids in forced], settings.r_v.window
    rv_output: list[Tensor] = []
    pulls: list[Tensor] = []
    logprobs: list[Tensor] = []
    geometry: list[Future[list[dict[str, Any]]]] = []
    beside = ThreadPoolExecutor(max_workers=1, thread_name_prefix="kvpatch-geometry")
    watched: list[Attention] = []
    of_pair = [
        tuple(map(tuple, [first, *(text for cell in cells for text in cell)]))
        for first, cells in zip(forced, held_out, strict=True)
    ]
    step = min(MOST_ROWS_AT_ONCE, max(1, LOGITS_AT_ONCE // (positions * model.geometry.vocabulary)))
    for low in range(0, len(batch.trials), step):
        trials = batch.trials[low : low + step]
        wanted = [of_pair[t.pair] for t in trials]
        cache = built.cache.rows(low, low + len(trials))
        part = score(
            model.backbone,
            cache,
            wanted,
            keep_values=layers,
            keep_logits=positions,
            edits=_edits_from(built, low),
            to_capture=None if to_capture is None else to_capture.of_rows(slice(low, low + len(trials)), cache.slots),
        )
        assert part.logits is not None
        late, early = (part.values[layer] for layer in layers)
        watched += [part.attention] if part.attention else []
        of_pairs = [t.pair for t in trials]
        if natural_late is not None:
            sides_late = natural_late[:n_pairs], natural_late[n_pairs:]
            geometry.append(beside.submit(output_geometries, (late, early), sides_late, of_pairs, lengths, window))
        rv_output.append(_rv_before(late, early, [lengths[t.pair] for t in trials], window))
        pairs = sent(np.array(of_pairs), part.logits.device)
        counts = sent(np.array([min(positions, lengths[pair]) for pair in of_pairs]), part.logits.device)
        pulls.append(js_pulls(part.logits, reading.logits[pairs], reading.logits[n_pairs + pairs], counts))
        logprobs.append(part.logprobs[:, 1:, : settings.likelihood_tokens])
    beside.shutdown(wait=False)
    seen = Attention.concat(watched) if watched else None

    def found() -> _Forced:
        cells = np.concatenate(
            [
                cell_means(part.cpu().numpy(), [held_out[t.pair] for t in batch.trials[i * step :][: len(part)]])
                for i, part in enumerate(logprobs)
            ]
        )
        missing = settings.likelihood_tokens - cells.shape[2]
        cells = np.pad(cells, ((0, 0), (0, 0), (0, missing)), constant_values=np.nan)
        return _Forced(torch.cat(rv_output).tolist(), torch.cat(pulls).tolist(), cells, geometry, seen)

    return found


def _edits_from(built: Built, low: int) -> Callable[[slice], Edits] | None:
    """What steers the rows of a stretch of trials that starts at `low`."""
    steering = built.steering
    if steering is None:
        return None
    return lambda rows: steering.edits(slice(low + rows.start, low + rows.stop))


def _own_attention(
    model: Model, built: Built, outputs: Sequence[Sequence[int]], to_capture: AttentionRequest
) -> Attention:
    """What the heads did while each trial wrote. Read by forcing the text that it wrote: the same tokens are fed after
    the same cache, and decoding need not stop at every step to be watched."""
    found = score(
        model.backbone,
        built.cache,
        [[output] for output in outputs],
        edits=_edits_from(built, 0),
        to_capture=to_capture,
    ).attention
    assert found is not None
    return found


def _rv_before(late: Tensor, early: Tensor, ends: Sequence[int], window: int) -> Tensor:
    """R_V [rows] of the `window` tokens that end before `ends`, of values [rows, kv_heads, tokens, head_dim]; NaN where
    there are fewer."""
    stop = sent(np.array(ends), late.device)
    has_window = stop >= window
    if late.shape[2] < window:
        return torch.full((len(late),), float("nan"), device=late.device)
    at = (stop[:, None] - window + torch.arange(window, device=late.device)).clamp(min=0)[:, None, :, None]
    windows = [v.gather(2, at.expand(-1, v.shape[1], -1, v.shape[3])) for v in (late, early)]
    return torch.where(has_window, r_v_of(*windows), float("nan"))


def _rv_own(written: Continuations, lengths: Sequence[int], layers: tuple[int, int], window: int) -> Tensor:
    """R_V over the last `window` tokens each trial wrote and fed; NaN where it wrote fewer."""
    late, early = (written.values[layer] for layer in layers)
    return _rv_before(late, early, [length - 1 for length in lengths], window)


def _own_trajectories(written: Continuations, layers: tuple[int, int], window: int) -> list[list[float]]:
    """R_V of every window of the tokens each trial wrote and fed."""
    late, early = (written.values[layer] for layer in layers)
    whole = r_v_trajectory(late, early, window).tolist()
    return [row[: max(0, length - window)] for row, length in zip(whole, written.lengths, strict=True)]


def cell_means(logprobs: np.ndarray, cells: Sequence[Sequence[Sequence[Sequence[int]]]]) -> np.ndarray:
    """[rows, cells, positions]: mean over the continuations of a cell, of those long enough to have the position.

    logprobs: [rows, continuations, positions], NaN where there is none; cells: for every row its cells.
    """
    known = ~np.isnan(logprobs)
    edges = np.array([np.cumsum([0, *map(len, row)]) for row in cells])[..., None]  # [rows, cells + 1, 1]

    def per_cell(numbers: np.ndarray) -> np.ndarray:
        running = np.pad(numbers.astype(np.float64).cumsum(axis=1), ((0, 0), (1, 0), (0, 0)))
        return np.diff(np.take_along_axis(running, edges, axis=1), axis=1)

    with np.errstate(invalid="ignore", divide="ignore"):
        return per_cell(np.where(known, logprobs, 0)) / per_cell(known)

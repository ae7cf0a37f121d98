"""The readouts that a phase asks for: geometry of a trial's cache and output, and what its attention heads did."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from kvpatch.caches.kvcache import KVCache, Segment
from kvpatch.caches.selection import SINKS, beside_mask, slot_mask
from kvpatch.engine.attention import Attention, AttentionRequest
from kvpatch.planning.plan import Batch
from kvpatch.readouts.geometry import cache_ratios, principal_angles, r_v_trajectory
from kvpatch.specs.attention import STATISTICS, statistic_of
from kvpatch.specs.readouts import BUILT_IN
from kvpatch.store.columns import ATTENTION_SCHEMA

ANGLES = 4
"""Dimensions of the subspaces whose angles are taken, of a window of 16 vectors."""
MEANS = {readout.name: of for readout in BUILT_IN if (of := statistic_of(readout)) is not None}
"""Trial column -> the statistic it is the mean of, over layers and heads."""
MARKED = [readout.name for readout in BUILT_IN if readout.asks == "attention.marked"]
"""Columns that only a phase has that marks words."""
OPTIONAL_COLUMNS = [readout.name for readout in BUILT_IN if readout.asks is not None]
OPTIONAL_COLUMNS += ["pr_v", "pr_v_corrected", "pr_k", "pr_k_corrected", "rv_trajectory", "rv_forced_trajectory"]
"""Columns that are null in phases that do not ask for them."""


def cache_geometry(cache: KVCache, layers: tuple[int, int], window: int) -> list[dict[str, Any]]:
    """Participation ratios of every row's cache, raw and corrected; layers are late and early."""
    out: list[dict[str, Any]] = [{} for _ in range(cache.batch)]
    for part in ("v", "k"):
        for suffix, is_corrected in (("", False), ("_corrected", True)):
            joined = cache_ratios(cache, part, window=window, joined=True, corrected=is_corrected)[:, layers[0]]
            each = cache_ratios(cache, part, window=window, corrected=is_corrected).flatten(1)
            for row, late, of_heads in zip(out, joined.tolist(), each.tolist(), strict=True):
                row |= {f"pr_{part}_late{suffix}": late, f"pr_{part}{suffix}": of_heads}
    return out


def output_geometries(
    layers: tuple[Tensor, Tensor],
    natural: tuple[Tensor, Tensor],
    pairs: Sequence[int],
    lengths: Sequence[int],
    window: int,
) -> list[dict[str, Any]]:
    """R_V along a continuation, and how far its late values have turned from those it has after the natural prompts.
    Computed on the host: a GPU is slow at small decompositions.

    Args:
        layers: late and early values of the continuation in each trial, [trials, kv_heads, tokens, head_dim].
        natural: the late ones after the natural target and source of each pair, [pairs, ...].
        pairs: every trial's pair.
        lengths: tokens of every pair's continuation.
    """
    found: list[dict[str, Any]] = [{} for _ in pairs]
    layers, natural = ((first.cpu(), second.cpu()) for first, second in (layers, natural))
    for length in set(lengths):
        rows = [row for row, pair in enumerate(pairs) if lengths[pair] == length]
        if not rows:
            continue
        late, early = (x[rows, :, :length] for x in layers)
        sides = torch.stack([x[[pairs[row] for row in rows], :, :length] for x in natural])
        own, others = (x[..., -window:, :].transpose(-3, -2).flatten(-2) for x in (late[None], sides))
        angles = principal_angles(own, others, min(ANGLES, *own.shape[-2:])).mean(dim=-1).rad2deg()  # [2, rows]
        trajectories = r_v_trajectory(late, early, window)
        for row, trajectory, to_target, to_source in zip(rows, trajectories.tolist(), *angles.tolist(), strict=True):
            found[row] = {"rv_forced_trajectory": trajectory, "angle_target": to_target, "angle_source": to_source}
    return found


def attention_request(batch: Batch, cache: KVCache) -> AttentionRequest | None:
    """What the batch's phase watches, on its trials' caches; None where it watches nothing."""
    if batch.watched is None:
        return None
    marked, spread = batch.watched.marked, torch.tensor(spread_trials(batch))
    if marked is None:
        return AttentionRequest(spread=spread)
    return AttentionRequest(slot_mask(cache, marked), beside=beside_mask(cache, marked), spread=spread)


def spread_trials(batch: Batch) -> list[bool]:
    """Which trials have their heads' attention on every slot stored (`by_slot`): the first sample of every condition in
    the phase's first pair. They follow from the plan, so that neither the machine nor a resumed run changes them."""
    return [trial.sample == 0 and batch.pairs[trial.pair].number == 0 for trial in batch.trials]


def attention_means(attention: Attention, cache: KVCache, to_capture: AttentionRequest) -> list[dict[str, float]]:
    """The attention columns of a trial row: means over layers and heads."""
    means = {column: attention[name].flatten(1).nanmean(dim=1) for column, name in MEANS.items()}
    body = cache.is_real & (cache.is_real.cumsum(dim=1) > SINKS) & (cache.segments == Segment.body)
    each = means["attention_marked_each"]  # not a number where nothing is marked
    means["attention_marked_beside"] = each / attention["mass_beside_each"].flatten(1).nanmean(dim=1)
    means["attention_marked_lift"] = each / (means["attention_body"] / body.sum(dim=1))
    if to_capture.marked is None:
        means |= dict.fromkeys(MARKED, torch.full_like(each, float("nan")))
    columns = [values.tolist() for values in means.values()]
    return [dict(zip(means, row, strict=True)) for row in zip(*columns, strict=True)]


def each_trial_s(stages: Mapping[str, Attention]) -> list[dict[str, Attention]]:
    """Statistics of every trial's heads by stage, on the host."""
    on_host = {stage: (found.values.cpu().split(1), found.queries.cpu().split(1)) for stage, found in stages.items()}
    count = len(next(iter(stages.values())).queries)
    spread = {stage: [of if of is None else of.cpu() for of in found.by_slot] for stage, found in stages.items()}
    return [
        {
            stage: Attention(values[row], queries[row], {}, by_slot=tuple(spread[stage][row : row + 1]))
            for stage, (values, queries) in on_host.items()
        }
        for row in range(count)
    ]


def attention_table(trial_ids: Sequence[str], stages: Mapping[str, Attention]) -> pa.Table:
    """One row a trial, stage, layer and head, with the columns of `store.columns.ATTENTION_COLUMNS`."""
    parts = []
    for stage, found in stages.items():
        batch, layers, heads, _ = found.values.shape
        flat = found.values.flatten(0, 2).cpu().numpy()
        each, layer, head = (axis.ravel() for axis in np.indices((batch, layers, heads)))
        columns = {
            "trial_id": np.array(trial_ids, dtype=object)[each],
            "stage": np.full(len(flat), stage, dtype=object),
            "layer": layer,
            "head": head,
            "queries": found.queries.cpu().numpy()[each],
            **{name: pa.array(flat[:, i], from_pandas=True) for i, name in enumerate(STATISTICS)},
            "by_slot": _by_slot(found, layers * heads),
        }
        parts.append(pa.table(columns).cast(ATTENTION_SCHEMA))
    return pa.concat_tables(parts)


def _by_slot(found: Attention, heads: int) -> pa.Array:
    """The column `by_slot`, `heads` entries a trial; numbers keep the eleven bits of float16, which pack well."""
    lines: list[np.ndarray | None] = []
    for of in found.by_slot or [None] * len(found.queries):
        lines += [None] * heads if of is None else list(of.flatten(0, 1).half().float().cpu().numpy())
    return pa.array(lines, pa.list_(pa.float32()))

"""Attention on every slot of the prompt: stored for one pair, and what whole maps give."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from kvpatch.engine.attention import AttentionRequest, Maps
from kvpatch.engine.score import score
from kvpatch.executors.batch import run_batch
from kvpatch.executors.groups import merged
from kvpatch.planning import plan as planner
from kvpatch.specs.attention import STAGES
from kvpatch.specs.patch import Patch
from small import CONDITIONS
from tiny import LAYERS

pytestmark = pytest.mark.model

NAMES = ("A", "B", "C", "N1")
HEADS = 4


def changes(samples: int = 2) -> dict[str, Any]:
    return {
        "conditions": {name: CONDITIONS[name] for name in NAMES},
        "phases": {"1": {"question": "?", "n": 3, "conditions": list(NAMES), "attention": True}},
        "readouts": {"r_v": {"window": 6}, "forced_tokens": 12, "likelihood_tokens": 6, "js_positions": 4},
        "generation": {"max_new_tokens": 10, "temperature": 0.7, "samples": samples},
        "hypotheses": [],
    }


def run(model, batch) -> tuple[dict[str, dict[str, Any]], dict[tuple[str, str], np.ndarray]]:
    """The rows by trial, and (trial, stage) -> [layers, heads, slots] of those that have attention by slot."""
    tables: list = []
    rows = {row["trial_id"]: row for row in run_batch(model, batch, on_attention=tables.append)}
    frame = tables[0].to_pandas()
    kept = frame[frame["by_slot"].notna()].sort_values(["layer", "head"])
    found = {key: np.stack(list(own["by_slot"])) for key, own in kept.groupby(["trial_id", "stage"])}
    return rows, {key: lines.reshape(LAYERS, HEADS, -1) for key, lines in found.items()}


def test_first_sample_of_every_condition_in_the_first_pair_has_it_and_no_other_trial(model, small_plan):
    batches = [batch for batch in small_plan(**changes()).batches if batch.watched]
    wanted, found = set(), set()
    for batch in batches:
        wanted |= {t.trial_id for t in batch.trials if t.sample == 0 and batch.pairs[t.pair].number == 0}
        found |= {trial for trial, _ in run(model, batch)[1]}
    assert len(wanted) == len(NAMES) and found == wanted


def test_it_has_an_entry_a_slot_and_with_what_was_generated_it_adds_to_1(model, small_plan):
    batch = next(batch for batch in small_plan(**changes()).batches if batch.watched)
    rows, found = run(model, batch)
    tables: list = []
    run_batch(model, batch, on_attention=tables.append)
    frame = tables[0].to_pandas().set_index(["trial_id", "stage", "layer", "head"]).sort_index()
    assert {stage for _, stage in found} == set(STAGES)
    for (trial, stage), of in found.items():
        assert of.shape[2] == len(rows[trial]["cache_token_ids"])
        rest = frame.loc[(trial, stage), "mass_generated"].to_numpy().reshape(LAYERS, HEADS)
        np.testing.assert_allclose(of.sum(axis=2) + rest, 1, atol=2e-3)


def test_it_is_the_mean_over_the_queries_of_whole_maps(model, small_plan):
    batch = next(batch for batch in small_plan(**changes()).batches if batch.watched)
    rows, found = run(model, batch)
    texts = batch.pairs[0].texts
    target = model.prefill([texts["target"]])
    caches = {"A": target, "C": Patch(align="replace").apply(model.prefill([texts["source"]]), target)}
    forced = model.continuation_ids(batch.pairs[0].forced)[:12]
    maps = Maps(layers=range(LAYERS))
    for trial, _ in found:
        row = rows[trial]
        if row["condition"] not in caches:
            continue
        cache = caches[row["condition"]]
        for stage, fed, keep in (("own", row["output_token_ids"], ()), ("forced", forced, (0,))):
            read = score(model.backbone, cache, [[fed]], keep_values=keep, to_capture=AttentionRequest(maps=maps))
            assert read.attention is not None
            whole = np.stack([read.attention.maps[layer][0].numpy() for layer in range(LAYERS)])
            expected = whole.mean(axis=2)[..., : cache.slots + 1]
            np.testing.assert_allclose(found[trial, stage], expected, atol=1e-4, rtol=2e-3)


def test_it_is_the_same_whatever_shares_the_batch(model, small_plan, monkeypatch):
    together = merged([batch for batch in small_plan(**changes(1)).batches if batch.watched])
    monkeypatch.setattr(planner, "ROWS_PER_BATCH", 1)
    alone = next(batch for batch in small_plan(**changes(1)).batches if batch.watched)
    assert len(alone.pairs) == 1 < len(together.pairs)
    one, other = run(model, alone)[1], run(model, together)[1]
    assert one.keys() == other.keys()
    for key, of in one.items():
        np.testing.assert_allclose(of, other[key], atol=1e-4)


def test_rows_of_other_lengths_in_a_pass_change_nothing(model):
    prompts = ["How long should soup cook?", "Describe how a sloop notes the wind at sea."]
    ids = model.continuation_ids("First heat the oil in a wide pan and wait for it")
    fed = [ids[:3], ids[:9]]

    def read(texts, continuations):
        asked = AttentionRequest(spread=torch.ones(len(texts), dtype=torch.bool))
        found = score(
            model.backbone, model.prefill(texts), [[ids] for ids in continuations], to_capture=asked
        ).attention
        assert found is not None
        return found.by_slot

    for row, of in enumerate(read(prompts, fed)):
        (alone,) = read(prompts[row : row + 1], fed[row : row + 1])
        assert of is not None and alone is not None
        torch.testing.assert_close(of, alone, atol=1e-5, rtol=1e-4)

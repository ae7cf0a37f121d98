"""Attention capture: every statistic is what the model's own eager attention gives, with or without a patched cache."""

from __future__ import annotations

import inspect
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from kvpatch import Patch, SlotQuery
from kvpatch.caches.kvcache import KVCache, Origin, Segment
from kvpatch.caches.selection import SINKS
from kvpatch.engine.attention import BLOCK_BYTES, AttentionCapture, AttentionRequest, Maps
from kvpatch.engine.decode import decode
from kvpatch.engine.prefill import prefill, prefill_with_attention
from kvpatch.engine.score import score
from kvpatch.errors import ProtocolError
from kvpatch.models.hf import LayerEdit
from kvpatch.models.template import EncodedPrompt
from kvpatch.specs.attention import DISTANCES, STATISTICS
from tiny import WINDOW, random_prompts

pytestmark = pytest.mark.model

ARCHITECTURES = ("llama", "gemma3", "qwen3", "gpt_neox")
NEW = 12


def prompts_of(lengths: Sequence[int], seed: int = 0) -> list[EncodedPrompt]:
    """Prompts with all segments and with tokens that come again."""
    out = []
    for prompt in random_prompts(lengths, seed):
        ids = [token % 40 + 10 for token in prompt.token_ids]
        n = len(ids)
        kinds = [Segment.bos, *[Segment.template] * 6, *[Segment.body] * (n - 11), *[Segment.trailer] * 4]
        out.append(EncodedPrompt(tuple(ids), tuple(int(k) for k in kinds), ("x",) * n))
    return out


def marks(cache: KVCache) -> Tensor:
    return (cache.token_ids % 3 == 0) & cache.is_real


def request_for(cache: KVCache) -> AttentionRequest:
    return AttentionRequest(marks(cache), beside=(cache.token_ids % 3 == 1) & cache.is_real)


# --- the slow way ---


def eager(model, ids: list[int], cache: KVCache | None = None) -> list[Tensor]:
    """The model's own attention, one [heads, queries, slots] a layer, over these tokens after a cache of one row."""
    hf, past, before = model.hf, DynamicCache(), 0
    argument = "cache" if "cache" in inspect.signature(hf.forward).parameters else "past_key_values"
    if cache is not None:
        before = cache.slots
        for layer, (k, v) in enumerate(zip(cache.keys, cache.values, strict=True)):
            past.update(k, v, layer)
    implementation = hf.config._attn_implementation
    hf.set_attn_implementation("eager")
    try:
        positions = torch.arange(before, before + len(ids))[None]
        if cache is not None:
            assert int(cache.pending_position) == before
        with torch.no_grad():
            out = hf(torch.tensor([ids]), position_ids=positions, output_attentions=True, **{argument: past})
    finally:
        hf.set_attn_implementation(implementation)
    return [a[0].double() for a in out.attentions]


def slow_statistics(p: np.ndarray, tokens: list[int], kinds: list[str], origins: list[str], chosen, window):
    """Statistic -> mean over queries, of the attention [queries, slots] of one head; loops over every query."""
    queries, slots = p.shape
    marked, beside = chosen
    found: dict[str, list[float]] = {name: [] for name in STATISTICS}
    for q in range(queries):
        own = slots - queries + q
        seen = [s for s in range(own + 1) if window is None or own - s < window]
        row = p[q]
        assert abs(row[seen].sum() - 1) < 1e-5
        if len(seen) > 1:
            found["entropy"].append(-sum(x * np.log(x) for x in row[seen] if x > 0) / np.log(len(seen)))
            found["previous_token"].append(row[own - 1])
        peak = int(row.argmax())
        found["peak_mass"].append(row[peak])
        found["peak_position"].append(peak)
        found["peak_distance"].append(own - peak)
        found["own_slot"].append(row[own])
        after = [s for s in seen if s > 0 and tokens[s - 1] == tokens[own]]
        if after:
            found["induction"].append(sum(row[s] for s in after))
        for kind in ("sinks", "template", "body", "trailer", "generated"):
            found[f"mass_{kind}"].append(sum(row[s] for s in seen if kinds[s] == kind))
        for origin in ("own", "patched"):
            found[f"mass_{origin}"].append(sum(row[s] for s in seen if origins[s] == origin and kinds[s] != "sinks"))
        found["mass_marked"].append(sum(row[s] for s in seen if marked[s] and kinds[s] != "sinks"))
        for name, chosen in (("mass_marked_each", marked), ("mass_beside_each", beside)):
            of = [s for s in range(slots) if chosen[s] and kinds[s] != "sinks"]
            found[name] += [sum(row[s] for s in of if s in seen) / len(of)] if of else []
        for low, high in zip(DISTANCES, [*DISTANCES[1:], 10**9], strict=True):
            found[f"distance_{low}"].append(sum(row[s] for s in seen if low <= own - s < high))
    return {name: float(np.mean(values)) if values else float("nan") for name, values in found.items()}


def slow(model, cache: KVCache, attention: list[Tensor], fed: list[int]) -> np.ndarray:
    """[layers, heads, statistics] of a row whose cache holds the prompt, and of tokens fed after it."""
    kinds = [
        "sinks" if s < SINKS else {0: "template", 1: "template", 2: "body", 3: "trailer"}[k]
        for s, k in enumerate(cache.segments[0].tolist())
    ]
    origins = ["own" if o == Origin.own else "patched" for o in cache.origins[0].tolist()]
    request = request_for(cache)
    marked, beside = request.marked[0].tolist(), request.beside[0].tolist()
    if fed:
        kinds += ["trailer", *["generated"] * (len(fed) - 1)]
        origins += ["own", *["none"] * (len(fed) - 1)]
        marked += [False] * len(fed)
        beside += [False] * len(fed)
    tokens = cache.token_ids[0].tolist() + fed
    windows = model.geometry.windows
    out = [
        [
            list(slow_statistics(head.numpy(), tokens, kinds, origins, (marked, beside), windows[layer]).values())
            for head in of_layer
        ]
        for layer, of_layer in enumerate(attention)
    ]
    return np.array(out)


def assert_equal(found: Tensor, expected: np.ndarray) -> None:
    assert found.shape == expected.shape
    off = np.abs(found.double().numpy() - expected)
    assert (np.isnan(found.numpy()) == np.isnan(expected)).all()
    worst = np.nan_to_num(off).reshape(-1, len(STATISTICS)).max(axis=0)
    assert dict(zip(STATISTICS, worst, strict=True)) == {name: pytest.approx(0, abs=1e-5) for name in STATISTICS}


def patched(model, align: str) -> KVCache:
    """Caches of two targets with another prompt put in; the rows differ in length."""
    target = prefill(model.backbone, prompts_of([31, 25], seed=1))
    source = prefill(model.backbone, prompts_of([35, 28], seed=2))
    if align == "replace":
        return Patch(align="replace").apply(source, target)
    return Patch(slots="body", align="stretch").apply(source, target)


# --- prefill ---


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_statistics_of_prompts_equal_eager_attention(architecture: str, tiny, monkeypatch):
    model = tiny(architecture)
    prompts = prompts_of([2 * WINDOW + 9, WINDOW + 3])
    natural = prefill(model.backbone, prompts)
    for block in (None, 700):  # and in blocks of a query or two
        if block:
            monkeypatch.setitem(BLOCK_BYTES, "cpu", block)
        cache, found = prefill_with_attention(model.backbone, prompts, request_for(natural))
        assert cache.checksums() == natural.checksums()
        for row, prompt in enumerate(prompts):
            ids = list(prompt.token_ids[:-1])
            assert int(found.queries[row]) == len(ids)
            assert_equal(found.values[row], slow(model, natural[row], eager(model, ids), []))


def test_a_prompt_of_one_token_or_none_is_refused(tiny):
    model = tiny("llama")
    for prompts in ([], random_prompts([1])):
        with pytest.raises(ProtocolError, match="prompts of 2 to 256 tokens can be watched"):
            prefill_with_attention(model.backbone, prompts, AttentionRequest())


# --- decode ---


@pytest.mark.parametrize("align", ["none", "replace", "stretch"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_statistics_of_decoding_equal_eager_attention(architecture: str, align: str, tiny):
    model = tiny(architecture)
    cache = prefill(model.backbone, prompts_of([31, 25])) if align == "none" else patched(model, align)
    settings = {"max_new_tokens": NEW, "temperature": 0.7, "seeds": [3, 4]}
    plain = decode(model.backbone, cache, **settings)
    # One row ends early; what its steps go on to do must not count.
    end = int(plain.token_ids[1, 4])
    written = decode(model.backbone, cache, **settings, end_tokens=[end], to_capture=request_for(cache))
    assert torch.equal(written.token_ids[0, : written.lengths[0]], plain.token_ids[0, : written.lengths[0]])
    assert written.lengths[1] <= 5
    assert written.attention is not None
    for row in range(2):
        own = cache[row]
        fed = [int(own.pending), *written.token_ids[row, : written.lengths[row] - 1].tolist()]
        assert int(written.attention.queries[row]) == len(fed)
        assert_equal(written.attention.values[row], slow(model, own, eager(model, fed, own), fed))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_forcing_a_text_shows_what_the_heads_did_while_it_was_written(architecture: str, tiny):
    """A run decodes unwatched and looks afterwards; steered, as when it wrote."""
    model = tiny(architecture)
    cache = patched(model, "replace")
    geometry = model.geometry
    steer = torch.linspace(-1, 1, 2 * geometry.kv_heads * geometry.head_dim).view(2, geometry.kv_heads, -1)
    settings = {"max_new_tokens": NEW, "temperature": 0.7, "seeds": [3, 4]}
    plain = decode(model.backbone, cache, **settings)
    end = int(plain.token_ids[1, 4])

    def edits(rows: slice = slice(None)) -> dict[int, LayerEdit]:
        return {1: LayerEdit(steer=steer[rows])}

    written = decode(model.backbone, cache, **settings, end_tokens=[end], to_capture=request_for(cache), edits=edits())
    texts = [row[:length].tolist() for row, length in zip(written.token_ids, written.lengths, strict=True)]
    forced = score(model.backbone, cache, [[text] for text in texts], to_capture=request_for(cache), edits=edits)
    assert written.attention is not None and forced.attention is not None
    assert torch.equal(forced.attention.queries, written.attention.queries)
    assert torch.allclose(forced.attention.values, written.attention.values, atol=1e-5, equal_nan=True)
    unsteered = score(model.backbone, cache, [[text] for text in texts], to_capture=request_for(cache))
    assert unsteered.attention is not None
    assert not torch.allclose(unsteered.attention.values, written.attention.values, atol=1e-5, equal_nan=True)


def test_nothing_is_watched_where_nothing_is_asked(tiny, monkeypatch):
    model = tiny("llama")
    monkeypatch.setattr(AttentionCapture, "observe", None)
    cache = prefill(model.backbone, prompts_of([20]))
    written = decode(model.backbone, cache, max_new_tokens=3, temperature=0, seeds=[0])
    assert written.attention is None
    assert score(model.backbone, cache, [[[5, 6]]]).attention is None


# --- forced ---


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_statistics_of_a_forced_continuation_equal_eager_attention(architecture: str, tiny, monkeypatch):
    """Beside other branches, which it does not see, and in passes of a row each."""
    model = tiny(architecture)
    cache = patched(model, "replace")
    forced = [[11, 12, 30, 11, 12, 31], [40, 41, 42]]
    wanted = [[row, [20, 21, 22], [23]] for row in forced]
    for rows in (2, 1):
        monkeypatch.setattr("kvpatch.engine.token_budget.TOKENS_AT_ONCE", {"cpu": 16 * rows})
        found = score(model.backbone, cache, wanted, keep_values=[0], to_capture=request_for(cache)).attention
        assert found is not None
        for row in range(2):
            own = cache[row]
            fed = [int(own.pending), *forced[row]]
            assert int(found.queries[row]) == len(fed)
            assert_equal(found.values[row], slow(model, own, eager(model, fed, own), fed))


# --- maps, on request ---


def test_maps_asked_for_are_the_model_s_own(tiny):
    model = tiny("gemma3")
    prompts = prompts_of([40])
    whole = eager(model, list(prompts[0].token_ids[:-1]))
    _, found = prefill_with_attention(model.backbone, prompts, AttentionRequest(maps=Maps([1, 2], [3, 0])))
    assert found.maps.keys() == {1, 2}
    for layer, kept in found.maps.items():
        assert kept.shape == (1, 2, 39, 39)
        assert torch.allclose(kept[0].double(), whole[layer][[3, 0]], atol=1e-5)
    cache = prefill(model.backbone, prompts)
    some = AttentionRequest(maps=Maps([2], [1], queries=[0, 3]))
    written = decode(model.backbone, cache, max_new_tokens=6, temperature=0, seeds=[0], to_capture=some)
    fed = [int(cache.pending), *written.token_ids[0, :5].tolist()]
    own = eager(model, fed, cache)[2][1]
    assert written.attention is not None
    kept = written.attention.maps[2]
    assert kept.shape == (1, 1, 2, 39 + 6)
    assert torch.allclose(kept[0, 0].double(), own[[0, 3]], atol=1e-5)


# --- what must hold of any head ---


def test_shares_add_to_1(tiny):
    model = tiny("llama")
    cache = patched(model, "stretch")
    written = decode(
        model.backbone, cache, max_new_tokens=8, temperature=0.7, seeds=[0, 1], to_capture=request_for(cache)
    )
    found = written.attention
    assert found is not None
    segments = sum(found[f"mass_{name}"] for name in ("sinks", "template", "body", "trailer", "generated"))
    origins = sum(found[f"mass_{name}"] for name in ("sinks", "own", "patched", "generated"))
    distances = found["own_slot"] + found["previous_token"] + sum(found[f"distance_{low}"] for low in DISTANCES)
    for total in (segments, origins, distances):
        assert torch.allclose(total, torch.ones_like(total), atol=1e-5)
    assert (found["mass_patched"] > 0).all()


def test_a_row_gives_the_same_whatever_its_batch(tiny):
    model = tiny("qwen3")
    cache = patched(model, "replace")
    settings = {"max_new_tokens": 8, "temperature": 0.7}
    together = decode(model.backbone, cache, **settings, seeds=[0, 1], to_capture=request_for(cache)).attention
    for row in range(2):
        own = cache[row]
        alone = decode(model.backbone, own, **settings, seeds=[row], to_capture=request_for(own)).attention
        assert together is not None and alone is not None
        assert torch.allclose(together.values[row], alone.values[0], atol=1e-5, equal_nan=True)


def test_an_empty_cache_is_watched_too(tiny):
    model = tiny("llama")
    cache = prefill(model.backbone, random_prompts([1, 4]))
    found = decode(
        model.backbone, cache, max_new_tokens=3, temperature=0, seeds=[0, 1], to_capture=AttentionRequest()
    ).attention
    assert found is not None and found.queries.tolist() == [3, 3]
    assert torch.isfinite(found["mass_generated"]).all()


# --- in a notebook ---


def test_model_gives_the_attention_of_prompts_and_of_what_it_writes(tiny):
    model = tiny("llama")
    prompts = ["Explain how bread rises.", "Watch how words arrive."]
    found = model.attention(prompts, marked=SlotQuery(of="body", keywords=[r"\bbread\b"]))
    assert found.values.shape == (2, 4, 4, len(STATISTICS))
    assert (found["mass_marked"][0] > 0).all() and (found["mass_marked"][1] == 0).all()
    cache = model.prefill(prompts)
    written = model.generate(cache, max_new_tokens=5, temperature=0, attention=Maps([1], [0]))
    plain = model.generate(cache, max_new_tokens=5, temperature=0)
    assert written.texts == plain.texts
    assert plain.attention is None
    assert written.attention is not None
    assert written.attention.maps[1].shape == (2, 1, len(written.token_ids[0]), cache.slots + len(written.token_ids[0]))
    assert model.generate(cache, max_new_tokens=5, temperature=0, attention=True).attention.maps == {}

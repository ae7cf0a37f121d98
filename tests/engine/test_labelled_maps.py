"""Attention maps with the tokens that they are about."""

from __future__ import annotations

import numpy as np
import pytest

import kvpatch as kv

pytestmark = pytest.mark.model
PROMPTS = ["Explain how bread rises in a warm oven.", "Watch this."]


def test_a_map_names_heads_slots_and_tokens_and_leaves_padding_out(tiny) -> None:
    model = tiny("llama")
    cache = model.prefill(PROMPTS)
    found = model.attention(PROMPTS, maps=kv.Maps(layers=[1], heads=[0, -1]))
    for row, tokens in enumerate(cache.pieces):
        one = found.map(1, row)
        assert one.dims == ("head", "query", "key") and one.shape == (2, len(tokens), len(tokens))
        assert one.coords["head"].values.tolist() == [0, model.geometry.query_heads - 1]
        assert tuple(one.coords["key_token"].values) == tuple(one.coords["query_token"].values) == tokens
        assert np.allclose(one.sum("key"), 1, atol=1e-5)
        raw = found.maps[1][row][:, -len(tokens) :, -len(tokens) :]
        assert np.allclose(one.values, raw.numpy())
    assert len(cache.pieces[0]) > len(cache.pieces[1])


def test_one_layer_may_be_a_number_and_heads_left_out_are_all(tiny) -> None:
    model = tiny("llama")
    every = range(model.geometry.query_heads)
    named = model.attention(PROMPTS, maps=kv.Maps(layers=[1], heads=every)).map(1)
    assert model.attention(PROMPTS, maps=kv.Maps(1)).map(1).identical(named)
    assert model.attention(PROMPTS, maps=kv.Maps(1, heads=2)).map(1).identical(named.sel(head=[2]))


def test_some_queries_keep_their_slots(tiny) -> None:
    model = tiny("llama")
    last = len(model.prefill(PROMPTS[0]).pieces[0]) - 1
    whole = model.attention(PROMPTS[0], maps=kv.Maps(layers=[0], heads=[1])).map(0)
    some = model.attention(PROMPTS[0], maps=kv.Maps(layers=[0], heads=[1], queries=[2, last])).map(0)
    assert some.coords["query"].values.tolist() == [2, last]
    assert np.allclose(some.sel(query=last), whole.sel(query=last))


def test_what_is_written_is_labelled_too(tiny) -> None:
    model = tiny("llama")
    cache = model.prefill(PROMPTS)
    out = model.generate(cache, max_new_tokens=3, temperature=0, stop=False, attention=kv.Maps(layers=[0], heads=[0]))
    assert out.attention is not None
    for row, pieces in enumerate(cache.pieces):
        one = out.attention.map(0, row)
        assert one.shape == (1, 3, len(pieces) + 3)  # the pending token and all but the last written are fed
        fed = [int(cache.pending[row]), *out.token_ids[row, :2].tolist()]
        assert one.coords["query_token"].values.tolist() == [model.tokenizer.decode([token]) for token in fed]
        assert np.allclose(one.sum("key"), 1, atol=1e-5)


def test_what_was_not_asked_for_is_told(tiny) -> None:
    model = tiny("llama")
    found = model.attention(PROMPTS, maps=kv.Maps(layers=[1], heads=[0]))
    with pytest.raises(kv.CacheError, match=r"layer 2 has no map: there are maps of layers \[1\]"):
        found.map(2)
    with pytest.raises(kv.CacheError, match="row 5 is not in a batch of 2"):
        found.map(1, 5)
    with pytest.raises(kv.CacheError, match="no map was asked for"):
        model.attention(PROMPTS).map(0)

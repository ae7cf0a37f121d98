"""Caches handed to transformers, taken from it, written to files and shown."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import kvpatch as kv
from kvpatch.caches.kvcache import PAD
from tiny import prompt_of, random_prompts

TEXT = "Watch yourself write this, and say how each of these words arrives in the long sentence."


def own_logits(model: kv.Model, cache: kv.KVCache) -> torch.Tensor:
    """transformers' logits of the pending token over a cache given as its own; [batch, vocabulary]."""
    mask = torch.cat([cache.is_real, torch.ones(cache.batch, 1, dtype=torch.bool)], dim=1).long()
    with torch.no_grad():
        out = model.hf(
            input_ids=cache.pending[:, None],
            **{model.backbone._cache_argument: cache.to_dynamic()},
            position_ids=cache.pending_position[:, None],
            attention_mask=mask,
        )
    return out.logits[:, -1]


@pytest.mark.parametrize("architecture", ["llama", "mistral", "gemma3", "gpt2"])
def test_transformers_goes_on_from_a_cache_as_from_the_text(tiny, architecture: str) -> None:
    model = tiny(architecture)
    cache = model.prefill([TEXT])
    assert cache.slots > 16 and isinstance(cache.to_dynamic(), DynamicCache)
    ids = torch.tensor([cache.row_token_ids(0)])
    with torch.no_grad():
        expected = model.hf(input_ids=ids, use_cache=False).logits[:, -1]
    torch.testing.assert_close(own_logits(model, cache), expected, rtol=0, atol=1e-4)


def test_rows_of_other_lengths_go_on_as_each_alone(tiny) -> None:
    model = tiny("llama")
    prompts = random_prompts([9, 20])
    both = own_logits(model, model.prefill(prompts))
    alone = torch.cat([own_logits(model, model.prefill([prompt])) for prompt in prompts])
    torch.testing.assert_close(both, alone, rtol=0, atol=1e-4)


def test_a_cache_comes_back_with_its_model_and_labels(tiny) -> None:
    model = tiny("llama")
    cache = model.prefill([TEXT, "Short."])
    back = kv.KVCache.from_dynamic(
        cache.to_dynamic(), positions=cache.positions, token_ids=cache.token_ids, pending=cache.pending
    )
    assert back.checksums() == cache.checksums() and back.pieces == cache.pieces and back.rope == cache.rope
    assert torch.equal(back.segments, cache.segments) and torch.equal(back.pending_position, cache.pending_position)
    assert model.generate(back, max_new_tokens=4).texts == model.generate(cache, max_new_tokens=4).texts


def test_a_cache_that_transformers_made_is_taken_with_its_model(tiny) -> None:
    model = tiny("llama")
    ids = torch.tensor([model.continuation_ids(TEXT)])
    with torch.no_grad():
        made = DynamicCache()
        model.hf(input_ids=ids[:, :-1], use_cache=True, **{model.backbone._cache_argument: made})
    labels = {"positions": range(ids.shape[1] - 1), "token_ids": ids[:, :-1], "pending": ids[:, -1]}
    taken = kv.KVCache.from_dynamic(made, **labels, model=model)
    assert "".join(taken.pieces[0]) in TEXT and taken.segments.unique().tolist() == [2]
    own = model.prefill([prompt_of(ids[0].tolist())])
    assert torch.equal(taken.positions, own.positions)
    torch.testing.assert_close(model.score(taken, ["a b"]), model.score(own, ["a b"]), rtol=0, atol=1e-4)
    unknown = kv.KVCache.from_dynamic(made, **labels)
    assert torch.equal(unknown.keys[0], taken.keys[0])
    with pytest.raises(kv.CacheError, match=r"from_dynamic\(\.\.\., model=model\)"):
        model.generate(unknown)
    with pytest.raises(kv.CacheError, match="does not say how its keys are turned"):
        kv.Patch(slots=[3]).apply(unknown, _moved(unknown))


def _moved(cache: kv.KVCache) -> kv.KVCache:
    from dataclasses import replace

    return replace(cache, positions=cache.positions + 5, pending_position=cache.pending_position + 5)


def test_labels_that_do_not_fit_are_told_in_one_line(tiny) -> None:
    cache = tiny("llama").prefill(["One two three."])
    good = {"positions": cache.positions, "token_ids": cache.token_ids, "pending": cache.pending}
    gaps = cache.positions.clone()
    gaps[0, -1] = PAD
    for changes, told in [
        ({"positions": cache.positions[:, 1:]}, r"positions must be \[batch, slots\]"),
        ({"token_ids": [1.5]}, "token_ids must be whole numbers"),
        ({"pending": [1, 2]}, "pending has 2 tokens"),
        ({"positions": gaps}, "pad rows on the left"),
        ({"segments": [9] * cache.slots}, "a segment is 0"),
    ]:
        with pytest.raises(kv.CacheError, match=told):
            kv.KVCache.from_dynamic(cache.to_dynamic(), **{**good, **changes})
    for wrong in (None, cache, DynamicCache()):
        with pytest.raises(kv.CacheError, match="DynamicCache"):
            kv.KVCache.from_dynamic(wrong, **good)


def test_a_cache_is_the_same_after_a_file(tiny, tmp_path: Path) -> None:
    model = tiny("llama")
    cache = kv.Patch(layers=[1], slots=[1, 2]).apply(model.prefill([TEXT])[[0]], model.prefill([TEXT, "Short one."]))
    cache.save(tmp_path / "c.safetensors")
    back = kv.KVCache.load(tmp_path / "c.safetensors", model=model)
    assert back.checksums() == cache.checksums() and repr(back) == repr(cache) and back.pieces == cache.pieces
    for name in ("positions", "token_ids", "segments", "origins", "pending", "pending_position"):
        assert torch.equal(getattr(back, name), getattr(cache, name)), name
    assert torch.equal(model.score(back, [" a"] * 2), model.score(cache, [" a"] * 2))
    assert kv.KVCache.load(tmp_path / "c.safetensors").model == cache.model


def test_the_cache_of_another_model_of_the_same_shape_is_refused(tiny, tmp_path: Path) -> None:
    from tiny import CHATML, tiny_hf, tiny_tokenizer

    tiny("llama").prefill([TEXT]).save(tmp_path / "c.safetensors")
    hf = tiny_hf("llama")
    hf.model.layers[0].mlp.up_proj.weight.data += 0.01
    with pytest.raises(kv.CacheError, match="cache of another model") as caught:
        kv.KVCache.load(tmp_path / "c.safetensors", model=kv.load(model=hf, tokenizer=tiny_tokenizer(CHATML)))
    assert "\n" not in str(caught.value)


def test_what_is_no_saved_cache_is_told_in_one_line(tiny, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    model = tiny("llama")
    whole = tmp_path / "c.safetensors"
    model.prefill([TEXT]).save(whole)
    content = whole.read_bytes()
    for name, made in {"cut": content[:-1000], "short": content[:5], "empty": b"", "text": b"hello" * 99}.items():
        (tmp_path / name).write_bytes(made)
        with pytest.raises(kv.CacheError, match="damaged, or no safetensors file") as caught:
            kv.KVCache.load(tmp_path / name, model=model)
        assert "\n" not in str(caught.value)
    save_file({"a": torch.zeros(2)}, tmp_path / "other")
    for path, told in [("other", "no cache that kvpatch saved"), ("none", "there is no file"), (".", "is no file")]:
        with pytest.raises(kv.CacheError, match=told):
            kv.KVCache.load(tmp_path / path, model=model)
    with pytest.raises(kv.CacheError, match="must be a kvpatch Model"):
        kv.KVCache.load(whole, model=model.hf)
    (tmp_path / "file").touch()
    with pytest.raises(kv.CacheError, match="can't be written"):
        model.prefill([TEXT]).save(tmp_path / "file" / "c.safetensors")


def test_a_cache_prints_short(tiny) -> None:
    cache = tiny("llama").prefill(["One two <b> three.", TEXT])
    assert repr(cache).count("\n") == 0 and f"slots={list(cache.row_lengths)}, dtype" in repr(cache)
    assert f"slots={cache.slots}, dtype" in repr(cache[[1]])
    assert repr(cache.keys) == f"<4 layers of [2, 2, {cache.slots}, 16] float32>" and len(cache.keys) == 4
    assert isinstance(cache.keys, tuple) and torch.stack(cache.keys).shape[0] == 4
    shown = cache._repr_html_()
    assert "Watch" in shown and "<b>" not in shown and len(shown) < 30_000


def test_a_saved_cache_that_was_changed_is_refused_whatever_was_changed(tiny, tmp_path: Path) -> None:
    import json

    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    model = tiny("llama")
    whole = model.prefill([TEXT, "Short one."]).save(tmp_path / "c.safetensors")
    with safe_open(whole, framework="pt") as file:
        note = json.loads(file.metadata()["kvpatch"])
    tensors, changed = load_file(whole), tmp_path / "changed"
    for name in sorted(tensors):
        other = tensors[name].clone()
        other.view(-1)[-1] += 1
        save_file({**tensors, name: other}, changed, {"kvpatch": json.dumps(note)})
        with pytest.raises(kv.CacheError, match="its SHA-256 is not"):
            kv.KVCache.load(changed, model=model)
    for key, value in {"pieces": [["a"], ["b"]], "rope": [*note["rope"][::-1], ["none", []]], "layers": 3}.items():
        save_file(tensors, changed, {"kvpatch": json.dumps({**note, key: value})})
        with pytest.raises(kv.CacheError, match="is damaged"):
            kv.KVCache.load(changed)
    for key in note.keys() - {"sha256", "format"}:
        for value in (None, -1, 10**9, "x", [[]], {}, [["x", [1.0]]]):
            save_file(tensors, changed, {"kvpatch": json.dumps({**note, key: value})})
            with pytest.raises(kv.CacheError, match=r"is damaged|holds a cache of another model"):
                kv.KVCache.load(changed, model=model)
    save_file(tensors, changed, {"kvpatch": "[" * 100_000})
    with pytest.raises(kv.CacheError, match="holds no cache that kvpatch saved"):
        kv.KVCache.load(changed)


@pytest.mark.parametrize("path", [None, 3, b"x", "~no-such-user-here/x", "x" * 5_000, "a\x00b", object()])
def test_what_is_no_path_is_told_in_one_line(tiny, path: Any) -> None:
    for call in (kv.KVCache.load, tiny("llama").prefill([TEXT]).save):
        with pytest.raises(kv.CacheError):
            call(path)


def test_cache_is_not_written_in_the_place_of_a_device_or_a_pipe(tiny, tmp_path: Path) -> None:
    cache = tiny("llama").prefill([TEXT])
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "null").symlink_to("/dev/null")
    for name in ("pipe", "null"):
        with pytest.raises(kv.CacheError, match=f"can't be written: {name} is no regular file"):
            cache.save(tmp_path / name)
    assert (tmp_path / "pipe").is_fifo() and (tmp_path / "null").is_char_device()
    assert len(list(tmp_path.iterdir())) == 2

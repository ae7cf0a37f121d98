"""SmolLM2-135M-Instruct: the README's example as written, and the identities on a real model and real words."""

from __future__ import annotations

import pytest
import torch

import kvpatch as kv
from kvpatch.checks.identities import next_logits
from kvpatch.models.probe import native_greedy, native_logits
from kvpatch.models.template import EncodedPrompt

pytestmark = pytest.mark.model
SOURCE = "Watch yourself write this."
TARGET = "Explain how bread rises."


@pytest.fixture(scope="module")
def model() -> kv.Model:
    return kv.load("smollm2-135m", device="cpu")


def cut(prompt: EncodedPrompt, length: int) -> EncodedPrompt:
    """A prompt cut to so many tokens, the last one kept."""
    keep = [*range(length - 1), len(prompt.token_ids) - 1]
    return EncodedPrompt(*(tuple(part[i] for i in keep) for part in (prompt.token_ids, prompt.segments, prompt.pieces)))


@pytest.fixture(scope="module")
def pair(model: kv.Model) -> tuple[kv.KVCache, kv.KVCache]:
    """Source and target, equally long, made in one pass."""
    prompts = [model.encode(text) for text in (SOURCE, TARGET)]
    length = min(len(prompt.token_ids) for prompt in prompts)
    cache = model.prefill([cut(prompt, length) for prompt in prompts])
    return cache[0], cache[1]


def off(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


# --- the example of the README ---


def test_the_example_runs_as_written(model: kv.Model):
    source = model.prefill(["Watch yourself write this."])
    target = model.prefill(["Explain how bread rises."])
    before = source.checksums() + target.checksums()

    patch = kv.Patch(layers=range(16, 30), slots="body", parts="kv", align="end")
    mixed = patch.apply(source, target)
    out = model.generate(mixed, max_new_tokens=64, temperature=0.7, seeds=[0])
    logprobs = model.score(mixed, [" The yeast"])

    assert (source.batch, target.batch, mixed.batch) == (1, 1, 1)
    assert len(out.texts) == 1
    assert isinstance(out.texts[0], str)
    assert out.texts[0]
    assert out.token_ids.shape == out.logprobs.shape
    assert out.token_ids.shape[1] <= 64
    assert (out.logprobs <= 0).all()
    assert logprobs.shape == (1, len(model.tokenizer(" The yeast")["input_ids"]))
    assert (logprobs < 0).all()
    assert source.checksums() + target.checksums() == before
    assert mixed.checksums() != target.checksums()

    assert kv.participation_ratio(source.values[24]).shape == (1, 3)
    assert kv.r_v(source, early=4, late=24, window=16).shape == (1,)


def test_its_geometry_is_that_of_the_model_card(model: kv.Model):
    g = model.geometry
    assert (g.architecture, g.layers, g.query_heads, g.kv_heads, g.head_dim) == ("LlamaForCausalLM", 30, 9, 3, 64)
    assert (g.context, g.vocabulary, g.windows) == (8192, 49152, (None,) * 30)
    assert {(rope.layout, rope.rotary_dim) for rope in g.rope} == {("half", 64)}


def test_its_chat_template_is_cut_into_segments(model: kv.Model):
    prompt = model.encode(TARGET)
    parts = ["", "", "", ""]
    for piece, segment in zip(prompt.pieces, prompt.segments, strict=True):
        parts[segment] += piece
    messages = [{"role": "user", "content": TARGET}]
    rendered = model.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert "".join(parts) == rendered
    assert parts[0] == "<|im_start|>"
    assert parts[1].startswith("system\n")
    assert parts[1].endswith("<|im_start|>user\n")
    assert parts[2:] == [TARGET, "<|im_end|>\n<|im_start|>assistant\n"]


# --- identities ---


def test_a_full_swap_equals_the_sources_text(model: kv.Model, pair):
    source, target = pair
    swapped = kv.Patch(align="replace").apply(source, target)
    ids = [*source.row_token_ids(0, with_pending=False), int(target.pending[0])]
    native = native_logits(model.hf, torch.tensor([ids]))[:, -1]
    assert off(next_logits(model, swapped), native) < 1e-5
    out = model.generate(swapped, max_new_tokens=8, temperature=0)
    assert out.token_ids[0].tolist() == native_greedy(model.hf, ids, 8)[: out.token_ids.shape[1]]


def test_joint_shuffle_of_keys_and_values_changes_nothing_and_the_controls_do(model: kv.Model, pair):
    source, target = pair
    donors = ["source", "shuffle_jointly", "shuffle_values", "shuffle_rerotate"]
    conditions = [kv.Patch(align="replace", donor=donor).apply(source, target, seed=1) for donor in donors]
    batch = kv.KVCache.concat(conditions)
    logits = next_logits(model, batch)
    assert off(logits[1], logits[0]) < 1e-5
    assert off(logits[2], logits[0]) > 0.02
    assert off(logits[3], logits[0]) > 0.02
    texts = model.generate(batch, max_new_tokens=16, temperature=0.7, seeds=[0] * 4).texts
    assert texts[1] == texts[0]
    assert texts[2] != texts[0]
    assert texts[3] != texts[0]


def test_rows_of_a_batch_write_what_they_write_alone(model: kv.Model):
    prompts = [TARGET, "Name three rivers of France, and say where each of them meets the sea.", SOURCE]
    together = model.generate(model.prefill(prompts), max_new_tokens=12, temperature=0.7, seeds=[5, 6, 7])
    for row, prompt in enumerate(prompts):
        alone = model.generate(model.prefill([prompt]), max_new_tokens=12, temperature=0.7, seeds=[5 + row])
        assert together.texts[row] == alone.texts[0]


def test_score_equals_transformers_log_softmax(model: kv.Model):
    cache = model.prefill([TARGET])
    continuations = [" The yeast", "Bread rises because yeast makes gas."]
    out = model.score(cache, continuations)
    for row, text in enumerate(continuations):
        new = model.tokenizer(text)["input_ids"]
        ids = torch.tensor([[*cache.row_token_ids(0), *new]])
        expected = native_logits(model.hf, ids)[0, -len(new) - 1 : -1].log_softmax(-1)
        expected = expected.gather(1, torch.tensor(new)[:, None])[:, 0]
        assert out[row, : len(new)].tolist() == pytest.approx(expected.tolist(), rel=1e-4, abs=1e-4)

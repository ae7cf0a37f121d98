"""At load, logits are compared with transformers' own on both sides of every limit; who differs is refused there."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import kvpatch as kv
import kvpatch.models.second_opinion as room
import tiny
from broken import attention_to_padding, attention_with_a_window_one_too_long, attention_without_window
from kvpatch.checks.identities import check
from kvpatch.errors import ModelError
from kvpatch.models.backbone import Backbone
from kvpatch.models.limits import lengths_around, named_limits
from kvpatch.models.second_opinion import Opinion, compare, lengths_to_compare, of_engine, of_model, second_opinion
from tiny import ARCHITECTURES, VOCABULARY, WINDOW, tiny_hf, tiny_tokenizer

pytestmark = pytest.mark.model

tiny_of = functools.partial(tiny.tiny_of, num_hidden_layers=2)
ROUTED = {"num_local_experts": 4, "num_experts_per_tok": 2}


def saved(hf, where: Path) -> Path:
    hf.save_pretrained(where)
    tiny_tokenizer().save_pretrained(where)
    return where


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A store of the test's own; grows by an entry with every comparison that is made."""
    monkeypatch.setenv("KVPATCH_CACHE", str(tmp_path / "cache"))
    seen: list[str] = []

    def counted(backbone: Backbone, work: float = 1.0) -> Opinion:
        seen.append(backbone.geometry.architecture)
        return compare(backbone, work)

    monkeypatch.setattr(room, "compare", counted)
    return seen


# --- which lengths ---


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_tiny_architecture_agrees(architecture: str, tiny):
    found = compare(tiny(architecture).backbone)
    assert found.holds
    assert found.error < 1e-5


def test_lengths_lie_on_both_sides_of_every_limit():
    assert lengths_around([], 1000) == [9, 33]
    assert lengths_around([16, 500], 1000) == [9, 16, 24, 33, 500, 508]
    assert lengths_around([16, 500], 503) == [9, 16, 24, 33, 500, 503]
    assert lengths_around([], 20) == [9, 20]


@pytest.mark.parametrize(
    ("setting", "name"),
    [
        ({"sliding_window": 40}, "sliding_window"),
        ({"attention_chunk_size": 40}, "attention_chunk_size"),
        ({"attention_window_size": 40}, "attention_window_size"),
        ({"max_window_layers": 40}, "max_window_layers"),
        ({"index_topk": 40}, "index_topk"),
        ({"rope_parameters": {"full_attention": {"original_max_position_embeddings": 40}}}, "original"),
    ],
)
def test_limits_are_found_wherever_the_configuration_names_them(setting: dict[str, Any], name: str):
    config = transformers.PreTrainedConfig(**setting)
    found = named_limits(config, 1000)
    assert name in found[40]
    assert named_limits(config, 40) == {}


def test_counts_of_layers_and_experts_are_no_limits():
    assert named_limits(transformers.PreTrainedConfig(num_local_experts=8, sliding_window_pattern=6), 1000) == {}


def test_the_window_of_the_masks_is_a_limit_whatever_its_name(tiny):
    backbone = tiny("mistral").backbone
    assert lengths_to_compare(backbone)[0] == [9, WINDOW, WINDOW + 8, 33]


def test_limits_too_long_to_reach_are_left_out_and_said():
    hf = tiny_of("MistralConfig", sliding_window=4096, max_position_embeddings=131_072)
    backbone = Backbone(hf)
    assert lengths_to_compare(backbone)[0] == [9, 33, 4096, 4104]
    lengths, left_out = lengths_to_compare(backbone, work=1e-3)
    assert (lengths, left_out) == ([9, 33], (4096,))
    assert compare(backbone, work=1e-3).note == "prompts of 9 to 33 tokens, not past 4096: too long"


# --- what is compared ---


def test_the_engine_runs_an_unequal_batch_in_pieces_and_gives_each_row_as_alone(tiny, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(room, "PIECE", 10)
    backbone = tiny("gemma3").backbone
    rows = [room._tokens(backbone, length, 0) for length in (7, 45, 20)]
    for found, row in zip(of_engine(backbone, rows), rows, strict=True):
        assert found.shape == (min(len(row), 16), VOCABULARY)
        assert room._off(found, of_model(backbone, row)) < 1e-5


def test_tokens_are_distinct_and_the_same_every_time(tiny):
    backbone = tiny("llama").backbone
    tokens = room._tokens(backbone, 300, 1)
    assert len(set(tokens.tolist())) == 300
    assert torch.equal(tokens, room._tokens(backbone, 300, 1))
    assert not torch.equal(tokens, room._tokens(backbone, 300, 2))
    assert len(room._tokens(backbone, VOCABULARY + 5, 0)) == VOCABULARY + 5


def test_nothing_that_is_no_number_passes():
    assert room._off(torch.tensor([float("nan"), 1.0]), torch.tensor([1.0, 1.0])) == float("inf")


# --- who differs is refused by load ---

Break = Callable[[pytest.MonkeyPatch], None]


@pytest.mark.parametrize(
    ("kind", "settings", "fault", "tokens"),
    [
        ("MistralConfig", {"sliding_window": 16}, attention_without_window, "24|33"),
        ("MistralConfig", {"sliding_window": 60}, attention_without_window, "68"),
        ("MistralConfig", {"sliding_window": 60}, attention_with_a_window_one_too_long, "68"),
        ("PhimoeConfig", {"sliding_window": 60, **ROUTED}, attention_without_window, "68"),
        ("LlamaConfig", {}, attention_to_padding, "9"),
    ],
)
def test_load_refuses_a_model_that_differs_and_names_it_the_length_and_the_difference(
    kind: str, settings: dict[str, Any], fault: Break, tokens: str, asked, tmp_path: Path, monkeypatch
):
    where = saved(tiny_of(kind, **settings), tmp_path / "model")
    fault(monkeypatch)
    for _ in range(2):  # a difference is not remembered as agreement
        with pytest.raises(ModelError) as refusal:
            kv.load(where, device="cpu")
        name = kind.replace("Config", "ForCausalLM")
        message = str(refusal.value)
        assert message.startswith(f"{name}: with ")
        assert message.split(" tokens")[0].removeprefix(f"{name}: with ") in tokens.split("|")
        assert "of the largest logit" in message
        assert "\n" not in message


@pytest.mark.parametrize(
    ("kind", "settings", "reason"),
    [
        (
            "BartConfig",
            {"d_model": 48, "decoder_layers": 2, "decoder_attention_heads": 4, "is_decoder": True},
            "takes no positions",
        ),
        ("DogeConfig", {}, "a mask of its own"),
        ("Gemma3TextConfig", {"head_dim": 12, "use_bidirectional_attention": True}, "later ones"),
    ],
)
# transformers' wrapper around BART's decoder still takes the cache's old name.
@pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated:FutureWarning")
def test_models_that_do_otherwise_are_refused_by_load(kind: str, settings, reason: str, asked, tmp_path: Path):
    where = saved(tiny_of(kind, **settings), tmp_path / "model")
    with pytest.raises(ModelError, match=reason):
        kv.load(where, device="cpu")


def test_a_token_that_rounding_sends_to_another_expert_is_no_difference(monkeypatch: pytest.MonkeyPatch):
    backbone = Backbone(tiny_of("MixtralConfig", sliding_window=None, **ROUTED))
    given = {0: [0.3, 0.0], 1: [1e-7, 0.2], 2: [1e-7, 1e-7]}
    monkeypatch.setattr(room, "_errors", lambda backbone, lengths, seed: given[seed])
    assert compare(backbone).error == 1e-7
    given[1] = given[2] = given[0]
    assert compare(backbone).error == 0.3


def test_a_model_without_experts_has_one_prompt_only(tiny, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(room, "_errors", lambda backbone, lengths, seed: [0.3 if seed == 0 else 0.0] * len(lengths))
    assert not compare(tiny("llama").backbone).holds


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt2"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_in_other_types_the_bound_follows_the_noise(architecture: str, dtype: str, tiny_dirs):
    opinion = kv.load(tiny_dirs(architecture), device="cpu", dtype=dtype).opinion
    assert opinion is not None
    assert opinion.holds
    assert 10 * torch.finfo(getattr(torch, dtype)).eps / 2 <= opinion.bound < 0.3


def test_a_dropped_window_shows_in_bfloat16(tiny_dirs, asked, monkeypatch: pytest.MonkeyPatch):
    attention_without_window(monkeypatch)
    with pytest.raises(ModelError, match=r"MistralForCausalLM: with .* tokens kvpatch's logits differ"):
        kv.load(tiny_dirs("mistral"), device="cpu", dtype="bfloat16")


# --- asked once ---


def test_a_model_is_asked_once(asked, tmp_path: Path):
    where = saved(tiny_hf("mistral"), tmp_path / "model")
    first = kv.load(where, device="cpu").opinion
    assert asked == ["MistralForCausalLM"]
    assert kv.load(where, device="cpu").opinion == first
    assert asked == ["MistralForCausalLM"]


def test_the_same_model_elsewhere_is_not_asked_again(asked, tmp_path: Path):
    for place in ("here", "there"):
        kv.load(saved(tiny_hf("llama"), tmp_path / place), device="cpu")
    assert len(asked) == 1


def change_weights(where: Path) -> None:
    hf = tiny_hf("mistral")
    hf.lm_head.weight.data *= 2
    hf.save_pretrained(where)


def change_config(where: Path) -> None:
    config = json.loads((where / "config.json").read_text())
    (where / "config.json").write_text(json.dumps({**config, "sliding_window": 20}))


@pytest.mark.parametrize("change", [change_weights, change_config])
@pytest.mark.parametrize("limit", [0, 1 << 26])
def test_it_is_asked_again_when_weights_or_settings_change(change, limit: int, asked, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(room, "SMALL_ENOUGH_TO_HASH", limit)
    where = saved(tiny_hf("mistral"), tmp_path / "model")
    kv.load(where, device="cpu")
    change(where)
    kv.load(where, device="cpu")
    assert len(asked) == 2


def test_it_is_asked_again_in_another_type_and_by_another_version(asked, tmp_path: Path, monkeypatch):
    where = saved(tiny_hf("llama"), tmp_path / "model")
    kv.load(where, device="cpu")
    kv.load(where, device="cpu", dtype="bfloat16")
    assert len(asked) == 2
    monkeypatch.setattr(room, "version", lambda name: "0")
    kv.load(where, device="cpu")
    assert len(asked) == 3


def test_the_answer_about_a_converted_model_lies_beside_its_weights(asked, tmp_path: Path):
    where = saved(tiny_hf("llama"), tmp_path / "model")
    model = kv.load(where, device="cpu")
    found = second_opinion(model.backbone, replace(model.loaded, is_converted=True))
    assert (where / "second_opinion.json").exists()
    assert second_opinion(model.backbone, replace(model.loaded, is_converted=True)) == found
    assert len(asked) == 2


def test_a_damaged_answer_is_asked_for_again(asked, tmp_path: Path):
    where = saved(tiny_hf("llama"), tmp_path / "model")
    kv.load(where, device="cpu")
    (kept,) = (tmp_path / "cache" / "opinions").glob("*.json")
    for damaged in ("{", "[]", "[" * 100_000, json.dumps({key: {"error": 0} for key in json.loads(kept.read_text())})):
        kept.write_text(damaged)
        kv.load(where, device="cpu")
    assert len(asked) == 5


def test_a_store_that_can_not_be_written_stops_nothing(asked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("KVPATCH_CACHE", str(tmp_path / "file"))
    assert kv.load(saved(tiny_hf("llama"), tmp_path / "model"), device="cpu").opinion is not None


# --- check reaches as far ---


def test_check_goes_past_every_limit_and_says_how_far(tmp_path: Path):
    hf = tiny_of("PhimoeConfig", sliding_window=70, **ROUTED)
    first = check(kv.load(saved(hf, tmp_path), device="cpu"))[0]
    assert first.holds
    assert first.note == "prompts of 9 to 78 tokens; past the window of 70"


# --- the reference itself ---


def test_a_default_attention_that_drops_the_cap_on_scores_is_not_the_reference() -> None:
    """As transformers' own did for Gemma 2 up to 5.20: kvpatch caps, and so does the attention that the file writes."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    def forgetful(*given: Any, softcap: float | None = None, **settings: Any) -> Any:
        return sdpa_attention_forward(*given, **settings)

    AttentionInterface.register("forgets_the_cap", forgetful)
    AttentionMaskInterface.register("forgets_the_cap", sdpa_mask)
    hf: Any = tiny_of("Gemma2Config", attn_logit_softcapping=0.05, query_pre_attn_scalar=1)
    hf.config._attn_implementation = "forgets_the_cap"
    model = kv.load(model=hf, tokenizer=tiny_tokenizer())
    row = torch.arange(40)
    plain = hf(input_ids=row[None], use_cache=False)[0][0, -16:]
    capped = of_model(model.backbone, row)
    assert float((plain - capped).abs().max() / capped.abs().max()) > 1e-3
    assert hf.config._attn_implementation == "forgets_the_cap"
    assert [i.identity for i in check(model) if i.holds is False] == []


def test_in_float32_a_bound_follows_the_model_s_own_two_ways_to_attend_and_no_more(monkeypatch: pytest.MonkeyPatch):
    import kvpatch.checks.identities as identities

    model = kv.load(model=tiny_hf("llama"), tokenizer=tiny_tokenizer())
    assert 0 < room.own_attentions_differ(model.backbone, 33) < 1e-5

    def bound_with(own: float) -> float:
        monkeypatch.setattr(identities, "own_attentions_differ", lambda *_: own)
        return next(i.bound for i in check(model) if i.identity.startswith("own forward pass"))

    assert [bound_with(own) for own in (1e-7, 1e-5, 1e-2)] == pytest.approx([1e-5, 3e-5, 1e-4])

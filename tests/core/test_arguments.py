"""What a notebook may pass: Python's, NumPy's and torch's numbers alike; what can't be meant is refused in one line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from core_caches import make_cache
from kvpatch.caches.kvcache import KVCache
from kvpatch.errors import CacheError, KvpatchError, ProtocolError
from kvpatch.models.template import EncodedPrompt
from kvpatch.protocols.schema import Generation
from kvpatch.readouts.geometry import cache_ratios, participation_ratio, r_v
from kvpatch.specs.arguments import LEAST_TEMPERATURE
from kvpatch.specs.interventions import CacheSteering, ValueSteering
from kvpatch.specs.patch import Patch
from kvpatch.specs.selectors import LayerAt, LayerBand, SlotQuery

NAN, INF = float("nan"), float("inf")


def refused(call: Callable[[], object], words: str = "") -> None:
    with pytest.raises(KvpatchError, match=words or None) as caught:
        call()
    assert isinstance(caught.value, ValueError)
    assert len(str(caught.value).splitlines()) == 1


# --- rows of a cache ---


@pytest.mark.parametrize("kind", [list, tuple, np.array, torch.tensor])
def test_booleans_are_a_mask_of_rows(kind: Callable[[Any], Any]):
    cache = make_cache((4, 5, 6))
    for mask in ([True, False, False], [False, True, True], [True, True, True]):
        expected = cache[[row for row, is_on in enumerate(mask) if is_on]]
        assert cache[kind(mask)].checksums() == expected.checksums()
    for wrong in ([True, False], [True] * 4, [False] * 3):
        refused(lambda wrong=wrong: cache[kind(wrong)])


@pytest.mark.parametrize("kind", [list, tuple, np.array, torch.tensor])
def test_whole_numbers_are_rows(kind: Callable[[Any], Any]):
    cache = make_cache((4, 5, 6))
    assert cache[kind([2, -3, 2])].row_lengths == (6, 4, 6)
    refused(lambda: cache[kind([0, 3])], r"rows \[0, 3\] are not in a batch of 3")
    refused(lambda: cache[kind([0.0, 1.0])], "rows must be whole numbers")


@pytest.mark.parametrize("one", [1, np.int64(1), np.array(1), torch.tensor(1), -2])
def test_one_number_is_one_row(one: Any):
    assert make_cache((4, 5, 6))[one].row_lengths == (5,)


@pytest.mark.parametrize(
    "wrong", [True, np.bool_(True), torch.tensor(True), 1.0, "0", None, [True, 1], [[0, 1]], {0: 1}]
)
def test_what_is_no_row_is_refused(wrong: Any):
    refused(lambda: make_cache((4, 5, 6))[wrong])


# --- patches ---


@pytest.mark.parametrize("key", ["layers", "kv_heads", "slots"])
def test_indices_may_be_of_any_kind(key: str):
    def found(value: Any) -> Any:
        return getattr(Patch(**{key: value}), key)

    for value in ([1, 2], (1, 2), range(1, 3), np.array([1, 2]), torch.tensor([1, 2]), slice(1, 3), [np.int64(1), 2]):
        assert found(value) == [1, 2]
        assert all(type(index) is int for index in found(value))
    assert found(3) == found(np.int32(3)) == found(torch.tensor(3)) == [3]
    assert found(slice(-2, None)) == [-2, -1]
    assert found("all") == found(slice(None)) == ("all" if key == "slots" else None)
    assert Patch(**{key: np.array([1, 2])}).sha256 == Patch(**{key: [1, 2]}).sha256


@pytest.mark.parametrize("key", ["layers", "kv_heads", "slots"])
@pytest.mark.parametrize(
    "wrong",
    [[True, False], np.array([True]), torch.tensor([False]), True, [1.0], np.array([0.5]), ["1"], 1.5, [None], [[1]],
     b"1", "some", slice(3, None, 0), slice(None, -1.5), slice(0, 4, -1), slice("a", None)],
    ids=str,
)  # fmt: skip
def test_indices_that_can_t_be_meant_are_refused_by_name(key: str, wrong: Any):
    refused(lambda: Patch(**{key: wrong}), key)


@pytest.mark.parametrize("wrong", [NAN, INF, -INF, True, "1", None, [1], 1j, np.nan, torch.tensor(NAN)], ids=str)
def test_strengths_are_finite_numbers(wrong: Any):
    refused(lambda: Patch(strength=wrong), "strength must be a finite number")
    refused(lambda: CacheSteering(strength=wrong), "strength must be a finite number")
    refused(lambda: ValueSteering(layers=None, alpha=wrong), "alpha must be a finite number")


@pytest.mark.parametrize("half", [0.5, np.float32(0.5), np.float64(0.5), torch.tensor(0.5)])
def test_strengths_may_be_of_any_kind(half: Any):
    assert Patch(strength=half) == Patch(strength=0.5)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Patch(layer=[1]), "there is no 'layer'; it has layers, kv_heads"),  # type: ignore[call-arg]
        (lambda: Patch(slots={"off": "body"}), "there is no 'slots.off'"),
        (lambda: Patch(slots={"fraction": (0.5, 0.1)}), "fraction must be two numbers"),
        (lambda: Patch(slots={"of": "nowhere"}), "slots.of: Input should be 'all'.*, not 'nowhere'"),
        (lambda: Patch(layers={"depth": 2}), "layers.depth: .*must be at most 1, not 2"),
        (lambda: Patch(layers={"band": (0.5, 0.5)}), "band must be two fractions"),
        (lambda: Patch(align="middle"), "align: .*not 'middle'"),  # type: ignore[arg-type]
        (lambda: SlotQuery(keywords=["(open"]), r"keyword '\(open' is not a regular expression"),
        (lambda: SlotQuery(keywords="self"), "keywords: .*list, not 'self'"),  # type: ignore[arg-type]
        (lambda: LayerBand(band=(0, NAN)), "band must be two fractions"),
        (lambda: LayerAt(depth=NAN), "depth"),
        (lambda: ValueSteering(alpha=1), "'layers' is missing"),  # type: ignore[call-arg]
    ],
)
def test_what_is_wrong_with_a_selection_is_told_in_one_line(make: Callable[[], object], words: str):
    refused(make, words)


@pytest.mark.parametrize("seed", [np.int64(3), torch.tensor(3), [3, 3], np.array([3, 3]), torch.tensor([3, 3])])
def test_seeds_of_a_patch_may_be_of_any_kind(seed: Any):
    source, target = make_cache((5, 6), seed=1), make_cache((4, 7), seed=2)
    patch = Patch(donor="gaussian_isotropic")
    assert patch.apply(source, target, seed=seed).checksums() == patch.apply(source, target, seed=3).checksums()


@pytest.mark.parametrize("seed", [1.0, True, "1", None, [1], [1, 2.0], [1, True], np.array([1.0, 2.0])], ids=str)
def test_what_is_no_seed_of_a_patch_is_refused(seed: Any):
    cache = make_cache((5, 6), seed=1)
    refused(lambda: Patch().apply(cache, cache, seed=seed), "seed")


def test_a_patch_is_of_caches():
    cache: Any = make_cache((5,))
    refused(lambda: Patch().apply([cache], cache), "source must be a KVCache, got list")
    refused(lambda: Patch().apply(cache, "target"), "target must be a KVCache, got str 'target'")
    refused(lambda: Patch(donor="mean").apply(cache, cache, reference=[cache]), "reference must be a KVCache")


# --- geometry ---


@pytest.mark.parametrize("wrong", ["text", None, [1.0], 1.0, torch.tensor([[True]]), torch.ones(2, 2) * 1j, object()])
def test_a_participation_ratio_is_of_windows_of_real_numbers(wrong: Any):
    refused(lambda: participation_ratio(wrong))


def test_a_participation_ratio_of_an_array_is_that_of_its_tensor():
    window = np.random.default_rng(0).standard_normal((5, 8))
    assert participation_ratio(window).equal(participation_ratio(torch.from_numpy(window)))  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", [True, "1", None, [1], 1.5, NAN, 99, -99])
def test_layers_of_r_v_are_indices_or_fractions(wrong: Any):
    cache = make_cache((9,))
    refused(lambda: r_v(cache, wrong, 2, 4), "layer")
    refused(lambda: r_v(cache, 0, wrong, 4), "layer")


@pytest.mark.parametrize("wrong", [True, 4.0, "4", None, 1, 0, -3, 10**30])
def test_windows_are_whole_numbers(wrong: Any):
    refused(lambda: r_v(make_cache((9,)), 0, 2, wrong), "window must be")
    refused(lambda: cache_ratios(make_cache((9,)), window=wrong), "window must be")


def test_layers_and_windows_may_be_numpy_s():
    cache = make_cache((9,))
    assert r_v(cache, np.int64(0), np.int64(2), np.int64(4)).equal(r_v(cache, 0, 2, 4))  # type: ignore[arg-type]
    assert r_v(cache, np.float32(0.0), 2, 4).equal(r_v(cache, 0.0, 2, 4))  # type: ignore[arg-type]
    refused(lambda: r_v([cache]), "cache must be a KVCache")  # type: ignore[arg-type]


# --- a model ---


@pytest.fixture(scope="module")
def model(tiny):
    return tiny("llama")


@pytest.fixture(scope="module")
def cache(model) -> KVCache:
    return model.prefill(["Explain how bread rises.", "Watch each word."])


@pytest.mark.model
def test_a_text_alone_is_one_continuation(model, cache):
    alone = model.score(cache[0], " in a warm oven")
    assert alone.shape == (1, len(model.continuation_ids(" in a warm oven")))
    assert alone.equal(model.score(cache[0], [" in a warm oven"]))


@pytest.mark.model
def test_token_ids_to_score_may_be_of_any_kind(model, cache):
    expected = model.score(cache, [[7, 8], [9, 10]])
    for ids in (np.array([[7, 8], [9, 10]]), torch.tensor([[7, 8], [9, 10]]), [np.array([7, 8]), (9, 10)]):
        assert model.score(cache, ids).equal(expected)


@pytest.mark.model
@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ([[7, -1]], "token id -1; the model's vocabulary goes from 0 to 383"),
        ([[384]], "token id 384"),
        ([[10**20]], "token id 1000"),
        (torch.tensor([[7, -1]]), "token id -1"),
        ([7, 8], "put the ids of one continuation in a list"),
        (7, "continuations must be"),
        (None, "continuations must be"),
        (b"text", "continuations must be"),
        ([[7.0]], "whole numbers, got 7.0"),
        ([[True]], "booleans"),
        ([["a"]], "whole numbers, got 'a'"),
        ([None], "whole numbers, got None"),
        ([{7, 8}], "in an order"),
        ("", "a continuation is empty"),
        ([""], "a continuation is empty"),
        ([[]], "a continuation is empty"),
        ([], "0 continuations for a batch of 1"),
    ],
)
def test_what_is_no_continuation_is_refused(model, cache, wrong, words):
    refused(lambda: model.score(cache[0], wrong), words)


@pytest.mark.model
@pytest.mark.parametrize(
    "wrong", [5, None, [5], [None], [["a"]], b"a", {"a": 1}, [b"a"], torch.tensor(1), "", [], [""], ["a", ""]], ids=str
)
def test_what_is_no_prompt_is_refused(model, wrong):
    refused(lambda: model.prefill(wrong))
    refused(lambda: model.attention(wrong))


@pytest.mark.model
@pytest.mark.parametrize("token", [-1, 384])
def test_a_prompt_of_foreign_tokens_is_refused(model, token):
    prompt = EncodedPrompt((5, token, 6), (2, 2, 2), ("a", "b", "c"))
    for prompts in (prompt, [prompt]):
        refused(lambda prompts=prompts: model.prefill(prompts), f"token id {token}")


@pytest.mark.model
@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"temperature": 1e-38}, "must be 0 .* or at least 1e-30, got 1e-38"),
        ({"temperature": 5e-324}, "at least 1e-30"),
        ({"temperature": LEAST_TEMPERATURE / 2}, "at least 1e-30"),
        ({"temperature": NAN}, "temperature must be"),
        ({"temperature": INF}, "temperature must be a finite number"),
        ({"temperature": -1}, "temperature must be at least 0"),
        ({"temperature": True}, "temperature must be a number"),
        ({"temperature": "0.7"}, "temperature must be a number"),
        ({"temperature": None}, "temperature must be a number"),
        ({"top_p": NAN}, r"top_p in \(0, 1\]"),
        ({"top_p": 0}, r"top_p in \(0, 1\]"),
        ({"top_p": 1.5}, r"top_p in \(0, 1\]"),
        ({"top_p": True}, "top_p must be a number"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"max_new_tokens": -1}, "max_new_tokens must be at least 1"),
        ({"max_new_tokens": 2.0}, "max_new_tokens must be a whole number"),
        ({"max_new_tokens": True}, "max_new_tokens must be a whole number"),
        ({"max_new_tokens": "2"}, "max_new_tokens must be a whole number"),
        ({"seeds": [1]}, "1 seeds for a batch of 2"),
        ({"seeds": 1}, "one whole number a row"),
        ({"seeds": "12"}, "one whole number a row"),
        ({"seeds": [1, 1.0]}, "a seed must be a whole number"),
        ({"seeds": [1, True]}, "a seed must be a whole number"),
        ({"seeds": [1, None]}, "a seed must be a whole number"),
        ({"seeds": [1, 2**63]}, "a seed must be at most 9223372036854775807"),
        ({"seeds": [1, -(2**63) - 1]}, "a seed must be at least -9223372036854775808"),
        ({"seeds": np.array([1.0, 2.0])}, "a seed must be a whole number"),
        ({"stop": "no"}, "stop must be True or False"),
        ({"on_step": 3}, "on_step must be a function"),
        ({"attention": "yes"}, "maps must be a Maps"),
    ],
    ids=str,
)
def test_settings_of_generation_that_can_t_be_meant_are_refused(model, cache, settings, words):
    refused(lambda: model.generate(cache, **{"max_new_tokens": 2, **settings}), words)


@pytest.mark.model
def test_settings_of_generation_may_be_numpy_s_and_torch_s(model, cache):
    expected = model.generate(cache, max_new_tokens=4, temperature=0.5, top_p=0.5, seeds=[3, 4])
    for of in (np.array, torch.tensor):
        found = model.generate(
            cache, max_new_tokens=of(4), temperature=of(0.5), top_p=of(0.5), seeds=of([3, 4]), stop=of(True)
        )
        assert found.token_ids.equal(expected.token_ids)


@pytest.mark.model
@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_the_least_temperature_is_greedy(model, cache, top_p):
    greedy = model.generate(cache, max_new_tokens=8, temperature=0, stop=False)
    cold = model.generate(cache, max_new_tokens=8, temperature=LEAST_TEMPERATURE, top_p=top_p, stop=False)
    assert cold.token_ids.equal(greedy.token_ids)


@pytest.mark.model
def test_generation_goes_on_from_caches_alone(model):
    for wrong in ("text", None, [1], model):
        refused(lambda wrong=wrong: model.generate(wrong), "cache must be a KVCache")
        refused(lambda wrong=wrong: model.score(wrong, ["a"]), "cache must be a KVCache")


@pytest.mark.model
def test_maps_of_what_the_model_has_not_are_refused(model):
    from kvpatch.engine.attention import Maps

    for maps, words in (
        (Maps([4], [0]), "layer 4 does not exist"),
        (Maps([], [0]), "holds no layer"),
        (Maps([0], [4]), "query head 4 does not exist"),
        (Maps([0], []), "no query head"),
        (Maps([0], [0], [10**6]), "none of the queries"),
        (Maps([0], [0], [-1]), "none of the queries"),
    ):
        refused(lambda maps=maps: model.attention("Explain how bread rises.", maps=maps), words)


@pytest.mark.model
def test_marks_that_no_prompt_has_are_refused(model):
    prompts = ["Explain how bread rises.", "Watch each word."]
    refused(
        lambda: model.attention(prompts, marked=SlotQuery(keywords=["zebra"])), "find no slot in any of the prompts"
    )
    refused(lambda: model.attention(prompts, marked="words"), "'words' is not a selection")
    assert model.attention(prompts, marked=SlotQuery(keywords=["bread"]))["mass_marked"][0].max() > 0


@pytest.mark.parametrize("wrong", [1e-38, 1e-31, NAN, INF, -1])
def test_a_protocol_s_temperature_has_the_same_bounds(wrong: float):
    with pytest.raises(ValueError, match="temperature"):
        Generation(temperature=wrong)


def test_errors_of_arguments_are_those_the_package_names():
    assert issubclass(CacheError, KvpatchError)
    assert issubclass(ProtocolError, ValueError)

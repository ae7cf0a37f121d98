"""Every intervention of a protocol, called on prompts from Python."""

from __future__ import annotations

import pytest
import torch

import kvpatch as kv

SOURCE, TARGETS = "Watch how each word arrives.", ["Explain how bread rises.", "Say what a warm oven does."]
PAIRS = (["Watch these words.", "Say what arrives now."], ["Explain the oven.", "Say how bread rises."])


@pytest.mark.parametrize("site", ["values", "queries_keys_values", "residual"])
def test_an_edit_in_prefill_reaches_the_layers_above_it(tiny, site: str) -> None:
    model = tiny("llama")
    natural = model.prefill(TARGETS)
    edited = model.intervene(kv.InPrefill(site=site, layers=[1], slots="body"), TARGETS, SOURCE)
    is_equal = [torch.equal(a, b) for a, b in zip(edited.values, natural.values, strict=True)]
    assert is_equal[0] and not is_equal[1] and not is_equal[2]
    assert model.generate(edited, max_new_tokens=3).token_ids.shape == (2, 3)


def test_a_patch_is_that_of_apply(tiny) -> None:
    model = tiny("llama")
    patch = kv.Patch(layers=[1, 2], slots="body", donor="shuffle_values")
    by_hand = patch.apply(model.prefill([SOURCE]), model.prefill(TARGETS), seed=5)
    assert model.intervene(patch, TARGETS, SOURCE, seed=5).checksums() == by_hand.checksums()


@pytest.mark.parametrize(
    "change",
    [
        kv.ValueSteering(layers=[1], alpha=2),
        kv.CacheSteering(strength=2, parts="v"),
        kv.Joined(keep="all"),
        kv.Reshape(),
    ],
    ids=lambda change: type(change).__name__,
)
def test_the_others_change_the_cache(tiny, change) -> None:
    model = tiny("llama")
    long = [
        text + " Say it in many words, and then in a few more words than that, twice." for text in (SOURCE, *TARGETS)
    ]
    giver = long[0] if change.takes_giver else None
    made = model.intervene(change, long[1:], giver, calibration=PAIRS if change.is_fitted else None)
    assert made.batch == 2 and made.checksums() != model.prefill(long[1:]).checksums()


def test_what_is_missing_is_told_in_one_line(tiny) -> None:
    model, edit = tiny("llama"), kv.InPrefill(site="values", layers=[1])
    steering = kv.ValueSteering(layers=[1], alpha=1)
    for args, settings, told in [
        ((edit, TARGETS), {}, "give it: source="),
        ((steering, TARGETS, SOURCE), {}, "leave source out"),
        ((steering, TARGETS), {}, "give calibration="),
        ((steering, TARGETS), {"calibration": ["a", 3]}, "calibration must be"),
        ((kv.InPrefill(site="values", layers=[99]), TARGETS, SOURCE), {}, "layer 99 does not exist"),
        ((edit, TARGETS, [SOURCE] * 3), {}, "3 sources do not fit 2 targets"),
        (("values", TARGETS, SOURCE), {}, "an intervention must be a Patch"),
    ]:
        with pytest.raises(kv.KvpatchError, match=told) as caught:
            model.intervene(*args, **settings)
        assert "\n" not in str(caught.value)

"""What a person writes of a selection in Python: what is taken, how it prints, how a mistake is told."""

from __future__ import annotations

import inspect
import pickle
import pydoc
from typing import Any

import numpy as np
import pytest

import kvpatch as kv
from kvpatch.specs.interventions import InPrefill


@pytest.mark.parametrize("field", ["layers", "kv_heads", "slots"])
@pytest.mark.parametrize(
    ("given", "meant"),
    [
        (3, [3]),
        (np.int64(3), [3]),
        (slice(4, 8), [4, 5, 6, 7]),
        (range(2, 5), [2, 3, 4]),
        (np.arange(3), [0, 1, 2]),
        ((1, 2), [1, 2]),
        (-1, [-1]),
    ],
)
def test_numbers_slices_ranges_and_arrays_are_taken(field: str, given: Any, meant: list[int]) -> None:
    assert getattr(kv.Patch(**{field: given}), field) == meant


@pytest.mark.parametrize("field", ["layers", "kv_heads", "slots"])
@pytest.mark.parametrize("cut", [slice(3, None), slice(None, -1), slice(1, -1, 2), slice(None, None, 2)])
def test_a_slice_without_an_end_waits_for_the_model(field: str, cut: slice) -> None:
    patch = kv.Patch(**{field: cut})
    span = getattr(patch, field)
    assert [list(span.within(count)) for count in (0, 5, 12)] == [list(range(count))[cut] for count in (0, 5, 12)]
    assert eval(repr(patch), {"Patch": kv.Patch, "slice": slice}) == patch == pickle.loads(pickle.dumps(patch))
    assert kv.Patch.model_validate_json(patch.to_json()) == patch


def test_a_span_that_says_nothing_is_refused() -> None:
    with pytest.raises(kv.ProtocolError, match="needs start, stop or step"):
        kv.Span()


def test_all_is_taken_for_every_selection() -> None:
    assert kv.Patch(layers="all", kv_heads="all", slots="all") == kv.Patch()


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"parts": "q"}, "'k', 'v' or 'kv', not 'q'"),
        ({"layer": 3}, "donor; did you mean 'layers'?"),
        ({"nonsense": 3}, "no 'nonsense'; it has layers, kv_heads, slots"),
        ({"layers": "some"}, "whole numbers or 'all', got 'some'"),
        ({"slots": "boddy"}, "slots 'boddy' is not a selection; use all, bos"),
        ({"rotate": 3}, "must be True or False, not 3"),
        ({"strength": "much"}, "finite number, got 'much'"),
        ({"layers": slice(4, None, -1)}, "in steps of at least 1"),
        ({"layers": slice("a", None)}, "cut by whole numbers"),
    ],
)
def test_a_mistake_is_told_in_one_line(given: dict[str, Any], told: str) -> None:
    with pytest.raises(kv.ProtocolError) as caught:
        kv.Patch(**given)
    assert told in str(caught.value) and "\n" not in str(caught.value) and isinstance(caught.value, kv.CacheError)


def test_what_stands_without_a_name_is_told() -> None:
    with pytest.raises(kv.KvpatchError, match=r"3 stands without a name; write layers=\.\.\."):
        kv.Patch(3)  # type: ignore[call-arg]


def test_it_prints_what_differs_from_the_default_as_it_would_be_written() -> None:
    patch = kv.Patch(layers=range(16, 30), slots=kv.SlotQuery(of="body"), parts="v")
    assert repr(patch) == str(patch) == "Patch(layers=range(16, 30), slots=SlotQuery(of='body'), parts='v')"
    names = {"Patch": kv.Patch, "SlotQuery": kv.SlotQuery, "range": range}
    assert eval(repr(patch), names) == patch == pickle.loads(pickle.dumps(patch))
    assert repr(kv.Patch()) == "Patch()" and repr(kv.Patch(layers=[3, 1, 2])) == "Patch(layers=[3, 1, 2])"
    assert "range(16, 30)" in patch._repr_html_() and "<code>" in patch._repr_html_()


@pytest.mark.parametrize("kind", [kv.Patch, kv.SlotQuery, kv.LayerBand, InPrefill])
def test_help_and_completion_show_what_is_ours(kind: type) -> None:
    shown = pydoc.plain(pydoc.render_doc(kind))
    assert "model_validate" not in shown and len(shown.splitlines()) <= 60
    assert "BeforeValidator" not in shown and "typing" not in str(inspect.signature(kind))
    assert kind.__doc__ and kind.__doc__.splitlines()[0] in shown


def test_completion_lists_fields_and_methods() -> None:
    assert {"layers", "kv_heads", "slots", "parts", "align", "strength", "apply", "to_json"} <= set(dir(kv.Patch()))
    assert not [name for name in dir(kv.Patch()) if name.startswith("model_")]

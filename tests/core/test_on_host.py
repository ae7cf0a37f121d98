"""Labels of a cache as numbers: brought to the host once, right after changes in place, known of chosen rows."""

from __future__ import annotations

from contextlib import suppress

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from core_caches import make_cache
from kvpatch.caches import on_host
from kvpatch.caches.devices import one_host_thread


def seen(labels: torch.Tensor, calls: list[int]) -> tuple[int, ...]:
    def read(rows: list[int]) -> tuple[int, ...]:
        calls.append(1)
        return tuple(rows)

    return on_host.once(labels, "plain", read)


def test_labels_are_read_once():
    labels, calls = torch.tensor([3, 1]), []
    assert seen(labels, calls) == seen(labels, calls) == (3, 1) and len(calls) == 1


def test_labels_that_were_changed_in_place_are_read_again():
    labels, calls = torch.tensor([3, 1]), []
    seen(labels, calls)
    labels[0] = 7
    assert seen(labels, calls) == (7, 1)
    part = labels[1:]
    on_host.pass_on(labels, part, slice(1, 2))
    labels[1] = 9
    assert seen(part, calls) == (9,)


def test_what_was_told_of_labels_that_changed_since_is_not_passed_on():
    labels, calls = torch.tensor([3, 1]), []
    seen(labels, calls)
    labels[0] = 7
    part = labels[:1].clone()
    on_host.pass_on(labels, part, slice(0, 1))
    assert seen(part, calls) == (7,)


def test_one_tensor_may_be_read_for_several_things():
    labels = torch.tensor([[-1, 4], [5, 6]])
    lengths = on_host.once(labels, "lengths", lambda rows: tuple(sum(at >= 0 for at in row) for row in rows))
    assert lengths == (1, 2) and seen(labels, []) == ([-1, 4], [5, 6])
    part = labels[1:]
    on_host.pass_on(labels, part, slice(1, 2))
    assert seen(part, []) == ([5, 6],)
    assert on_host.once(part, "lengths", lambda rows: ()) == (2,)


def test_labels_made_in_inference_mode_are_read_once_and_again_where_they_were_changed():
    with torch.inference_mode():
        labels, calls = torch.tensor([3, 1]), []
        assert seen(labels, calls) == seen(labels, calls) == (3, 1) and len(calls) == 1
        labels[0] = 7
        assert seen(labels, calls) == (7, 1)
    assert seen(labels, calls) == (7, 1) and len(calls) == 2


@given(rows=st.lists(st.integers(0, 3), min_size=1, max_size=6), low=st.integers(0, 3), size=st.integers(1, 4))
def test_chosen_rows_say_what_their_labels_say(rows: list[int], low: int, size: int):
    cache = make_cache((9, 6, 7, 3), seed=1)
    known = (cache.row_lengths, cache.row_pending, cache.row_pending_position, cache.row_segments, cache.row_tokens)
    assert all(known)
    for part in (cache[rows], cache.rows(low, min(4, low + size)), cache[rows].rows(0, len(rows))):
        real = [[at for at in row if at >= 0] for row in part.token_ids.tolist()]
        assert [list(row) for row in part.row_tokens] == real
        assert part.row_lengths == tuple(map(len, real))
        assert part.row_segments == tuple(tuple(at for at in row if at >= 0) for row in part.segments.tolist())
        assert part.row_pending == tuple(part.pending.tolist())
        assert part.row_pending_position == tuple(part.pending_position.tolist())
        assert part.row_token_ids(0) == [*real[0], int(part.pending[0])]


@pytest.mark.parametrize(
    ("devices", "threads"), [(["cuda"], 1), (["cuda", "cuda"], 1), (["cuda", "cpu"], 2), (["cpu"], 2), ([], 2)]
)
def test_one_thread_is_enough_beside_gpus_alone(devices: list[str], threads: int):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with suppress(ZeroDivisionError), one_host_thread(map(torch.device, devices)):
            assert torch.get_num_threads() == threads
            raise ZeroDivisionError
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)

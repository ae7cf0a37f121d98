"""Layers that are worked on together give what each gives by itself."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from core_caches import HALF, PARTIAL, make_cache
from kvpatch.caches import stacks
from kvpatch.caches.stacks import over_layers, stack_of
from kvpatch.interventions.splice import splice
from kvpatch.specs.patch import Patch


@pytest.fixture
def together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stacks, "IS_WORTH_IT", ("cpu", "cuda"))


def test_layers_at_equal_distances_are_one_view_and_others_a_copy() -> None:
    whole = torch.randn(5, 2, 3, 4, 6)
    rows = [layer[1:, :, 1:] for layer in whole.unbind()]
    view = stack_of(rows)
    assert (
        torch.equal(view, whole[:, 1:, :, 1:])
        and view.untyped_storage().data_ptr() == rows[0].untyped_storage().data_ptr()
    )
    for apart in ([whole[0], whole[1], whole[3]], [whole[3], whole[2]], [t.clone() for t in whole]):
        copy = stack_of(apart)
        assert torch.equal(copy, torch.stack(apart))
        assert copy.untyped_storage().data_ptr() != whole.untyped_storage().data_ptr()


def test_only_layers_of_one_kind_are_worked_on_together_and_of_no_more_numbers_than_allowed(
    together: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stacks, "NUMBERS_AT_ONCE", 3 * 24)
    layers = [torch.randn(1, 2, 3, 4) for _ in range(7)] + [torch.randn(1, 1, 3, 8)]
    seen: list[tuple[str, tuple[int, ...]]] = []

    def doubled(name: str, tensor: Tensor, other: Tensor) -> Tensor:
        seen.append((name, tuple(tensor.shape)))
        return tensor + other

    found = over_layers(doubled, layers, layers, of=["a", "b", "a", "a", "a", "a", "b", "b"])
    assert all(torch.equal(one, 2 * layer) for one, layer in zip(found, layers, strict=True))
    assert seen == [("a", (3, 1, 2, 3, 4)), ("a", (2, 1, 2, 3, 4)), ("b", (2, 1, 2, 3, 4)), ("b", (1, 1, 3, 8))]


@pytest.mark.parametrize("align", ["end", "start", "stretch", "replace", "append"])
@pytest.mark.parametrize("donor", ["source", "shuffle_rerotate", "gaussian_isotropic"])
def test_a_patch_made_of_all_layers_at_once_is_the_same_to_the_bit(
    align: str, donor: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ropes = [HALF, HALF, PARTIAL, HALF]
    source, target = (make_cache(of, seed=n, rope=ropes) for n, of in enumerate(([5, 9, 3], [7, 4, 6])))
    part = {} if align in ("replace", "append") else {"layers": [0, 2, 3], "kv_heads": [1]}
    patch = Patch(align=align, donor=donor, **part)
    one = splice(patch, source, target, seed=[1, 2, 3])
    monkeypatch.setattr(stacks, "IS_WORTH_IT", ("cpu", "cuda"))
    other = splice(patch, source, target, seed=[1, 2, 3])
    for a, b in zip([*one.keys, *one.values], [*other.keys, *other.values], strict=True):
        assert torch.equal(a, b)
    assert one.checksums() == other.checksums()
    monkeypatch.setattr(stacks, "IS_WORTH_IT", ())
    assert one.checksums() == other.checksums()


def test_a_model_of_very_many_layers_has_checksums() -> None:
    deep = make_cache([3, 2], rope=[HALF] * 130)
    assert len(set(deep.checksums())) == 2

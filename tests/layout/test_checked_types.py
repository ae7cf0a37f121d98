"""The test run holds functions to their annotations."""

from __future__ import annotations

import numpy as np
import pytest
from jaxtyping import TypeCheckError

from kvpatch.caches.rope import LayerRope, rotate
from kvpatch.statistics.grid import on_grid


def test_an_array_of_another_type_is_refused():
    with pytest.raises(TypeCheckError):
        on_grid(np.array(["no", "numbers"]))


def test_an_array_where_a_tensor_should_stand_is_refused():
    with pytest.raises(TypeCheckError):
        rotate(np.zeros((1, 1, 1, 2)), np.zeros((1, 1)), LayerRope("none"))

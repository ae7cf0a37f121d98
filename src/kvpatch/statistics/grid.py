"""Rounding to a grid of binary fractions, so that sums do not depend on the order of the rows."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
GRID_BITS = 40
SMALLEST = 2.0**-960  # magnitudes below this are taken as 0, before a grid step could be subnormal


def on_grid(values: Floats) -> Floats:
    """Round to multiples of 2**-40 of the largest magnitude, so that sums of up to 8192 values are exact.

    values: [n]. Returns [n]; off by at most 2**-40 of the largest magnitude, far below any readout's noise.
    Values all below 2**-960 become 0. Gridding twice changes nothing.
    """
    step = grid_step(values)
    return np.zeros_like(values) if step == 0 else np.rint(values / step) * step


def grid_step(values: Floats) -> float:
    """The step of `on_grid`, in the values' unit: a power of two, or 0 if every value is 0 or there is
    none."""
    largest = float(np.max(np.abs(values), initial=0.0))
    if largest < SMALLEST:
        return 0.0
    mantissa, exponent = np.frexp(largest)
    is_power_of_two = mantissa == 0.5
    return 2.0 ** (exponent - is_power_of_two - GRID_BITS)

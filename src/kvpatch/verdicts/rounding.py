"""How every sentence, table, chart and page rounds a number."""

from __future__ import annotations

import math


def number(value: float) -> str:
    """A whole number in full, any other at three significant digits; without an exponent where that reads well.

    Sentences, tables, charts' captions and the live view all round by this.

    >>> number(7), number(1234567), number(1234.5), number(0.04213), number(-0.000012), number(float("nan"))
    ('7', '1,234,567', '1,234', '0.0421', '-1.20e-05', 'unknown')
    """
    if not math.isfinite(value):
        return "unknown"
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    if abs(value) < 1e-4 or abs(value) >= 1e6:
        return f"{value:.2e}"
    text = f"{value:.3g}"
    return f"{value:,.0f}" if "e" in text else text

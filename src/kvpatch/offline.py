"""What a notebook shows: charts drawn here, as SVG, where altair would ask a network for scripts; bars if watched."""

from __future__ import annotations

import sys
from typing import Any, TypeVar

import altair as alt
import vl_convert

from kvpatch.errors import all_visible, visible

Chart = TypeVar("Chart")


class _Offline:
    """Mixed into the class of a chart: what a notebook shows of it."""

    def _repr_mimebundle_(self: Any, *_: object, **__: object) -> dict[str, str]:
        return {"image/svg+xml": as_svg(self), "text/plain": repr(self)}

    def __repr__(self: Any) -> str:
        return f"<chart: {visible(self.title)}>" if isinstance(self.title, str) else f"<{type(self).__name__}>"


def drawn_offline(chart: Chart) -> Chart:
    """The same chart, of the same kind and to be changed in the same ways, which shows itself without a network."""
    kind = type(chart)
    if not isinstance(chart, _Offline):
        object.__setattr__(chart, "__class__", type(kind.__name__, (_Offline, kind), {"__module__": kind.__module__}))
    return chart


def as_svg(chart: Any) -> str:
    """A chart as SVG, whatever the number of its data; every character of its texts can be seen."""
    with alt.data_transformers.enable("default", max_rows=None):
        return vl_convert.vegalite_to_svg(all_visible(chart.to_dict()))


def is_watched() -> bool:
    """Whether somebody sees what goes to standard error: in a terminal or a notebook."""
    return sys.stderr.isatty() or "ipykernel" in sys.modules

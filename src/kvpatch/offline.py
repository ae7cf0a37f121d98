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
        return vl_convert.vegalite_to_svg(_without_escapes(all_visible(chart.to_dict())))


def _without_escapes(spec: Any) -> Any:
    """A chart whose titles hold no backslash, but a letter that looks like one: Vega-Lite puts titles of tooltips into
    an expression with their quotes escaped and their backslashes not, so that a title could end the string there."""
    if isinstance(spec, dict):
        titles = {key: inner.replace("\\", "\u2216") for key, inner in spec.items() if _is_title(key, inner)}
        return {key: _without_escapes(inner) for key, inner in spec.items()} | titles
    return [_without_escapes(inner) for inner in spec] if isinstance(spec, list) else spec


def _is_title(key: str, value: Any) -> bool:
    return key == "title" and isinstance(value, str)


def is_watched() -> bool:
    """Whether somebody sees what goes to standard error: in a terminal or a notebook."""
    return sys.stderr.isatty() or "ipykernel" in sys.modules

"""A figure: one chart with its title, what it shows in words, and the data it is drawn from."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from kvpatch.report import charts


@dataclass(frozen=True)
class Figure:
    """What the page needs of a chart.

    id: unique on the page, and the name of the files a reader saves. about: what is drawn, in a sentence or two. label:
    what a reader who can't see the chart is told. spec: Vega-Lite with its data by columns; None where there is none.
    note: what the chart leaves out. heads: what `head_tokens.over_tokens` gives of the heads that the chart names.
    """

    id: str
    title: str
    about: str
    label: str
    spec: dict | None
    note: str = ""
    column: str = ""
    heads: dict | None = None


def figure(name: str, title: str, about: str, chart: charts.Drawn | None, *, label: str = "", note: str = "") -> Figure:
    """Return the figure of a chart; `chart` None says that there is no data."""
    spec = None if chart is None else without_config(charts.packed(chart))
    return Figure(_identifier(name), title, about, label or title, spec, note)


def without_config(spec: dict) -> dict:
    """Return a specification without the configuration that all charts share; the page's script adds it."""
    return {key: value for key, value in spec.items() if key != "config"} if spec["config"] == charts.CONFIG else spec


def _identifier(name: str) -> str:
    return "".join(c if c.isascii() and (c.isalnum() or c in "-_") else "-" for c in name)


def rounded(frame: pd.DataFrame, digits: int = 6) -> pd.DataFrame:
    """Return the table with its floats at `digits` significant digits: all a chart can show."""
    out = frame.copy()
    for name in out.select_dtypes("float").columns:
        out[name] = [float(f"{x:.{digits}g}") for x in out[name]]
    return out

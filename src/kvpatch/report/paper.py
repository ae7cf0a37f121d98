"""Figures of a report for a paper: SVG, PDF and PNG at a set width, and a script that draws each anew from the run.

All lengths are points, 72 to the inch, so that a PDF is as wide as was asked for and its type as large as it says.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import vl_convert

from kvpatch.errors import ProtocolError, all_visible
from kvpatch.report.charts import CONFIG
from kvpatch.report.figure import Figure
from kvpatch.specs.nearest import instead

WIDTHS = (3.25, 6.75)
"""Inches: one column and two columns of a paper."""
NARROWEST, WIDEST = 1.0, 20.0
POINTS = 72
TYPE = 8
"""Points of the type on axes and legends."""
DOTS = 300
"""Dots per inch of a PNG."""
FONT = "DejaVu Sans, Arial, Helvetica, sans-serif"
"""The first has the symbols of the verdicts."""
SCALED = 0.02
"""Share of its width by which a chart may be scaled without its type being set anew."""
_SIZES = {"labelFontSize": TYPE, "titleFontSize": TYPE, "labelFont": FONT, "titleFont": FONT}


def figures_in(context: Any) -> Iterator[Figure]:
    """Every figure that has data in what a report's template is given, each id once."""
    seen: set[str] = set()

    def within(part: Any) -> Iterator[Figure]:
        if isinstance(part, Figure):
            if part.spec is not None and part.id not in seen:
                seen.add(part.id)
                yield part
        elif isinstance(part, Mapping):
            for value in part.values():
                yield from within(value)
        elif isinstance(part, list | tuple):
            for value in part:
                yield from within(value)
        elif dataclasses.is_dataclass(part) and not isinstance(part, type):
            for field in dataclasses.fields(part):
                yield from within(getattr(part, field.name))

    yield from within(context)


def chosen(found: Mapping[str, Figure], names: Sequence[str]) -> list[Figure]:
    """The figures of these ids; all where none is named.

    Raises:
        ProtocolError: for an id that there is not.
    """
    for name in names:
        if name not in found:
            raise ProtocolError(f"there is no figure {name!r}; {instead(name, tuple(found))}")
    return [found[name] for name in names] if names else list(found.values())


def paper_spec(figure: Figure, inches: float) -> dict[str, Any]:
    """The figure as Vega-Lite with its data, for vl-convert or altair, in points and on white.

    Raises:
        ProtocolError: for a width that no page has.
    """
    if not NARROWEST <= inches <= WIDEST:
        raise ProtocolError(f"a figure must be {NARROWEST:g} to {WIDEST:g} inches wide, got {inches:g}")
    assert figure.spec is not None
    width = inches * POINTS
    datasets = {
        key: [dict(zip(found["columns"], row, strict=True)) for row in found["rows"]]
        for key, found in figure.spec.get("datasets", {}).items()
    }
    config = dict(figure.spec.get("config", CONFIG))
    config |= {"font": FONT, "axis": {**config.get("axis", {}), **_SIZES}}
    config["axisY"] = {**config.get("axisY", {}), "labelLimit": round(width * 0.42)}
    config["axisX"] = {**config.get("axisX", {}), "tickCount": 4 if inches < 5 else 6}
    config["legend"] = {**config.get("legend", {}), **_SIZES, "labelLimit": round(width * 0.6), "symbolSize": 40}
    config["header"] = {**config.get("header", {}), **_SIZES}
    spec = {**figure.spec, "config": config, "datasets": datasets, "background": "#ffffff"}
    if spec.get("width") == "container":
        spec["width"] = width
    return {"$schema": "https://vega.github.io/schema/vega-lite/v6.json", **all_visible(spec)}


def drawn(spec: Mapping[str, Any], inches: float) -> dict[str, bytes]:
    """The figure as files: ending -> content. Each is `inches` wide, and its type is as large as the specification
    says: a chart that can't be laid out to a width, such as a map of heads, is scaled, and its type the other way."""
    asked, wanted = dict(spec), inches * POINTS
    svg, width, height = _laid_out(asked)
    for _ in range(3):
        if abs(wanted / width - 1) < SCALED:
            break
        svg, width, height = _laid_out(_with_type(asked, width / wanted))
    box, tall = f'width="{width:g}" height="{height:g}"', height * wanted / width
    in_points = svg.replace(box, f'width="{wanted:g}" height="{tall:g}"', 1)
    in_inches = svg.replace(box, f'width="{inches:g}in" height="{tall / POINTS:.4g}in"', 1)
    return {
        ".svg": in_inches.encode(),
        ".pdf": vl_convert.svg_to_pdf(in_points),
        ".png": vl_convert.svg_to_png(in_points, ppi=DOTS),
    }


def _laid_out(spec: dict[str, Any]) -> tuple[str, float, float]:
    """SVG, and its width and height."""
    svg = vl_convert.vegalite_to_svg(spec)
    box = re.search(r'width="([\d.]+)" height="([\d.]+)"', svg)
    assert box is not None
    return svg, float(box[1]), float(box[2])


def _with_type(spec: dict[str, Any], times: float) -> dict[str, Any]:
    """The specification with larger or smaller type on axes, legends and headers."""
    config = dict(spec["config"])
    for part in ("axis", "legend", "header"):
        known = config.get(part, {})
        config[part] = known | {name: known.get(name, TYPE) * times for name in ("labelFontSize", "titleFontSize")}
    return {**spec, "config": config}


def script_of(figure: Figure, directory: str, widths: Sequence[float]) -> str:
    """A Python script that draws the figure anew: numbers from the run's Parquet files, and all else to be changed."""
    return _SCRIPT.format(
        title=" ".join(figure.title.replace('"', "'").replace("\\", "").split()),
        id=figure.id,
        directory=directory,
        widths=f"[{', '.join(f'{width:g}' for width in widths)}]",
        font=FONT,
        size=TYPE,
    )


_SCRIPT = '''"""{title}: draws the figure anew from the trials of a run.

    python {id}.py [RUN_DIRECTORY]

kvpatch computes the numbers from trials/*.parquet; `figure["datasets"]` holds them, as lists of rows. `figure` is a
Vega-Lite specification, to be changed as you like. Sizes are points, 72 to the inch.
"""

import sys
from pathlib import Path

import kvpatch as kv

directory = sys.argv[1] if len(sys.argv) > 1 else {directory!r}
run = kv.Run(directory)

for inches in {widths}:
    figure = run.figure({id!r}, inches=inches)
    figure["config"]["font"] = {font!r}
    figure["config"]["axis"] |= {{"labelFontSize": {size}, "titleFontSize": {size}}}
    figure["config"]["legend"] |= {{"labelFontSize": {size}, "titleFontSize": {size}}}
    for ending, content in run.drawn(figure, inches).items():
        Path(f"{id}-{{inches:g}}in{{ending}}").write_bytes(content)
'''


def write_figures(figures: Sequence[Figure], folder: Path, directory: str, widths: Sequence[float]) -> list[Path]:
    """Write each figure as SVG, PDF and PNG at each width, and its script; returns the files."""
    out: list[Path] = []
    folder.mkdir(parents=True, exist_ok=True)
    for figure in figures:
        for inches in widths:
            for ending, content in drawn(paper_spec(figure, inches), inches).items():
                out.append(folder / f"{figure.id}-{inches:g}in{ending}")
                out[-1].write_bytes(content)
        out.append(folder / f"{figure.id}.py")
        out[-1].write_text(script_of(figure, directory, widths), encoding="utf-8")
    return out

"""The heat map of a sweep."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import altair as alt

from kvpatch.caches.display import visible
from kvpatch.offline import drawn_offline

if TYPE_CHECKING:
    from kvpatch.sweeps.grid import Sweep

TITLES = {"layers": "layer", "slots": "token of the target", "kv_heads": "KV head", "parts": "part", "row": "row"}
CELL = 18


def heat_map(sweep: Sweep) -> alt.Chart:
    """Layer upwards, token to the right; the metric as colour, its middle where the target is as it was."""
    data = sweep.data
    frame = sweep.to_frame()
    dims = [str(name) for name in data.dims]
    has_tokens = "token" in data.coords
    x = next(name for name in ("slots", "kv_heads", "parts", "layers", "row") if name in dims)
    others = [name for name in dims if name != x]
    y = next((name for name in ("layers", "kv_heads", "parts", "row") if name in others), None)
    names = {name: [str(label) for label in data.coords[name].values.tolist()] for name in dims}
    if has_tokens:
        tokens = data.coords["token"].values.tolist()
        names["slots"] = [
            f"{visible(token)} {slot}" for token, slot in zip(tokens, data.coords["slots"].values.tolist(), strict=True)
        ]
    for name in dims:
        written = dict(zip(data.coords[name].values.tolist(), names[name], strict=True))
        frame[name] = frame[name].map(written)
    told: list[Any] = [alt.Tooltip(name, title=TITLES[name]) for name in dims]
    told += [alt.Tooltip("source_token", title="token of the source")] if has_tokens else []
    told.append(alt.Tooltip("value", title=sweep.metric, format=".4g"))
    across = alt.X(f"{x}:N", title=TITLES[x], sort=names[x], axis=alt.Axis(labelAngle=-60, labelLimit=140))
    encodings: dict[str, Any] = {"x": across, "tooltip": told}
    if y is None:
        encodings["y"] = alt.Y("value:Q", title=sweep.metric)
    else:
        # The first layer stands at the bottom, where the model begins.
        order = names[y][::-1] if y == "layers" else names[y]
        encodings["y"] = alt.Y(f"{y}:N", title=TITLES[y], sort=order)
        scale = alt.Scale(scheme="redblue", domainMid=sweep.target_value)
        legend = alt.Legend(title=sweep.metric, orient="top", gradientLength=220, titleLimit=400)
        encodings["color"] = alt.Color("value:Q", scale=scale, legend=legend)
    left = [name for name in others if name != y]
    for channel, name in zip(("column", "row"), left, strict=False):
        kind = alt.Column if channel == "column" else alt.Row
        encodings[channel] = kind(f"{name}:N", title=TITLES[name], sort=names[name])
    chart = alt.Chart(frame, title=f"{sweep.model}: {sweep.metric}")
    drawn = chart.mark_bar() if y is None else chart.mark_rect()
    sizes = {"width": alt.Step(CELL)} | ({} if y is None else {"height": alt.Step(CELL * 2 // 3)})
    return drawn_offline(drawn.encode(**encodings).properties(**sizes))

"""What a sweep gives: a labelled array, and its heat map of layer by token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from kvpatch.caches.kvcache import KVCache
from kvpatch.errors import as_html, missing_extra, visible
from kvpatch.sweeps.axes import Plan, token_labels

if TYPE_CHECKING:
    import altair as alt
    import pandas as pd
    import xarray as xr


@dataclass(frozen=True)
class Sweep:
    """A metric at every cell of a sweep.

    Attributes:
        data: `xarray.DataArray`, a dimension an axis, in the order row, layers, slots, kv_heads, parts. Coordinates are
            real numbers of layers, KV heads and slots of the target; `token` and `source_token` stand beside the slots.
            What was the same in all cells is a coordinate without a dimension.
        metric: what was read, with its unit.
        model: the model's name.
        natural: per row, the metric at the source and at the target as they are.
    """

    data: xr.DataArray
    metric: str
    model: str
    natural: tuple[tuple[float, float], ...]

    @property
    def source_value(self) -> float:
        """The metric at the source as it is (mean over rows)."""
        return float(np.mean([source for source, _ in self.natural]))

    @property
    def target_value(self) -> float:
        """The metric at the target as it is (mean over rows)."""
        return float(np.mean([target for _, target in self.natural]))

    def to_frame(self) -> pd.DataFrame:
        """One row a cell, with its labels and the metric in `value`."""
        return self.data.rename("value").to_dataframe().reset_index()

    def plot(self) -> alt.Chart:
        """A heat map of layer by token, the tokens written under the axis; bars where one axis is swept. Further axes
        stand side by side. It is drawn without a network."""
        from kvpatch.sweeps.figure import heat_map

        return heat_map(self)

    def __repr__(self) -> str:
        sizes = ", ".join(f"{name}={size}" for name, size in self.data.sizes.items())
        return (
            f"Sweep({sizes}; {visible(self.metric)}: {float(self.data.min()):.3g} to {float(self.data.max()):.3g}, "
            f"source {self.source_value:.3g}, target {self.target_value:.3g})"
        )

    def _repr_html_(self) -> str:
        at = self.data.isel(self.data.argmax(...))  # pyright: ignore[reportArgumentType]
        place = ", ".join(f"{name} {at.coords[name].item()}" for name in self.data.dims)
        return f"<p><code>{as_html(repr(self))}</code></p><p>highest at {as_html(place)}</p>"


def labelled(plan: Plan, rows: Sequence[Sequence[float]], source: KVCache, target: KVCache) -> xr.DataArray:
    """Numbers of the cells, a list a row of the batch, as a labelled array. A batch of one has no dimension `row`."""
    try:
        import xarray as xr
    except ImportError as error:
        raise (missing_extra(error) or error) from error

    shape = tuple(len(axis.labels) for axis in plan.axes)
    values = np.array(rows, dtype=np.float64).reshape(len(rows), *shape)
    coords: dict[str, Any] = {axis.name: list(axis.labels) for axis in plan.axes} | dict(plan.fixed)
    for axis in plan.axes:
        if axis.name == "slots" and len(rows) == 1:
            distance = [
                slot if isinstance(slot, str) else slot - _offset(axis.settings, source, target) for slot in axis.labels
            ]
            coords["token"] = ("slots", token_labels(target, axis.labels))
            coords["source_token"] = ("slots", token_labels(source, distance))
    names = [axis.name for axis in plan.axes]
    if len(rows) == 1:
        return xr.DataArray(values[0], dims=names, coords=coords)
    return xr.DataArray(values, dims=["row", *names], coords=coords | {"row": range(len(rows))})


def _offset(settings: Sequence[Any], source: KVCache, target: KVCache) -> int:
    """How many slots further on the target's slots stand than their partners, where they are counted from the end."""
    from_end = any(isinstance(setting, int) and setting < 0 for setting in settings)
    return target.row_lengths[0] - source.row_lengths[0] if from_end else 0

"""Run a sweep: the cells of a plan as variants of the target's cache, read by a metric."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kvpatch.caches.kvcache import PAD, KVCache
from kvpatch.caches.selection import chosen_heads, chosen_layers
from kvpatch.engine.variants import Variants, run_variants
from kvpatch.errors import CacheError
from kvpatch.interventions.donors import make_donor
from kvpatch.interventions.splice import Taken, blend, broadcast, plan, without_keys
from kvpatch.offline import is_watched
from kvpatch.specs.arguments import refuse_other, switch, whole
from kvpatch.specs.patch import Patch
from kvpatch.sweeps.axes import Plan, plan_of
from kvpatch.sweeps.grid import Sweep, labelled
from kvpatch.sweeps.metrics import Context, Metric, metric_of

if TYPE_CHECKING:
    from kvpatch.engine.model import Model


def sweep(
    model: Model,
    source: KVCache,
    target: KVCache,
    over: Mapping[str, Any],
    metric: Any,
    patch: Patch | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Sweep:
    """Patch the target with the source at every cell and read a metric; see `Model.sweep`.

    Args:
        settings: `seed`, what random donors and slots draw from, and `progress`, whether a bar is shown.
    """
    asked = {"seed": 0, "progress": None} | dict(settings or {})
    for side, cache in (("source", source), ("target", target)):
        refuse_other(side, cache, KVCache)
    common = Patch() if patch is None else patch
    refuse_other("patch", common, Patch)
    how = metric_of(metric)
    seed = whole("seed", asked["seed"])
    source = broadcast(source, target)
    if len(set(target.row_lengths)) > 1 or len(set(source.row_lengths)) > 1:
        raise CacheError(
            f"rows of a sweep must be of one length each for source and target, got {list(source.row_lengths)} and "
            f"{list(target.row_lengths)}; sweep row by row: target[[0]]"
        )
    logits = [model.logits(cache) for cache in (source, target)]
    rows: list[list[float]] = []
    natural: list[tuple[float, float]] = []
    laid_out = plan_of(over, common, source[[0]], target[[0]])
    with _bar(len(laid_out.patches) * target.batch, asked["progress"]) as on_cells:
        for row in range(target.batch):
            pair = source[[row]], target[[row]]
            context = Context(model, logits[0][row], logits[1][row])
            values, own = _row(context, how, laid_out, pair, seed, on_cells)
            rows.append(values)
            natural.append((_natural(context, how, pair[0]), own))
    return Sweep(labelled(laid_out, rows, source, target), how.name, model.loaded.name, tuple(natural))


def _row(
    context: Context, metric: Metric, laid_out: Plan, pair: tuple[KVCache, KVCache], seed: int, on_cells: OnCells
) -> tuple[list[float], float]:
    """The metric at every cell, and at the target as it is."""
    variants = Variants(pair[1], *_cells(laid_out.patches, *pair, seed))
    reading = metric.reading(context)
    share = len(reading.passes)
    found = [
        run_variants(context.model.backbone, variants, one.fed, one.read, lambda count: on_cells(count / share))
        for one in reading.passes
    ]
    cells = reading.combine([values for values, _ in found])
    return cells.double().tolist(), float(reading.combine([own[None] for _, own in found])[0])


def _natural(context: Context, metric: Metric, cache: KVCache) -> float:
    """The metric at a cache as it is."""
    reading = metric.reading(context)
    nothing = Variants(cache, (), lambda layer, variants: (cache.keys[layer], cache.values[layer]))
    own = [run_variants(context.model.backbone, nothing, one.fed, one.read)[1][None] for one in reading.passes]
    return float(reading.combine(own)[0])


@dataclass(frozen=True)
class _Places:
    """Where the cells' slots come from, one row a cell.

    Attributes:
        source: [cells, slots], the slot of the donor that is put there; -1 for none.
        heads: [cells, kv_heads], whether a KV head is changed.
        keys, values: [cells], whether keys (values) are.
    """

    source: Tensor
    heads: Tensor
    keys: Tensor
    values: Tensor


def _cells(
    patches: Sequence[Patch], source: KVCache, target: KVCache, seed: int
) -> tuple[list[list[int]], Callable[[int, Sequence[int]], tuple[Tensor, Tensor]]]:
    """The layers that each patch changes, and what stands there: what `Patch.apply` makes, layer by layer.

    Raises:
        CacheError: where a patch finds nothing to change, as `Patch.apply` does.
    """
    first = patches[0]  # the patches differ in what is chosen alone
    donor = make_donor(first.donor, source if any("k" in p.parts for p in patches) else without_keys(source), [seed])
    layouts: dict[str, Tensor] = {}
    for patch in patches:
        key = str(patch.slots)
        if key not in layouts:
            layouts[key] = plan(patch, donor, target, [seed]).source
    count = target.keys[0].shape[1]
    chosen = [set(chosen_heads(patch.kv_heads, count)) for patch in patches]
    device = target.positions.device
    places = _Places(
        torch.cat([layouts[str(patch.slots)] for patch in patches]),
        torch.tensor([[head in own for head in range(count)] for own in chosen], device=device),
        torch.tensor(["k" in patch.parts for patch in patches], device=device),
        torch.tensor(["v" in patch.parts for patch in patches], device=device),
    )

    def changed(layer: int, cells: Sequence[int]) -> tuple[Tensor, Tensor]:
        at = torch.tensor(list(cells), device=device)
        return _spliced(first, donor, target, layer, places, at)

    return [chosen_layers(patch.layers, target.layers) for patch in patches], changed


def _spliced(
    patch: Patch, donor: KVCache, target: KVCache, layer: int, places: _Places, at: Tensor
) -> tuple[Tensor, Tensor]:
    """Keys and values of one layer, [cells, kv_heads, slots, head_dim], for the cells `at`."""
    shape, rows = (len(at), -1, -1, -1), (len(at), -1)
    of, heads = places.source[at], places.heads[at]
    keys, values = target.keys[layer].expand(shape), target.values[layer].expand(shape)

    def is_put(has_part: Tensor) -> Tensor:
        return (of != PAD)[:, None, :, None] & (heads & has_part[:, None])[:, :, None, None]

    if bool((has_keys := places.keys[at]).any()):
        landing = target.positions.expand(rows) if patch.rotate else None
        slots = torch.where(has_keys[:, None], of, PAD)  # what is not put in need not be turned
        taken = Taken(slots, donor.positions.expand(rows), landing)
        put = taken.keys(donor.keys[layer].expand(shape), donor.rope[layer])
        keys = blend(keys, put, is_put(has_keys), patch.strength)
    if bool((has_values := places.values[at]).any()):
        put = Taken(of, donor.positions.expand(rows), None).values(donor.values[layer].expand(shape))
        values = blend(values, put, is_put(has_values), patch.strength)
    return keys, values


OnCells = Callable[[float], object]


class _bar:
    """A progress bar that a sweep of more than a second shows, where somebody can see it."""

    def __init__(self, cells: int, wanted: object) -> None:
        self.cells, self.is_shown = cells, is_watched() if wanted is None else switch("progress", wanted)

    def __enter__(self) -> OnCells:
        from tqdm import tqdm

        self.bar = tqdm(
            total=self.cells,
            desc="sweep",
            unit="cell",
            delay=1,
            leave=False,
            disable=not self.is_shown,
            bar_format="{l_bar}{bar}| {n:.0f}/{total} [{elapsed}<{remaining}]",
        )
        return self.bar.update

    def __exit__(self, *_: object) -> None:
        self.bar.close()

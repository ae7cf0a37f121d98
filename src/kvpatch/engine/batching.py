"""Rows of a batch take turns in places: fill, step, take out what has finished, fill again.

    the first rows move in -> a stretch of steps, no look from the host -> who is still going? -> finished rows move
    out, waiting rows move in -> ... until none is left

On a GPU a step is one CUDA graph, captured once and kept with the model. The number of places never changes while rows
are in them, so a row's matrix products have the same shape whatever its mates do, and its numbers do not depend on them
even in bfloat16. On a CPU in float32, where they do not depend on the shape either, the places of finished rows are
given up once enough are empty.
"""

from __future__ import annotations

import functools
import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from kvpatch.caches.devices import sent
from kvpatch.caches.kvcache import PAD, KVCache
from kvpatch.engine.backend import Fast
from kvpatch.engine.places import Slots, bytes_per_slot, make_places
from kvpatch.engine.step import PlainOps, Sampling, decode_step
from kvpatch.engine.token_budget import MORE_AT_ONCE, is_narrow
from kvpatch.models.backbone import Backbone
from kvpatch.models.fp8 import are_activations_whole

STRETCH = 16
"""Steps on a GPU between two looks at who is still going."""
BUCKET = 64
"""Slots between two graphs' reaches, where attention reads up to a fixed slot (without Triton)."""
AT_MOST = 768
"""Places on a GPU: past this many rows the products gain nothing (benchmarks/LOG.md), but for narrow models."""
GIVE_UP_AT = 0.75
"""On a CPU, places are given up once no more than this share of them is in use and no row is waiting."""
IDLE_AT_MOST = 1.25
"""Kept places are used again for up to so many times fewer rows; new ones would need new graphs."""
NARROW_IDLE_AT_MOST = 16
"""The same of a narrow model, whose step takes as long with few rows as with many."""
WORTH_PACKING = 512
"""On a CPU, tokens from which on a decoding gains by laying out the weights anew."""
LEFT_FREE = 0.1
"""Share of a GPU's free memory that the planner leaves alone."""


@dataclass(frozen=True)
class Request:
    """What is asked of every row; `steering` is added to the values of every token fed: layer -> [batch, kv_heads,
    head_dim]."""

    limit: int
    sampling: Sampling
    seeds: Tensor  # [batch], int64
    keep_values: tuple[int, ...]
    steering: dict[int, Tensor]
    on_step: Callable[[int], None] | None


@dataclass(frozen=True)
class Written:
    """What the rows wrote: token_ids and logprobs [batch, limit], lengths [batch], and values a layer asked for,
    [batch, kv_heads, limit, head_dim]. `steps` counts the steps that were run, `steered` those that steered a layer."""

    token_ids: Tensor
    logprobs: Tensor
    lengths: Tensor
    values: dict[int, Tensor]
    steps: int
    steered: dict[int, int]


def decode_in_places(backbone: Backbone, fast: Fast, cache: KVCache, request: Request, places: int | None) -> Written:
    """Decode all rows of a cache; with half the places, and from the beginning, where memory runs out."""
    assert not are_activations_whole()  # a graph would keep it
    count = min(cache.batch, places) if places else planned_places(backbone, cache.slots, request.limit, cache.batch)
    count = min(count, backbone.kept.most_rows or count)
    while True:
        try:
            runner = _runner(backbone, fast, cache, request, count, is_exact=places is not None)
            if isinstance(runner.ops, PlainOps) and count * request.limit >= WORTH_PACKING:
                runner.ops.reuse(fast.weights(backbone))
            return _Turns(backbone, runner, cache, request).run()
        except torch.OutOfMemoryError:
            if count == 1:
                raise
        # Out here nothing holds on to what the failed attempt had allocated.
        runner = None
        release(backbone)
        count = backbone.kept.most_rows = (count + 1) // 2


def planned_places(backbone: Backbone, slots: int, limit: int, rows: int) -> int:
    """How many rows to decode at a time: all of them on a CPU, as many as fit on a GPU, up to `most_places`.

    On a GPU rows are spread evenly over the turns, in multiples of 64: few sizes, so few graphs.
    """
    if backbone.device.type != "cuda":
        return rows
    fitting = int((1 - LEFT_FREE) * free_bytes(backbone) / bytes_per_place(backbone, slots, limit))
    most = max(1, min(most_places(backbone), fitting))
    turns = math.ceil(rows / most)
    even = math.ceil(rows / turns)
    return min(most, math.ceil(even / 64) * 64)


def most_places(backbone: Backbone) -> int:
    """Places on a GPU past which more gain nothing."""
    return AT_MOST * (MORE_AT_ONCE if is_narrow(backbone) else 1)


def free_bytes(backbone: Backbone) -> int:
    """A GPU's free memory, with what the allocator holds unused and what decoding keeps from call to call."""
    device, held = backbone.device, backbone.kept.runner
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused + (0 if held is None else held.nbytes)


def bytes_per_place(backbone: Backbone, slots: int, limit: int) -> int:
    """Memory of one place: its slots in every layer, its logits, and what one step makes on the way."""
    geometry, config = backbone.geometry, backbone.config
    size = backbone.head.weight.element_size()
    cached = bytes_per_slot(backbone) * (_rounded(slots) + limit + 1)
    inner = int(getattr(config, "intermediate_size", 4 * config.hidden_size))
    passing = (4 * inner + 8 * config.hidden_size) * size + geometry.vocabulary * (size + 8)
    return cached + passing + 16 * limit


def release(backbone: Backbone) -> None:
    """Free the places and graphs that are kept with a model."""
    backbone.kept.runner = None
    if backbone.device.type == "cuda":
        torch.cuda.empty_cache()


def _rounded(slots: int) -> int:
    return math.ceil(slots / 32) * 32


class _Runner:
    """Places and what steps them: on a GPU CUDA graphs, on a CPU the step itself."""

    def __init__(
        self, backbone: Backbone, fast: Fast, count: int, area: int, request: Request, positions: int, *, capture: bool
    ) -> None:
        self.sampling, self.positions, self.fast = request.sampling, positions, fast
        self.places = make_places(
            backbone, count, area, request.limit, request.sampling.end_tokens, tuple(request.steering)
        )
        self.ops = fast.make_ops(backbone, request.sampling, positions)
        assert fast.network is not None
        self._step = functools.partial(decode_step, backbone, fast.network, self.ops)
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self.steered = dict.fromkeys(request.steering, 0)  # by layer: steps that did steer it
        self._steered_by_graph = dict(self.steered)
        if capture:
            self._capture(bounded=fast.ops == "fused" and request.sampling.top_p == 1)

    @property
    def nbytes(self) -> int:
        """Bytes of the slab."""
        return sum(slots.nbytes for slots in (*self.places.keys, *self.places.values))

    def fits(self, fast: Fast, most: int, least: int, area: int, request: Request, positions: int) -> bool:
        """Whether these places, graphs included, do for a request that wants `least` to `most` of them."""
        own = self.places
        return (
            self.fast is fast
            and least <= len(own) <= most
            and (own.limit, self.sampling) == (request.limit, request.sampling)
            and area <= own.area
            and positions <= self.positions
            and own.steering.keys() == request.steering.keys()
        )

    def run(self, steps: int, furthest: int) -> None:
        """Run steps; `furthest` is the most steps any row will then have made."""
        reach = min(self.places.area + furthest + 1, self.places.capacity)
        if not self._graphs:
            self.places.live = reach
            for _ in range(steps):
                for layer, count in self._stepped().items():
                    self.steered[layer] += count
            return
        graph = self._graphs[min(end for end in self._graphs if end >= reach)]
        for _ in range(steps):
            graph.replay()
        for layer, count in self._steered_by_graph.items():
            self.steered[layer] += count * steps

    def _stepped(self) -> dict[int, int]:
        """Run or capture one step; for each layer whether it steered."""
        before = {layer: edit.fired for layer, edit in self.places.steering.items()}
        self._step(self.places)
        return {layer: edit.fired - before[layer] for layer, edit in self.places.steering.items()}

    def _capture(self, bounded: bool) -> None:
        """Capture a step. While no row is in a place, a step changes nothing that counts.

        bounded: attention finds each row's last slot itself; else it reads up to the end of a bucket, and there is one
        graph for each.
        """
        own = self.places
        ends = [own.capacity] if bounded else [*range(own.area + BUCKET, own.capacity, BUCKET), own.capacity]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            own.live = own.capacity
            for _ in range(2):
                self._step(own)
        torch.cuda.current_stream().wait_stream(stream)
        pool = torch.cuda.graph_pool_handle()
        for end in reversed(ends):
            own.live = end
            self._graphs[end] = graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                self._steered_by_graph = self._stepped()


def _runner(backbone: Backbone, fast: Fast, cache: KVCache, request: Request, count: int, *, is_exact: bool) -> _Runner:
    """The kept places where they do, a few idle ones allowed; on a GPU new ones are kept with the model."""
    positions = max(cache.row_pending_position) + request.limit + 1
    if backbone.device.type != "cuda":
        return _Runner(backbone, fast, count, cache.slots, request, positions, capture=False)
    kept = backbone.kept.runner
    idle = NARROW_IDLE_AT_MOST if is_narrow(backbone) else IDLE_AT_MOST
    most = count if is_exact else max(count + 64, int(idle * count))
    if kept is not None and kept.fits(fast, most, count, cache.slots, request, positions):
        return kept
    area = max(_rounded(cache.slots), 0 if kept is None else kept.places.area)
    del kept
    release(backbone)
    positions = math.ceil(positions / 256) * 256
    backbone.kept.runner = made = _Runner(backbone, fast, count, area, request, positions, capture=True)
    return made


class _Turns:
    """One batch's way through the places."""

    def __init__(self, backbone: Backbone, runner: _Runner, cache: KVCache, request: Request) -> None:
        self.backbone, self.runner, self.cache, self.request = backbone, runner, cache, request
        self.row: list[int | None] = [None] * len(runner.places)  # the row in each place
        self.began = [0] * len(runner.places)  # steps run when it moved in
        self.waiting = deque(range(cache.batch))
        self.steps = 0
        self.steered_before = dict(runner.steered)
        shape = (cache.batch, request.limit)
        device = backbone.device
        geometry = backbone.geometry
        self.token_ids = torch.full(shape, PAD, dtype=torch.int64, device=device)
        self.logprobs = torch.full(shape, float("nan"), device=device)
        self.lengths = torch.zeros(cache.batch, dtype=torch.int64, device=device)
        self.values = {
            layer: torch.zeros(
                cache.batch, geometry.kv_heads, request.limit, geometry.head_dim, dtype=backbone.dtype, device=device
            )
            for layer in request.keep_values
        }

    def run(self) -> Written:
        self.runner.places.going.fill_(False)
        self._fill([place for place, _ in zip(range(len(self.row)), self.waiting, strict=False)])
        is_gpu = self.backbone.device.type == "cuda"
        while any(row is not None for row in self.row):
            made = [self.steps - began for row, began in zip(self.row, self.began, strict=True) if row is not None]
            left = self.request.limit - max(made)
            stretch = min(STRETCH, max(left, 4)) if is_gpu else 1
            self._stretch(stretch, max(made) + min(stretch, left))
            going = self.runner.places.going.tolist()
            done = [place for place, row in enumerate(self.row) if row is not None and not going[place]]
            if done:
                self._take_out(done)
                self._fill(done[: len(self.waiting)])
                if not is_gpu and self.backbone.dtype == torch.float32:
                    self._give_up_places()
        real = torch.arange(self.request.limit, device=self.lengths.device) < self.lengths[:, None] - 1
        for values in self.values.values():
            values.mul_(real[:, None, :, None])
        steered = {layer: count - self.steered_before[layer] for layer, count in self.runner.steered.items()}
        return Written(self.token_ids, self.logprobs, self.lengths, self.values, self.steps, steered)

    def _stretch(self, steps: int, furthest: int) -> None:
        on_step = self.request.on_step
        if on_step is None:
            self.runner.run(steps, furthest)
        else:
            counts = []
            for _ in range(steps):
                self.runner.run(1, furthest)
                counts.append(self.runner.places.going.sum())
            told = torch.stack(counts).tolist()
            for before, now in pairwise([1, *told]):
                if before:  # the rest of a stretch after the last row has stopped is not news
                    on_step(now)
        self.steps += steps

    def _fill(self, places: Sequence[int]) -> None:
        """Move waiting rows into free places."""
        if not places:
            return
        own, cache, request = self.runner.places, self.cache, self.request
        rows = [self.waiting.popleft() for _ in places]
        for place, row in zip(places, rows, strict=True):
            self.row[place], self.began[place] = row, self.steps
        to, of = _index(places, own.first.device), _index(rows, own.first.device)
        start = own.area - cache.slots
        for tensors, held in ((own.keys, cache.keys), (own.values, cache.values)):
            for slots, tensor in zip(tensors, held, strict=True):
                slots.write((to, slice(None), slice(start, own.area)), tensor[of])
        own.slot_positions[to] = PAD
        own.slot_positions[to, start : own.area] = cache.positions[of].int()
        own.first[to] = (own.area - cache.lengths[of]).int()
        own.step[to] = 0
        own.feed[to] = cache.pending[of]
        own.position[to] = cache.pending_position[of]
        own.seeds[to] = request.seeds[of]
        own.going[to] = True
        own.token_ids[to] = PAD
        own.logprobs[to] = float("nan")
        for layer, steps in request.steering.items():
            buffer = own.steering[layer].steer
            assert buffer is not None
            buffer[to] = steps[of].to(buffer.dtype)

    def _take_out(self, places: Sequence[int]) -> None:
        """Keep what rows have written, and free their places."""
        own = self.runner.places
        rows = [row for place in places if (row := self.row[place]) is not None]
        to, of = _index(rows, own.first.device), _index(places, own.first.device)
        self.token_ids[to] = own.token_ids[of]
        self.logprobs[to] = own.logprobs[of]
        self.lengths[to] = own.step[of].long()
        for layer, values in self.values.items():
            # Token t was fed at step t + 1.
            written = own.values[layer].read((of, slice(None), slice(own.area + 1, own.area + own.limit)))
            values[to, :, : own.limit - 1] = written.to(values.dtype)
        for place in places:
            self.row[place] = None

    def _give_up_places(self) -> None:
        """Go on with the places in use alone, where that leaves out enough."""
        used = [place for place, row in enumerate(self.row) if row is not None]
        if not used or self.waiting or len(used) > GIVE_UP_AT * len(self.row):
            return
        own = self.runner.places
        at = _index(used, own.first.device)
        for layer in range(len(own.keys)):
            own.keys[layer] = Slots(own.keys[layer].numbers.mT[at].mT)  # as they lay; none of float32 is rounded
            own.values[layer] = Slots(own.values[layer].numbers[at])
        names = ("slot_positions", "first", "step", "feed", "position", "seeds", "going", "token_ids", "logprobs")
        self.runner.places = replace(
            own,
            steering={
                layer: replace(edit, steer=edit.steer[at])
                for layer, edit in own.steering.items()
                if edit.steer is not None
            },
            **{name: getattr(own, name)[at] for name in names},
        )
        self.row = [self.row[place] for place in used]
        self.began = [self.began[place] for place in used]


def _index(numbers: Sequence[int], device: torch.device) -> Tensor:
    return sent(np.array(numbers, dtype=np.int64), device)

"""Choose the engine's own way of running a model, once per model, by comparing logits.

A decoding step of the network, and on a GPU a reading of many tokens, are compared with the model's own forward pass on
a few tokens. Where they differ, or the model is not Llama-like, the model's own forward pass runs, and `note` says why.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import torch

from kvpatch.caches.kvcache import PAD
from kvpatch.engine.pack import Held, pack_rows
from kvpatch.engine.places import Places, make_places
from kvpatch.engine.residual import disturbed_residual
from kvpatch.engine.step import Ops, PlainOps, Sampling, feed_step
from kvpatch.errors import ModelError
from kvpatch.models.backbone import Backbone
from kvpatch.models.fp8 import FP8, Weight, refuse_unfit, whole_activations
from kvpatch.models.hf import Edits
from kvpatch.models.llamalike import Network, network_of
from kvpatch.specs.arguments import shown

_CHECKED_ON = 7
"""Cached tokens of the comparison's longer row."""
MOST_NOISE = 0.2
"""A step may never differ by more, whatever the model's own noise is."""
DRAWS = 4
"""Tokens are drawn so often at most, until some are found on which the model's own noise is below that. Of others the
comparison says nothing: far apart, a few random tokens can move a model in 16 bits from one text to another."""
LITTLE_NOISE = 5e-2
"""The same of models with fp8 weights, so that a step is held to the narrowest bound among the draws: on some tokens
their logits move as far by the step's rounding as by that of the noise."""
FP8_NOISE = 1e-2
"""What one product by an fp8 weight may differ by from the model's own, over its largest number. Both multiply the same
numbers, and round in bfloat16 what they sum."""
CACHE_NOISE = 2e-2
"""The same of what attention gives over keys and values of 8 bits, which `PlainOps` multiplies in float32."""
_FURTHEST = 32_767
"""Furthest position of the comparison: its tables take 16 MB a set of frequencies."""


@dataclass(frozen=True)
class Fast:
    """How a model's decoding step runs: the network and what carries it out ("fused" or "plain"); with no network, the
    model's own forward pass. `error` is the largest difference of a logit from the model's own, over the largest
    logit. `reader` reads prompts and continuations on a GPU, an `engine.reading.Reader`; None where the model's own
    forward pass does. "fused" has one, and multiplies with its products."""

    network: Network | None
    ops: str
    note: str
    error: float = 0.0
    reader: Any = None

    @property
    def is_batch_invariant(self) -> bool:
        """Whether a row's tokens and log-probabilities are the same to the bit whatever rows it runs with."""
        return self.ops == "fused" and self.reader.products.is_exact

    def weights(self, backbone: Backbone) -> list[Weight]:
        """The matrices that every step multiplies by."""
        assert self.network is not None
        layers = self.network.layers
        return [w for layer in layers for w in (layer.qkv, layer.out, layer.gate_up, layer.down)] + [
            backbone.head.weight
        ]

    def make_ops(self, backbone: Backbone, sampling: Sampling, positions: int) -> Ops:
        """The parts of a step for a sampling and for positions [0, positions)."""
        assert self.network is not None
        # A nucleus needs sorted logits, which the fused choice does not have.
        if self.ops == "fused" and (sampling.top_p == 1 or sampling.temperature == 0):
            from kvpatch.engine.fused import FusedOps

            return FusedOps(backbone, self.network, sampling, positions, self.reader.products)
        return PlainOps(backbone, self.network, sampling, positions)


def fast_of(backbone: Backbone) -> Fast:
    """How a model's decoding step runs, found out at the first call and again where the model was changed."""
    backbone.catch_up()
    if backbone.state.hooks:
        return Fast(None, "model", "the model carries hooks")
    known = backbone.kept.backend
    if known is None:
        backbone.kept.backend = known = _find(backbone)
    elif known.network is not None and not backbone.is_left_alone:
        known.network.refresh()
    return known


def refuse_other_cache(wanted: object) -> None:
    """Refuse a type of caches that there is not.

    Raises:
        ModelError: naming it.
    """
    if wanted is not None and wanted != FP8:
        raise ModelError(f"no cache_dtype {shown(wanted)}; it is fp8, or left out for the model's own type")


def hold_cache_in(backbone: Backbone, wanted: str | None, *, is_in_memory: bool = False) -> None:
    """Let decoding hold keys and values in "fp8", or in the model's own type, None.

    Args:
        is_in_memory: whether the model was there before, so that nothing says how it is read.
    Raises:
        ModelError: for another type, or a model or device that this does not go with.
    """
    refuse_other_cache(wanted)
    if wanted is None:
        return
    refuse_unfit(backbone.device, "fp8 caches", "leave cache_dtype out")
    if backbone.dtype != torch.bfloat16:
        own = str(backbone.dtype).removeprefix("torch.")
        instead = "give dtype='bfloat16' or dtype='fp8'"
        if is_in_memory:
            instead = "move it with .to(torch.bfloat16) before"
        raise ModelError(f"fp8 caches go with bfloat16, and the model is in {own}; {instead}")
    backbone.cache_dtype = FP8
    backbone.kept.clear()
    refuse_unheld(backbone, fast_of(backbone))


def refuse_unheld(backbone: Backbone, fast: Fast) -> None:
    """Refuse to decode over a cache of 8 bits where the engine's own step, which holds it, does not run.

    Raises:
        ModelError: saying why it does not.
    """
    if backbone.cache_dtype and fast.network is None:
        raise ModelError(
            "fp8 caches are held by the engine's own decoding step, which this model does not take: "
            f"{fast.note or backbone.name}; leave cache_dtype out"
        )


@contextmanager
def left_alone(backbone: Backbone) -> Iterator[None]:
    """Look at the model once, and not again within the block, in which nobody may change it.

    Raises:
        ModelError: where the model as it now is can't be patched, or drops numbers at random.
    """
    was = backbone.is_left_alone
    fast_of(backbone)
    backbone.is_left_alone = True
    try:
        yield
    finally:
        backbone.is_left_alone = was


def reader_of(backbone: Backbone, edits: Edits | None = None) -> Any:
    """The `engine.reading.Reader` of a model as it now is; None on a processor, with hooks on the model, for edits that
    it does not make, or where the model's own forward pass reads. Takes over what was changed in the model."""
    if backbone.device.type != "cuda":
        backbone.catch_up()
        return None
    reader = fast_of(backbone).reader
    return reader if reader is not None and reader.makes(edits) else None


def _find(backbone: Backbone) -> Fast:
    network = network_of(backbone)
    if isinstance(network, str):
        return Fast(None, "model", network)
    backbone.note_own_changes()
    if not network.shares_weights():
        return Fast(None, "model", "some of the layers share weights")
    notes = []
    for ops in _candidates(backbone, network, notes):
        try:
            found = _carried_out_by(backbone, network, ops)
            with whole_activations():  # of fp8 weights; their own products are compared next
                error, noise = _difference(backbone, found)
            if backbone.quantization == FP8 and (off := _difference_of_products(backbone, found)) > FP8_NOISE:
                notes.append(f"{ops}: fp8 products differ from the model's own by {off:.2g} of their size")
                continue
            if backbone.rounds_cache and (off := _difference_over_the_cache(backbone, found)) > CACHE_NOISE:
                notes.append(f"{ops}: attention over an fp8 cache is off by {off:.2g} of its size")
                continue
        except torch.OutOfMemoryError:
            raise
        except Exception as problem:  # Triton needs a compiler, and its own errors have no common class
            notes.append(f"{ops}: {type(problem).__name__}: {problem}".splitlines()[0])
            continue
        if error < _bound(backbone, noise):
            return replace(found, note="; ".join(notes), error=error)
        notes.append(f"{ops}: logits differ from the model's own by {error:.2g} of their size")
    return Fast(None, "model", "; ".join(notes))


def _carried_out_by(backbone: Backbone, network: Network, ops: str) -> Fast:
    if ops == "plain":
        return Fast(network, ops, "")
    from kvpatch.engine.exact_products import Products
    from kvpatch.engine.reading import Reader

    return Fast(network, ops, "", reader=Reader(backbone, network, Products(is_exact=backbone.batch_invariant)))


def _candidates(backbone: Backbone, network: Network, notes: list[str]) -> list[str]:
    if backbone.device.type != "cuda":
        return ["plain"]
    if importlib.util.find_spec("triton") is None:
        notes.append("Triton is not installed")
        return ["plain"]
    from kvpatch.engine.fused import what_is_unfit

    if reason := what_is_unfit(network):
        notes.append(f"no fused kernels for {reason}")
        return ["plain"]
    return ["fused", "plain"]


def _bound(backbone: Backbone, noise: float) -> float:
    """What a step's logits may differ by. In 16 bits every rounding moves them, the more the deeper the model is: a
    step may move them as far as one more unit in the last place per layer does. A step that is wrong moves them by
    about their size."""
    return 1e-4 if backbone.is_exact else min(MOST_NOISE, max(5e-2, noise))


def _difference(backbone: Backbone, fast: Fast) -> tuple[float, float]:
    """How far a step's logits are from the model's own, over the largest of those; and how far the model's own move
    where each layer's input is off by one unit in the last place."""
    far = min(backbone.geometry.context - 1, _FURTHEST)
    spread = torch.linspace(0, far, _CHECKED_ON + 1).long()
    windows = [w for w in backbone.geometry.windows if w and w + _CHECKED_ON < far]
    # The last token of the second row sees the fourth but not the third, where a window ends.
    edge = spread if not windows else torch.cat([far - min(windows) - 2 + torch.arange(4), far - 3 + torch.arange(4)])
    near = torch.arange(_CHECKED_ON + 1)
    # The near positions come last: a model that sets its own frequencies is left as short texts leave it.
    places = [torch.stack([spread, edge]), torch.stack([near, near - 2])]
    enough = LITTLE_NOISE if backbone.quantization else MOST_NOISE
    found = [_telling_difference(backbone, fast, positions.to(backbone.device), enough) for positions in places]
    return max(error for error, _ in found), max(noise for _, noise in found)


@torch.no_grad()
def _difference_of_products(backbone: Backbone, fast: Fast) -> float:
    """How far products by the first and the last layer's fp8 weights are from those of the model's own modules, over
    the largest number of each."""
    assert fast.network is not None
    ops = fast.make_ops(backbone, Sampling(0.0, 1.0, ()), 1)
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    for index in (0, -1):
        layer, block = fast.network.layers[index], cast(Any, backbone.blocks[index])
        attention, mlp = block.self_attn, block.mlp
        for weight, bias, modules in (
            (layer.qkv, layer.qkv_bias, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (layer.out, None, (attention.o_proj,)),
            (layer.gate_up, None, (mlp.gate_proj, mlp.up_proj)),
            (layer.down, None, (mlp.down_proj,)),
        ):
            x = torch.randn(_CHECKED_ON, weight.shape[1], generator=generator).to(backbone.device, backbone.dtype)
            own = torch.cat([module(x) for module in modules], dim=1).float()
            off = (ops.linear(x, weight, bias).float() - own).abs().max() / own.abs().max().clamp(min=1e-30)
            worst = max(worst, float(off))
    return worst


@torch.no_grad()
def _difference_over_the_cache(backbone: Backbone, fast: Fast) -> float:
    """How far what the first and the last layer's attention gives over keys and values of 8 bits is from what torch
    gives in float32, over the largest number of each."""
    assert fast.network is not None
    generator, sampling = torch.Generator().manual_seed(0), Sampling(0.0, 1.0, ())
    ways = (
        PlainOps(backbone, fast.network, sampling, _CHECKED_ON + 1),
        fast.make_ops(backbone, sampling, _CHECKED_ON + 1),
    )
    worst, first = 0.0, torch.tensor([0, 2])
    for index in (0, -1):
        layer = range(backbone.geometry.layers)[index]
        weights = fast.network.layers[layer]
        shape = (2, backbone.geometry.kv_heads, _CHECKED_ON, backbone.geometry.head_dim)
        keys, values = (torch.randn(shape, generator=generator).to(backbone.device, backbone.dtype) for _ in range(2))
        qkv = torch.randn(2, weights.qkv.shape[0], generator=generator).to(backbone.device, backbone.dtype)
        found = []
        for ops in ways:
            places = _filled(backbone, {layer: (keys, values)}, torch.arange(_CHECKED_ON).expand(2, -1), first)
            ops.begin(places)
            found.append(ops.attend(layer, weights, qkv.clone(), places).float())
        worst = max(worst, float((found[1] - found[0]).abs().max() / found[0].abs().max().clamp(min=1e-30)))
    return worst


def _filled(
    backbone: Backbone,
    cached: dict[int, tuple[torch.Tensor, torch.Tensor]],
    positions: torch.Tensor,
    first: torch.Tensor,
) -> Places:
    """Places for two rows that are to feed one token each behind what is cached: keys and values by layer, at positions
    [2, slots] from the slots `first` [2] on."""
    slots = positions.shape[1]
    places = make_places(backbone, 2, slots, 1, [])
    at = (slice(None), slice(None), slice(0, slots))
    for layer, (keys, values) in cached.items():
        places.keys[layer].write(at, keys)
        places.values[layer].write(at, values)
    places.slot_positions[:, :slots] = positions
    places.first.copy_(first)
    places.position.fill_(slots)
    places.going.fill_(True)
    places.live = slots + 1
    return places


def _telling_difference(
    backbone: Backbone, fast: Fast, positions: torch.Tensor, enough: float = MOST_NOISE
) -> tuple[float, float]:
    """The same at positions [2, cached tokens and one more], below 0 where padded.

    It is that of the first tokens drawn on which the model's own noise is at most `enough`, else of those where it is
    smallest.
    What the step does has no part in the choice.
    """
    drawn: list[tuple[float, float]] = []
    for seed in range(DRAWS):
        drawn.append(_difference_at(backbone, fast, positions, seed))
        if drawn[-1][1] <= enough:
            return drawn[-1]
    return min(drawn, key=lambda of: of[1])


@torch.no_grad()
def _difference_at(backbone: Backbone, fast: Fast, positions: torch.Tensor, seed: int) -> tuple[float, float]:
    """The same for the tokens of a seed."""
    generator = torch.Generator().manual_seed(seed)
    vocabulary, slots = backbone.geometry.vocabulary, _CHECKED_ON
    tokens = torch.randint(vocabulary, (2, slots + 1), generator=generator).to(backbone.device)
    positions = positions.clamp(min=PAD)
    slab = backbone.slab(2, slots + 1)
    backbone.forward(tokens[:, :slots], positions[:, :slots], slab)
    cached = {i: (held.keys[:, :, :slots], held.values[:, :, :slots]) for i, held in enumerate(slab.slab_layers)}
    places = _filled(backbone, cached, positions[:, :slots], (positions[:, :slots] == PAD).sum(dim=1))
    places.feed.copy_(tokens[:, slots])
    places.position.copy_(positions[:, slots])
    own = backbone.logits(backbone.forward(tokens[:, slots:], positions[:, slots:], slab)[:, -1])
    ops = fast.make_ops(backbone, Sampling(0.0, 1.0, ()), int(positions.max()) + 1)
    assert fast.network is not None
    found = backbone.scaled(feed_step(backbone, fast.network, ops, places).float())
    rounded = found.to(backbone.dtype)
    ops.advance(rounded, places)
    chosen = places.token_ids[:, :1]
    if not bool(((chosen >= 0) & (rounded.gather(1, chosen.clamp(min=0)) == rounded.amax(1, keepdim=True))).all()):
        raise ModelError("the chosen token is not the likeliest")
    if fast.reader is not None:
        held = Held(
            [layer.keys[:, :, :slots] for layer in slab.slab_layers],
            [layer.values[:, :, :slots] for layer in slab.slab_layers],
            positions[:, :slots],
        )
        found = torch.stack([found, *_as_read(fast.reader, backbone, tokens, positions, held)])
    with disturbed_residual(backbone):
        moved = backbone.logits(backbone.forward(tokens, positions, backbone.slab(2, slots + 1))[:, -1])
    size = own.abs().max().clamp(min=1e-30)
    return float((own - found).abs().max() / size), float((own - moved).abs().max() / size)


def _as_read(
    reader: Any, backbone: Backbone, tokens: torch.Tensor, positions: torch.Tensor, held: Held
) -> list[torch.Tensor]:
    """Logits [2, vocabulary] behind the last of these tokens as the reader gives them: of all of them, and of the last
    one behind a cache of those before."""
    is_real = (positions != PAD).tolist()
    rows = [
        [(token, at) for token, at, real in zip(*of_row, strict=True) if real]
        for of_row in zip(tokens.tolist(), positions.tolist(), is_real, strict=True)
    ]
    cached = [len(row) - 1 for row in rows]
    whole = reader.read(pack_rows(rows))
    ends = torch.tensor([len(row) for row in rows], device=backbone.device).cumsum(0) - 1
    behind = reader.read(pack_rows([row[-1:] for row in rows], cached, held), held)
    return [reader.logits(states) for states in (whole[ends], behind)]

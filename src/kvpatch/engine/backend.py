"""Can a model take the engine's own decoding step, and which parts carry it out? Asked once a model, by measuring.

A step of the network is compared with the model's own forward pass on a few tokens. Where the two differ, or the model
is not Llama-like, decoding runs the model's own forward pass, and `note` says why.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

import torch

from kvpatch.caches.kvcache import PAD
from kvpatch.engine.step import Ops, PlainOps, Sampling, feed_step, make_places
from kvpatch.errors import ModelError
from kvpatch.models.backbone import Backbone
from kvpatch.models.llamalike import Network, network_of

_CHECKED_ON = 7
"""Cached tokens of the comparison's longer row."""
_FURTHEST = 32_767
"""Furthest position of the comparison: its tables take 16 MB a set of frequencies."""


@dataclass(frozen=True)
class Fast:
    """How a model's decoding step runs: the network and what carries it out ("fused" or "plain"); with no network, the
    model's own forward pass. `error` is the largest difference of a logit from the model's own, over the largest
    logit."""

    network: Network | None
    ops: str
    note: str
    error: float = 0.0

    def weights(self, backbone: Backbone) -> list[torch.Tensor]:
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

            return FusedOps(backbone, self.network, sampling, positions)
        return PlainOps(backbone, self.network, sampling, positions)


def fast_of(backbone: Backbone) -> Fast:
    """How a model's decoding step runs, found out at the first call and again where the model was changed."""
    backbone.catch_up()
    if backbone.state.hooks:
        return Fast(None, "model", "the model carries hooks")
    known = backbone.kept.backend
    if known is None:
        backbone.kept.backend = known = _find(backbone)
    elif known.network is not None:
        known.network.refresh()
    return known


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
            error = _difference(backbone, Fast(network, ops, ""))
        except torch.OutOfMemoryError:
            raise
        except Exception as problem:  # Triton needs a compiler, and its own errors have no common class
            notes.append(f"{ops}: {type(problem).__name__}: {problem}".splitlines()[0])
            continue
        if error < (1e-4 if backbone.dtype == torch.float32 else 5e-2):
            return Fast(network, ops, "; ".join(notes), error)
        notes.append(f"{ops}: logits differ from the model's own by {error:.2g} of their size")
    return Fast(None, "model", "; ".join(notes))


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


def _difference(backbone: Backbone, fast: Fast) -> float:
    """How far a step's logits are from the model's own, over the largest of those."""
    far = min(backbone.geometry.context - 1, _FURTHEST)
    spread = torch.linspace(0, far, _CHECKED_ON + 1).long()
    windows = [w for w in backbone.geometry.windows if w and w + _CHECKED_ON < far]
    # The last token of the second row sees the fourth but not the third, where a window ends.
    edge = spread if not windows else torch.cat([far - min(windows) - 2 + torch.arange(4), far - 3 + torch.arange(4)])
    near = torch.arange(_CHECKED_ON + 1)
    # The near positions come last: a model that sets its own frequencies is left as short texts leave it.
    places = [torch.stack([spread, edge]), torch.stack([near, near - 2])]
    return max(_difference_at(backbone, fast, positions.to(backbone.device)) for positions in places)


@torch.no_grad()
def _difference_at(backbone: Backbone, fast: Fast, positions: torch.Tensor) -> float:
    """The same for tokens at positions [2, cached tokens and one more], below 0 where padded."""
    generator = torch.Generator().manual_seed(0)
    vocabulary, slots = backbone.geometry.vocabulary, _CHECKED_ON
    tokens = torch.randint(vocabulary, (2, slots + 1), generator=generator).to(backbone.device)
    positions = positions.clamp(min=PAD)
    slab = backbone.slab(2, slots + 1)
    backbone.forward(tokens[:, :slots], positions[:, :slots], slab)
    places = make_places(backbone, 2, slots, 1, [])
    for layer, held in enumerate(slab.slab_layers):
        places.keys[layer][:, :, :slots] = held.keys[:, :, :slots]
        places.values[layer][:, :, :slots] = held.values[:, :, :slots]
    places.slot_positions[:, :slots] = positions[:, :slots]
    places.first.copy_((positions[:, :slots] == PAD).sum(dim=1))
    places.feed.copy_(tokens[:, slots])
    places.position.copy_(positions[:, slots])
    places.going.fill_(True)
    places.live = slots + 1
    own = backbone.logits(backbone.forward(tokens[:, slots:], positions[:, slots:], slab)[:, -1])
    ops = fast.make_ops(backbone, Sampling(0.0, 1.0, ()), int(positions.max()) + 1)
    assert fast.network is not None
    found = backbone.scaled(feed_step(backbone, fast.network, ops, places).float())
    rounded = found.to(backbone.dtype)
    ops.advance(rounded, places)
    chosen = places.token_ids[:, :1]
    if not bool(((chosen >= 0) & (rounded.gather(1, chosen.clamp(min=0)) == rounded.amax(1, keepdim=True))).all()):
        raise ModelError("the chosen token is not the likeliest")
    return float((own - found).abs().max() / own.abs().max().clamp(min=1e-30))

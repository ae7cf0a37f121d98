"""A second opinion at load: the engine's logits against transformers' own, where the model may begin to do otherwise.

The engine runs a batch of unequal lengths over its slab, fed in pieces. The reference is the model's own uncached
forward pass, each row alone and unpadded, under its own masks and its own attention. The lengths lie on both sides of
every limit that the configuration names (`limits`). Tokens are random and distinct, so that their order counts.

A model that agrees is not asked again: the answer is stored under a hash of all that it rests on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import inspect
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import kvpatch
from kvpatch.caches.kvcache import PAD
from kvpatch.errors import ModelError
from kvpatch.files import cache_directory, read_json, write_whole
from kvpatch.models.backbone import Backbone
from kvpatch.models.fp8 import whole_activations
from kvpatch.models.limits import lengths_around, named_limits
from kvpatch.models.load import Loaded
from kvpatch.models.placement import told_placement
from kvpatch.models.probe import attention_as_written

BOUND = 1e-4
"""Largest difference of a logit in float32, over the largest logit."""
READ = 16
"""Last positions of each row whose logits are compared; by causality they stand for prompts that end there."""
PIECE = 512
"""Tokens the engine is fed at a time."""
WORK = {"cpu": 3e11, "cuda": 3e13}
"""Multiplications that may be spent on lengths past the shortest two: a few seconds."""
WRITTEN_OUT_AT_MOST = 1024
"""Tokens for which all scores of attention are held at once."""
DRAWS = 3
"""Prompts that a model of experts is given before it is said to differ: rounding may send a token to another expert."""
SMALL_ENOUGH_TO_HASH = 1 << 26
"""Bytes of weights up to which the files' content is hashed; larger ones are known by name, size and time."""


@dataclass(frozen=True)
class Opinion:
    """What was compared, and how far the logits were apart.

    Attributes:
        lengths: tokens of the prompts, rising.
        left_out: limits that would have taken too long to reach, in tokens.
        error, at: largest difference over the largest logit, and the prompt's length there.
        bound: what it must stay under.
    """

    lengths: tuple[int, ...]
    left_out: tuple[int, ...]
    error: float
    at: int
    bound: float

    @property
    def holds(self) -> bool:
        """Whether the logits agree."""
        return self.error <= self.bound

    @property
    def note(self) -> str:
        """How far was compared, for a person."""
        far = f"prompts of {self.lengths[0]} to {self.lengths[-1]} tokens"
        return far + (f", not past {_listed(self.left_out)}: too long" if self.left_out else "")


def second_opinion(backbone: Backbone, loaded: Loaded) -> Opinion:
    """Compare a model's logits with transformers' own, or read what came out when this was done before.

    Raises:
        ModelError: where they differ; names the architecture, the length and the difference.
    """
    place = _place(backbone, loaded)
    if place is not None and (known := _read(*place)):
        return known
    found = compare(backbone)
    if not found.holds:
        if _sees_later_tokens(backbone):
            raise ModelError(
                f"{backbone.geometry.architecture} lets the tokens of a prompt see later ones (bidirectional "
                "attention), which kvpatch can't follow"
            )
        raise ModelError(
            f"{backbone.geometry.architecture}: with {found.at} tokens kvpatch's logits differ from transformers' by "
            f"{found.error:.2g} of the largest logit (rounding explains {found.bound:.2g}); it can't be patched safely"
        )
    if place is not None:
        # Where nothing can be written the model is asked again next time.
        with contextlib.suppress(OSError):
            _write(*place, found)
    return found


@torch.no_grad()
def _sees_later_tokens(backbone: Backbone) -> bool:
    """Whether the model's own logits of a prompt's first tokens change with its last one."""
    row = _tokens(backbone, 9, 0)
    other = torch.cat([row[:-1], row[:1]])
    one, two = (of_model(backbone, ids)[:4] for ids in (row, other))
    return _off(two, one) > 1e-2


@torch.no_grad()
def compare(backbone: Backbone, work: float = 1.0) -> Opinion:
    """Compare logits at every length that matters. Of fp8 weights the activations are left whole, see
    `fp8.whole_activations`.

    Args:
        work: how much may be spent on long prompts, 1 as at load.
    """
    with whole_activations():
        return _compare(backbone, work)


def _compare(backbone: Backbone, work: float) -> Opinion:
    lengths, left_out = lengths_to_compare(backbone, work)
    bound = BOUND if backbone.is_exact else _bound_of_noise(backbone, lengths[-1])
    errors = _errors(backbone, lengths, 0)
    for seed in range(1, DRAWS if _has_experts(backbone.config) else 1):
        if all(error <= bound for error in errors):
            break
        errors = [min(pair) for pair in zip(errors, _errors(backbone, lengths, seed), strict=True)]
    worst = max(range(len(lengths)), key=lambda i: errors[i])
    return Opinion(tuple(lengths), left_out, errors[worst], lengths[worst], bound)


def lengths_to_compare(backbone: Backbone, work: float = 1.0) -> tuple[list[int], tuple[int, ...]]:
    """Lengths of prompts on both sides of every limit, and the limits left out as too dear."""
    geometry = backbone.geometry
    limits = {
        *named_limits(backbone.config, geometry.context),
        *(w for w in (*geometry.windows, *geometry.chunks) if w),
    }
    if geometry.ends_because:
        limits.add(geometry.context)
    reached: list[int] = []
    left = work * WORK.get(backbone.device.type, WORK["cpu"])
    for limit in sorted(limits):
        left -= sum(_work(backbone, length) for length in lengths_around([limit], geometry.context)[-2:])
        if left < 0:
            break
        reached.append(limit)
    return lengths_around(reached, geometry.context), tuple(sorted(limits - set(reached)))


def _work(backbone: Backbone, length: int) -> float:
    """Multiplications of one row, run by the model and by the engine."""
    geometry = backbone.geometry
    weights = sum(p.numel() for p in backbone.blocks.parameters())
    attention = 2 * geometry.layers * geometry.query_heads * geometry.head_dim * length
    return 2 * length * (weights + attention)


def _errors(backbone: Backbone, lengths: Sequence[int], seed: int) -> list[float]:
    """The largest difference of a logit at each length, over the largest logit.

    The engine runs two neighbours of the list at a time, a batch that is unequal and holds little padding.
    """
    rows = [_tokens(backbone, length, seed) for length in lengths]
    expected = [of_model(backbone, row) for row in rows]
    found = [0.0] * len(rows)
    for first in sorted({0, *range(len(rows) % 2, len(rows), 2)}):
        pair = range(first, min(first + 2, len(rows)))
        for place, logits in zip(pair, of_engine(backbone, [rows[i] for i in pair]), strict=True):
            found[place] = max(found[place], _off(logits, expected[place]))
    return found


def of_engine(backbone: Backbone, rows: Sequence[Tensor]) -> list[Tensor]:
    """Logits of the last `READ` tokens of each row by the engine, the rows one batch; [tokens, vocabulary] a row."""
    width = max(map(len, rows))
    tokens = torch.zeros(len(rows), width, dtype=torch.int64, device=backbone.device)
    positions = torch.full_like(tokens, PAD)
    for number, row in enumerate(rows):
        tokens[number, width - len(row) :] = row
        positions[number, width - len(row) :] = torch.arange(len(row), device=backbone.device)
    slab, states = backbone.slab(len(rows), width), []
    # The last piece is short, so that it looks back on slots of a pass before.
    ends = [*range(PIECE, width - READ, PIECE), *([width - READ] if width > READ else []), width]
    for low, high in zip([0, *ends], ends, strict=False):
        states.append(backbone.forward(tokens[:, low:high], positions[:, low:high], slab))
    logits = backbone.logits(torch.cat(states, dim=1)[:, -READ:])
    return [logits[number, -min(READ, len(row)) :] for number, row in enumerate(rows)]


def of_model(backbone: Backbone, row: Tensor) -> Tensor:
    """The same of one row by transformers alone, uncached."""
    hf: Any = backbone.hf
    less = {"logits_to_keep": READ} if "logits_to_keep" in inspect.signature(hf.forward).parameters else {}
    with attention_as_written(hf):
        return hf(input_ids=row[None], use_cache=False, **less)[0][0, -READ:].float()


@torch.no_grad()
def own_attentions_differ(backbone: Backbone, length: int) -> float:
    """How far a model's own logits move from its usual attention to the one that its file writes out, at a length; no
    part of ours in it. What only rounds differently tells how much the model enlarges rounding."""
    row = _tokens(backbone, min(length, WRITTEN_OUT_AT_MOST), 0)
    usual = of_model(backbone, row)
    with attention_as_written(backbone.hf, everywhere=True):
        return _off(of_model(backbone, row), usual)


def _tokens(backbone: Backbone, length: int, seed: int) -> Tensor:
    """Random token ids, all distinct as far as the vocabulary goes."""
    generator = torch.Generator().manual_seed(seed)
    embedding: Any = backbone.hf.get_input_embeddings()
    known = min(backbone.geometry.vocabulary, len(embedding.weight))
    turns = [torch.randperm(known, generator=generator) for _ in range(-(-length // known))]
    return torch.cat(turns)[:length].to(backbone.device)


def _bound_of_noise(backbone: Backbone, longest: int) -> float:
    """Ten times what rounding alone does to the model's own logits, at least one rounding: the same row alone, and with
    one more token behind it or another row beside it, which takes products of another shape. Products of quantised
    weights go other ways for one token and for few, so there the row's first tokens by themselves are compared too."""
    row = _tokens(backbone, min(longest, backbone.geometry.context - 1), 0)
    alone, longer = of_model(backbone, row), torch.cat([row, row[:1]])
    hf: Any = backbone.hf
    off = []
    for rows in (longer[None], torch.stack([row, row.flip(0)])):
        with attention_as_written(hf):
            logits = hf(input_ids=rows, use_cache=False)[0][0, : len(row)]
        off.append(_off(logits[-READ:].float(), alone))
    for first in (1, READ) if backbone.quantization else ():
        with attention_as_written(hf):
            few, many = (hf(input_ids=of[None], use_cache=False)[0][0, :first].float() for of in (row[:first], row))
        off.append(_off(few, many))
    return 10 * max(*off, backbone.rounding)


def _off(found: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest expected value; infinite where either is no number."""
    off = float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-30))
    return off if off == off else float("inf")


def _has_experts(config: Any) -> bool:
    """Whether tokens are sent to some of many experts, so that a hair's breadth decides."""
    return any("expert" in name and isinstance(value, int) and value > 1 for name, value in config.to_dict().items())


# --- what is remembered ---


def _place(backbone: Backbone, loaded: Loaded) -> tuple[Path, str] | None:
    """The file and key under which a model's opinion is kept; None where what it rests on has no hash."""
    weights = _identity(loaded)
    if weights is None:
        return None
    device = backbone.device
    # Where a model lies says nothing of it.
    settings = {name: value for name, value in backbone.hf.config.to_dict().items() if name != "_name_or_path"}
    parts = [
        weights,
        json.dumps(settings, sort_keys=True, default=str),
        str(backbone.hf.config._attn_implementation),
        f"{backbone.dtype} {backbone.quantization} {told_placement(backbone.hf)}",
        torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        kvpatch.__version__,
        *(version(name) for name in ("transformers", "torch")),
        _own_sources(),
    ]
    key = hashlib.sha256("\n".join(parts).encode()).hexdigest()
    if loaded.is_converted and loaded.directory is not None:
        return loaded.directory / "second_opinion.json", key
    return cache_directory() / "opinions" / f"{key[:32]}.json", key


def _identity(loaded: Loaded) -> str | None:
    """What tells a model's weights and code from others': its files, or the hub's commit."""
    if loaded.is_held:
        return None  # whoever made it may have changed its weights or its code
    if loaded.directory is None:
        commit = getattr(loaded.hf.config, "_commit_hash", None)
        return f"{loaded.name}@{commit}" if commit else None
    weights = sorted(p for ending in ("safetensors", "bin") for p in loaded.directory.glob(f"*.{ending}"))
    is_small = sum(p.stat().st_size for p in weights) <= SMALL_ENOUGH_TO_HASH
    total = hashlib.sha256()
    for path in [*weights, *sorted(loaded.directory.glob("*.py"))]:
        total.update(path.name.encode())
        if is_small or path.suffix == ".py":
            total.update(path.read_bytes())
        else:
            total.update(f"{path.resolve()} {path.stat().st_size} {path.stat().st_mtime_ns}".encode())
    return total.hexdigest()


def _own_sources() -> str:
    """Hash of the code that the engine's logits come from: a checkout changes without its version changing."""
    total = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        total.update(path.read_bytes())
    return total.hexdigest()


def _kept(path: Path) -> dict[str, Any]:
    """What a file holds, by key; nothing where it is not there or damaged."""
    try:
        kept = read_json(path)
    except (OSError, ValueError):
        return {}
    return kept if isinstance(kept, dict) else {}


def _read(path: Path, key: str) -> Opinion | None:
    try:
        settings: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in _kept(path)[key].items()}
        return Opinion(**settings)
    except (KeyError, TypeError, AttributeError):
        return None  # never asked, or damaged: ask again


def _write(path: Path, key: str, opinion: Opinion) -> None:
    write_whole(path, json.dumps({**_kept(path), key: dataclasses.asdict(opinion)}, indent=1).encode())


def _listed(numbers: Sequence[int]) -> str:
    return " and ".join(map(str, numbers))

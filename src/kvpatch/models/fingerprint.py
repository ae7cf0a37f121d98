"""Hashes that say which model it is: of the weights as they are in memory, and of the tokenizer's vocabulary.

A tensor's bytes are hashed in pieces, in threads; then names, types, shapes and pieces in the order of the names. So
the hash depends on what is loaded alone: not on files, shards, device or threads.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

from kvpatch.models.placement import with_numbers

PIECE = 8 << 20
"""Bytes hashed at a time; part of the hash."""


def tensors_sha256(model: nn.Module) -> str:
    """Hash of every parameter and persistent buffer, as it is in memory now.

    Tied weights stand in it under each of their names, so that it is the same whether they share memory or not.
    """
    tensors = {name: tensor for name, tensor in model.state_dict().items() if isinstance(tensor, Tensor)}
    # Tensors that share memory, as tied weights do, are hashed once.
    distinct = {_place(tensor): tensor for tensor in tensors.values() if not tensor.is_meta}
    with ThreadPoolExecutor(max_workers=min(16, os.cpu_count() or 1)) as threads:  # hashing lets go of the interpreter
        pieces = {place: [threads.submit(_digest, piece) for piece in _pieces(t)] for place, t in distinct.items()}
        digests = {place: b"".join(piece.result() for piece in found) for place, found in pieces.items()}
        offloaded = {
            name: b"".join(threads.map(_digest, _pieces(tensor)))
            for name, tensor in with_numbers(model, ((n, t) for n, t in tensors.items() if t.is_meta))
        }
    total = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        own = offloaded[name] if tensor.is_meta else digests[_place(tensor)]
        total.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode() + own)
    return total.hexdigest()


def vocabulary_sha256(tokenizer: Any) -> str:
    """Hash of how a tokenizer turns text into tokens, whatever it was called with before (padding, truncation)."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        text = json.dumps(tokenizer.get_vocab(), sort_keys=True)
    else:
        # Padding and truncation, which a call sets, stand before the added tokens; all the rest behind.
        text = backend.to_str().partition('"added_tokens"')[2]
    return hashlib.sha256(text.encode()).hexdigest()


def identity(weights: str, tokenizer: str) -> str:
    """What the caches of a model carry, to be told from another's: 32 hex digits of both hashes."""
    return hashlib.sha256(f"{weights}:{tokenizer}".encode()).hexdigest()[:32]


def _place(tensor: Tensor) -> tuple[object, ...]:
    return tensor.data_ptr(), tensor.dtype, tensor.device, tuple(tensor.shape), tensor.stride()


def _pieces(tensor: Tensor) -> Iterator[Tensor]:
    flat = tensor.detach().contiguous().flatten()
    step = max(1, PIECE // tensor.element_size())
    return (flat[at : at + step] for at in range(0, len(flat), step))


def _digest(piece: Tensor) -> bytes:
    return hashlib.sha256(piece.cpu().view(torch.uint8).numpy().data).digest()

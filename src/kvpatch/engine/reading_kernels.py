"""The parts of a forward pass over many tokens that are no matrix product, in Triton; and a product of fixed order.

Tokens are packed: those of all rows stand one behind the other, without padding. What a token gets depends on its own
row alone, and is summed in an order that neither the other rows nor their number can change: attention walks a row's
keys from its first token on, in blocks that are counted from there.

This file is imported only where there is a CUDA device and Triton.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvpatch.engine.kernels import _logits_of
from kvpatch.models.fp8_kernels import store_row

KEY_BLOCK = 64
QUERY_BLOCK = 64
"""Rows of the product of queries and keys: query heads of a KV head times queries."""
VOCABULARY_BLOCK = 4096


@triton.jit
def add_norm_kernel(
    hidden,  # [tokens, width], changed in place
    added,  # [tokens, width]
    after,  # [width]
    weight,  # [width]
    out,  # [tokens, width], in the type of hidden or e4m3
    scale,  # [tokens], where `out` is e4m3
    epsilon,
    width,
    HAS_AFTER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """hidden += added, where Gemma norms what is added; then the norm of the sum."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < width
    kind = hidden.dtype.element_ty
    x = tl.load(added + row * width + at, mask=inside, other=0.0).to(tl.float32)
    if HAS_AFTER:
        x = x * tl.rsqrt(tl.sum(x * x, axis=0) / width + epsilon)
        x = (x * tl.load(after + at, mask=inside, other=0.0)).to(kind).to(tl.float32)
    x = (x + tl.load(hidden + row * width + at, mask=inside, other=0.0).to(tl.float32)).to(kind)
    tl.store(hidden + row * width + at, x, mask=inside)
    x = x.to(tl.float32)
    x = x * tl.rsqrt(tl.sum(x * x, axis=0) / width + epsilon)
    x = (x * tl.load(weight + at, mask=inside, other=0.0)).to(kind)
    if out.dtype.element_ty == tl.float8e4nv:
        store_row(x.to(tl.float32), out, scale, row, width, BLOCK)
    else:
        tl.store(out + row * width + at, x, mask=inside)


@triton.jit
def turn_kernel(
    qkv,  # [tokens, (GROUP + 2) * KV_HEADS * 2 * HALF], changed in place
    cos,  # [positions, HALF]
    sin,
    position,  # [tokens]
    query_norm,  # [2 * HALF]
    key_norm,
    epsilon,
    QUERY_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEADS_BLOCK: tl.constexpr,
    HALF: tl.constexpr,
    HAS_NORM: tl.constexpr,
):
    """Norm and turn the query heads and the keys of one token."""
    DIM: tl.constexpr = 2 * HALF
    token = tl.program_id(0).to(tl.int64)
    kind = qkv.dtype.element_ty
    half = tl.arange(0, HALF)
    heads = tl.arange(0, HEADS_BLOCK)
    inside = (heads < QUERY_HEADS + KV_HEADS)[:, None]
    at = qkv + token * (QUERY_HEADS + 2 * KV_HEADS) * DIM + heads[:, None] * DIM + half[None, :]
    x1 = tl.load(at, mask=inside, other=0.0).to(tl.float32)  # [HEADS_BLOCK, HALF]
    x2 = tl.load(at + HALF, mask=inside, other=0.0).to(tl.float32)
    if HAS_NORM:
        is_query = (heads < QUERY_HEADS)[:, None]
        factor = tl.rsqrt((tl.sum(x1 * x1, axis=1) + tl.sum(x2 * x2, axis=1)) / DIM + epsilon)[:, None]
        w1 = tl.where(is_query, tl.load(query_norm + half)[None, :], tl.load(key_norm + half)[None, :])
        w2 = tl.where(is_query, tl.load(query_norm + HALF + half)[None, :], tl.load(key_norm + HALF + half)[None, :])
        x1 = (x1 * factor * w1).to(kind).to(tl.float32)
        x2 = (x2 * factor * w2).to(kind).to(tl.float32)
    place = tl.load(position + token).to(tl.int64)
    c = tl.load(cos + place * HALF + half)[None, :]
    s = tl.load(sin + place * HALF + half)[None, :]
    tl.store(at, (x1 * c - x2 * s).to(kind), mask=inside)
    tl.store(at + HALF, (x2 * c + x1 * s).to(kind), mask=inside)


@triton.jit
def packed_attend_kernel(
    qkv,  # [tokens, (GROUP + 2) * KV_HEADS * DIM], turned
    cached_keys,  # [rows, KV_HEADS, slots, DIM], turned
    cached_values,
    out,  # [tokens, GROUP * KV_HEADS * DIM]
    tiles,  # [tiles, 8], see `pack.Segments.tiles`
    position,  # [tokens]
    cached_position,  # [rows, slots]
    scale,
    slots,
    key_row,
    key_head,
    key_slot,
    value_row,
    value_head,
    value_slot,
    window,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_BLOCK: tl.constexpr,
    QUERIES: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_CACHE: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One KV head of one tile: queries of one row that follow one another.

    The row's keys are counted from its first token: `cached` of them lie in the cache from slot `first` on, then comes
    the pending token where there is one, then the tokens of the tile's own segment. The tile's first query is number
    `index`.
    """
    tile = tiles + tl.program_id(0).to(tl.int64) * 8
    head = tl.program_id(1)
    row = tl.load(tile).to(tl.int64)
    first = tl.load(tile + 1)
    cached = tl.load(tile + 2)
    pending = tl.load(tile + 3)
    segment = tl.load(tile + 4)
    query = tl.load(tile + 5)
    index = tl.load(tile + 6)
    count = tl.load(tile + 7)
    kind = qkv.dtype.element_ty
    STRIDE: tl.constexpr = (GROUP + 2) * KV_HEADS * DIM
    dims = tl.arange(0, DIM)
    rows = tl.arange(0, QUERIES * GROUP_BLOCK)
    of_query = rows // GROUP_BLOCK
    of_group = rows % GROUP_BLOCK
    is_query = (of_query < count) & (of_group < GROUP)
    tokens = (query + of_query).to(tl.int64)
    q = tl.load(
        qkv + tokens[:, None] * STRIDE + (head * GROUP + of_group)[:, None] * DIM + dims[None, :],
        mask=is_query[:, None],
        other=0.0,
    )
    if HAS_WINDOW:
        at = tl.load(position + tokens, mask=is_query, other=0)
    has_pending = (pending >= 0).to(tl.int32)
    best = tl.full([QUERIES * GROUP_BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES * GROUP_BLOCK], tl.float32)
    mixed = tl.zeros([QUERIES * GROUP_BLOCK, DIM], tl.float32)
    end = index + count
    for start in range(0, end, BLOCK):
        number = start + tl.arange(0, BLOCK)
        is_old = number < cached
        is_new = (number >= cached) & (number < end)
        is_pending = (has_pending == 1) & (number == cached)
        new = tl.where(is_pending, pending, segment + number - cached - has_pending).to(tl.int64)
        k = tl.load(
            qkv + new[None, :] * STRIDE + (GROUP * KV_HEADS + head) * DIM + dims[:, None],
            mask=is_new[None, :],
            other=0.0,
        )  # [DIM, BLOCK]
        v = tl.load(
            qkv + new[:, None] * STRIDE + ((GROUP + 1) * KV_HEADS + head) * DIM + dims[None, :],
            mask=is_new[:, None],
            other=0.0,
        )  # [BLOCK, DIM]
        if HAS_CACHE:
            slot = (first + number).to(tl.int64)
            k_old = tl.load(
                cached_keys + row * key_row + head * key_head + slot[None, :] * key_slot + dims[:, None],
                mask=is_old[None, :],
                other=0.0,
            )
            v_old = tl.load(
                cached_values + row * value_row + head * value_head + slot[:, None] * value_slot + dims[None, :],
                mask=is_old[:, None],
                other=0.0,
            )
            k = tl.where(is_old[None, :], k_old, k)
            v = tl.where(is_old[:, None], v_old, v)
        scores = tl.dot(q, k, input_precision=PRECISION) * scale
        may = number[None, :] <= (index + of_query)[:, None]
        if HAS_WINDOW:
            seen = tl.load(position + new, mask=is_new, other=0)
            if HAS_CACHE:
                seen_old = tl.load(cached_position + row * slots + slot, mask=is_old, other=0).to(seen.dtype)
                seen = tl.where(is_old, seen_old, seen)
            may = may & (at[:, None] - seen[None, :] < window)
        scores = tl.where(may, scores, float("-inf"))
        higher = tl.maximum(best, tl.max(scores, axis=1))
        safe = tl.where(higher == float("-inf"), 0.0, higher)  # a block that a window leaves out
        shrink = tl.exp(best - safe)
        share = tl.exp(scores - safe[:, None])
        total = total * shrink + tl.sum(share, axis=1)
        mixed = tl.dot(share.to(kind), v, mixed * shrink[:, None], input_precision=PRECISION)
        best = higher
    to = out + tokens[:, None] * (GROUP * KV_HEADS * DIM) + (head * GROUP + of_group)[:, None] * DIM + dims[None, :]
    tl.store(to, (mixed / total[:, None]).to(kind), mask=is_query[:, None])


@triton.jit
def read_kernel(
    logits,  # [states, vocabulary]
    totals,  # [states]
    means,  # [states]
    vocabulary,
    factor,
    cap,
    HAS_FACTOR: tl.constexpr,
    HAS_CAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Of one state the log of its softmax's sum, and the mean of its logits under its probabilities."""
    row = tl.program_id(0).to(tl.int64)
    largest = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    moment = tl.zeros([BLOCK], tl.float32)
    for start in range(0, vocabulary, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < vocabulary
        raw = tl.load(logits + row * vocabulary + at, mask=inside, other=0.0)
        x = tl.where(inside, _logits_of(raw, factor, cap, HAS_FACTOR, HAS_CAP), float("-inf"))
        higher = tl.maximum(largest, x)
        safe = tl.where(higher == float("-inf"), 0.0, higher)
        shrink = tl.exp(largest - safe)
        share = tl.exp(x - safe)
        total = total * shrink + share
        moment = moment * shrink + tl.where(share > 0, share * x, 0.0)
        largest = higher
    top = tl.max(largest, axis=0)
    shrink = tl.exp(largest - top)
    whole = tl.sum(total * shrink, axis=0)
    tl.store(totals + row, tl.log(whole) + top)
    tl.store(means + row, tl.sum(moment * shrink, axis=0) / whole)


@triton.jit
def product_kernel(
    x,  # [tokens, inner]
    weight,  # [outputs, inner]
    out,  # [tokens, outputs]
    tokens,
    outputs,
    inner,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """x @ weight.T, each number summed over `inner` from its first to its last, whatever the number of tokens."""
    pid = tl.program_id(0)
    down, across = tl.cdiv(tokens, BLOCK_M), tl.cdiv(outputs, BLOCK_N)
    band = pid // (GROUP * across)
    high = min(down - band * GROUP, GROUP)
    m = ((band * GROUP + (pid % (GROUP * across)) % high) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    n = ((pid % (GROUP * across)) // high * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, inner, BLOCK_K):
        inside = start + k < inner
        a = tl.load(
            x + m[:, None] * inner + start + k[None, :], mask=(m < tokens)[:, None] & inside[None, :], other=0.0
        )
        b = tl.load(
            weight + n[None, :] * inner + start + k[:, None], mask=(n < outputs)[None, :] & inside[:, None], other=0.0
        )
        sums = tl.dot(a, b, sums, input_precision=PRECISION)
    to = out + m[:, None] * outputs + n[None, :]
    tl.store(to, sums.to(out.dtype.element_ty), mask=(m < tokens)[:, None] & (n < outputs)[None, :])

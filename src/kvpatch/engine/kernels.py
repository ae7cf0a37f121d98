"""The parts of a decoding step that are no matrix product, in Triton: one pass over memory each.

`FusedOps` does what `step.PlainOps` does. Attention turns queries and keys, writes the new slot and reads the live
slots of its own row alone, from `first` to the row's last, so that no length bucket is needed; sampling reads the
logits once, for the choice and its log-probability together. Everything is float32 inside and rounded once.

This file is imported only where there is a CUDA device and Triton.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvpatch.models.fp8_kernels import power_of, store_row

SLOT_BLOCK = 64
VOCABULARY_BLOCK = 2048
VOCABULARY_SPLIT = 16_384
INNER_BLOCK = 1024


@triton.jit
def norm_kernel(hidden, weight, out, scale, epsilon, width, BLOCK: tl.constexpr):
    """out: in the type of `hidden`, or e4m3 with a scale for each row."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < width
    x = tl.load(hidden + row * width + at, mask=inside, other=0.0).to(tl.float32)
    x = x * tl.rsqrt(tl.sum(x * x, axis=0) / width + epsilon)
    x = (x * tl.load(weight + at, mask=inside, other=0.0)).to(hidden.dtype.element_ty)
    if out.dtype.element_ty == tl.float8e4nv:
        store_row(x.to(tl.float32), out, scale, row, width, BLOCK)
    else:
        tl.store(out + row * width + at, x, mask=inside)


@triton.jit
def gated_kernel(gate_up, out, inner, IS_SILU: tl.constexpr, BLOCK: tl.constexpr):
    """A stretch of a row."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + row * inner + at, _gated(gate_up, row, inner, at, IS_SILU), mask=at < inner)


@triton.jit
def rounded_gated_kernel(gate_up, numbers, scale, inner, IS_SILU: tl.constexpr, BLOCK: tl.constexpr):
    """A whole row, since its scale follows from its largest number."""
    row = tl.program_id(0).to(tl.int64)
    made = _gated(gate_up, row, inner, tl.arange(0, BLOCK), IS_SILU)
    store_row(made.to(tl.float32), numbers, scale, row, inner, BLOCK)


@triton.jit
def _gated(gate_up, row, inner, at, IS_SILU: tl.constexpr):
    """activation(gate) * up at these places of a row, in the type of gate_up [rows, 2 * inner]."""
    kind = gate_up.dtype.element_ty
    inside = at < inner
    gate = tl.load(gate_up + row * 2 * inner + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * inner + inner + at, mask=inside, other=0.0).to(tl.float32)
    if IS_SILU:
        active = gate / (1.0 + tl.exp(-gate))
    else:  # gelu, tanh form: 0.5 x (1 + tanh(u)) = x sigmoid(2 u)
        u = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
        active = gate / (1.0 + tl.exp(-2.0 * u))
    # The model rounds the activation before it multiplies.
    return (active.to(kind).to(tl.float32) * up).to(kind)


@triton.jit
def attend_kernel(
    qkv,  # [places, (GROUP + 2) * KV_HEADS * head_dim]
    keys,  # [places, KV_HEADS, capacity, head_dim], in the type of qkv or e4m3
    values,
    key_scale,  # [places, KV_HEADS, capacity], where keys and values are e4m3
    value_scale,
    out,  # [places, GROUP * KV_HEADS * head_dim]
    cos,  # [positions, HALF]
    sin,
    first,
    step,
    position,
    going,
    slot_positions,  # [places, capacity]
    query_norm,
    key_norm,
    steering,  # [places, KV_HEADS, head_dim]
    scale,
    epsilon,
    area,
    capacity,
    window,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_BLOCK: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_STEERING: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One KV head of one place. Heads come as halves, since RoPE pairs dimension i with i + HALF.

    Keys and values of 8 bits are multiplied in float16, which has all numbers of e4m3 and which a GPU turns them into
    at once; their scales are multiplied in float32. Queries go into its range by a power of two, which changes no
    digit, and a block's scales of values over the largest of them.
    """
    DIM: tl.constexpr = 2 * HALF
    place = (tl.program_id(0) // KV_HEADS).to(tl.int64)
    head = tl.program_id(0) % KV_HEADS
    kind = qkv.dtype.element_ty
    IN_8_BITS: tl.constexpr = keys.dtype.element_ty == tl.float8e4nv
    half = tl.arange(0, HALF)
    whole = tl.arange(0, DIM)
    group = tl.arange(0, GROUP_BLOCK)
    is_query = (group < GROUP)[:, None]
    at = tl.load(position + place)
    last = area + tl.load(step + place)  # the slot this token goes to
    row = qkv + place * (GROUP + 2) * KV_HEADS * DIM
    queries = row + (head * GROUP + group)[:, None] * DIM + half[None, :]
    q1 = tl.load(queries, mask=is_query, other=0.0).to(tl.float32)  # [GROUP_BLOCK, HALF]
    q2 = tl.load(queries + HALF, mask=is_query, other=0.0).to(tl.float32)
    key = row + (GROUP * KV_HEADS + head) * DIM + half
    k1 = tl.load(key).to(tl.float32)  # [HALF]
    k2 = tl.load(key + HALF).to(tl.float32)
    v = tl.load(row + ((GROUP + 1) * KV_HEADS + head) * DIM + whole).to(tl.float32)  # [DIM]
    if HAS_NORM:
        q_factor = tl.rsqrt((tl.sum(q1 * q1, axis=1) + tl.sum(q2 * q2, axis=1)) / DIM + epsilon)[:, None]
        q1 = (q1 * q_factor * tl.load(query_norm + half)[None, :]).to(kind).to(tl.float32)
        q2 = (q2 * q_factor * tl.load(query_norm + HALF + half)[None, :]).to(kind).to(tl.float32)
        k_factor = tl.rsqrt((tl.sum(k1 * k1, axis=0) + tl.sum(k2 * k2, axis=0)) / DIM + epsilon)
        k1 = (k1 * k_factor * tl.load(key_norm + half)).to(kind).to(tl.float32)
        k2 = (k2 * k_factor * tl.load(key_norm + HALF + half)).to(kind).to(tl.float32)
    if HAS_STEERING:
        v += tl.load(steering + (place * KV_HEADS + head) * DIM + whole).to(tl.float32)
    c = tl.load(cos + at * HALF + half)
    s = tl.load(sin + at * HALF + half)
    turned1 = (q1 * c[None, :] - q2 * s[None, :]).to(kind)
    turned2 = (q2 * c[None, :] + q1 * s[None, :]).to(kind)
    new1 = (k1 * c - k2 * s).to(kind)
    new2 = (k2 * c + k1 * s).to(kind)
    v = v.to(kind)
    first_slot = (place * KV_HEADS + head) * capacity
    base = first_slot * DIM
    slot = base + last * DIM
    if IN_8_BITS:
        new1, new2, v = new1.to(tl.float32), new2.to(tl.float32), v.to(tl.float32)
        k_scale, k_inverse = power_of(tl.maximum(tl.max(tl.abs(new1), axis=0), tl.max(tl.abs(new2), axis=0)))
        v_scale, v_inverse = power_of(tl.max(tl.abs(v), axis=0))
        new1, new2 = (new1 * k_inverse).to(tl.float8e4nv), (new2 * k_inverse).to(tl.float8e4nv)
        v = (v * v_inverse).to(tl.float8e4nv)
        tl.store(key_scale + first_slot + last, k_scale)
        tl.store(value_scale + first_slot + last, v_scale)
    tl.store(keys + slot + half, new1)
    tl.store(keys + slot + HALF + half, new2)
    tl.store(values + slot + whole, v)
    if tl.load(going + place) != 0:
        # The new slot opens the running softmax; the slots before it follow block by block.
        best = tl.sum(turned1.to(tl.float32) * new1.to(tl.float32)[None, :], axis=1)
        best = (best + tl.sum(turned2.to(tl.float32) * new2.to(tl.float32)[None, :], axis=1)) * scale
        total = tl.full([GROUP_BLOCK], 1.0, tl.float32)
        mixed = tl.zeros([GROUP_BLOCK, DIM], tl.float32) + v.to(tl.float32)[None, :]
        if IN_8_BITS:
            best = best * k_scale
            mixed = mixed * v_scale
            single1, single2 = turned1.to(tl.float32), turned2.to(tl.float32)
            largest_query = tl.maximum(tl.max(tl.abs(single1), axis=1), tl.max(tl.abs(single2), axis=1))
            exponent = largest_query.to(tl.int32, bitcast=True) & 0x7F800000
            inverse = (0x7F000000 - exponent).to(tl.float32, bitcast=True)  # of the power of two
            query1 = (single1 * inverse[:, None]).to(tl.float16)
            query2 = (single2 * inverse[:, None]).to(tl.float16)
            of_queries = exponent.to(tl.float32, bitcast=True) * scale
        for start in range(tl.load(first + place), last, BLOCK):
            slots = start + tl.arange(0, BLOCK)
            may = slots < last
            offsets = base + slots.to(tl.int64) * DIM
            block1 = tl.load(keys + offsets[None, :] + half[:, None], mask=may[None, :], other=0.0)  # [HALF, BLOCK]
            block2 = tl.load(keys + offsets[None, :] + HALF + half[:, None], mask=may[None, :], other=0.0)
            if IN_8_BITS:
                of_keys = tl.load(key_scale + first_slot + slots, mask=may, other=0.0)
                scores = tl.dot(query1, block1.to(tl.float16))
                scores = tl.dot(query2, block2.to(tl.float16), scores) * of_queries[:, None] * of_keys[None, :]
            else:
                scores = tl.dot(turned1, block1, input_precision=PRECISION)
                scores = tl.dot(turned2, block2, scores, input_precision=PRECISION) * scale
            if HAS_WINDOW:
                seen = tl.load(slot_positions + place * capacity + slots, mask=may, other=0)
                may = may & (at - seen < window)
            scores = tl.where(may[None, :], scores, float("-inf"))
            higher = tl.maximum(best, tl.max(scores, axis=1))
            shrink = tl.exp(best - higher)
            share = tl.exp(scores - higher[:, None])
            total = total * shrink + tl.sum(share, axis=1)
            block = tl.load(values + offsets[:, None] + whole[None, :], mask=(slots < last)[:, None], other=0.0)
            if IN_8_BITS:
                of_values = tl.load(value_scale + first_slot + slots, mask=slots < last, other=0.0)
                largest = tl.max(of_values, axis=0)
                share = (share * (of_values / largest)[None, :]).to(tl.float16)
                mixed = mixed * shrink[:, None] + tl.dot(share, _settled(block.to(tl.float16))) * largest
            else:
                mixed = tl.dot(share.to(kind), block, mixed * shrink[:, None], input_precision=PRECISION)
            best = higher
        to = out + place * GROUP * KV_HEADS * DIM + (head * GROUP + group)[:, None] * DIM + whole[None, :]
        tl.store(to, (mixed / total[:, None]).to(kind), mask=is_query)
    else:
        to = out + place * GROUP * KV_HEADS * DIM + (head * GROUP + group)[:, None] * DIM + whole[None, :]
        tl.store(to, tl.zeros([GROUP_BLOCK, DIM], kind), mask=is_query)


@triton.jit
def _settled(x):
    """x, float16, which Triton then turns into a product's operand as it is. It would turn numbers of 8 bits first, one
    byte after the other, which takes a quarter more instructions in all."""
    return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=tl.float16, is_pure=False, pack=2)


@triton.jit
def _mixed_bits(x):
    """lowbias32, as in sampling.py, on uint32."""
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= 0x846CA68B
    x ^= x >> 16
    return x


@triton.jit
def _logits_of(raw, factor, cap, HAS_FACTOR: tl.constexpr, HAS_CAP: tl.constexpr):
    x = raw.to(tl.float32)
    if HAS_FACTOR:
        x = x * factor
    if HAS_CAP:
        x = (2.0 / (1.0 + tl.exp(-2.0 * (x / cap))) - 1.0) * cap
    return x


@triton.jit
def choose_kernel(
    logits,  # [places, vocabulary]
    seeds,
    step,
    numbers,  # [3, places, splits]
    tokens,  # [places, splits]
    vocabulary,
    splits,
    temperature,
    factor,
    cap,
    IS_GREEDY: tl.constexpr,
    HAS_FACTOR: tl.constexpr,
    HAS_CAP: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The best token of one stretch of the vocabulary, and the stretch's part of the softmax's sum."""
    place = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    seed = tl.load(seeds + place)
    golden = tl.full([], 2654435769, tl.uint32)
    counter = (tl.load(step + place) + 1).to(tl.uint32) * golden
    low = (seed & 0xFFFFFFFF).to(tl.uint32)
    key = _mixed_bits(_mixed_bits(_mixed_bits(low) ^ (seed >> 32).to(tl.uint32)) ^ _mixed_bits(counter))
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    winner = tl.full([BLOCK], 0, tl.int32)
    largest = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(split * SPLIT, min(vocabulary, split * SPLIT + SPLIT), BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < vocabulary
        raw = tl.load(logits + place * vocabulary + at, mask=inside, other=0.0)
        x = _logits_of(raw, factor, cap, HAS_FACTOR, HAS_CAP)
        x = tl.where(inside, x, float("-inf"))
        higher = tl.maximum(largest, x)
        total = total * tl.exp(largest - higher) + tl.exp(x - higher)
        total = tl.where(higher == float("-inf"), 0.0, total)
        largest = higher
        if IS_GREEDY:
            scored = x
        else:
            bits = _mixed_bits((at.to(tl.uint32) * golden) ^ key)
            uniform = ((bits >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07
            scored = x / temperature - tl.log(-tl.log(uniform))
        is_better = scored > best
        winner = tl.where(is_better, at, winner)
        best = tl.where(is_better, scored, best)
    highest = tl.max(best, axis=0)
    # Of equal scores the first token wins, as in argmax.
    token = tl.min(tl.where(best == highest, winner, 2147483647), axis=0)
    top = tl.max(largest, axis=0)
    part = tl.sum(tl.where(largest == float("-inf"), 0.0, total * tl.exp(largest - top)), axis=0)
    to = place * splits + split
    stride = tl.num_programs(0).to(tl.int64) * splits
    tl.store(numbers + to, highest)
    tl.store(numbers + stride + to, top)
    tl.store(numbers + 2 * stride + to, part)
    tl.store(tokens + to, token)


@triton.jit
def note_kernel(
    logits,
    numbers,
    tokens,
    token_ids,  # [places, limit]
    logprobs,
    feed,
    position,
    step,
    going,
    ends,
    vocabulary,
    splits,
    limit,
    end_tokens,
    factor,
    cap,
    HAS_FACTOR: tl.constexpr,
    HAS_CAP: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Join the stretches, write down the token and its log-probability, and feed it next."""
    place = tl.program_id(0).to(tl.int64)
    if tl.load(going + place) != 0:
        at = tl.arange(0, SPLITS)
        inside = at < splits
        stride = tl.num_programs(0).to(tl.int64) * splits
        score = tl.load(numbers + place * splits + at, mask=inside, other=float("-inf"))
        top = tl.load(numbers + stride + place * splits + at, mask=inside, other=float("-inf"))
        part = tl.load(numbers + 2 * stride + place * splits + at, mask=inside, other=0.0)
        token = tl.load(tokens + place * splits + at, mask=inside, other=2147483647)
        highest = tl.max(score, axis=0)
        chosen = tl.min(tl.where(score == highest, token, 2147483647), axis=0)
        chosen = tl.where(chosen < vocabulary, chosen, 0)  # a row without a finite logit
        largest = tl.max(top, axis=0)
        total = tl.log(tl.sum(part * tl.exp(top - largest), axis=0)) + largest
        raw = tl.load(logits + place * vocabulary + chosen)
        logprob = _logits_of(raw, factor, cap, HAS_FACTOR, HAS_CAP) - total
        now = tl.load(step + place)
        tl.store(token_ids + place * limit + now, chosen.to(tl.int64))
        tl.store(logprobs + place * limit + now, logprob)
        tl.store(feed + place, chosen.to(tl.int64))
        tl.store(position + place, tl.load(position + place) + 1)
        tl.store(step + place, now + 1)
        goes_on = now + 1 < limit
        for index in range(end_tokens):
            goes_on = goes_on & (tl.load(ends + index) != chosen)
        tl.store(going + place, goes_on.to(tl.uint8))

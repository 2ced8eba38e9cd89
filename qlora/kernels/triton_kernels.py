"""The Triton kernels that :mod:`qlora.kernels.triton_ops` launches: what one program computes.

Inputs of any floating dtype become fp32 as they are loaded, results are rounded as they are stored.
Widths that a kernel loops over are constants of a model, and compiled in. Numbers of rows do not
specialize a kernel, so a batch of another length compiles nothing. Offsets of rows are 64-bit: a long
context times a vocabulary passes 2**31.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _load(pointers, mask):
    return tl.load(pointers, mask=mask, other=0.0).to(tl.float32)


# --- RMSNorm: a program has one wide row, or as many narrow ones (heads) as make a tile


@triton.jit
def _store_normed(value, rstd, weight, add, y, column, real, offset, WIDTH: tl.constexpr):
    mask = real & (column < WIDTH)
    result = value * rstd * (_load(weight + column, column < WIDTH) + offset)
    if add is not None:
        result += _load(add + column, mask)
    tl.store(y + column, result, mask=mask)


@triton.jit(do_not_specialize=["rows"])
def rms_norm(
    x, weight, add, y, rstd, rows, x_stride, add_stride, eps, offset,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    real = row < rows
    column = tl.arange(0, BLOCK)[None, :]
    x += row * x_stride
    y += row * WIDTH
    if add is not None:
        add += row * add_stride
    if WHOLE:
        value = _load(x + column, real & (column < WIDTH))
        squares = value * value
    else:
        squares = tl.zeros((ROWS, BLOCK), tl.float32)
        for start in range(0, WIDTH, BLOCK):
            part = _load(x + start + column, real & (start + column < WIDTH))
            squares += part * part
    scale = tl.rsqrt(tl.sum(squares, 1, keep_dims=True) / WIDTH + eps)
    tl.store(rstd + row, scale, mask=real)
    if WHOLE:
        _store_normed(value, scale, weight, add, y, column, real, offset, WIDTH)
    else:
        for start in range(0, WIDTH, BLOCK):
            part = _load(x + start + column, real & (start + column < WIDTH))
            _store_normed(part, scale, weight, add, y, start + column, real, offset, WIDTH)


@triton.jit
def _load_normed(dy, x, weight, rstd, column, real, offset, WIDTH: tl.constexpr):
    """The output's gradient times the weight, and the normalized input."""
    mask = real & (column < WIDTH)
    gain = _load(weight + column, column < WIDTH) + offset
    return _load(dy + column, mask) * gain, _load(x + column, mask) * rstd


@triton.jit
def _store_dx(scaled, normed, mean, rstd, add, dx, column, mask):
    result = (scaled - normed * mean) * rstd
    if add is not None:
        result += _load(add + column, mask)
    tl.store(dx + column, result, mask=mask)


@triton.jit(do_not_specialize=["rows"])
def rms_norm_backward(
    dy, x, weight, rstd, add, dx, rows, dy_stride, x_stride, add_stride, offset,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row = index[:, None]
    real = row < rows
    column = tl.arange(0, BLOCK)[None, :]
    dy += row * dy_stride
    x += row * x_stride
    dx += row * WIDTH
    if add is not None:
        add += row * add_stride
    scale = _load(rstd + index, index < rows)[:, None]
    if WHOLE:
        scaled, normed = _load_normed(dy, x, weight, scale, column, real, offset, WIDTH)
        products = scaled * normed
    else:
        products = tl.zeros((ROWS, BLOCK), tl.float32)
        for start in range(0, WIDTH, BLOCK):
            a, b = _load_normed(dy, x, weight, scale, start + column, real, offset, WIDTH)
            products += a * b
    mean = tl.sum(products, 1, keep_dims=True) / WIDTH
    if WHOLE:
        _store_dx(scaled, normed, mean, scale, add, dx, column, real & (column < WIDTH))
    else:
        for start in range(0, WIDTH, BLOCK):
            mask = real & (start + column < WIDTH)
            a, b = _load_normed(dy, x, weight, scale, start + column, real, offset, WIDTH)
            _store_dx(a, b, mean, scale, add, dx, start + column, mask)


# --- rotary position embedding: a program has some heads of one token


@triton.jit
def _rotate(x, head, heads, stride, column, inside, cos1, cos2, sin1, sin2, HALF: tl.constexpr):
    first = x + head * stride + column
    mask = (head < heads) & inside
    a = _load(first, mask)
    b = _load(first + HALF, mask)
    tl.store(first, a * cos1 - b * sin1, mask=mask)
    tl.store(first + HALF, b * cos2 + a * sin2, mask=mask)


@triton.jit(do_not_specialize=["positions"])
def rotary(
    q, k, cos, sin, q_heads, k_heads, q_token, q_head, k_token, k_head, positions, cos_row, sin_row,
    INVERSE: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    q_groups = tl.cdiv(q_heads, HEADS)
    column = tl.arange(0, BLOCK)[None, :]
    inside = column < HALF
    position = (tl.program_id(0) % positions).to(tl.int64)
    cos += position * cos_row + column
    sin += position * sin_row + column
    cos1 = _load(cos, inside)
    cos2 = _load(cos + HALF, inside)
    sin1 = _load(sin, inside)
    sin2 = _load(sin + HALF, inside)
    if INVERSE:
        sin1 = -sin1
        sin2 = -sin2
    head = tl.arange(0, HEADS)[:, None]
    if group < q_groups:
        q += token * q_token
        head += group * HEADS
        _rotate(q, head, q_heads, q_head, column, inside, cos1, cos2, sin1, sin2, HALF)
    else:
        k += token * k_token
        head += (group - q_groups) * HEADS
        _rotate(k, head, k_heads, k_head, column, inside, cos1, cos2, sin1, sin2, HALF)


# --- gated MLP: a program has a block of one row


@triton.jit
def _sigmoid_form(gate, GELU: tl.constexpr):
    """Both activations are ``g * sigmoid(t(g))``: the sigmoid, and the derivative of t.

    SiLU has t = g; the tanh form of GELU has t = 2 u, as (1 + tanh u) / 2 is the sigmoid of 2 u.
    """
    if GELU:
        square = gate * gate
        argument = 1.5957691216057308 * gate * (1 + 0.044715 * square)  # 2 sqrt(2 / pi)
        slope = 1.5957691216057308 * (1 + 0.134145 * square)
    else:
        argument = gate
        slope = tl.full(gate.shape, 1.0, tl.float32)
    return tl.sigmoid(argument), slope


@triton.jit
def gated(gate, up, out, width, gate_stride, up_stride, GELU: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    g = _load(gate + row * gate_stride + column, inside)
    u = _load(up + row * up_stride + column, inside)
    s, _ = _sigmoid_form(g, GELU)
    tl.store(out + row * width + column, g * s * u, mask=inside)


@triton.jit
def gated_backward(
    dproduct, gate, up, width, d_stride, gate_stride, up_stride,
    GELU: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    dproduct += row * d_stride + column
    gate += row * gate_stride + column
    up += row * up_stride + column
    d = _load(dproduct, inside)
    g = _load(gate, inside)
    u = _load(up, inside)
    s, slope = _sigmoid_form(g, GELU)
    activated = g * s
    tl.store(dproduct, activated * u, mask=inside)
    tl.store(gate, d * u * (s + activated * (1 - s) * slope), mask=inside)
    tl.store(up, d * activated, mask=inside)


# --- NF4 with nested scales: a program has some blocks, each with its scale


@triton.jit
def unpack(
    packed, absmax, code, offset, absmax2, code2, out, packed_numel, numel,
    HALF: tl.constexpr, BLOCKSIZE2: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * BLOCKS
    block = tl.arange(0, BLOCKS)
    real = (first + block) * (2 * HALF) < numel
    scale = tl.load(absmax + first + block, mask=real, other=0)
    if absmax2 is not None:
        nested = tl.load(absmax2 + (first + block) // BLOCKSIZE2, mask=real, other=0.0)
        scale = tl.load(code2 + scale.to(tl.int32)) * nested + tl.load(offset)
    byte = block[:, None] * HALF + tl.arange(0, HALF)[None, :]
    byte += first * HALF
    pair = tl.load(packed + byte, mask=byte < packed_numel, other=0).to(tl.int32)
    nibble = tl.interleave(pair >> 4, pair & 15)
    weight = block[:, None] * (2 * HALF) + tl.arange(0, 2 * HALF)[None, :]
    weight += first * (2 * HALF)
    tl.store(out + weight, tl.load(code + nibble) * scale[:, None], mask=weight < numel)


# --- dropout without a mask: a counter of Philox makes four numbers, one for each quarter of a row


@triton.jit
def _drop(x, out, column, draw, p, scale, mask):
    value = _load(x + column, mask)
    tl.store(out + column, tl.where(draw >= p, value * scale, 0.0), mask=mask)


@triton.jit
def dropout(x, out, width, quarter, stride, p, scale, seed: tl.int64, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < quarter
    a, b, c, d = tl.rand4x(seed, row * quarter + column)
    x += row * stride
    out += row * width
    _drop(x, out, column, a, p, scale, inside & (column < width))
    column += quarter
    _drop(x, out, column, b, p, scale, inside & (column < width))
    column += quarter
    _drop(x, out, column, c, p, scale, inside & (column < width))
    column += quarter
    _drop(x, out, column, d, p, scale, inside & (column < width))


# --- cross entropy, its gradient in place: a program has a row, and reads it twice


@triton.jit
def _capped(logit, softcap, SOFTCAP: tl.constexpr):
    """``c tanh(x / c)``; tanh by the sigmoid, which overflows nowhere."""
    if SOFTCAP:
        logit = softcap * (2 * tl.sigmoid(2 * logit / softcap) - 1)
    return logit


@triton.jit
def cross_entropy(
    logits, labels, losses, stride, softcap, scale,
    WIDTH: tl.constexpr, SOFTCAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    label = tl.load(labels + row)
    # before any gradient is written; a label outside the vocabulary makes the loss NaN
    target = tl.load(logits + label, mask=(label >= 0) & (label < WIDTH), other=float("nan"))
    target = _capped(target.to(tl.float32), softcap, SOFTCAP)

    largest = float("-inf")
    total = 0.0
    for start in range(0, WIDTH, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < WIDTH
        value = _capped(_load(logits + column, inside), softcap, SOFTCAP)
        value = tl.where(inside, value, float("-inf"))
        larger = tl.maximum(largest, tl.max(value, 0))
        shift = tl.where(larger == float("-inf"), 0.0, larger)  # nothing but -inf so far
        total = total * tl.exp(largest - shift) + tl.sum(tl.exp(value - shift), 0)
        largest = larger
    tl.store(losses + row, tl.log(total) + largest - target)

    last: tl.constexpr = (WIDTH - 1) // BLOCK * BLOCK
    for start in range(0, WIDTH, BLOCK):
        # backwards: what was read last is still in a cache
        column = last - start + tl.arange(0, BLOCK)
        inside = column < WIDTH
        value = _capped(_load(logits + column, inside), softcap, SOFTCAP)
        gradient = tl.exp(value - largest) / total - tl.where(column == label, 1.0, 0.0)
        if SOFTCAP:
            gradient *= 1 - value * value / (softcap * softcap)
        tl.store(logits + column, gradient * scale, mask=inside)

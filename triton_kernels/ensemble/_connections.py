"""What the kernels of core `connections` are made of: a token's streams, coefficients and Sinkhorn."""

import triton
import triton.language as tl


@triton.jit
def tanh(a, ACC: tl.constexpr):
    """1 - 2 / (1 + e^2a) cancels near 0: there an odd polynomial, in float32."""
    far = 1.0 - 2.0 / (1.0 + tl.exp(2.0 * a))
    if ACC == tl.float32:
        u = a * a
        p = -0.0088632356 * u + 0.0218694885
        p = p * u - 0.0539682540
        p = p * u + 0.1333333333
        p = p * u - 0.3333333333
        far = tl.where(u < 0.09, a + a * u * p, far)
    return far


@triton.jit
def column_of(matrix, c, lanes):
    """Column c of a matrix [N2, P2] whose columns are numbered by lanes [P2]: [N2]."""
    return tl.sum(tl.where(lanes[None, :] == c, matrix, 0.0), 1)


@triton.jit
def element_of(vector, index, lanes):
    """vector[index] for a vector [PF] numbered by lanes and an index [N2]."""
    return tl.sum(tl.where(lanes[None, :] == index[:, None], vector[None, :], 0.0), 1)


@triton.jit
def elements_of(vector, index, lanes):
    """vector[index] for an index [N2, N2]."""
    match = lanes[None, None, :] == index[:, :, None]
    return tl.sum(tl.where(match, vector[None, None, :], 0.0), 2)


@triton.jit
def streams_of(h, out, out_beta, at, token, k, cols, columns, mask, MERGED: tl.constexpr,
             ACC: tl.constexpr, n: tl.constexpr):  # fmt: skip
    """The streams of a token, [N2, C]: with MERGED what the depth connection would have stored."""
    v = tl.load(h + at, mask=mask, other=0.0).to(ACC)
    if MERGED:
        beta = tl.load(out_beta + token * n + k, mask=k < n, other=0.0).to(ACC)
        f = tl.load(out + token * columns + cols, mask=cols < columns, other=0.0).to(ACC)
        v += beta[:, None] * f[None, :]
    return v


@triton.jit
def divide(m, sums, step, steps, AXIS: tl.constexpr):
    s = tl.maximum(tl.sum(m, AXIS), 1e-30)
    m = m / tl.expand_dims(s, AXIS)
    return m, tl.where(steps[:, None] == step, s[None, :], sums)


@triton.jit
def undivide(g, m, sums, step, steps, AXIS: tl.constexpr):
    s = tl.expand_dims(tl.sum(tl.where(steps[:, None] == step, sums, 0.0), 0), AXIS)
    dot = tl.expand_dims(tl.sum(g * m, AXIS), AXIS)
    # Where m is 0 (padding, for one) the gradient is not needed, and would grow without bound.
    return tl.where(m > 0, g - dot, 0.0) / s, m * s


@triton.jit
def sinkhorn(t, k, lanes, iterations, ACC: tl.constexpr, n: tl.constexpr, N2: tl.constexpr,
              S2: tl.constexpr):  # fmt: skip
    """m [k, j] (the mixing matrix transposed) of t [PF], and the sums of the steps [S2, N2]."""
    j = tl.arange(0, N2)
    steps = tl.arange(0, S2)
    inside = (k[:, None] < n) & (j[None, :] < n)
    m = elements_of(t, 2 * n + j[None, :] * n + k[:, None], lanes)
    m = tl.where(inside, m, float("-inf"))
    top = tl.max(m, 1)[:, None]
    m = tl.where(inside, tl.exp(m - top), 0.0)
    sums = tl.full((S2, N2), 1.0, ACC)
    for i in range(iterations):
        m, sums = divide(m, sums, 2 * i, steps, 1)
        m, sums = divide(m, sums, 2 * i + 1, steps, 0)
    return m, sums


@triton.jit
def manifold(t, k, lanes, c, iterations, ACC: tl.constexpr, n: tl.constexpr, N2: tl.constexpr,
              P2: tl.constexpr, S2: tl.constexpr):  # fmt: skip
    """The coefficients [N2, P2] of t [PF], the mixing matrix and its sums."""
    m, sums = sinkhorn(t, k, lanes, iterations, ACC, n, N2, S2)
    j = tl.arange(0, N2)
    pre = 1.0 / (1.0 + tl.exp(-element_of(t, k, lanes)))
    post = 2.0 / (1.0 + tl.exp(-element_of(t, n + k, lanes)))
    match = (c[None, :, None] == j[None, None, :] + 1) & (j[None, None, :] < n)
    mixing = tl.sum(tl.where(match, m[:, None, :], 0.0), 2)
    mixing += tl.where(c[None, :] == 0, pre[:, None], 0.0)
    mixing += tl.where(c[None, :] == n + 1, post[:, None], 0.0)
    return tl.where(k[:, None] < n, mixing, 0.0), m, sums


@triton.jit
def gradient_row(dinput, drest, i, first, token, inner, cols, columns, HAS_INPUT: tl.constexpr,
                  HAS_REST: tl.constexpr, ACC: tl.constexpr, C: tl.constexpr):  # fmt: skip
    """The gradient of the i-th of (input, rest_1, ..), i > 0 for the streams: [C]."""
    g = tl.zeros((C,), ACC)
    if HAS_INPUT:
        at = token * columns + cols
        g += tl.load(dinput + at, mask=(cols < columns) & (i == 0), other=0.0).to(ACC)
    if HAS_REST:
        at = (first + (i - 1) * inner) * columns + cols
        g += tl.load(drest + at, mask=(cols < columns) & (i > 0), other=0.0).to(ACC)
    return g

"""GPU launchers of core `moment_exchange`: the passes of `channel_norm`, a few torch operations on (N, sets) between.

Forward reads x twice and writes y, backward reads x and dy twice and writes dx: 8 passes over x in memory. A walk
along the donors as on the CPU would make it 5, but needs a block of every sample in one program's reach.
"""

from __future__ import annotations

from collections.abc import Iterator

from solera.norm.moment_exchange import cotangents

from .channel_norm import channel_affine, channel_gradient, channel_moments, channel_reduce


def _flat(t):
    """(N, R, M, K), R or K 1 -> (A, M, K) of channel_norm."""
    n, r, m, k = t.shape
    return t.reshape(n * r, m, k)


def moment_exchange(x, index, eps, ratio):
    flat, stats = _flat(x), (x.shape[0], x.shape[1] * x.shape[3])
    mean, var = (t.view(stats) for t in channel_moments(flat, None))
    deviation = (var * ratio + eps).sqrt()
    pair = (flat.shape[0], flat.shape[2])
    scale = (deviation[index] / deviation).view(pair)
    y = channel_affine(flat, mean.view(pair), scale, mean[index].view(pair), None, None, 0)
    return y.view(x.shape), mean, deviation


def moment_exchange_backward(dy, x, index, mean, deviation, ratio):
    flat = _flat(x)
    pair = (flat.shape[0], flat.shape[2])
    center = mean.contiguous().view(pair)
    scale = (deviation[index] / deviation).view(pair)
    # Without an activation the shift takes no part.
    data = (_flat(dy), flat, center, scale, center, None, None, 0)
    sum_g, sum_gd = (t.view(mean.shape) for t in channel_reduce(*data))
    _, p, q = cotangents(sum_g, sum_gd, index, deviation, ratio, max(x.shape[2], 1))
    dx, _ = channel_gradient(*data, p.view(pair), q.view(pair), True, False)
    return dx.view(x.shape)


def aot() -> Iterator:
    """No kernel of its own: channel_norm's are compiled there."""
    yield from ()

"""Orthogonal matrices that spread any diagonal evenly: Hadamard where there is one, plane rotations elsewhere."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, math.isqrt(n) + 1))


def _paley(order: int) -> Tensor:
    """Hadamard matrix of order q + 1 for a prime q = 3 mod 4: I + S, S bordered quadratic residues."""
    q = order - 1
    residue = torch.full((q,), -1.0, dtype=torch.float64)
    residue[torch.arange(1, q) ** 2 % q] = 1.0
    residue[0] = 0.0
    i = torch.arange(q)
    s = torch.zeros(order, order, dtype=torch.float64)
    s[0, 1:], s[1:, 0] = 1.0, -1.0
    s[1:, 1:] = residue[(i[None, :] - i[:, None]) % q]
    return s + torch.eye(order, dtype=torch.float64)


def hadamard(order: int) -> Tensor | None:
    """A Hadamard matrix (entries 1 and -1, float64), or None where neither construction gives one.

    Sylvester's doubling of Paley's first construction: 2^a, and 2^a (q + 1) for a prime q = 3 mod 4.
    """
    rest = order
    while rest > 0:
        if rest == 1 or (rest % 4 == 0 and (rest - 1) % 4 == 3 and _is_prime(rest - 1)):
            h = torch.ones(1, 1, dtype=torch.float64) if rest == 1 else _paley(rest)
            two = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
            while h.shape[0] < order:
                h = torch.kron(two, h)
            return h
        if rest % 2:
            return None
        rest //= 2
    return None


def _level(values: Tensor) -> Tensor:
    """Orthogonal R with the diagonal of R diag(values) R^T constant, by D - 1 plane rotations.

    Each takes one diagonal entry above the mean and one below, and turns their plane until the first is the
    mean: with a > m > b and coupling c, t = tan of the angle solves (b - m) t^2 + 2 c t + (a - m) = 0.
    """
    a = torch.diag(values.double())
    size = values.numel()
    rotation = torch.eye(size, dtype=torch.float64)
    mean = float(values.double().mean())
    open_ = set(range(size))
    for _ in range(size - 1):
        order = sorted(open_, key=lambda i: float(a[i, i]))
        low, high = order[0], order[-1]
        b, top, c = float(a[low, low]), float(a[high, high]), float(a[high, low])
        if not top > mean > b:
            break
        root = math.sqrt(c * c - (b - mean) * (top - mean))
        t = (-c - math.copysign(root, c)) / (b - mean)
        t = (top - mean) / ((b - mean) * t) if abs(t) > 1 else t
        cosine = 1 / math.sqrt(1 + t * t)
        turn = torch.tensor([[cosine, cosine * t], [-cosine * t, cosine]], dtype=torch.float64)
        pair = [high, low]
        a[pair] = turn @ a[pair]
        a[:, pair] = a[:, pair] @ turn.T
        rotation[pair] = turn @ rotation[pair]
        open_.discard(high)
    return rotation


def balanced_rotation(values: Tensor) -> Tensor:
    """Orthogonal H (float64, on values' device) such that H diag(values) H^T has a constant diagonal."""
    size = values.numel()
    h = hadamard(size)
    if h is not None:
        return (h / math.sqrt(size)).to(values.device)
    return _level(values.cpu()).to(values.device)

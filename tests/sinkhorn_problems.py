"""Problems that the tests of the Sinkhorn cores share."""

import torch
from helpers import DEVICE


def problem(*shape, dtype=torch.float32, zeros=False, grad=False):
    """A cost in [0, 1] and two marginals, some weights 0 if asked."""
    *batch, n, m = shape
    cost = torch.rand(*shape, dtype=torch.float64)
    a, b = (torch.rand(*batch, k, dtype=torch.float64) + 0.05 for k in (n, m))
    if zeros:
        a[..., n // 2] *= float(n == 1)
        b[..., m // 3] *= float(m == 1)
    a, b = a / a.sum(-1, keepdim=True), b / b.sum(-1, keepdim=True)
    return [t.to(device=DEVICE, dtype=dtype).requires_grad_(grad) for t in (cost, a, b)]


def clouds(n, m, d, *batch, dtype=torch.float64, zeros=False, grad=False):
    """Points in the unit cube and marginals of total 1, some weights 0 if asked."""
    x, y = (torch.rand(*batch, k, d, dtype=torch.float64) for k in (n, m))
    a, b = (torch.rand(*batch, k, dtype=torch.float64) + 0.05 for k in (n, m))
    if zeros:
        a[..., n // 2] *= float(n == 1)
        b[..., m // 3] *= float(m == 1)
    a, b = a / a.sum(-1, keepdim=True), b / b.sum(-1, keepdim=True)
    return [t.to(device=DEVICE, dtype=dtype).requires_grad_(grad) for t in (x, y, a, b)]

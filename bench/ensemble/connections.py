"""Benchmark lines of core connections: width and depth around a layer, on n 4, D 1024, 8k tokens."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from bench.case import Case, Spec, in_double, step
from solera.ensemble import (
    hyper_connection_depth,
    hyper_connection_depth_width,
    hyper_connection_width,
    manifold_connection,
)

EPS = 1e-5


def _ours(H, out, *p):
    h_in, rest, beta = hyper_connection_width(H, *p, eps=EPS)
    return h_in, hyper_connection_depth(out, rest, beta)


def _eager(H, out, alpha, beta, wa, wb, sa, sb, nw, nb):
    """The paper's algorithm in torch."""
    normal = torch.nn.functional.layer_norm(H, H.shape[-1:], nw, nb, EPS)
    a = torch.tanh(normal @ wa) * sa + alpha
    b = torch.tanh(normal @ wb) * sb + beta
    mix = a.mT @ H
    return mix[..., 0, :], b.unsqueeze(-1) * out.unsqueeze(-2) + mix[..., 1:, :]


def _ours_merged(H, out, *p):
    """Depth of one layer and width of the next."""
    return hyper_connection_depth_width(out, H, H.new_ones(H.shape[:-1]), *p, eps=EPS)


def _eager_merged(H, out, alpha, beta, wa, wb, sa, sb, nw, nb):
    H = out.unsqueeze(-2) + H
    normal = torch.nn.functional.layer_norm(H, H.shape[-1:], nw, nb, EPS)
    a = torch.tanh(normal @ wa) * sa + alpha
    b = torch.tanh(normal @ wb) * sb + beta
    mix = a.mT @ H
    return mix[..., 0, :], mix[..., 1:, :], b


def _ours_manifold(H, out, weight, bias, scale):
    h_in, rest, beta = manifold_connection(H, weight, bias, scale)
    return h_in, hyper_connection_depth(out, rest, beta)


def _eager_manifold(H, out, weight, bias, scale):
    n = H.shape[-2]
    x = H.flatten(-2)
    x = torch.nn.functional.rms_norm(x, x.shape[-1:], None, 1e-6)
    a = torch.cat([scale[0].expand(n), scale[1].expand(n), scale[2].expand(n * n)])
    t = a * (x @ weight) + bias
    m = t[..., 2 * n :].unflatten(-1, (n, n)).exp()
    for _ in range(20):
        m = m / m.sum(-2, keepdim=True)
        m = m / m.sum(-1, keepdim=True)
    h_in = (torch.sigmoid(t[..., :n]).unsqueeze(-2) @ H).squeeze(-2)
    post = 2 * torch.sigmoid(t[..., n : 2 * n])
    return h_in, post.unsqueeze(-1) * out.unsqueeze(-2) + m @ H


def _package(n: int, D: int, dtype, device: str):
    """The PyPI package's module on its own layout, (batch * streams, tokens, D); None if it is not there."""
    try:
        from hyper_connections.hyper_connections import HyperConnections
    except ImportError:
        return None
    module = HyperConnections(n, dim=D, layer_index=0).to(device=device, dtype=dtype)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn_like(p) * 0.03)
    return module


def _case(kind: str, tokens: int, n: int, D: int, dtype, device: str) -> Case:
    new = lambda *s, scale=1.0: (torch.randn(*s, device=device) * scale).to(dtype).requires_grad_()
    H, out = new(tokens, n, D), new(tokens, D)
    if kind == "manifold":
        P = n * (n + 2)
        inputs = [H, out, new(n * D, P, scale=(n * D) ** -0.5), new(P), new(3)]
        ours, reference = _ours_manifold, _eager_manifold
    else:
        inputs = [H, out, new(n, n + 1), new(n), new(D, n + 1, scale=D**-0.5), new(D, scale=D**-0.5),
                  new(1), new(1), new(D), new(D)]  # fmt: skip
        ours, reference = (_ours_merged, _eager_merged) if kind == "merged" else (_ours, _eager)
    # The outputs themselves: against random gradients those of the two scales, one number each out of 8192 tokens'
    # sums, cancel to a thousandth of their terms, and then two float32 errors say nothing about each other.
    with torch.no_grad():
        grads = [t.to(dtype) for t in reference(*inputs)]

    def steps(function):
        def build(*tensors: Tensor):
            def outputs(*t: Tensor):
                return tuple(o.to(tensors[0].dtype) for o in function(*t))

            return step(outputs, tensors, [g.to(tensors[0].dtype) for g in grads])

        return build

    peers = {}
    module = _package(n, D, dtype, device) if kind == "split" else None
    if module is not None:
        residuals = H.detach().transpose(0, 1).contiguous().requires_grad_()
        flat = out.detach().unsqueeze(0).requires_grad_()

        def package(residuals, flat, *parameters):
            h_in, add = module(residuals)
            return h_in, add(flat)

        g = [grads[0].unsqueeze(0), grads[1].transpose(0, 1).contiguous()]
        peers["hyper-connections"] = step(package, (residuals, flat, *module.parameters()), g)
    rows = (
        2 * n + 2 + 3 * n + 3
        if kind == "merged"
        else (2 * n + 1) + (3 * n + 1) + (2 * n + 1) + (n + 2)
    )
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append(t.numel() * t.element_size()) or t, lambda t: t
    ):
        ours(*inputs)
    return Case(
        ours=steps(ours)(*inputs),
        exact=in_double(steps(reference), inputs),
        eager=steps(reference)(*inputs),
        compiled=steps(torch.compile(reference))(*inputs),
        peers=peers,
        bytes=tokens * D * H.element_size() * rows,
        saved_bytes=sum(kept),
        tolerance=6e-7 if dtype == torch.float32 else None,
        floor_note="streams once each way for width and for depth",
    )


def specs(device: str) -> Iterator[Spec]:
    for kind, op in (
        ("split", "hyper_connection_width+depth"),
        ("merged", "hyper_connection_depth_width"),
        ("manifold", "manifold_connection+depth"),
    ):
        for dtype in (torch.float32, torch.bfloat16):
            yield Spec(
                op=f"ensemble.{op}",
                label="fwd+bwd 8192x4x1024",
                dtype=dtype,
                make=lambda kind=kind, dtype=dtype: _case(kind, 8192, 4, 1024, dtype, device),
                targets={"eager": 4, "compile": 1.5, "hyper-connections": 4}
                if kind == "split"
                else {},
                quick=kind == "split" and dtype == torch.float32,
            )

"""Pytest plugin: POT's Sinkhorn, unbalanced, barycenter, batch and sliced functions become Solera's.

Only where the definitions coincide; what is left to POT is said at each function. `CALLS` counts what was redirected.
POT's plans have the reference measure 1 where Solera's have a b^T, which is a shift of the potentials:
log u = f / reg + log a.
"""

from __future__ import annotations

import atexit
import functools
import os
import warnings
from collections import Counter

import ot
import torch
from ot.backend import get_backend
from ot.utils import list_to_array

from solera import sinkhorn as solera

CALLS: Counter[str] = Counter()
NOT_CONVERGED = (
    "Sinkhorn did not converge. You might want to increase the number of iterations `numItermax` "
    "or the regularization parameter `reg`."
)


@atexit.register
def _report() -> None:
    if "SOLERA_PEER_CALLS" in os.environ:
        with open(os.environ["SOLERA_PEER_CALLS"], "w") as file:
            file.writelines(f"{name} {count}\n" for name, count in sorted(CALLS.items()))


def _torch(value):
    """A tensor that shares the array's memory; gradients of torch tensors are kept."""
    return value if isinstance(value, torch.Tensor) else torch.as_tensor(value)


def _like(value, nx, reference):
    if isinstance(reference, torch.Tensor):
        return value.to(reference.dtype)
    return nx.from_numpy(value.detach().numpy(), type_as=reference)


def _replace(owner, module, name: str):
    """Put the decorated function in place of `module.name` (and of the public name that `owner` has for it)."""

    def put(function):
        original = getattr(module, name)

        @functools.wraps(original)
        def redirected(*args, **kwargs):
            result = function(original, *args, **kwargs)
            if result is NotImplemented:
                return original(*args, **kwargs)
            CALLS[name] += 1
            return result

        for place in {owner, module, ot}:
            if getattr(place, name, None) is original:
                setattr(place, name, redirected)
        return redirected

    return put


def _weights(a, count, M, nx):
    return nx.full((count,), 1.0 / count, type_as=M) if a is None or len(a) == 0 else a


def _solve(a, b, M, reg, iterations, tolerance, warn, warmstart, **more):
    a, b, M = list_to_array(a, b, M)
    nx = get_backend(M, a, b)
    a, b = _weights(a, M.shape[0], M, nx), _weights(b, M.shape[1], M, nx)
    cost, wa, wb = (_torch(t) for t in (M, a, b))
    many = wb.dim() > 1  # several targets: a batch
    if many:
        cost, wa, wb = cost.expand(wb.shape[1], *cost.shape), wa, wb.mT
        wa = wa.expand(wb.shape[0], -1)
    init = None
    if warmstart is not None and not many:
        u, v = (_torch(t).to(cost.dtype) for t in warmstart)
        init = (reg * (u - wa.log()), reg * (v - wb.log()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        r = solera.sinkhorn(
            cost, wa, wb, epsilon=reg, max_iterations=max(1, int(iterations)),
            tolerance=float(tolerance), init=init, validate=False, **more,
        )  # fmt: skip
    if warn and not bool(r.converged.all()):
        warnings.warn(NOT_CONVERGED, UserWarning, stacklevel=4)
    log_u, log_v = r.f / reg + wa.log(), r.g / reg + wb.log()
    return nx, M, r, many, log_u, log_v


def _answer(solved, log):
    nx, M, r, many, log_u, log_v = solved
    out = lambda t: _like(t, nx, M)
    plan = r.plan()
    result = out((plan * _torch(M)).sum((-2, -1))) if many else out(plan)
    if not log:
        return result
    if many:
        log_u, log_v = log_u.mT, log_v.mT
    state = {
        "err": [float(r.marginal_error.max())], "niter": int(r.iterations.max()),
        "log_u": out(log_u), "log_v": out(log_v), "u": out(log_u.exp()), "v": out(log_v.exp()),
    }  # fmt: skip
    return result, state


@_replace(ot.bregman, ot.bregman._sinkhorn, "sinkhorn_log")
def sinkhorn_log(
    original, a, b, M, reg, numItermax=1000, stopThr=1e-9, verbose=False, log=False, warn=True,
    warmstart=None, **kwargs,
):  # fmt: skip
    return _answer(_solve(a, b, M, reg, numItermax, stopThr, warn, warmstart), log)


@_replace(ot.bregman, ot.bregman._sinkhorn, "sinkhorn_knopp")
def sinkhorn_knopp(
    original, a, b, M, reg, numItermax=1000, stopThr=1e-9, verbose=False, log=False, warn=True,
    warmstart=None, **kwargs,
):  # fmt: skip
    return _answer(_solve(a, b, M, reg, numItermax, stopThr, warn, warmstart), log)


@_replace(ot.bregman, ot.bregman._sinkhorn, "sinkhorn_stabilized")
def sinkhorn_stabilized(
    original, a, b, M, reg, numItermax=1000, tau=1e3, stopThr=1e-9, warmstart=None, verbose=False,
    print_period=20, log=False, warn=True, **kwargs,
):  # fmt: skip
    if warmstart is not None:  # given as potentials here
        warmstart = tuple(w / reg for w in warmstart)
    solved = _solve(a, b, M, reg, numItermax, stopThr, warn, warmstart)
    answer = _answer(solved, log)
    if not log:
        return answer
    result, state = answer
    state["logu"], state["logv"], state["n_iter"] = state["log_u"], state["log_v"], state["niter"]
    state["alpha"], state["beta"] = reg * state["log_u"], reg * state["log_v"]
    state["warmstart"] = (state["alpha"], state["beta"])
    return result, state


@_replace(ot.unbalanced, ot.unbalanced._sinkhorn, "sinkhorn_knopp_unbalanced")
def sinkhorn_knopp_unbalanced(
    original, a, b, M, reg, reg_m, reg_type="kl", c=None, warmstart=None, numItermax=1000,
    stopThr=1e-6, verbose=False, log=False, **kwargs,
):  # fmt: skip
    """Left to POT: a reference c of its own, several targets, a warm start (in another gauge)."""
    a_, b_, M_ = list_to_array(a, b, M)
    if c is not None or warmstart is not None or len(b_.shape) > 1:
        return NotImplemented
    nx = get_backend(M_, a_, b_)
    a_, b_ = _weights(a_, M_.shape[0], M_, nx), _weights(b_, M_.shape[1], M_, nx)
    cost, wa, wb = _torch(M_), _torch(a_), _torch(b_)
    entropy = reg_type.lower() == "entropy"
    if entropy:  # reference 1 instead of a b^T: a cost of its own for each pair
        warnings.warn(
            "If reg_type = entropy, then the matrix c is overwritten by the one matrix.",
            stacklevel=2,
        )
        cost = cost + reg * (wa.log()[:, None] + wb.log())
    pair = ot.utils.get_parameter_pair(reg_m)
    rho = tuple(None if float(p) == float("inf") else float(p) for p in pair)
    r = solera.sinkhorn(
        cost, wa, wb, epsilon=reg, rho=None if rho == (None, None) else rho, validate=False,
        max_iterations=max(int(numItermax), 1), tolerance=float(stopThr) * 1e-2,
    )  # fmt: skip
    plan = r.plan()
    out = lambda t: _like(t, nx, M_)
    if not log:
        return out(plan)
    reference = torch.ones_like(plan) if entropy else wa[:, None] * wb
    # u and v scale exp(-M / reg) c, which for reg_type "kl" has the weights in it.
    log_u, log_v = r.f / reg, r.g / reg
    kl = lambda p, q: (p * torch.where(p > 0, p / q, 1.0).log() - p + q).sum()
    linear = (plan * _torch(M_)).sum()
    total = linear + reg * kl(plan, reference)
    for strength, part, weight in zip(rho, (plan.sum(1), plan.sum(0)), (wa, wb)):
        total = total + (0.0 if strength is None else strength * kl(part, weight))
    state = {
        "err": [float(r.marginal_error)], "logu": out(log_u), "logv": out(log_v),
        "cost": out(linear), "total_cost": out(total),
    }  # fmt: skip
    return out(plan), state


@_replace(ot.bregman, ot.bregman._barycenter, "barycenter_sinkhorn")
def barycenter_sinkhorn(
    original, A, M, reg, weights=None, numItermax=1000, stopThr=1e-4, verbose=False, log=False,
    warn=True,
):  # fmt: skip
    A_, M_ = list_to_array(A, M)
    nx = get_backend(A_, M_)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", UserWarning)
        found = solera.barycenter(
            _torch(A_).mT, _torch(M_), weights=None if weights is None else _torch(weights),
            epsilon=reg, max_iterations=int(numItermax), tolerance=max(float(stopThr) * 1e-2, 1e-12),
        )  # fmt: skip
    if said and warn:
        warnings.warn(NOT_CONVERGED, UserWarning, stacklevel=3)
    result = _like(found, nx, A_)
    return (result, {"err": [0.0], "niter": int(numItermax)}) if log else result


@_replace(ot.batch, ot.batch._utils, "bregman_log_projection_batch")
def bregman_log_projection_batch(
    original, K, a=None, b=None, nx=None, max_iter=10000, tol=1e-5, grad="detach"
):
    """Left to POT: grad="last_step", whose gradient is of one iteration."""
    if grad == "last_step":
        return NotImplemented
    nx = nx or get_backend(a, b, K)
    scores = _torch(K)
    count, n, m = scores.shape
    wa = _torch(a) if a is not None else scores.new_full((count, n), 1 / n)
    wb = _torch(b) if b is not None else scores.new_full((count, m), 1 / m)
    cost = -(scores.detach() if grad == "detach" else scores)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        r = solera.sinkhorn(
            cost, wa, wb, epsilon=1.0, max_iterations=max_iter, tolerance=tol, validate=False
        )
    log_u, log_v = r.f + wa.log(), r.g + wb.log()
    out = lambda t: _like(t, nx, K)
    log_plan = log_u[..., None] + log_v[..., None, :] - cost
    return {
        "T": out(log_plan.exp()), "log_T": out(log_plan), "n_iters": int(r.iterations.max()),
        "potentials": (out(log_u), out(log_v)),
    }  # fmt: skip


for _user in (ot.batch._linear, ot.batch._quadratic):
    if hasattr(_user, "bregman_log_projection_batch"):
        _user.bregman_log_projection_batch = ot.batch._utils.bregman_log_projection_batch


@_replace(ot.sliced, ot.sliced._sliced_distances, "sliced_wasserstein_distance")
def sliced_wasserstein_distance(
    original, X_s, X_t, a=None, b=None, n_projections=50, p=2, projections=None, seed=None,
    log=False, scaler=None,
):  # fmt: skip
    """Left to POT: scalers, and clouds of different dimensions (its error is tested)."""
    x, y = list_to_array(X_s, X_t)
    if scaler is not None or x.shape[1] != y.shape[1]:
        return NotImplemented
    nx = get_backend(x, y, projections)
    if projections is None:
        projections = ot.sliced.get_random_projections(
            x.shape[1], n_projections, seed, backend=nx, type_as=x
        )
    directions = _torch(projections).mT.contiguous()
    weights = [None if w is None else _torch(w) for w in (a, b)]
    each = solera.sliced_wasserstein(
        _torch(x),
        _torch(y),
        directions,
        p,
        reduction="none",
        x_weights=weights[0],
        y_weights=weights[1],
    )
    result = _like(each.mean() ** (1.0 / p), nx, x)
    return (
        (result, {"projections": projections, "projected_emds": _like(each, nx, x)})
        if log
        else result
    )

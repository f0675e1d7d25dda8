r"""Core `perturb`: steps of sharpness-aware minimisation and noise over lists of parameters, in place.

With $g$ the gradients of all parameters taken as one vector (Foret et al.),

$$e = \rho\, \frac{g}{\lVert g\rVert + \epsilon}, \qquad \text{or, adaptive,}\quad
  e = \rho\, \frac{T^2 g}{\lVert T g\rVert + \epsilon},\quad T = \mathrm{diag}(|w| + \eta),$$

and the training step is taken at $w$ with the gradient of the loss at $w + e$. The norm stays on the device: one pass
over the gradients, one over gradients and parameters, and nothing waits.

**Back to w.** $w + e - e$ is not $w$: rounding moves it by a unit in the last place, which for bfloat16 and float16
adds up to a drift over the steps. Either the old values are kept (`backup=`, restored bit for bit, as much memory
as the first gradient would take) or, where the first gradient is kept anyway, e is computed again and taken off.

**Noise** is a function of (seed, key of the tensor, element), never stored (see _random.py): the 24 upper bits of the
word choose one of as many equal parts of the unit interval, and the normal distribution's inverse at its middle is the
value (at most 5.2), by Giles' polynomials in float32 without fused multiply-adds: the same bits on every backend.

Sources: Foret et al., "Sharpness-Aware Minimization for Efficiently Improving Generalization", 2021; Kwon et al.,
"ASAM", 2021; Giles, "Approximating the erfinv function", 2012.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from .. import _check
from .._registry import reference
from ..norm.grad_norm import _wide, norms_of, run_in_place
from ._distributed import whole_norm
from ._lists import local, shards
from ._parameters import apart, beside, checked, parameters_of, written
from ._random import random_words, tensor_key
from .lincomb import lincomb

HALVES = (torch.bfloat16, torch.float16)
Parameters = Tensor | Iterable[Tensor] | Mapping[str, Tensor]


# ---- reference ---------------------------------------------------------------------------------------


@reference("perturb_norms")
def _perturb_norms(parameters, grads, eta):
    """(L,): the norm of (|w| + eta) g."""
    dtype = _wide((*parameters, *grads))
    found = []
    for w, g in zip(parameters, grads, strict=True):
        if w.shape != g.shape:
            raise RuntimeError("perturb_norms: a gradient differs in shape from its parameter")
        own = _wide((w, g))
        norm = torch.linalg.vector_norm(((w.to(own).abs() + eta) * g.to(own)).flatten())
        found.append(norm.to(dtype))
    return torch.stack(found)


def _moved(parameters, grads, factors, eta, others):
    """(w, other, w + f g or w + f (|w| + eta)^2 g) of each entry."""
    for index, (w, g, k) in enumerate(zip(parameters, grads, others, strict=True)):
        if not w.shape == g.shape == k.shape or w.dtype != k.dtype:
            raise RuntimeError("perturb_: the tensors of an entry differ in shape or dtype")
        dtype = _wide((w, g))
        old, e = w.to(dtype), g.to(dtype)
        if eta is not None:
            t = old.abs() + eta
            e = t * t * e
        factor = factors if factors.dim() == 0 else factors[index]
        yield w, k, old + factor.to(dtype) * e


@reference("perturb_")
def _perturb(parameters, grads, factors, eta, kept):
    """w + f g, or w + f (|w| + eta)^2 g, in place; the old values into `kept`, if there are any."""
    for w, k, moved in _moved(parameters, grads, factors, eta, kept or parameters):
        if kept:
            k.copy_(w)
        w.copy_(moved)


@reference("perturb_out")
def _perturb_out(parameters, grads, factors, eta, out):
    """The same into `out`."""
    for _, o, moved in _moved(parameters, grads, factors, eta, out):
        o.copy_(moved)


_LOG = (
    7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1,
    -1.6668057665e-1, 2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1,
)  # fmt: skip
_CENTRE = (
    2.81022636e-08, 3.43273939e-07, -3.5233877e-06, -4.39150654e-06, 0.00021858087, -0.00125372503,
    -0.00417768164, 0.246640727, 1.50140941,
)  # fmt: skip
_TAIL = (
    -0.000200214257, 0.000100950558, 0.00134934322, -0.00367342844, 0.00573950773, -0.0076224613,
    0.00943887047, 1.00167406, 2.83297682,
)  # fmt: skip


def _polynomial(x: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    p = x * coefficients[0] + coefficients[1]
    for c in coefficients[2:]:
        p = p * x + c
    return p


def normal_of(words: Tensor) -> Tensor:
    """Normal numbers, float32, of int64 words below 2^32: the inverse distribution at 2^24 midpoints."""
    x = ((words >> 8) * 2 - 16777215).float() * 2.0**-24
    bits = ((1.0 - x) * (1.0 + x)).view(torch.int32)
    m = ((bits & 0x7FFFFF) | 0x3F000000).view(torch.float32)
    low = (m < 0.70710678).float()
    e = ((bits >> 23) - 126).float() - low
    t = (m + low * m) - 1.0
    s = t * t
    rest = (_polynomial(t, _LOG) * t * s + e * -2.12194440e-4) + s * -0.5
    y = -((t + rest) + e * 0.693359375)
    centre = _polynomial(y - 2.5, _CENTRE)
    tail = _polynomial(y.clamp_min(0.0).sqrt() - 3.0, _TAIL)
    return torch.where(y < 5.0, centre, tail) * x * 1.41421354


@reference("noise_")
def _noise(parameters, norms, scales, seed, keys):
    """w + f z with f = norm times scale and z of (seed, key, element)."""
    for index, (w, scale, key) in enumerate(zip(parameters, scales, keys, strict=True)):
        dtype = _wide((w,))
        norm = norms if norms.dim() == 0 else norms[index]
        z = normal_of(random_words(seed, key, 0, w.numel(), w.device)).view(w.shape).to(dtype)
        w.copy_(w.to(dtype) + (norm.double() * scale).to(dtype) * z)


# ---- arguments ---------------------------------------------------------------------------------------


def _with_gradients(parameters: Any, gradients: Any) -> tuple[list, list, list]:
    """(every parameter, those with a gradient, the gradients); DTensors as they were given."""
    keys, every = parameters_of("parameters", parameters)
    if gradients is None:
        found = [getattr(p, "grad", None) for p in every]
    else:
        found = beside("gradients", gradients, keys)
    live = [i for i, g in enumerate(found) if g is not None]
    return every, [every[i] for i in live], [found[i] for i in live]


def _checked_pair(weights: list, grads: list) -> tuple[list[Tensor], list[Tensor]]:
    """This process's part of both, checked."""
    own = checked("parameters", shards(weights))
    return written("parameters", own), checked("gradients", shards(grads), own)


def _kept(backup: Any, parameters: Any, like: list[Tensor]) -> list[Tensor]:
    keys, _ = parameters_of("parameters", parameters)
    kept = shards(beside("backup", backup, keys))
    checked("backup", kept, like)
    for index, (k, w) in enumerate(zip(kept, like)):
        if k.dtype != w.dtype:
            raise TypeError(f"backup[{index}]: expected {w.dtype}, the parameter's, got {k.dtype}")
    return written("backup", kept)


def _factor(norm: Tensor, rho: float, eps: float) -> Tensor:
    return rho / (norm + eps)


# ---- public functions --------------------------------------------------------------------------------


def sam_perturb_(
    parameters: Parameters,
    gradients: Parameters | None = None,
    rho: float = 0.05,
    *,
    adaptive: bool = False,
    eta: float = 0.0,
    eps: float = 1e-12,
    backup: Parameters | None = None,
    swap: bool = False,
) -> Tensor:
    r"""Climb to where the loss is worst nearby: $w \leftarrow w + \rho\, g / (\lVert g\rVert + \epsilon)$, in place.

    The norm is that of all gradients as one vector. Adaptive (ASAM):
    $w \leftarrow w + \rho\, T^2 g / (\lVert T g\rVert + \epsilon)$ with $T = |w| + \eta$ element by element.

    Args:
        parameters: a tensor, an iterable or a mapping of names; those without a gradient stay.
        gradients: as many (None for a parameter to leave alone); default: the parameters' `.grad`.
        rho: the radius, at least 0.
        adaptive: scale each element's step by its own size.
        eta: added to |w| in T. The ASAM paper takes 0.01.
        eps: added to the norm. 0 makes a zero gradient NaN.
        backup: as many tensors of the parameters' shapes and dtypes, which the old values of all parameters
            are written to in the same pass, for `sam_restore_`. Make them once and use them at every step.
        swap: write the new values into the backup and exchange its memory with the parameters' (`.data`), which is
            all that `sam_restore_(swap=True)` does as well: four passes over memory instead of seven. The
            parameters stay the same objects, but views of their memory (flat buffers, captured CUDA graphs)
            do not follow. Not for DTensors.

    Returns the norm, () float32 (float64 where a tensor is float64), on the parameters' device.

    Shapes: any. float32, float64, bfloat16, float16, mixed; computed in float32, or float64 where one of a pair is.
    DTensors (FSDP2's parameters): each process moves its shards, the norm is that of the whole, one all-reduce.

    Raises:
        ValueError, TypeError: naming the argument.

    Source: Foret et al., "Sharpness-Aware Minimization for Efficiently Improving Generalization", 2021; adaptive:
    Kwon et al., "ASAM", 2021.
    """
    rho = _check.number("rho", rho, low=0.0)
    eta = _check.number("eta", eta, low=0.0)
    eps = _check.number("eps", eps, low=0.0)
    if not isinstance(parameters, Tensor | Mapping):
        parameters = parameters_of("parameters", parameters)[1]
    every, live, given = _with_gradients(parameters, gradients)
    if swap:
        _refuse_swap(every, backup)
    kept: list[Tensor] = []
    if backup is not None and every:
        own = checked("parameters", shards(every))
        kept = _kept(backup, parameters, own)
        apart("parameters", own, kept, "backup")
    if not live:
        if kept:
            with torch.no_grad():
                torch._foreach_copy_(kept, own)
        return torch.zeros((), device=local(every[0]).device if every else None)
    weights, grads = _checked_pair(live, given)
    beside_weights = kept
    if len(weights) < len(kept):
        moving = {id(p) for p in live}
        beside_weights = [k for k, p in zip(kept, every) if id(p) in moving]
        still = [(k, w) for k, w, p in zip(kept, own, every) if id(p) not in moving]
        with torch.no_grad():
            torch._foreach_copy_([k for k, _ in still], [w for _, w in still])
    if adaptive:
        norms = run_in_place("perturb_norms", _perturb_norms, (), weights, grads, eta)
    else:
        norms = norms_of(grads)
    norm = whole_norm(norms, given)
    arguments = (weights, grads, _factor(norm, rho, eps), eta if adaptive else None, beside_weights)
    if swap:
        run_in_place("perturb_out", _perturb_out, (beside_weights,), *arguments)
        _exchange(own, kept)
    else:
        run_in_place("perturb_", _perturb, (weights, beside_weights), *arguments)
    return norm


def _refuse_swap(every: list, backup: Any) -> None:
    if backup is None:
        raise ValueError("swap: expected a backup whose memory is exchanged with the parameters'")
    if any([hasattr(p, "to_local") for p in every]):
        raise ValueError("swap: a DTensor's memory is not exchanged; leave swap out")


def _exchange(parameters: list[Tensor], backup: list[Tensor]) -> None:
    """Each pair's memory, swapped; both count as changed for autograd."""
    for p, k in zip(parameters, backup):
        p.data, k.data = k.data, p.data
    torch.autograd.graph.increment_version([*parameters, *backup])


def sam_restore_(
    parameters: Parameters,
    gradients: Parameters | None = None,
    norm: Tensor | None = None,
    rho: float = 0.05,
    *,
    adaptive: bool = False,
    eps: float = 1e-12,
    backup: Parameters | None = None,
    swap: bool = False,
    add: Parameters | None = None,
) -> None:
    r"""Back from `sam_perturb_`, in place: the kept values bit for bit, or the step computed again and taken off,
    $w \leftarrow w - \rho\, g / (\lVert g\rVert + \epsilon)$.

    Args:
        parameters: as given to `sam_perturb_`.
        gradients, norm, rho, eps: what it was called with and what it returned, where there is no backup: the
            step is computed again. The result may differ from the old value by a unit in the last place of
            the larger of w and w + e; bfloat16 and float16 parameters, where that adds up, are refused.
        adaptive: True needs a backup: the step depends on values that are gone.
        backup: the tensors `sam_perturb_` wrote to. With it gradients and norm are not needed.
        swap: as given there.
        add: gradients (None for none) added to the parameters' `.grad` in the same pass: ImbSAM's gradient of the
            head classes, which is kept while the tail's perturbs. Where `.grad` is None it becomes a copy.

    Shapes: any, as `sam_perturb_`. DTensors as there.

    Raises:
        ValueError, TypeError: naming the argument.

    Source: Foret et al., 2021; add: Zhou et al., "ImbSAM: A Closer Look at Sharpness-Aware Minimization in
    Class-Imbalanced Recognition", 2023.
    """
    rho = _check.number("rho", rho, low=0.0)
    eps = _check.number("eps", eps, low=0.0)
    if not isinstance(parameters, Tensor | Mapping):
        parameters = parameters_of("parameters", parameters)[1]
    keys, every = parameters_of("parameters", parameters)
    if swap:
        _refuse_swap(every, backup)
    targets, more = _to_add(every, [] if add is None else beside("add", add, keys))
    if backup is not None:
        own = written("parameters", checked("parameters", shards(every)))
        kept = _kept(backup, parameters, own)
        if swap:
            _exchange(own, kept)
        elif own:
            with torch.no_grad():
                torch._foreach_copy_(own, kept)
        if targets:
            one = torch.ones((), device=targets[0].device)
            run_in_place("perturb_", _perturb, (targets,), targets, more, one, None, [])
        return
    if adaptive:
        raise ValueError(
            "backup: an adaptive step depends on values that are gone; give sam_perturb_ and sam_restore_ "
            "tensors to keep them in"
        )
    if gradients is None or not isinstance(norm, Tensor) or norm.dim() != 0:
        raise ValueError(
            "gradients, norm: expected those of sam_perturb_ (the gradients it used and the norm it "
            "returned), or a backup"
        )
    _, live, given = _with_gradients(parameters, gradients)
    weights, grads = _checked_pair(live, given) if live else ([], [])
    for index, w in enumerate(weights):
        if w.dtype in HALVES:
            raise ValueError(
                f"parameters[{index}]: w + e - e drifts in {w.dtype}; give sam_perturb_ and sam_restore_ a "
                "backup, which restores bit for bit"
            )
    if not weights and not targets:
        return
    factor = -_factor(norm.detach(), rho, eps)
    if targets:
        factor = torch.cat([factor.expand(len(weights)), factor.new_ones(len(targets))])
    pairs = ([*weights, *targets], [*grads, *more])
    run_in_place("perturb_", _perturb, (pairs[0],), *pairs, factor, None, [])


def _to_add(every: list, add: list) -> tuple[list[Tensor], list[Tensor]]:
    """The gradients that are there and what is added to them; others are set to a copy."""
    pairs = []
    for p, a in zip(every, add):
        if a is None:
            continue
        if not isinstance(a, Tensor) or a.shape != p.shape:
            came = tuple(a.shape) if isinstance(a, Tensor) else type(a).__name__
            raise ValueError(f"add: expected a tensor of shape {tuple(p.shape)}, got {came}")
        if p.grad is None:
            p.grad = a.detach().clone()
        else:
            pairs.append((local(p.grad), local(a)))
    if not pairs:
        return [], []
    targets = checked("gradients", [t for t, _ in pairs])
    return written("gradients", targets), checked("add", [a for _, a in pairs], targets)


SCOPES = ("tensor", "model")


def perturb_weights_(
    parameters: Parameters, rho: float, seed: int, *, scope: str = "tensor"
) -> None:
    r"""Normal noise in proportion to the norm, in place: $w \leftarrow w + \rho\, \frac{\lVert w\rVert}{\sqrt n} z$.

    z is standard normal, so the noise's expected squared norm is $\rho^2 \lVert w\rVert^2$. Nothing is stored: z is a
    function of (seed, tensor, element), the same on every device, at any tiling and thread count; another seed gives
    other noise, and the same seed again adds the same noise again.

    Args:
        parameters: a tensor, an iterable or a mapping of names (whose noise then follows the names, not the order).
        rho: noise over weight.
        seed: in [0, 2^63).
        scope: "tensor": norm and n of each tensor; "model": of all as one vector.

    Shapes: any. float32, float64, bfloat16, float16, mixed.

    Raises:
        ValueError, TypeError: naming the argument.

    Source: Shen et al., "Efficient Dataset Distillation through Alignment with Smooth and High-Quality Expert
    Trajectories", 2023, which perturbs weights in words; the form is this library's.
    """
    rho = _check.number("rho", rho, low=0.0)
    _check.choice("scope", scope, SCOPES)
    if not isinstance(seed, int | torch.SymInt) or isinstance(seed, bool):
        raise TypeError(f"seed: expected an int, got {type(seed).__name__} {seed!r}")
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed: expected an int in [0, 2**63), got {seed}")
    keys, every = parameters_of("parameters", parameters)
    tensors = written("parameters", checked("parameters", every))
    if not tensors:
        return
    norms = norms_of(tensors)
    counts = [t.numel() for t in tensors]
    if scope == "model":
        norms = torch.linalg.vector_norm(norms)
        counts = [sum(counts)] * len(counts)
    scales = [rho / math.sqrt(max(n, 1)) for n in counts]
    arguments: Any = (tensors, norms, scales, seed, [tensor_key(k) for k in keys])
    run_in_place("noise_", _noise, (tensors,), *arguments)


def normalized_step(
    x: Tensor, g: Tensor, rho: float, *, per_sample: bool = True, eps: float = 1e-12
) -> Tensor:
    r"""A step of length rho along g: $x + \rho\, g / \max(\lVert g\rVert, \epsilon)$, sample by sample.

    A composition of `norm.l2_normalize` and `weights.lincomb`; differentiable in x and g.

    Args:
        x: (B, ...), or any shape with per_sample=False.
        g: the gradient, x's shape.
        rho: the length.
        per_sample: one norm for each index of the first dimension; False: one of all.
        eps: the least norm divided by.

    Shapes: x and g (B, ...) -> (B, ...). float32, float64, bfloat16, float16.

    Raises:
        ValueError, TypeError: naming the argument.

    Source: Shin et al., "Unknown Domain Inconsistency Minimization for Domain Generalization", 2024.
    """
    from ..norm import l2_normalize

    rho = _check.number("rho", rho)
    eps = _check.number("eps", eps, low=0.0)
    _check.tensor("x", x, min_dim=1 if per_sample else 0)
    _check.like("g", g, x.shape, x)
    if x.numel() == 0:
        return x.clone()
    rows = g.reshape(x.shape[0] if per_sample else 1, -1)
    return lincomb([x, l2_normalize(rows, eps=eps).view(x.shape)], [1.0, rho], out_dtype=x.dtype)

"""Benchmark lines of the cores logit_mixture and distillation: several models' logits over a vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from bench.case import Case, Spec, Step, in_double, step
from solera.ensemble import combine_logits, ensemble_distillation_loss, mixture_nll


def _distillation(student: Tensor, *teachers: Tensor) -> Tensor:
    mean = torch.stack([t.softmax(-1) for t in teachers]).mean(0)
    return -(mean * student.log_softmax(-1)).sum(-1).mean()


def _ours_distillation(student: Tensor, *teachers: Tensor) -> Tensor:
    return ensemble_distillation_loss(student, teachers)


def _distillation_case(teachers_learn: bool, dtype: torch.dtype, device: str, rows=512) -> Case:
    members, width = 8, 50257
    student = torch.randn(rows, width, device=device).to(dtype).requires_grad_()
    teachers = [torch.randn(rows, width, device=device).to(dtype) for _ in range(members)]
    tensors = [student, *(t.requires_grad_(teachers_learn) for t in teachers)]
    read = (members + 1) * student.numel() * student.element_size()
    written = read if teachers_learn else student.numel() * student.element_size()
    return _case(_ours_distillation, _distillation, tensors, read, written)


def _mixture(target: Tensor, prior: Tensor) -> tuple[Callable, Callable]:
    def eager(logits: Tensor) -> Tensor:
        experts, batch, length, _ = logits.shape
        at = target.expand(experts, batch, length)[..., None]
        score = logits.log_softmax(-1).gather(-1, at)[..., 0].sum(-1)
        return -(prior[:, None].to(score.dtype) + score).logsumexp(0).sum()

    return lambda logits: mixture_nll(logits, target, prior.to(logits.dtype)).nll.sum(), eager


def _mixture_case(dtype: torch.dtype, device: str, length: int = 128) -> Case:
    experts, batch, width = 8, 8, 32000
    logits = torch.randn(experts, batch, length, width, device=device).to(dtype).requires_grad_()
    target = torch.randint(width, (batch, length), device=device)
    prior = torch.randn(experts, device=device).log_softmax(0)
    size = logits.numel() * logits.element_size()
    return _case(*_mixture(target, prior), [logits], 2 * size, size)


def _case(
    ours: Callable, eager: Callable, tensors: Sequence[Tensor], read: int, written: int
) -> Case:
    device = tensors[0].device

    def steps(function: Callable) -> Callable[..., Step]:
        one = torch.ones((), device=device)
        return lambda *t: step(lambda *v: function(*v), t, [one.to(t[0].dtype)])

    return Case(
        ours=steps(ours)(*tensors),
        exact=in_double(lambda *t: steps(eager)(*t), tensors),
        eager=steps(eager)(*tensors),
        compiled=steps(torch.compile(eager))(*tensors),
        bytes=read + written,
        written=written,
    )


def _combine(big: Tensor, new: Tensor, old: Tensor) -> Tensor:
    z = big.log_softmax(-1) + 0.5 * (new.log_softmax(-1) - old.log_softmax(-1))
    p = big.softmax(-1)
    return z.masked_fill(p < 0.1 * p.amax(-1, keepdim=True), float("-inf")).log_softmax(-1)


def _ours_combine(big: Tensor, new: Tensor, old: Tensor) -> Tensor:
    return combine_logits([big, new, old], [1.0, 0.5, -0.5], plausibility=0.1)


def _combine_case(dtype: torch.dtype, device: str) -> Case:
    tensors = [torch.randn(64, 32000, device=device).to(dtype) for _ in range(3)]
    return Case(
        ours=step(_ours_combine, tensors),
        exact=in_double(lambda *t: step(_combine, t), tensors),
        eager=step(_combine, tensors),
        compiled=step(torch.compile(_combine), tensors),
        bytes=4 * tensors[0].numel() * tensors[0].element_size(),
    )


def specs(device: str) -> Iterator[Spec]:
    for learn in (False, True):
        yield Spec(
            op="ensemble.ensemble_distillation_loss",
            label=f"fwd+bwd 8 x 512x50257{', gradients to teachers' if learn else ''}",
            dtype=torch.float32,
            make=lambda learn=learn: _distillation_case(learn, torch.float32, device),
            quick=False,
            targets={"eager": 4, "compile": 2},
        )
    yield Spec(
        op="ensemble.mixture_nll",
        label="fwd+bwd 8 x 8x128x32000",
        dtype=torch.float32,
        make=lambda: _mixture_case(torch.float32, device),
        quick=False,
        targets={"eager": 4},
    )
    yield Spec(
        op="ensemble.ensemble_distillation_loss",
        label="fwd+bwd 8 x 64x50257",
        dtype=torch.float32,
        make=lambda: _distillation_case(False, torch.float32, device, rows=64),
        targets={"eager": 4},
    )
    yield Spec(
        op="ensemble.mixture_nll",
        label="fwd+bwd 8 x 8x16x32000",
        dtype=torch.float32,
        make=lambda: _mixture_case(torch.float32, device, length=16),
        targets={"eager": 4},
    )
    for dtype in (torch.float32, torch.bfloat16):
        yield Spec(
            op="ensemble.combine_logits",
            label="fwd 3 x 64x32000, plausible",
            dtype=dtype,
            make=lambda dtype=dtype: _combine_case(dtype, device),
        )

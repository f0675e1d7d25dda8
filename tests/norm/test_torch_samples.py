"""The op and module samples that ship inside torch, run against ours.

Differences, by name:

- torch raises RuntimeError for a shape that does not fit; here every such error is a ValueError or TypeError
  that names the argument (ERRORS below).
- `F.normalize` knows any p; `l2_normalize` is p = 2.
- A negative eps, and a batch norm of a one-dimensional x, are refused (`refused` below).
- A float16 or bfloat16 sample is held to float64 of the formula, not to torch's own rounding.
"""

import pytest
import torch
from helpers import INTERPRETED, assert_accurate

import solera
from solera import norm

pytest.importorskip("expecttest", reason="torch's own samples import it (in the test requirements)")
common_ops = pytest.importorskip("torch.testing._internal.common_methods_invocations")
common_modules = pytest.importorskip("torch.testing._internal.common_modules")

pytestmark = pytest.mark.skipif(
    INTERPRETED, reason="hundreds of small calls; the core's own tests run the interpreted kernels"
)


def _layer_norm(x, shape, weight=None, bias=None, eps=1e-5):
    rows = [None if t is None else t.flatten() for t in (weight, bias)]
    return norm.layer_norm(x.flatten(-len(shape)), *rows, eps=eps).view(x.shape)


def _rms_norm(x, shape, weight=None, eps=None):
    weight = None if weight is None else weight.flatten()
    return norm.rms_norm(x.flatten(-len(shape)), weight, eps=eps).view(x.shape)


def _normalize(x, p=2.0, dim=1, eps=1e-12):
    if p != 2:
        return None
    return norm.l2_normalize(x, dim=dim, eps=eps)


OURS = {
    "nn.functional.layer_norm": _layer_norm,
    "nn.functional.rms_norm": _rms_norm,
    "nn.functional.group_norm": norm.group_norm,
    "nn.functional.instance_norm": norm.instance_norm,
    "nn.functional.batch_norm": norm.batch_norm,
    "nn.functional.normalize": _normalize,
}
OPS = [o for o in common_ops.op_db if o.name in OURS and not o.variant_test_name]


def refused(name, args, kwargs):
    """Samples that torch computes and we do not: a negative eps, a batch without channels."""
    if name == "nn.functional.normalize":
        return False
    if "batch_norm" in name or "instance_norm" in name:
        return kwargs.get("eps", 0.0) < 0 or ("batch_norm" in name and args[0].dim() < 2)
    return any(a < 0 for a in (*args[1:], *kwargs.values()) if isinstance(a, float))


def fresh(sample, dtype=None):
    """The sample's input, args and kwargs as leaves of their own, so that nothing is updated twice."""

    def copy(t):
        if not isinstance(t, torch.Tensor):
            return t
        t = (
            t.detach().clone()
            if dtype is None or not t.is_floating_point()
            else t.detach().to(dtype)
        )
        return t

    args = [copy(a) for a in (sample.input, *sample.args)]
    kwargs = {k: copy(v) for k, v in sample.kwargs.items()}
    args[0].requires_grad_()
    return args, kwargs


def every_sample(op, dtype):
    yield from op.sample_inputs("cpu", dtype, requires_grad=False)
    if op.reference_inputs_func is not None:
        yield from op.reference_inputs("cpu", dtype, requires_grad=False)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", OPS, ids=lambda o: o.name)
def test_samples(op, dtype):
    compared = 0
    for sample in every_sample(op, dtype):
        (args, kwargs), (args64, kwargs64) = fresh(sample), fresh(sample, torch.float64)
        today_args, today_kwargs = fresh(sample)
        theirs = op.op
        if refused(op.name, args, kwargs):
            with pytest.raises(ValueError, match=r"eps: expected|x: expected at least 2"):
                OURS[op.name](*args, **kwargs)
            continue
        try:
            today = theirs(*today_args, **today_kwargs)
        except (ValueError, RuntimeError):
            with pytest.raises((ValueError, TypeError)):
                OURS[op.name](*args, **kwargs)
            continue
        y = OURS[op.name](*args, **kwargs)
        if y is None:
            continue
        if op.name == "nn.functional.rms_norm" and (len(args) < 4 or args[3] is None):
            kwargs64 = {**kwargs64}
            if kwargs64.get("eps") is None and len(args64) < 4:
                kwargs64["eps"] = torch.finfo(
                    torch.float64 if dtype == torch.float64 else torch.float32
                ).eps
        truth = theirs(*args64, **kwargs64)
        assert y.shape == today.shape and y.dtype == today.dtype
        compared += 1
        if y.numel() == 0:
            continue
        if dtype == torch.float64:
            torch.testing.assert_close(y, today, rtol=1e-10, atol=1e-10)
        else:
            assert_accurate(y, truth, today, str(sample))
        g = torch.randn(y.shape, dtype=torch.float64)
        (dx,) = torch.autograd.grad(y, args[0], g.to(dtype))
        (dx_today,) = torch.autograd.grad(today, today_args[0], g.to(dtype))
        (dx64,) = torch.autograd.grad(truth, args64[0], g.to(dtype).double())
        if dtype == torch.float64:
            torch.testing.assert_close(dx, dx_today, rtol=1e-8, atol=1e-8)
        else:
            scale = dx64.norm().item() + 1e-3 * y.numel() ** 0.5
            error = (dx.double() - dx64).norm().item()
            allowed = max(2 * (dx_today.double() - dx64).norm().item(), 1e-2 * scale)
            assert error <= allowed if dtype == torch.bfloat16 else error <= 1e-4 * scale, sample
    assert compared > 0


# torch's error samples: all of them RuntimeErrors there.
ERRORS = {"nn.functional.rms_norm", "nn.functional.group_norm"}


@pytest.mark.parametrize("op", [o for o in OPS if o.name in ERRORS], ids=lambda o: o.name)
def test_error_samples(op):
    seen = 0
    for error in op.error_inputs("cpu"):
        sample = error.sample_input
        with pytest.raises(RuntimeError):
            op.op(sample.input, *sample.args, **sample.kwargs)
        if op.name == "nn.functional.rms_norm" and not sample.args[0]:
            continue  # an empty normalized_shape: our functions have no such argument
        with pytest.raises((ValueError, TypeError)):
            if op.name == "nn.functional.rms_norm" and sample.args[1] is None:
                solera.nn.RMSNorm(sample.args[0])(sample.input)
            else:
                OURS[op.name](sample.input, *sample.args, **sample.kwargs)
        seen += 1
    assert seen > 0


MODULES = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "GroupNorm",
    "InstanceNorm1d",
    "InstanceNorm2d",
    "InstanceNorm3d",
    "LayerNorm",
    "RMSNorm",
]
INFOS = {m.module_cls.__name__: m for m in common_modules.module_db}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", MODULES)
def test_module_samples(name, training):
    info = INFOS[name]
    compared = 0
    for sample in info.module_inputs_func(
        info, device="cpu", dtype=torch.float32, requires_grad=False, training=training
    ):
        if sample.forward_input is None:
            continue
        made, given = sample.constructor_input, sample.forward_input
        theirs = getattr(torch.nn, name)(*made.args, **made.kwargs)
        ours = getattr(solera.nn, name)(*made.args, **made.kwargs)
        for p in theirs.parameters():
            torch.nn.init.normal_(p)
        ours.load_state_dict(theirs.state_dict())
        ours.train(training)
        theirs.train(training)
        try:
            expected = theirs(*given.args, **given.kwargs)
        except (ValueError, RuntimeError):
            with pytest.raises((ValueError, TypeError)):
                ours(*given.args, **given.kwargs)
            continue
        torch.testing.assert_close(ours(*given.args, **given.kwargs), expected)
        for key, value in theirs.state_dict().items():
            torch.testing.assert_close(ours.state_dict()[key], value)
        compared += 1
    assert compared > 0


@pytest.mark.parametrize("name", ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "GroupNorm"])
def test_module_error_samples(name):
    info = INFOS[name]
    seen = 0
    for error in info.module_error_inputs_func(
        info, device="cpu", dtype=torch.float32, requires_grad=False, training=True
    ):
        made = error.module_error_input.constructor_input
        given = error.module_error_input.forward_input
        with pytest.raises((ValueError, TypeError, RuntimeError)):
            module = getattr(solera.nn, name)(*made.args, **made.kwargs)
            module(*given.args, **given.kwargs)
        seen += 1
    assert seen > 0

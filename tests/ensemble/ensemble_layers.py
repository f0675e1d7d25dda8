"""What the tests of both ensemble cores share: layers as written today, inputs, and the common properties.

`separate` says which core: False for batch_ensemble (one weight, scales), True for member_linear.
"""

import itertools
import os
import subprocess
import sys

import torch
import torch.nn.functional as F
from helpers import (
    DEVICE,
    DTYPES,
    INTERPRETED,
    ULP,
    assert_accurate,
    double,
    randn,
    relative_error,
)
from hypothesis import strategies as st

import solera
from solera.ensemble import batch_ensemble_linear, ensemble_linear
from solera.ensemble._members import ACTIVATIONS

# (B, K, I, O): single elements, odd sizes, tiles with a tail, several blocks, a long batch, many members.
SHAPES = [(1, 1, 1, 1), (3, 4, 5, 7), (8, 32, 24, 40), (17, 3, 16, 300), (70, 2, 530, 20)]
SMALL = [
    (1, 1, 1, 1),
    (3, 4, 5, 7),
    (17, 2, 70, 130),
    (70, 2, 18, 20),
]  # for the interpreter: all kinds of tiles
LARGE = [(600, 2, 20, 17), (10, 300, 8, 8)]
SHAPES_HERE = SMALL if INTERPRETED else SHAPES + LARGE


def eager(x, weight, r, s, bias, activation):
    """What a user writes today, in x's dtype."""
    h = x.unsqueeze(1) if x.dim() == 2 else x
    h = h if r is None else h * r
    h = h @ weight.T
    h = h if s is None else h * s
    h = h if bias is None else h + bias
    return h if activation is None else getattr(F, activation)(h)


def eager_separate(x, weight, bias, activation):
    h = x.unsqueeze(1).expand(-1, weight.shape[0], -1) if x.dim() == 2 else x
    h = (h.transpose(0, 1) @ weight).transpose(0, 1)
    h = h if bias is None else h + bias
    return h if activation is None else getattr(F, activation)(h)


def make(shape, dtype, shared=False, scales=True, bias="member", separate=False):
    B, K, I, O = shape
    x = randn(*((B, I) if shared else (B, K, I)), dtype=dtype, grad=True)
    weight = randn(
        *((K, I, O) if separate else (O, I)), dtype=dtype, scale=max(I, 1) ** -0.5, grad=True
    )
    r = randn(K, I, dtype=dtype, grad=True) if scales else None
    s = randn(K, O, dtype=dtype, grad=True) if scales else None
    sizes = {"member": (K, O), "one": (O,), None: None}[bias]
    b = None if sizes is None else randn(*sizes, dtype=dtype, grad=True)
    return (x, weight, b) if separate else (x, weight, r, s, b)


def whole(function, tensors, activation, dy):
    """y and the gradients."""
    y = function(*tensors, activation)
    return (y, *torch.autograd.grad(y, [t for t in tensors if t is not None], dy))


def ours(*arguments):
    *tensors, activation = arguments
    function = batch_ensemble_linear if len(tensors) == 5 else ensemble_linear
    return function(*tensors, activation=activation)


def check(tensors, activation, shape):
    today = eager if len(tensors) == 5 else eager_separate
    B, K, _, O = shape
    dy = randn(B, K, O, dtype=tensors[0].dtype)
    a = whole(ours, tensors, activation, dy)
    b = whole(today, double(*tensors), activation, dy.double())
    c = whole(today, tensors, activation, dy)
    names = ["y"] + [n for n, t in zip(("x", "weight", "r", "s", "bias"), tensors) if t is not None]
    for name, mine, truth, other in zip(names, a, b, c, strict=True):
        assert mine.dtype == tensors[0].dtype
        if mine.numel() < 64:  # the error of a handful of values is luck: a few roundings each
            assert relative_error(mine, truth) <= 4 * max(
                ULP[mine.dtype], relative_error(other, truth)
            ), name
        else:
            assert_accurate(mine, truth, other, name)


def check_empty_sizes(zero, separate):
    shape = [3, 2, 4, 5]
    shape[zero] = 0
    tensors = make(shape, torch.float32, separate=separate)
    out = whole(ours, tensors, "gelu", randn(shape[0], shape[1], shape[3]))
    for t, g in zip(tensors, out[1:]):
        assert g.shape == t.shape and torch.isfinite(g).all()
    if zero == 2:
        assert_accurate(out[0], F.gelu(tensors[-1].double()).expand(3, 2, 5))


def check_float32_parameters(separate):
    shape = (9, 3, 20, 11)
    tensors = make(shape, torch.float32, separate=separate)
    x = randn(9, 3, 20, dtype=torch.bfloat16, grad=True)
    dy = randn(9, 3, 11, dtype=torch.bfloat16)
    out = whole(ours, (x, *tensors[1:]), "gelu", dy)
    assert [t.dtype for t in out] == [torch.bfloat16] * 2 + [torch.float32] * (len(tensors) - 1)
    today = eager_separate if separate else eager
    truth = whole(today, double(x, *tensors[1:]), "gelu", dy.double())
    for a, b in zip(out, truth):
        assert relative_error(a, b) <= ULP[torch.bfloat16]


def check_double_backward(separate, activation):
    both = (False, True)
    for shared in (activation in ("relu", "silu"),) if INTERPRETED else both:
        tensors = make((2, 2, 3, 2), torch.float64, shared, separate=separate)
        f = lambda *t: ours(*t, activation)
        assert torch.autograd.gradcheck(f, tensors, fast_mode=INTERPRETED)
        assert torch.autograd.gradgradcheck(f, tensors, fast_mode=INTERPRETED)


def check_each_gradient_alone(separate):
    """Each gradient alone equals the one among all."""
    for shape in ((3, 4, 5, 7), (20, 3, 6, 5)):
        tensors = make(shape, torch.float32, separate=separate)
        dy = randn(shape[0], shape[1], shape[3])
        every = whole(ours, tensors, "gelu", dy)[1:]
        for i, want in enumerate(every):
            alone = [t.detach().requires_grad_(i == j) for j, t in enumerate(tensors)]
            (got,) = torch.autograd.grad(ours(*alone, "gelu"), alone[i], dy)
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def check_strides(separate):
    x, weight, *rest = (t.detach() for t in make((6, 4, 10, 8), torch.float32, separate=separate))
    views = [x.flip(0), x.transpose(0, 1).contiguous().transpose(0, 1), x[:1].expand(6, 4, 10)]
    for view in views:
        y = ours(view, weight, *rest, None)
        assert torch.equal(y, ours(view.contiguous(), weight, *rest, None))
    turned = weight.mT.contiguous().mT
    assert torch.equal(ours(x, turned, *rest, None), ours(x, weight, *rest, None))
    x.requires_grad_()
    (a,) = torch.autograd.grad(ours(x, weight, *rest, None).sum(), x)
    ones = torch.ones(6, 4, 8, device=DEVICE)
    (c,) = torch.autograd.grad(ours(x, weight, *rest, None), x, ones)
    assert torch.equal(a, c)


def check_rows_in_every_batch(separate, dtype, columns=80):
    tensors = [t.detach() for t in make((256, 8, 96, columns), dtype, separate=separate)]
    full = ours(*tensors, "gelu")
    for batch in (1, 7, 255):
        assert torch.equal(ours(tensors[0][:batch], *tensors[1:], "gelu"), full[:batch]), batch


def check_thread_counts(shape, separate):
    tensors = make(shape, torch.float32, separate=separate)
    dy = randn(shape[0], shape[1], shape[3])
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(whole(ours, tensors, "gelu", dy))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for a, b in zip(results[0], other):
            assert torch.equal(a, b)


def check_switches(separate, fixed):
    for shape in ((3, 4, 5, 7), (40, 3, 33, 20), (600, 2, 20, 17)):
        for shared in (False, True):
            check(make(shape, torch.bfloat16, shared, separate=separate), "gelu", shape)
    tensors = [t.detach() for t in make((40, 3, 33, 20), torch.bfloat16, separate=separate)]
    full = ours(*tensors, None)
    if fixed:
        assert torch.equal(ours(tensors[0][:7], *tensors[1:], None), full[:7])


def check_instruction_set(isa, separate):
    code = (
        "import ensemble_layers as t\n"
        "for shape in ((3, 4, 5, 7), (40, 3, 33, 20)):\n"
        "    for dtype in t.DTYPES:\n"
        "        for a in t.ACTIVATIONS:\n"
        f"            t.check(t.make(shape, dtype, separate={separate}), a, shape)\n"
    )
    environment = {**os.environ, "SOLERA_ISA": isa}
    paths = [os.path.dirname(__file__), os.path.dirname(os.path.dirname(__file__))]
    environment["PYTHONPATH"] = os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")])
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def check_compile(backend, separate):
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda *t: ours(*t, "gelu"), fullgraph=True, dynamic=True, backend=backend
    )
    for B in (5, 9):
        for shared in (False, True):
            tensors = make((B, 3, 6, 4), torch.float32, shared, separate=separate)
            dy = randn(B, 3, 4)
            a = whole(ours, tensors, "gelu", dy)
            y = compiled(*tensors)
            b = (y, *torch.autograd.grad(y, tensors, dy))
            for u, v in zip(a, b):
                torch.testing.assert_close(u, v)


def check_transforms(separate):
    tensors = [t.detach() for t in make((4, 3, 6, 5), torch.float64, separate=separate)]
    f = lambda *t: ours(*t, "gelu").square().sum()
    grads = torch.func.grad(f, argnums=tuple(range(len(tensors))))(*tensors)
    leaves = [t.clone().requires_grad_() for t in tensors]
    for a, b in zip(grads, torch.autograd.grad(f(*leaves), leaves)):
        torch.testing.assert_close(a, b)
    tangents = [torch.randn_like(t) for t in tensors]
    _, derivative = torch.func.jvp(f, tuple(tensors), tuple(tangents))
    torch.testing.assert_close(derivative, sum((g * t).sum() for g, t in zip(grads, tangents)))
    stack = torch.stack([tensors[0], 2 * tensors[0]])
    mapped = torch.func.vmap(lambda x: ours(x, *tensors[1:], "gelu"))(stack)
    torch.testing.assert_close(mapped[1], ours(2 * tensors[0], *tensors[1:], "gelu"))


def check_backend_and_autocast(separate):
    shape = (6, 3, 10, 8)
    tensors = make(shape, torch.float32, separate=separate)
    with solera.backend("reference"):
        a = ours(*tensors, "silu")
    torch.testing.assert_close(a, ours(*tensors, "silu"))
    if DEVICE == "cpu":
        for name in ("auto", "reference"):
            with torch.autocast("cpu", torch.bfloat16), solera.backend(name):
                y = ours(*tensors, "silu")
                assert y.dtype == torch.bfloat16
            grads = torch.autograd.grad(y, tensors, randn(*y.shape, dtype=y.dtype))
            assert all(g.dtype == torch.float32 for g in grads)
            assert relative_error(y, a) < 1e-2


SHAPES_AND_VALUES = (
    st.sampled_from([0, 1, 2, 9, 33]), st.integers(1, 3 if INTERPRETED else 5), st.sampled_from([0, 1, 3, 17]),
    st.sampled_from([0, 1, 4, 19]), st.booleans(), st.sampled_from(ACTIVATIONS),
    st.sampled_from(DTYPES[:2] if INTERPRETED else DTYPES),
    st.sampled_from([0.0, 1e-40, 1e30, float("inf"), float("nan"), 1.0]),
)  # fmt: skip


def check_shape_and_value(separate, B, K, I, O, shared, activation, dtype, value):
    tensors = [t.detach() for t in make((B, K, I, O), dtype, shared, separate=separate)]
    if tensors[0].numel():
        tensors[0].view(-1)[0] = value
    y = ours(*tensors, activation)
    today = eager_separate if separate else eager
    truth = today(*(t.double() for t in tensors), activation)
    assert y.shape == (B, K, O) and y.dtype == dtype
    finite = truth.abs() < torch.finfo(dtype).max / 2
    y, truth = y.double(), truth.double()
    rest = torch.where(finite, truth, 0.0)
    bound = 4 * ULP[dtype] * (rest.abs() + 1 + (abs(value) if abs(value) < 1e31 else 0) * 10)
    assert ((torch.where(finite, y, 0.0) - rest).abs() <= bound).all()
    if B > 1 and I > 0:  # a bad value stays in its batch item
        assert torch.isfinite(y[1:]).all()


def gradients_and_needs():
    """(dy, need): each in its two kinds, in every combination or, interpreted, each kind once."""
    kinds = (randn(4, 3, 5), randn(1, 1, 1).expand(4, 3, 5)), (True, False)
    return list(zip(*kinds)) if INTERPRETED else list(itertools.product(*kinds))


SIZES = st.lists(st.sampled_from([0, 1, 2, 3]), max_size=4).map(tuple)
KINDS = st.sampled_from([torch.float32] * 4 + [torch.float64, torch.int64, torch.bool])
TENSORS = st.builds(lambda s, d: torch.zeros(s, dtype=d, device=DEVICE), SIZES, KINDS)
ANYTHING = st.one_of(TENSORS, TENSORS, st.none(), st.just("x"), st.just(1))
ANY_ACTIVATION = st.sampled_from([None, "relu", "gelu", "silu", "GELU", 2, object()])


def check_fuzzed(function, arguments, activation):
    """A clear ValueError or TypeError, or a result; never anything else."""
    try:
        assert function(*arguments, activation=activation).dim() == 3
    except (ValueError, TypeError) as error:
        assert ": " in str(error)

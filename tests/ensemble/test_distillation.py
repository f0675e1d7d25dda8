"""Core distillation: the loss and its gradients against the formula in float64, memory, bits, bad input."""

import function_checks
import pytest
import torch
from helpers import DEVICE, DTYPES, assert_accurate, double, randn, relative_error
from hypothesis import given
from hypothesis import strategies as st

import solera
from solera.ensemble import ensemble_distillation_loss

ops = torch.ops.solera
KINDS = ("probability", "logit")
# Past a block of the C++ kernel (1024) and, in the last, a tile of the Triton kernel.
SHAPES = [(1, 1, 1), (3, 2, 3), (5, 4, 17), (2, 3, 1500), (2, 2, 4100)]


def formula(student, teachers, weights=None, temperature=1.0, combine="probability"):
    """(B,) of student (B, C) and teachers (K, B, C)."""
    if weights is None:
        weights = torch.full_like(teachers[:, 0, 0], 1 / len(teachers))
    w = weights[:, None, None]
    if combine == "probability":
        q = ((teachers / temperature).softmax(-1) * w).sum(0)
    else:
        q = ((teachers / temperature) * w).sum(0).softmax(-1)
    return -(q * (student / temperature).log_softmax(-1)).sum(-1)


def batch(rows, members, width, dtype=torch.float32, grad=True, scale=2.0):
    student = randn(rows, width, dtype=dtype, grad=grad, scale=scale)
    teachers = randn(members, rows, width, dtype=dtype, grad=grad, scale=scale)
    weights = torch.rand(members, dtype=torch.float64) + 0.2
    weights = (weights / weights.sum()).to(DEVICE, dtype).requires_grad_(grad)
    return student, teachers, weights


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("combine", KINDS)
def test_loss_and_gradients_against_float64(combine, shape, dtype):
    tensors = batch(*shape, dtype)
    wide = (
        [t.detach().float().requires_grad_() for t in tensors] if dtype.itemsize == 2 else tensors
    )
    truth = double(*tensors)
    options = {"temperature": 1.7, "combine": combine}
    got = ensemble_distillation_loss(
        tensors[0], tensors[1], weights=tensors[2], member_dim=0, reduction="none", **options
    )
    want, today = formula(*truth, **options), formula(*wide, **options)
    assert got.dtype == dtype and got.shape == (shape[0],)
    g = (randn(shape[0]).abs() + 0.5).to(dtype)
    ours = torch.autograd.grad(got, tensors, g)
    exact = torch.autograd.grad(want, truth, g.double())
    eager = torch.autograd.grad(today, wide, g.to(wide[0].dtype))
    if shape[2] == 1:
        assert got.abs().max() <= 1e-6 and all(d.abs().max() <= 1e-6 for d in ours)
        return
    for name, a, b, c in zip(
        ("loss", "student", "teachers", "weights"), (got, *ours), (want, *exact), (today, *eager)
    ):
        if dtype == torch.float64:
            assert relative_error(a, b) <= 1e-12, name
        elif dtype == torch.float32:
            # One rounding of a row's log-sum, of size 8 to 16, moves all its softmax by up to 4.8e-7.
            assert relative_error(a, b) <= max(5e-7, 2 * relative_error(c, b)), name
        else:
            assert_accurate(a, b, c, name)


def test_meal_v2():
    """The paper's loss, its mean over the batch, and its gradient (softmax(s) - mean p) / B."""
    student, teachers, _ = batch(6, 3, 9, torch.float64)
    loss = ensemble_distillation_loss(student, list(teachers.unbind(0)))
    mean = teachers.softmax(-1).mean(0)
    torch.testing.assert_close(loss, -(mean * student.log_softmax(-1)).sum(-1).mean())
    (dstudent,) = torch.autograd.grad(loss, student)
    torch.testing.assert_close(dstudent, (student.softmax(-1) - mean) / 6)


@pytest.mark.parametrize("combine", KINDS)
def test_layouts_are_one_function(combine):
    student, teachers, weights = batch(6, 3, 40)
    student, teachers = student.detach().reshape(2, 3, 40), teachers.detach().reshape(3, 2, 3, 40)

    def run(t, **options):
        if isinstance(t, list):
            t = [x.detach().requires_grad_() for x in t]
            leaves, dim = t, 0
        else:
            t = t.detach().requires_grad_()
            leaves, dim = [t], options["member_dim"]
        s = student.detach().requires_grad_()
        loss = ensemble_distillation_loss(s, t, weights=weights, combine=combine, **options)
        ds, dw, *dt = torch.autograd.grad(loss, (s, weights, *leaves))
        return loss, ds, dw, torch.stack(dt) if isinstance(t, list) else dt[0].movedim(dim, 0)

    want = run(teachers, member_dim=0)
    for got in (
        run(list(teachers.unbind(0))),
        run(teachers.movedim(0, -2), member_dim=-2),
        run(teachers.movedim(0, -2).contiguous(), member_dim=2),
        run(teachers.transpose(2, 3).contiguous().transpose(2, 3), member_dim=0),
        run([t.flip(0).contiguous().flip(0) for t in teachers]),
    ):
        assert all(torch.equal(a, b) for a, b in zip(got, want))
    stacked = teachers.detach().requires_grad_()
    (d,) = torch.autograd.grad(ensemble_distillation_loss(student, stacked, member_dim=0), stacked)
    # Nothing to copy when it is accumulated.
    assert d.stride() == stacked.stride() or solera._route.use_reference()


def test_reductions_and_backward_twice():
    student, teachers, weights = batch(5, 3, 11)
    each = ensemble_distillation_loss(student, teachers, member_dim=0, reduction="none")
    total = ensemble_distillation_loss(student, teachers, member_dim=0, reduction="sum")
    mean = ensemble_distillation_loss(student, teachers, member_dim=0)
    torch.testing.assert_close(total, each.sum())
    torch.testing.assert_close(mean, each.mean())
    for loss, factor in ((mean, 3.0), (total, -0.5)):
        first = torch.autograd.grad(loss * factor, (student, teachers), retain_graph=True)
        kept = [t.clone() for t in first]
        first[0].zero_()  # the caller's own: a second backward must not see this
        second = torch.autograd.grad(loss * factor, (student, teachers), retain_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(second, kept))
        one = torch.autograd.grad(loss, student)[0]
        torch.testing.assert_close(kept[0], one * factor)
    assert ensemble_distillation_loss(student[:0], teachers[:, :0], member_dim=0).isnan()
    assert (
        ensemble_distillation_loss(student[:0], teachers[:, :0], member_dim=0, reduction="sum") == 0
    )


@pytest.mark.parametrize("combine", KINDS)
def test_gradcheck_and_double_backward(combine):
    tensors = batch(3, 2, 4, torch.float64)

    def loss(s, t, w):
        return ensemble_distillation_loss(
            s, t, weights=w, temperature=1.3, combine=combine, member_dim=0, reduction="none"
        )

    function_checks.differentiates(loss, tensors)


def test_only_what_is_asked_for():
    student, teachers, weights = batch(4, 3, 6)
    for needs in ((True, False, False), (False, True, False), (False, False, True)):
        inputs = [t.detach().requires_grad_(n) for t, n in zip((student, teachers, weights), needs)]
        loss = ensemble_distillation_loss(*inputs[:2], weights=inputs[2], member_dim=0)
        loss.backward()
        assert [t.grad is not None for t in inputs] == list(needs)
    members = [t.detach().requires_grad_(k == 1) for k, t in enumerate(teachers)]
    ensemble_distillation_loss(student.detach(), members).backward()
    assert [t.grad is not None for t in members] == [False, True, False]


def test_masked_and_extreme_logits():
    """A class that every model leaves out counts for nothing; offsets and huge logits cost no accuracy."""
    student, teachers, _ = batch(5, 2, 8, grad=False)
    student[0, 3], teachers[:, 0, 3] = float("-inf"), float("-inf")
    student[1] += 1e4
    teachers[:, 2] *= 1e30
    student[3], teachers[0, 3] = 1e-42, 1e-42
    teachers[1, 4, 2] = float("nan")
    leaf = student.requires_grad_()
    got = ensemble_distillation_loss(leaf, teachers, member_dim=0, reduction="none")
    q = teachers.double().softmax(-1).mean(0)
    log_p = student.double().log_softmax(-1)
    want = -torch.where(q == 0, 0.0, q * log_p).sum(-1).float()
    torch.testing.assert_close(got, want, equal_nan=True)
    (d,) = torch.autograd.grad(got[:4].sum(), leaf)
    torch.testing.assert_close(d[:4], (log_p.exp() - q).float()[:4], rtol=1e-5, atol=1e-6)
    assert d[0, 3] == 0


@given(
    rows=st.integers(0, 4),
    members=st.integers(1, 5),
    width=st.integers(1, 70),
    dtype=st.sampled_from(DTYPES),
    scale=st.sampled_from([1e-3, 1.0, 30.0]),
    combine=st.sampled_from(KINDS),
    listed=st.booleans(),
)
def test_any_shape_dtype_and_scale(rows, members, width, dtype, scale, combine, listed):
    student, teachers, weights = batch(rows, members, width, dtype, scale=scale)
    given_ = list(teachers.unbind(0)) if listed else teachers
    got = ensemble_distillation_loss(
        student, given_, weights=weights, combine=combine, member_dim=0, reduction="none"
    )
    want = formula(*double(student, teachers, weights), combine=combine)
    tolerance = {
        torch.float64: 1e-10,
        torch.float32: 1e-4,
        torch.bfloat16: 2e-2,
        torch.float16: 3e-3,
    }
    rtol = tolerance[dtype]
    torch.testing.assert_close(got.double(), want, rtol=rtol, atol=rtol * scale)


def test_same_bits_for_any_thread_count_and_batch():
    student, teachers, weights = batch(40, 3, 300)
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            each = ensemble_distillation_loss(student, teachers, member_dim=0, reduction="none")
            results.append((each, *torch.autograd.grad(each.sum(), (student, teachers))))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))
    for part in (slice(0, 1), slice(7, 12)):
        few = ensemble_distillation_loss(
            student[part], teachers[:, part], member_dim=0, reduction="none"
        )
        assert torch.equal(few, results[0][0][part])


@pytest.mark.no_interpreter
def test_large_gradients_take_the_streaming_stores():
    student, teachers, _ = batch(64, 2, 40000)
    loss = ensemble_distillation_loss(student, teachers, member_dim=0, reduction="sum")
    dstudent, dteachers = torch.autograd.grad(loss, (student, teachers))
    few = [t.detach()[..., 30:32, :].requires_grad_() for t in (student, teachers)]
    loss = ensemble_distillation_loss(*few, member_dim=0, reduction="sum")
    ds, dt = torch.autograd.grad(loss, few)
    assert torch.equal(ds, dstudent[30:32]) and torch.equal(dt, dteachers[:, 30:32])


def test_nothing_of_the_logits_size_is_kept_but_the_gradient():
    student, teachers, _ = batch(8, 3, 512)
    teachers = list(teachers.detach().unbind(0))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        loss = ensemble_distillation_loss(student, teachers)
    large = {t.untyped_storage().data_ptr() for t in saved if t.numel() >= student.numel()}
    assert large == {t.untyped_storage().data_ptr() for t in (student, *teachers)}
    (d,) = torch.autograd.grad(loss, student)
    assert d.shape == student.shape


@pytest.mark.parametrize("kind", (0, 1))
def test_opcheck(kind):
    student, weights = randn(6, 4).t(), torch.rand(3, device=DEVICE)
    lists = (
        [randn(4, 6) for _ in range(3)],
        [randn(6, 4).t() for _ in range(3)],
        list(randn(4, 3, 6).unbind(1)),
    )
    for teachers in lists:
        for rows_first in (False, True):
            args = (student, teachers, weights, 0.7, 0.5, kind, True, True, True, rows_first)
            torch.library.opcheck(ops.distill.default, args)
    few = (student, teachers, weights, 1.0, 1.0, kind, False, False, False, False)
    torch.library.opcheck(ops.distill.default, few)
    one = randn(1).expand(4)
    for x in (randn(2, 4, 6), randn(4, 2, 6).transpose(0, 1), randn(2, 6, 4).mT):
        torch.library.opcheck(ops.distill_scale_.default, (x.clone(), one))
        held = x.clone(memory_format=torch.preserve_format)
        ops.distill_scale_(held, randn(4).clone())
        factor = torch.tensor([1.0, 2.0, -3.0, 0.0], device=DEVICE)
        held = x.clone(memory_format=torch.preserve_format)
        ops.distill_scale_(held, factor)
        assert torch.equal(held, x * factor[:, None])


def test_compile_and_torch_func():
    def f(s, t, w):
        each = ensemble_distillation_loss(
            s * 2, t, weights=w, temperature=2.0, member_dim=0, reduction="none"
        )
        return each + ensemble_distillation_loss(s, t, combine="logit", member_dim=0)

    function_checks.compiles(f, lambda n: batch(n, 3, 8))
    function_checks.works_under_torch_func(f, batch(4, 3, 8))


@pytest.mark.parametrize("combine", KINDS)
def test_compiled_graph_holds_the_kernel(combine):
    """Whatever needs a gradient, stacked teachers and a list, kept as (N, K, C) and as (K, N, C)."""
    student, teachers, weights = batch(4, 2, 9)
    loss = lambda s, *t, **o: ensemble_distillation_loss(s, *t, combine=combine, **o)
    for f, tensors in (
        (lambda s, t: loss(s, t, member_dim=0), (student, teachers.detach())),
        (
            lambda s, t, w: loss(s, t, weights=w, member_dim=0),
            (student.detach(), teachers, weights),
        ),
        (lambda s, t: loss(s, t), (student, randn(4, 2, 9, grad=True))),
        (lambda s, a, b: loss(s, [a, b]), (student, *teachers.detach().unbind(0))),
    ):
        assert function_checks.ops_in_graph(f, tensors) == {"distill"}
        function_checks.compiles(lambda *t, f=f: f(*t)[None], lambda n, t=tensors: t)


@pytest.mark.no_interpreter
def test_rising_rows():
    """A row whose largest value rises from block to block."""
    student, teachers, weights = batch(2, 2, 5000, torch.float32, grad=False)
    rise = torch.linspace(0, 90, 5000, device=DEVICE)
    tensors = [t.requires_grad_() for t in (student + rise, teachers + rise.flip(0), weights)]
    for combine in KINDS:
        function_checks.agrees_with_formula(
            lambda s, t, w, c=combine: ensemble_distillation_loss(
                s, t, weights=w, combine=c, member_dim=0, reduction="none"
            ),
            lambda s, t, w, c=combine: formula(s, t, w, combine=c),
            tensors,
            allowed=1e-6,
        )


@pytest.mark.inductor
@pytest.mark.no_interpreter
def test_compile_inductor():
    function_checks.compiles(
        lambda s, t, w: ensemble_distillation_loss(s, t, weights=w, member_dim=0)[None],
        lambda n: batch(n, 3, 8),
        "inductor",
    )


def test_backend_switch_and_autocast():
    student, teachers, weights = batch(5, 3, 8)
    with solera.backend("reference"):
        want = ensemble_distillation_loss(student, teachers, weights=weights, member_dim=0)
    torch.testing.assert_close(
        ensemble_distillation_loss(student, teachers, weights=weights, member_dim=0), want
    )
    half = student.bfloat16(), teachers.bfloat16()
    assert ensemble_distillation_loss(*half, member_dim=0).dtype == torch.bfloat16
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert ensemble_distillation_loss(*half, member_dim=0).dtype == torch.float32


BAD = [
    ({"temperature": 0.0}, ValueError, "temperature: expected a positive number"),
    ({"combine": "mean"}, ValueError, "combine: expected one of"),
    ({"reduction": "max"}, ValueError, "reduction: expected one of"),
    ({"weights": torch.ones(4)}, ValueError, r"weights: expected shape \(3,\)"),
    ({"weights": "x"}, TypeError, "weights: expected a tensor or a list"),
    ({"member_dim": 2}, ValueError, "member_dim: expected a dimension of teachers"),
    ({"student": torch.ones(2, 6)}, ValueError, "teachers: expected rows"),
    ({"student": torch.ones(2, 5, dtype=torch.float64)}, TypeError, "teachers: expected torch.float64"),
    ({"teachers": []}, ValueError, "teachers: expected at least one member"),
    ({"teachers": 3}, TypeError, "teachers: expected a tensor"),
    ({"student": [1.0]}, TypeError, "student: expected a torch.Tensor"),
]  # fmt: skip


@pytest.mark.parametrize("options, error, message", BAD, ids=[m for _, _, m in BAD])
def test_bad_input(options, error, message):
    given_ = {"student": torch.ones(2, 5), "teachers": torch.ones(2, 3, 5), **options}
    with pytest.raises(error, match=message):
        ensemble_distillation_loss(given_.pop("student"), given_.pop("teachers"), **given_)

"""Core member_logits: cross-entropies of ensembles against the formula in float64, and torch's contract."""

import math

import pytest
import torch
import torch.nn.functional as F
from function_checks import differentiates, works_under_torch_func
from helpers import DEVICE, DTYPES, INTERPRETED, SLACK, ULP, randn, relative_error
from hypothesis import given
from hypothesis import strategies as st
from member_cases import in_two_ranks, part_of

import solera
from solera.ensemble import ensemble_cross_entropy
from solera.ensemble.member_logits import COMBINATIONS

ops = torch.ops.solera
# Past a block of the C++ kernel (1024) and a tile of the Triton kernel (4096).
SHAPES = [(1, 1, 1), (3, 3, 5), (4, 5, 100), (2, 2, 1500), (2, 3, 4100)]


def formula(z, y, weights=None, combine="logit", reduction="none"):
    members = z.shape[1]
    w = torch.full((members,), 1 / members, dtype=z.dtype, device=z.device)
    w = (w if weights is None else weights).expand(z.shape[:2])
    if combine == "logit":
        return F.cross_entropy((z * w[..., None]).sum(1), y, reduction=reduction)
    picked = z.log_softmax(-1).gather(2, y[:, None, None].expand(-1, members, 1))[..., 0]
    if combine == "probability":
        losses = -(w.log() + picked).logsumexp(1)
    else:
        losses = -(w * picked).sum(1)
    return losses if reduction == "none" else losses.mean()


def case(rows, members, width, dtype, weighted, scale=2.0):
    z = randn(rows, members, width, dtype=dtype, grad=True, scale=scale)
    y = torch.randint(width, (rows,), device=DEVICE)
    w = None
    if weighted:
        shape = (members,) if weighted == "members" else (rows, members)
        w = randn(*shape, dtype=torch.float64).softmax(-1).to(dtype).requires_grad_()
    return z, y, w


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weighted", [None, "members", "rows"])
@pytest.mark.parametrize("combine", COMBINATIONS)
def test_loss_and_gradient_against_float64(combine, weighted, dtype):
    for shape in SHAPES[:3] if INTERPRETED and dtype != torch.float32 else SHAPES:
        z, y, w = case(*shape, dtype, weighted)
        g = randn(shape[0]).abs() + 0.5
        # Eager in float32 for half: its own arithmetic in them would forgive anything.
        wide = torch.float32 if dtype.itemsize == 2 else dtype

        def values(function, dtype, z=z, y=y, w=w, g=g):
            tensors = [t.detach().to(dtype).requires_grad_() for t in (z, w) if t is not None]
            loss = function(tensors[0], y, *tensors[1:], combine=combine, reduction="none")
            return loss, *torch.autograd.grad(loss, tensors, g.to(loss.dtype).to(dtype))

        ours = values(ensemble_cross_entropy, dtype)
        assert ours[0].dtype == dtype
        rounded = values(formula, torch.float64)
        if dtype.itemsize == 2:  # the arriving gradient is rounded too
            g = g.to(dtype).float()
            rounded = values(formula, torch.float64, g=g)
        today = values(formula, wide)
        for i, (a, b, c) in enumerate(zip(ours, today, rounded)):
            size = float(c.detach().norm())
            # Terms that cancel (one class, or a gradient of 0) leave roundings of size one.
            limit = max(ULP[dtype], 2 * relative_error(b, c), 4 * ULP[wide] / max(size, 1e-300))
            limit = max(limit, 5e-7 if dtype == torch.float32 else 1e-12)
            assert relative_error(a, c) <= SLACK * limit, (shape, i, relative_error(a, c), limit)


def mean_agrees(combine, y, tensors):
    """The mean loss and its gradients (of a factor of 1) against the formula in float64."""
    dtype = tensors[0].dtype

    def values(function, dtype):
        copies = [t.detach().to(dtype).requires_grad_() for t in tensors]
        loss = function(copies[0], y, *copies[1:], combine=combine, reduction="mean")
        return loss, *torch.autograd.grad(loss, copies)

    ours = values(ensemble_cross_entropy, dtype)
    today = values(formula, torch.float32 if dtype.itemsize == 2 else dtype)
    for i, (a, b, c) in enumerate(zip(ours, today, values(formula, torch.float64))):
        least = 1e-12 if dtype == torch.float64 else 1e-6
        limit = max(ULP[dtype], 2 * relative_error(b, c), least)
        assert a.dtype == dtype and relative_error(a, c) <= limit, (i, relative_error(a, c), limit)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("combine", COMBINATIONS)
def test_mean_against_float64(combine, dtype):
    """The loss whose gradient is formed in the forward pass, with weights and without."""
    for shape in SHAPES[1:3] if INTERPRETED else SHAPES[1:]:
        for weighted in (None, "rows"):
            z, y, w = case(*shape, torch.float64, weighted)
            tensors = [t.detach().to(dtype).requires_grad_() for t in (z, w) if t is not None]
            mean_agrees(combine, y, tensors)


def test_the_layouts_agree_bit_for_bit():
    """(B, K, C), members first, more batch dimensions, and lists; gradients in the layout that came."""
    z, y, w = case(6, 3, 40, torch.float32, "members")
    for combine in COMBINATIONS:
        loss = ensemble_cross_entropy(z, y, w, combine=combine)
        dz, dw = torch.autograd.grad(loss, (z, w))
        first = z.detach().transpose(0, 1).contiguous().requires_grad_()
        parts = [t.detach().clone().requires_grad_() for t in z.unbind(1)]
        more = z.detach().reshape(2, 3, 3, 40).permute(2, 0, 1, 3).contiguous().requires_grad_()
        for given_, back, dim, target in (
            ([first], lambda g: g[0].transpose(0, 1), 0, y),
            (parts, lambda g: torch.stack(g, 1), 1, y),
            ([more], lambda g: g[0].permute(1, 2, 0, 3).reshape(6, 3, 40), 0, y.reshape(2, 3)),
        ):
            logits = given_ if len(given_) > 1 else given_[0]
            same = ensemble_cross_entropy(logits, target, w, combine=combine, member_dim=dim)
            *grads, dw2 = torch.autograd.grad(same, (*given_, w))
            assert torch.equal(same, loss) and torch.equal(back(grads), dz)
            assert torch.equal(dw2, dw)


def test_reductions_and_rows_left_out():
    z, y, _ = case(6, 3, 5, torch.float32, None)
    y[[1, 4]] = -100
    with torch.no_grad():
        z[1], z[4] = float("nan"), float("inf")
    for combine in COMBINATIONS:
        each = ensemble_cross_entropy(z, y, combine=combine, reduction="none")
        assert not each[[1, 4]].any() and each[[0, 2, 3, 5]].all()
        total = ensemble_cross_entropy(z, y, combine=combine, reduction="sum")
        torch.testing.assert_close(total, each.sum())
        mean = ensemble_cross_entropy(z, y, combine=combine)
        torch.testing.assert_close(mean, each.sum() / 4)
        (dz,) = torch.autograd.grad(mean, z)
        assert not dz[[1, 4]].any() and dz.isfinite().all()
        moved = y.clone().masked_fill(y == -100, 3)
        moved[y == 3] = 2
        again = ensemble_cross_entropy(z, moved, combine=combine, ignore_index=3, reduction="sum")
        torch.testing.assert_close(again, ensemble_cross_entropy(
            z, torch.where(y == 3, 2, y), combine=combine, reduction="sum"))  # fmt: skip


def test_masked_huge_and_broken_logits():
    z = randn(6, 2, 9)
    y = torch.zeros(6, dtype=torch.int64, device=DEVICE)
    z[0, :, 3:] = float("-inf")
    z[1] = 1e30 * torch.randn(2, 9).to(DEVICE)
    z[2] = 1e-42
    z[3, 0, 4] = float("nan")
    z[4, 1, 1:] = float("-inf")
    z.requires_grad_()
    rows = [0, 1, 2, 4, 5]
    for combine in COMBINATIONS:
        got = ensemble_cross_entropy(z, y, combine=combine, reduction="none")
        want = formula(z, y, combine=combine)
        torch.testing.assert_close(got[rows], want[rows])
        assert got[3].isnan()
        (a,) = torch.autograd.grad(got[rows].sum(), z)
        (b,) = torch.autograd.grad(want[rows].sum(), z)
        torch.testing.assert_close(a[rows], b[rows], equal_nan=True)
        assert not a[0, :, 3:].any()


@given(
    rows=st.integers(0, 4),
    members=st.integers(1, 5),
    width=st.integers(1, 70),
    combine=st.sampled_from(COMBINATIONS),
    dtype=st.sampled_from(DTYPES),
    scale=st.sampled_from([1e-3, 1.0, 30.0, 1e3]),
    view=st.sampled_from(["plain", "transposed", "expanded", "stepped", "list"]),
)
def test_any_shape_dtype_scale_and_stride(rows, members, width, combine, dtype, scale, view):
    base = randn(rows, members, 2 * width, dtype=dtype, scale=scale)
    z = {
        "plain": lambda: base[..., :width],
        "transposed": lambda: base[..., :width].mT.contiguous().mT,
        "expanded": lambda: base[:, :1, :width].expand(rows, members, width),
        "stepped": lambda: base[..., ::2],
        "list": lambda: base[..., :width],
    }[view]()
    y = torch.randint(width, (rows,), device=DEVICE)
    logits = [t.clone() for t in z.unbind(1)] if view == "list" else z
    got = ensemble_cross_entropy(logits, y, combine=combine, reduction="none")
    want = formula(z.double(), y, combine=combine)
    rtol = {1: 2e-4, 2: 1e-2}[1 if dtype.itemsize > 2 else 2]
    torch.testing.assert_close(
        got.double(), want, rtol=rtol, atol=rtol * (1e-2 + scale / 100), equal_nan=True
    )


@pytest.mark.parametrize("combine", COMBINATIONS)
def test_derivatives(combine):
    z, y, w = case(3, 2, 4, torch.float64, "rows")
    y[1] = -100
    differentiates(lambda z, w: ensemble_cross_entropy(z, y, w, combine=combine), [z, w])
    parts = [t.detach().clone().requires_grad_() for t in z.unbind(1)]
    both = lambda *parts: ensemble_cross_entropy(list(parts), y, combine=combine)
    assert torch.autograd.gradcheck(both, parts)
    works_under_torch_func(lambda z, w: ensemble_cross_entropy(z, y, w, combine=combine), [z, w])
    rows = torch.func.vmap(
        lambda z, y: ensemble_cross_entropy(z, y, combine=combine, reduction="sum", member_dim=0)
    )
    y[1] = 0
    torch.testing.assert_close(
        rows(z, y), ensemble_cross_entropy(z, y, combine=combine, reduction="none")
    )


@pytest.mark.no_interpreter
def test_same_bits_for_any_thread_count_and_batch():
    z, y, _ = case(40, 4, 1300, torch.float32, None)
    threads = torch.get_num_threads()
    try:
        for combine in COMBINATIONS:
            results = []
            for n in (1, 2, 3):
                torch.set_num_threads(n)
                each = ensemble_cross_entropy(z, y, combine=combine, reduction="none")
                results.append((each, *torch.autograd.grad(each.sum(), z)))
            for other in results[1:]:
                assert all(torch.equal(a, b) for a, b in zip(results[0], other))
                total = ensemble_cross_entropy(z, y, combine=combine, reduction="sum")
                results[-1] += torch.autograd.grad(total, z)
            part = ensemble_cross_entropy(z[7:12], y[7:12], combine=combine, reduction="none")
            assert torch.equal(part, results[0][0][7:12])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.no_interpreter
def test_large_gradients_take_the_streaming_stores():
    z, y, _ = case(50, 3, 40001, torch.float32, None)  # odd: no row but the first is aligned
    for combine in COMBINATIONS:
        loss = ensemble_cross_entropy(z, y, combine=combine, reduction="sum")
        (dz,) = torch.autograd.grad(loss, z)
        few = z.detach()[20:22].requires_grad_()
        loss = ensemble_cross_entropy(few, y[20:22], combine=combine, reduction="sum")
        assert torch.equal(dz[20:22], torch.autograd.grad(loss, few)[0])


@pytest.mark.no_interpreter
@pytest.mark.parametrize("members, width", [(2, 5000), (3, 400_000)])
def test_rising_rows_and_rows_past_the_scratch(members, width):
    """A row whose largest value rises from block to block; K rows whose exponentials are not kept."""
    z, y, w = case(1, members, width, torch.float32, "members")
    z = (z.detach() + torch.linspace(0, 90, width, device=DEVICE)).requires_grad_()
    for combine in COMBINATIONS:
        mean_agrees(combine, y, (z, w))


def test_backward_again_and_by_a_factor():
    z, y, w = case(5, 3, 70, torch.float32, "members")
    y[1] = -100
    for combine in COMBINATIONS:
        loss = ensemble_cross_entropy(z, y, w, combine=combine)
        once = torch.autograd.grad(loss, (z, w), retain_graph=True)
        again = torch.autograd.grad(loss, (z, w), retain_graph=True)
        third = torch.autograd.grad(loss * 3, (z, w))
        assert all(torch.equal(a, b) for a, b in zip(once, again))
        torch.testing.assert_close(third, tuple(3 * g for g in once))
        assert not once[0][1].any()
        none = ensemble_cross_entropy(z, torch.full_like(y, -100), combine=combine)
        assert none.isnan() and not torch.autograd.grad(none, z)[0].any()


def test_nothing_of_the_logits_size_is_kept_but_they():
    z, y, _ = case(8, 4, 512, torch.float32, None)
    for combine in COMBINATIONS:
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            ensemble_cross_entropy(z, y, combine=combine)
        assert {t.data_ptr() for t in saved if t.numel() > 8 * 4} <= {z.data_ptr()}


def test_opcheck():
    y = torch.tensor([0, -1, 3, 2], device=DEVICE)
    base = randn(6, 3, 4)
    w = torch.rand(4, 3, device=DEVICE)
    for logits, weights in (
        ([base.permute(2, 1, 0)], w),
        ([base[:, :, :1].permute(2, 1, 0).expand(4, 3, 6)], None),
        ([randn(6, 4).t() for _ in range(3)], w[:, :1].expand(4, 3)),
    ):
        torch.library.opcheck(ops.member_logsumexp.default, (logits, y, weights))
        lse, _ = ops.member_logsumexp(logits, y, weights)
        a, b = randn(*lse.shape), randn(1, 1).expand(lse.shape)
        args = (logits, y, weights, lse, a, b, weights is not None)
        torch.library.opcheck(ops.member_softmax.default, args)
        for kind, scale in enumerate((None, randn(1)[0], None)):
            for needs in ((True, True), (False, False)):
                args = (logits, y, weights, scale, kind, *needs)
                torch.library.opcheck(ops.member_cross_entropy.default, args)


def compiled_matches(backend, kinds=COMBINATIONS):
    def f(z, y, w):
        losses = [ensemble_cross_entropy(z * 2, y, w, combine=c) for c in kinds]
        return torch.stack(losses).sum()

    torch._dynamo.reset()
    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend=backend)
    for n in (4, 7):
        z, y, w = case(n, 3, 16, torch.float32, "members")
        want, got = f(z, y, w), compiled(z, y, w)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(
            torch.autograd.grad(got, (z, w)), torch.autograd.grad(want, (z, w))
        )


def test_compile_aot_eager():
    compiled_matches("aot_eager")


@pytest.mark.inductor
@pytest.mark.no_interpreter
def test_compile_inductor():
    compiled_matches("inductor", ["probability"])


def test_backend_switch_and_autocast():
    z, y, w = case(5, 3, 8, torch.float32, "members")
    for combine in COMBINATIONS:
        with solera.backend("reference"):
            want = ensemble_cross_entropy(z, y, w, combine=combine)
        torch.testing.assert_close(ensemble_cross_entropy(z, y, w, combine=combine), want)
        half = z.detach().bfloat16()
        assert ensemble_cross_entropy(half, y, combine=combine).dtype == torch.bfloat16
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            assert ensemble_cross_entropy(half, y, combine=combine).dtype == torch.float32


def test_logit_average_of_a_language_models_layout():
    """softmax of the mean logit is the members' normalised geometric mean, over (K, B, T, V)."""
    z = randn(3, 2, 4, 11, dtype=torch.float64)
    y = torch.randint(11, (2, 4), device=DEVICE)
    got = ensemble_cross_entropy(z, y, combine="logit", member_dim=0, reduction="none")
    geometric = z.log_softmax(-1).mean(0)
    log_p = geometric - geometric.logsumexp(-1, keepdim=True)
    torch.testing.assert_close(got, -log_p.gather(2, y[..., None])[..., 0])


Z, Y = torch.zeros(4, 3, 5), torch.zeros(4, dtype=torch.int64)
BAD = {
    "no tensor": (lambda: ensemble_cross_entropy(3, Y), TypeError, "logits: expected a tensor"),
    "empty list": (lambda: ensemble_cross_entropy([], Y), ValueError, "at least one member"),
    "rank": (lambda: ensemble_cross_entropy(Z[0, 0], Y), ValueError, "at least 2 dimension"),
    "no member": (lambda: ensemble_cross_entropy(Z[:, :0], Y), ValueError, "K = 0"),
    "classes": (lambda: ensemble_cross_entropy(Z[..., :0], Y), ValueError, "at least one class"),
    "member_dim": (
        lambda: ensemble_cross_entropy(Z, Y, member_dim=2), ValueError, "member_dim: expected"
    ),
    "member_dim type": (
        lambda: ensemble_cross_entropy(Z, Y, member_dim=1.0), TypeError, "member_dim: expected"
    ),
    "list shapes": (
        lambda: ensemble_cross_entropy([Z[:, 0], Z[:2, 0]], Y), ValueError, r"logits\[1\]"
    ),
    "list dtypes": (
        lambda: ensemble_cross_entropy([Z[:, 0], Z[:, 0].half()], Y), TypeError, r"logits\[1\]"
    ),
    "target": (lambda: ensemble_cross_entropy(Z, Y[:2]), ValueError, r"target: expected shape"),
    "target type": (lambda: ensemble_cross_entropy(Z, Y.int()), TypeError, "target: expected int"),
    "label": (lambda: ensemble_cross_entropy(Z, Y + 5), IndexError, "target: expected labels"),
    "weights": (
        lambda: ensemble_cross_entropy(Z, Y, Z[0, 0]), ValueError, r"weights: expected.*\(3,\)"
    ),
    "combine": (lambda: ensemble_cross_entropy(Z, Y, combine="sum"), ValueError, "combine: exp"),
    "reduction": (
        lambda: ensemble_cross_entropy(Z, Y, reduction="max"), ValueError, "reduction: expected"
    ),
    "group": (lambda: ensemble_cross_entropy(Z, Y, group=2), TypeError, "group: expected"),
}  # fmt: skip


@pytest.mark.no_interpreter
@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    call, error, message = BAD[name]
    with pytest.raises(error, match=message):
        call()


# ---- across ranks ------------------------------------------------------------------------------------


def _losses(z, y, w, group=None, rank=None):
    """Losses of each kind, with and without weights, and the gradients to this rank's members."""
    if rank is not None:
        z, w = part_of(z, rank), part_of(w, rank)
    z, w = z.requires_grad_(), w.requires_grad_()
    out = []
    for combine in COMBINATIONS:
        for weights in (None, w):
            loss = ensemble_cross_entropy(z, y, weights, combine=combine, group=group)
            wanted = (z,) if weights is None else (z, w)
            out += [loss, *torch.autograd.grad(loss, wanted)]
    return [t.detach() for t in out]


@pytest.mark.no_interpreter
def test_two_ranks_are_one_ensemble():
    """Ranks with two and three members against one process that holds all five."""
    z, y, w = case(6, 5, 7, torch.float64, "rows")
    z, w = z.detach(), w.detach()
    first, second = in_two_ranks(_losses, (z, y, w))
    for i, whole in enumerate(_losses(z, y, w)):
        if whole.dim():
            torch.testing.assert_close(torch.cat([first[i], second[i]], 1), whole)
        else:
            assert torch.equal(first[i], second[i])
            torch.testing.assert_close(first[i], whole)
    assert math.isfinite(float(first[0]))

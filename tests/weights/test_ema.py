"""Core ema: bits against the reference, unbiased rounding, and bad input."""

import pytest
import torch
from helpers import DEVICE, DTYPES, INTERPRETED, randn
from hypothesis import given
from hypothesis import strategies as st

import solera
from solera.weights import ema_
from solera.weights.ema import philox, random_halves, round_stochastic

ops = torch.ops.solera
HALVES = (torch.bfloat16, torch.float16)
SIZES = (7, 1024, 3 * 1024 + 130) if INTERPRETED else (1, 7, 128, 1000, 1024, 40007)
SEED = 0x1234567890ABCDEF


def same_bits(a, b, rounding="stochastic"):
    if INTERPRETED and a.dtype == torch.bfloat16 and rounding == "nearest":
        # The interpreter cuts float32 off to bfloat16, and flushes denormals, where a GPU rounds.
        torch.testing.assert_close(a, b, rtol=2**-7, atol=1e-37, equal_nan=True)
        return True
    kind = {8: torch.int64, 4: torch.int32, 2: torch.int16}[a.element_size()]
    nan = a.isnan() & b.isnan()
    return torch.equal(a[~nan].view(kind), b[~nan].view(kind))


def special(n, dtype, scale=1.0):
    t = randn(n, dtype=torch.float32) * scale
    values = [0.0, -0.0, float("inf"), float("-inf"), float("nan"), 1e-7, -3e-6, 6e4, 1e30, 1e-42]
    t[: len(values)] = torch.tensor(values, device=DEVICE)[:n]
    return t.to(dtype)


def test_philox_known_answers():
    """The vectors of Salmon et al.'s Random123."""
    word = torch.zeros((), dtype=torch.int64)
    ones = word + 0xFFFFFFFF
    assert [int(w) for w in philox((word,) * 4, (word,) * 2)] == [
        0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8,
    ]  # fmt: skip
    assert [int(w) for w in philox((ones,) * 4, (ones,) * 2)] == [
        0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD,
    ]  # fmt: skip
    pi = [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344, 0xA4093822, 0x299F31D0]
    counter = [word + p for p in pi]
    assert [int(w) for w in philox(tuple(counter[:4]), tuple(counter[4:]))] == [
        0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1,
    ]  # fmt: skip


def test_random_halves_follow_the_definition():
    state = torch.tensor([SEED, 5])
    halves = random_halves(state, 3, 3000)
    for e in (0, 127, 128, 255, 256, 1023, 1024, 2999):
        chunk, slot, lane = e // 1024, e % 1024 // 128, e % 128
        counter = [torch.tensor(v) for v in (chunk * 128 + lane, 0, 3, 5)]
        key = (torch.tensor(SEED & 0xFFFFFFFF), torch.tensor(SEED >> 32))
        word = int(philox(tuple(counter), key)[slot // 2])
        assert int(halves[e]) == (word & 0xFFFF if slot % 2 == 0 else word >> 16)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("parameter", DTYPES, ids=str)
@pytest.mark.parametrize("average", DTYPES, ids=str)
def test_same_bits_as_the_reference(average, parameter, rounding):
    options = {"rounding": rounding, "seed": SEED, "step": 3}
    for scale in (1.0, 3e-6):  # 3e-6: float16's subnormal range
        for decay in (0.0, 0.999) if INTERPRETED else (0.0, 0.3, 0.999):
            averages = [special(n, average, scale) for n in SIZES]
            parameters = [special(n, parameter, scale).flip(0) for n in SIZES]
            expected = [t.clone() for t in averages]
            ema_(averages, parameters, decay, **options)
            with solera.backend("reference"):
                ema_(expected, parameters, decay, **options)
            for a, b in zip(averages, expected):
                assert same_bits(a, b, rounding)


@pytest.mark.parametrize("average", DTYPES, ids=str)
def test_nearest_against_float64(average):
    a, p = randn(500, dtype=average), randn(500)
    truth = a.double() + 0.25 * (p.double() - a.double())
    ema_(a, p, 0.75)
    limit = {
        torch.float64: 1e-15,
        torch.float32: 3e-7,
        torch.bfloat16: 2**-8,
        torch.float16: 2**-11,
    }
    if INTERPRETED:  # which cuts off instead of rounding
        limit[torch.bfloat16] = 2**-7
    assert ((a.double() - truth).abs() <= limit[average] * (truth.abs() + 0.5)).all()


def test_decay_zero_copies_and_one_changes_nothing():
    for dtype in DTYPES:
        a, p = special(50, dtype), special(50, dtype).flip(0)
        before = a.clone()
        ema_(a, p, 1.0, rounding="stochastic")
        assert same_bits(a, before)
        ema_(a, p, 0, rounding="stochastic")
        assert same_bits(a, p)
    finite = randn(20)
    expected = finite.clone()
    ema_(finite, finite, 0.3)  # its own parameter
    assert torch.equal(finite, expected)


def test_mixed_dtypes_strides_and_containers():
    averages = [
        randn(4, 6, dtype=torch.bfloat16).t(),
        randn(5),
        randn(3, dtype=torch.float64),
        randn(0),
    ]
    parameters = [randn(6, 4), randn(10)[::2], randn(1).expand(3), randn(0)]
    expected = [
        (a.double() + 0.5 * (p.double() - a.double())) for a, p in zip(averages, parameters)
    ]
    ema_(averages, parameters, 0.5)
    for a, e in zip(averages, expected):
        torch.testing.assert_close(
            a.double(), e, rtol=8e-3 if a.dtype == torch.bfloat16 else 1e-6, atol=4e-3
        )
    contiguous = [randn(6, 4, dtype=torch.bfloat16)]
    strided = [contiguous[0].t().contiguous().t()]
    p = [randn(6, 4)]
    for target in (contiguous, strided):  # bits by row-major index, not by address
        ema_(target, p, 0.9, rounding="stochastic", seed=1, step=1)
    assert torch.equal(contiguous[0], strided[0])
    model, ema = (torch.nn.Linear(3, 2).to(DEVICE) for _ in range(2))
    old, new = ema.weight.detach().clone(), model.weight.detach()
    ema_(ema.parameters(), model.parameters(), 0.5)
    torch.testing.assert_close(ema.weight.detach(), (old + new) / 2)
    assert ema.weight.grad_fn is None
    ema_(ema.state_dict(), model.state_dict(), 0.0)
    assert torch.equal(ema.weight, model.weight)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_rounding_is_unbiased(dtype):
    """The mean over many steps' bits is the float32 value, within five standard errors."""
    values = torch.tensor([1.003, -2.017, 3.1e-5, 7.3e-6, -1.23e-7, 1000.3, 6.2e-5], device=DEVICE)
    repeat = 1024 if INTERPRETED else 8192
    x = values.repeat_interleave(repeat).float()
    average = torch.zeros_like(x, dtype=dtype)
    ema_(average, x, 0.0, rounding="stochastic", seed=11, step=2)
    for value, group in zip(values.tolist(), average.double().view(len(values), repeat)):
        found = group.unique()
        assert len(found) <= 2 and found[0] <= value <= found[-1]
        step = (found[-1] - found[0]).item()
        assert abs(group.mean().item() - value) <= 5 * step / 2 / repeat**0.5 + 1e-12


def test_every_16_bit_choice_of_the_rounding():
    r = torch.arange(65536)
    for dtype, value in ((torch.bfloat16, 1.003), (torch.float16, 1.0003), (torch.float16, 7.3e-6)):
        x = torch.full((65536,), value)
        mean = round_stochastic(x, dtype, r).double().mean().item()
        # float16 uses 13 of the 16 bits in its normal range, which are all there is to cut off.
        assert abs(mean - float(x[0])) <= abs(value) * 2e-9


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_half_average_does_not_die(dtype):
    n, steps = (2048, 25) if INTERPRETED else (4096, 400)
    decay = 0.999 if dtype == torch.bfloat16 else 0.9999
    gap = 2.0**-7 if dtype == torch.bfloat16 else 2.0**-10
    start, target = torch.ones(n, device=DEVICE), torch.full((n,), 1 + gap, device=DEVICE)
    dead, alive = start.to(dtype), start.to(dtype)
    for step in range(steps):
        ema_(dead, target, decay)
        ema_(alive, target, decay, rounding="stochastic", seed=7, step=step)
    assert torch.equal(dead, start.to(dtype))
    moved = 1 - decay**steps
    error = 5 * (moved / n) ** 0.5
    assert abs((alive.double().mean().item() - 1) / gap - moved) <= error


def test_seeds():
    p, zero = randn(3000), torch.zeros(3000, dtype=torch.bfloat16, device=DEVICE)

    def run(**options):
        a = [zero.clone(), zero.clone()]
        ema_(a, [p, p], 0.5, rounding="stochastic", **options)
        return a

    first, second = run(seed=3, step=1)
    assert not torch.equal(first, second)  # the index in the list counts
    assert torch.equal(first, run(seed=3, step=1)[0])
    for other in (
        run(seed=3, step=2),
        run(seed=4, step=1),
        run(seed=3 + 2**32, step=1),
        run(),
        run(),
    ):
        assert not torch.equal(first, other[0])
    torch.manual_seed(5)
    fresh = run()[0]
    torch.manual_seed(5)
    assert torch.equal(fresh, run(step=9)[0])  # torch's generator decides; the step is not used


@given(
    shapes=st.lists(st.lists(st.integers(0, 40), max_size=2), min_size=1, max_size=3),
    data=st.data(),
    decay=st.floats(0, 1),
    rounding=st.sampled_from(["nearest", "stochastic"]),
)
def test_any_shape_and_dtype(shapes, data, decay, rounding):
    dtypes = [
        (data.draw(st.sampled_from(DTYPES)), data.draw(st.sampled_from(DTYPES))) for _ in shapes
    ]
    averages = [randn(s, dtype=d[0]) for s, d in zip(shapes, dtypes)]
    parameters = [randn(s, dtype=d[1]) for s, d in zip(shapes, dtypes)]
    expected = [t.clone() for t in averages]
    ema_(averages, parameters, decay, rounding=rounding, seed=1, step=2)
    with solera.backend("reference"):
        ema_(expected, parameters, decay, rounding=rounding, seed=1, step=2)
    for a, b in zip(averages, expected):
        assert same_bits(a, b, rounding)


def test_same_bits_for_any_thread_count():
    sizes = (5000, 3) if INTERPRETED else (100_000, 3, 16384, 16385)
    p = [randn(n) for n in sizes]
    results = []
    threads = torch.get_num_threads()
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            a = [torch.zeros_like(t, dtype=torch.bfloat16) for t in p]
            ema_(a, p, 0.5, rounding="stochastic", seed=1, step=1)
            results.append(a)
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


# ---- the contract with torch --------------------------------------------------------------------------


def test_autograd_sees_the_write():
    x, average = randn(5, grad=True), randn(5)
    y = x * average
    ema_(average, randn(5), 0.9)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    leaf, source = randn(5, grad=True), randn(5, grad=True)
    ema_(leaf, source, 0.5)
    assert leaf.is_leaf and leaf.requires_grad and leaf.grad is None


def test_opcheck():
    state = torch.tensor([3, 4], device=DEVICE)
    for seed in (None, state):
        averages = [randn(4, 6, dtype=torch.bfloat16), randn(6, 4).t()]
        parameters = [randn(1).expand(4, 6), randn(4, 6, dtype=torch.float16)]
        torch.library.opcheck(ops.ema_.default, (averages, parameters, 0.9, seed))


def compiled_matches(backend):
    def f(a, b, p, q):
        ema_([a, b], [p * 2, q], 0.9)
        ema_([b], [q], 0.5, rounding="stochastic", seed=4, step=2)
        return a + 1

    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend=backend)
    for n in (4, 7):
        args = [randn(n), randn(n, dtype=torch.bfloat16), randn(n), randn(n)]
        copies = [t.clone() for t in args]
        torch.testing.assert_close(compiled(*args), f(*copies))
        for a, b in zip(args, copies):
            torch.testing.assert_close(a, b)

    def fresh(a, p):
        ema_(a, p, 0.5, rounding="stochastic")

    a = torch.zeros(64, dtype=torch.bfloat16, device=DEVICE)
    torch.compile(fresh, fullgraph=True, dynamic=True, backend=backend)(a, p := randn(64))
    torch.testing.assert_close(a.float(), p / 2, rtol=1e-2, atol=1e-3)


@pytest.mark.inductor
@pytest.mark.no_interpreter
def test_inductor():
    compiled_matches("inductor")


def test_functional_transforms():
    a, p = randn(6), randn(3, 6)

    def step(a, p):
        a = a.clone()
        ema_(a, p, 0.75)
        return a

    expected = torch.stack([step(a, row) for row in p])
    torch.testing.assert_close(torch.func.vmap(step)(a.expand(3, 6), p), expected)
    gradient = torch.func.grad(lambda p: step(a, p).sum())(p[0])
    assert not gradient.any()  # in place and outside autograd: documented


# ---- bad input ----------------------------------------------------------------------------------------

A, B = torch.ones(3), torch.zeros(3)
I64 = torch.ones(3, dtype=torch.int64)
BASE = torch.arange(8.0)
BAD = [
    (lambda: ema_([], [], 0.5), ValueError, "averages: expected at least one tensor"),
    (lambda: ema_(3, A, 0.5), TypeError, "averages: expected a tensor, a list"),
    (lambda: ema_(A, [B], 0.5), TypeError, "parameters: expected a tensor"),
    (lambda: ema_([A], [B, B], 0.5), ValueError, "parameters: expected 1 tensors"),
    (lambda: ema_([A], [torch.ones(1, 3)], 0.5), ValueError, r"parameters\[0\]: expected shape \(3,\)"),
    (lambda: ema_([A, I64], [B, I64], 0.5), TypeError, r"averages\[1\]: expected float32.*int64"),
    (lambda: ema_([A], [I64], 0.5), TypeError, r"parameters\[0\]: expected float32.*int64"),
    (lambda: ema_({"w": I64}, {"w": I64}, 0.5), TypeError, r"averages\['w'\]: expected float32"),
    (lambda: ema_({"w": A}, {"v": B}, 0.5), ValueError, r"missing \['w'\], unexpected \['v'\]"),
    (lambda: ema_([A], [None], 0.5), TypeError, r"parameters\[0\]: expected a torch.Tensor"),
    (lambda: ema_(A, B.to("meta"), 0.5), ValueError, "parameters: expected device cpu"),
    (lambda: ema_([A, A], [B, B], 0.5), ValueError, r"averages\[0\] and averages\[1\] overlap"),
    (lambda: ema_([A], [A.view(3)[:]] * 1 + [B], 0.5), ValueError, "expected 1 tensors"),
    (lambda: ema_([BASE[:4]], [BASE[2:6]], 0.5), ValueError, r"averages\[0\] overlaps parameters\[0\]"),
    (lambda: ema_([A, B], [B, A], 0.5), ValueError, "overlaps parameters"),
    (lambda: ema_(torch.ones(1).expand(3), A, 0.5), ValueError, "averages: expanded"),
    (lambda: ema_(A, B, 1.5), ValueError, r"decay: expected a finite number in \[0, 1\]"),
    (lambda: ema_(A, B, -0.1), ValueError, "decay"),
    (lambda: ema_(A, B, float("nan")), ValueError, "decay"),
    (lambda: ema_(A, B, "x"), TypeError, "decay"),
    (lambda: ema_(A, B, 0.5, rounding="up"), ValueError, "rounding: expected one of"),
    (lambda: ema_(A, B, 0.5, rounding="stochastic", seed=1), ValueError, "seed: a given seed needs a step"),
    (lambda: ema_(A, B, 0.5, rounding="stochastic", seed=-1, step=0), ValueError, "seed: expected"),
    (lambda: ema_(A, B, 0.5, rounding="stochastic", seed=1, step=2**32), ValueError, "step: expected"),
    (lambda: ema_(A, B, 0.5, rounding="stochastic", seed=1.5, step=1), TypeError, "seed: expected an int"),
]  # fmt: skip


@pytest.mark.skipif(DEVICE != "cpu", reason="the table's tensors are on the CPU")
@pytest.mark.parametrize("case", range(len(BAD)))
def test_bad_input(case):
    call, kind, message = BAD[case]
    with pytest.raises(kind, match=message):
        call()
    assert torch.equal(A, torch.ones(3)) and torch.equal(B, torch.zeros(3))


JUNK = st.one_of(
    st.none(), st.integers(-3, 3), st.floats(), st.text(max_size=3), st.just(torch.float16)
)
TENSOR = st.builds(
    lambda shape, dtype: torch.ones(shape, dtype=dtype, device=DEVICE),
    st.lists(st.integers(0, 3), max_size=2),
    st.sampled_from([*DTYPES, torch.int64, torch.bool, torch.complex64]),
)
WEIGHTS = st.one_of(
    TENSOR,
    st.lists(TENSOR, max_size=2),
    st.dictionaries(st.sampled_from("ab"), TENSOR, max_size=2),
    JUNK,
)


@given(
    averages=WEIGHTS,
    parameters=WEIGHTS,
    decay=st.one_of(st.floats(0, 1), JUNK),
    rounding=st.one_of(st.sampled_from(["nearest", "stochastic"]), JUNK),
    seed=JUNK,
    step=JUNK,
)
def test_a_clear_error_or_a_result(averages, parameters, decay, rounding, seed, step):
    try:
        ema_(averages, parameters, decay, rounding=rounding, seed=seed, step=step)
    except (ValueError, TypeError) as error:
        assert str(error).startswith(
            ("averages", "parameters", "decay", "rounding", "seed", "step")
        ), error

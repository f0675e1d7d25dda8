"""Core lincomb: bad input gets an error that names it, whatever it is."""

import pytest
import torch
from helpers import DEVICE, DTYPES
from hypothesis import given
from hypothesis import strategies as st

from solera.weights import lincomb

A, B = torch.ones(3), torch.ones(3)
I64 = torch.ones(3, dtype=torch.int64)
BAD = [
    (lambda: lincomb([], []), ValueError, "tensors: expected at least one model"),
    (lambda: lincomb(A, [1.0]), TypeError, "tensors: expected a list of K"),
    (lambda: lincomb(3, [1.0]), TypeError, "tensors: expected a list of K"),
    (lambda: lincomb([3], [1.0]), TypeError, r"tensors\[0\]: expected a tensor, a list"),
    (lambda: lincomb([[]], [1.0]), ValueError, r"tensors\[0\]: expected at least one tensor"),
    (lambda: lincomb([[A], [A, B]], [1.0, 1]), ValueError, r"tensors\[1\]: expected 1 tensors"),
    (lambda: lincomb([[A], A], [1.0, 1]), TypeError, r"tensors\[1\]: expected a list"),
    (lambda: lincomb([A, torch.ones(4)], [1.0, 1]), ValueError, r"tensors\[1\]: expected shape \(3,\)"),
    (lambda: lincomb([A, I64], [1.0, 1]), TypeError, r"tensors\[1\]: expected float32.*int64"),
    (lambda: lincomb([[A, I64]], [1.0]), TypeError, r"tensors\[0\]\[1\]: expected float32.*int64"),
    (lambda: lincomb([[A, None]], [1.0]), TypeError, r"tensors\[0\]\[1\]: expected a torch.Tensor"),
    (lambda: lincomb([{"a": I64}], [1.0]), ValueError, "no floating-point entry"),
    (lambda: lincomb([{"a": A, "b": "x"}], [1.0]), TypeError, r"tensors\[0\]\['b'\]"),
    (lambda: lincomb([A, A.to("meta")], [1.0, 1]), ValueError, r"tensors\[1\]: expected device"),
    (lambda: lincomb([A.to_sparse()], [1.0]), TypeError, "dense"),
    (lambda: lincomb([A, B], [1.0]), ValueError, r"coefficients: expected shape \(2,\) or \(2, 1\)"),
    (lambda: lincomb([A, B], torch.ones(2, 2)), ValueError, "coefficients: expected shape"),
    (lambda: lincomb([A, B], torch.ones(2, 1, 1)), ValueError, "coefficients: expected shape"),
    (lambda: lincomb([A, B], 0.5), ValueError, "coefficients: expected shape"),
    (lambda: lincomb([A, B], ["a", "b"]), TypeError, "coefficients: expected a tensor or a list"),
    (lambda: lincomb([A, B], None), TypeError, "coefficients: expected a tensor or a list"),
    (lambda: lincomb([A, B], I64[:2]), TypeError, "coefficients: expected a floating-point"),
    (lambda: lincomb([A], torch.ones(1, device="meta")), ValueError, "coefficients: expected device"),
    (lambda: lincomb([A], [1.0], base=torch.ones(2)), ValueError, "base: expected shape"),
    (lambda: lincomb([A], [1.0], base=[A]), TypeError, "base: expected a tensor"),
    (lambda: lincomb([A], [1.0], out_dtype=torch.int32), TypeError, "out_dtype: expected float32"),
    (lambda: lincomb([A], [1.0], out_dtype="half"), TypeError, "out_dtype: expected float32"),
    (lambda: lincomb([A], [1.0], out=torch.ones(2)), ValueError, "out: expected shape"),
    (lambda: lincomb([A], [1.0], out=I64), TypeError, "out: expected float32"),
    (lambda: lincomb([A], [1.0], out=torch.ones(1).expand(3)), ValueError, "out: expanded"),
    (
        lambda: lincomb([A], torch.ones(1, requires_grad=True), out=torch.empty(3)),
        ValueError, "out: no gradient flows",
    ),
    (
        lambda: lincomb([A], [1.0], out=torch.empty(3), out_dtype=torch.float32),
        ValueError, "out_dtype: has no meaning with out",
    ),
]  # fmt: skip


@pytest.mark.skipif(DEVICE != "cpu", reason="the table's tensors are on the CPU")
@pytest.mark.parametrize("case", range(len(BAD)))
def test_bad_input(case):
    call, kind, message = BAD[case]
    with pytest.raises(kind, match=message):
        call()


JUNK = st.one_of(
    st.none(), st.integers(-3, 3), st.floats(), st.text(max_size=3), st.just(torch.float16),
    st.lists(st.floats(-2, 2), max_size=3), st.lists(st.lists(st.floats(-2, 2), max_size=2), max_size=3),
)  # fmt: skip
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
    tensors=st.one_of(st.lists(WEIGHTS, max_size=3), WEIGHTS),
    coefficients=st.one_of(TENSOR, JUNK),
    base=st.one_of(st.none(), WEIGHTS),
    out_dtype=st.one_of(st.none(), st.sampled_from([torch.float32, torch.int8]), JUNK),
    out=st.one_of(st.none(), WEIGHTS),
)
def test_a_clear_error_or_a_result(tensors, coefficients, base, out_dtype, out):
    try:
        lincomb(tensors, coefficients, base=base, out_dtype=out_dtype, out=out)
    except (ValueError, TypeError) as error:
        assert str(error).startswith(("tensors", "coefficients", "base", "out")), error


def test_lists_of_coefficients_seen_before():
    a, b = torch.ones(3, device=DEVICE), torch.full((3,), 2.0, device=DEVICE)
    for _ in range(2):
        assert torch.equal(lincomb([a, b], [1.0, 3.0]), 7 * a)
        assert torch.equal(lincomb([a, b], [1, 3]), 7 * a)  # equal numbers, the same tensor
        for zero in (0.0, -0.0):  # told apart as in a tensor, which is never looked up
            want = lincomb([a], torch.tensor([zero], device=DEVICE))
            assert torch.equal(lincomb([a], [zero]).signbit(), want.signbit())
        assert lincomb([a], [float("nan")]).isnan().all()
        with pytest.raises(ValueError, match=r"coefficients: expected shape \(3,\)"):
            lincomb([a, a, b], [1.0, 3.0])
        with pytest.raises(TypeError, match="coefficients: expected a tensor or a list"):
            lincomb([a, b], [a, b])
        with pytest.raises(TypeError, match="coefficients: expected a tensor or a list"):
            lincomb([a, b], ["1", {}])

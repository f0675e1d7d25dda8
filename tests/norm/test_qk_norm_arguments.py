"""Core qk_norm: every bad argument is named, and no argument gives anything but a result or a clear error."""

import pytest
from helpers import INTERPRETED, randn
from hypothesis import given
from hypothesis import strategies as st

from solera.norm import qk_norm

Q = randn(2, 4, 3, 8)
C = randn(3, 4)
f = qk_norm
BAD = [
    (lambda: f([1.0], Q), TypeError, "q: expected a torch.Tensor, got list"),
    (lambda: f(Q[0], Q), ValueError, "q: expected 4 dimensions"),
    (lambda: f(Q, Q[0]), ValueError, "k: expected 4 dimensions"),
    (lambda: f(Q.int(), Q), TypeError, "q: expected float32.*int32"),
    (lambda: f(Q, Q.half()), TypeError, "k: expected torch.float32"),
    (lambda: f(Q, Q.to("meta")), ValueError, "k: expected device"),
    (lambda: f(Q, Q[:1]), ValueError, "k: expected batch 2 and head dimension 8"),
    (lambda: f(Q, Q[..., :4]), ValueError, "k: expected batch 2 and head dimension 8"),
    (lambda: f(Q, Q, randn(4)), ValueError, r"q_weight: expected shape \(8,\).*\(4,\)"),
    (lambda: f(Q, Q, randn(3, 8)), ValueError, r"q_weight: expected shape \(4, 8\).*\(3, 8\)"),
    (lambda: f(Q, Q, None, randn(4)), ValueError, r"k_weight: expected shape \(8,\)"),
    (lambda: f(Q, Q, kind="batch"), ValueError, "kind: expected one of.*'batch'"),
    (lambda: f(Q, Q, scale="g"), TypeError, "scale: expected a number"),
    (lambda: f(Q, Q, scale=randn(3)), ValueError, r"scale: expected shape \(4,\).*\(3,\)"),
    (lambda: f(Q, Q, eps=-1.0), ValueError, "eps: expected a finite number"),
    (lambda: f(Q, Q, seq_dim=3), ValueError, "seq_dim: expected one of"),
    (lambda: f(Q, Q, cos=C), ValueError, "cos, sin: expected both or neither"),
    (lambda: f(Q, Q, cos=C, sin=C[:2]), ValueError, r"sin: expected shape \(3, 4\) or \(3, 8\)"),
    (lambda: f(Q, Q, cos=C[:, :3], sin=C), ValueError, "cos: expected shape.*rotary_dim 8"),
    (lambda: f(Q, Q, cos=C[0], sin=C), ValueError, "cos: expected shape"),
    (lambda: f(Q, Q, cos=C.int(), sin=C), TypeError, "cos: expected float32"),
    (lambda: f(Q, Q, cos=C.clone().requires_grad_(), sin=C), ValueError, "cos: no gradient flows"),
    (lambda: f(Q, Q, cos=C.to("meta"), sin=C), ValueError, "cos: expected device"),
    (lambda: f(Q, Q[:, :, :2], cos=C, sin=C), ValueError, "k: expected 3 positions"),
    (lambda: f(Q, Q, rotary_dim=4), ValueError, "rotary_dim: 4 was given without cos"),
    (lambda: f(Q, Q, cos=C, sin=C, rotary_dim=3), ValueError, "rotary_dim: expected an even"),
    (lambda: f(Q, Q, cos=C, sin=C, rotary_dim=10), ValueError, "rotary_dim: expected.*at most 8"),
    (lambda: f(Q, Q, cos=C, sin=C, rotary_dim=4.0), TypeError, "rotary_dim: expected an int"),
]


@pytest.mark.parametrize("case", range(len(BAD)))
def test_bad_input_is_named(case):
    call, error, message = BAD[case]
    with pytest.raises(error, match=message):
        call()


anything = st.one_of(
    st.none(),
    st.integers(-2, 2),
    st.floats(),
    st.text(max_size=3),
    st.lists(st.integers(0, 3), max_size=4).map(lambda s: randn(s)),
    st.just(Q),
    st.just(C),
)


@pytest.mark.skipif(INTERPRETED, reason="argument checks do not depend on the backend")
@given(*[anything] * 7)
def test_arguments_give_a_result_or_a_clear_error(q, k, weight, scale, cos, sin, rotary_dim):
    try:
        qk_norm(q, k, weight, scale=scale, cos=cos, sin=sin, rotary_dim=rotary_dim)
    except (TypeError, ValueError) as error:
        names = {"q", "k", "q_weight", "scale", "cos", "sin", "rotary_dim", "cos, sin"}
        assert str(error).split(":")[0] in names, error

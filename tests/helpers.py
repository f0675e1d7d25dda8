"""Shared by the tests: where they run, and how errors are judged."""

import os

import torch
from torch import Tensor

from solera import _info

DEVICE = os.environ.get("SOLERA_TEST_DEVICE", "cpu")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# One unit in the last place. float64: the value it is held to is no more exact. A sum of N random terms in one
# accumulator is off by 1.1e-16 (N / 6)^(1/2), 3e-15 for N = 4096, on either side.
ULP = {torch.float64: 4e-15, torch.float32: 1.2e-7, torch.bfloat16: 7.9e-3, torch.float16: 9.8e-4}

# A build for AddressSanitizer: not optimised, so that it rounds a product before it adds it.
SANITIZED = "libasan" in os.environ.get("LD_PRELOAD", "")
# Narrower vectors add in longer sums than torch's kernels, which keep to the widest there are; interpreted
# kernels add as numpy does.
NARROW = _info._instruction_set() in ("generic", "avx2")
SLACK = 1.25 if INTERPRETED or SANITIZED or NARROW else 1.0


def randn(*shape, dtype=torch.float32, scale=1.0, grad=False, device=DEVICE) -> Tensor:
    t = (torch.randn(*shape, dtype=torch.float64) * scale).to(device=device, dtype=dtype)
    return t.requires_grad_(grad)


def relative_error(value: Tensor, exact: Tensor) -> float:
    """||value - exact|| / ||exact|| in float64; inf if value holds a NaN that exact has not."""
    value, exact = value.detach().double().cpu(), exact.detach().double().cpu()
    assert value.shape == exact.shape, f"shape {tuple(value.shape)} != {tuple(exact.shape)}"
    if value.numel() == 0:
        return 0.0
    if not torch.equal(value.isnan(), exact.isnan()):
        return float("inf")
    value, exact = value.nan_to_num(), exact.nan_to_num()
    return float((value - exact).norm() / exact.norm().clamp_min(1e-300))


def assert_accurate(value: Tensor, exact: Tensor, eager: Tensor | None = None, name="value"):
    """At most twice eager torch's error on the same input and dtype, or one ulp of the dtype."""
    error = relative_error(value, exact)
    allowed = ULP[value.dtype]
    if eager is not None:
        allowed = max(allowed, 2 * relative_error(eager, exact))
    allowed *= SLACK
    assert error <= allowed, f"{name}: relative error {error:.3g}, allowed {allowed:.3g}"


def double(*tensors: Tensor | None):
    """float64 copies with the same requires_grad (None stays None)."""
    out = [
        None if t is None else t.detach().double().requires_grad_(t.requires_grad) for t in tensors
    ]
    return out[0] if len(out) == 1 else out

"""Settings every test runs under. Environment:

SOLERA_BACKEND=triton TRITON_INTERPRET=1   the same tests on the Triton kernels, interpreted
SOLERA_TEST_DEVICE=cuda                    the same tests on a GPU
"""

import functools
import os
import sys
from pathlib import Path

os.environ.setdefault("SOLERA_POISON", "1")  # read by the compiled library at its first allocation
sys.path.insert(0, str(Path(__file__).parent))

import hypothesis
import pytest
import torch

# Fewer examples interpreted, where one costs a second; the C++ run has them all.
EXAMPLES = 8 if os.environ.get("TRITON_INTERPRET") == "1" else 40
hypothesis.settings.register_profile(
    "solera", deadline=None, derandomize=True, max_examples=EXAMPLES, print_blob=True
)
hypothesis.settings.load_profile("solera")


if os.environ.get("TRITON_INTERPRET") == "1":
    # One random direction instead of every element: each element costs a run of the kernel.
    for check in ("gradcheck", "gradgradcheck"):
        whole = getattr(torch.autograd, check)
        setattr(torch.autograd, check, functools.partial(whole, fast_mode=True))


@pytest.fixture(autouse=True)
def _poisoned_and_seeded():
    """torch.empty gives NaN (an element nobody wrote shows); every test starts from one seed."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


def pytest_collection_modifyitems(items):
    from helpers import INTERPRETED

    skip = pytest.mark.skip(reason="the interpreter takes minutes here; the C++ run covers it")
    for item in items:
        if INTERPRETED and item.get_closest_marker("no_interpreter"):
            item.add_marker(skip)

"""Settings every test runs under. Environment:

SOLERA_BACKEND=triton TRITON_INTERPRET=1   the same tests on the Triton kernels, interpreted
SOLERA_TEST_DEVICE=cuda                    the same tests on a GPU
SOLERA_TEST_CORES=1                        only the tests of the cores: tests/<family>/test_<core>.py and
                                           test_<core>_*.py, where csrc/cpu/<family>/<core>.cpp or
                                           triton_kernels/<family>/<core>.py exists; and those marked `kernel`
"""

import functools
import os
import sys
from pathlib import Path

os.environ.setdefault("SOLERA_POISON", "1")  # read by the compiled library at its first allocation
# Read by OpenMP when torch loads it. Threads that wait sleep: spinning ones take two thirds of the cores' time
# as soon as two test processes share them.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # no pool in every test process
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


opcheck, traced = torch.library.opcheck, set()


def opcheck_traced_once(op, args, kwargs=None, **options):
    """torch.library.opcheck whose trace with sizes unknown, which is nearly all of its time, is made once in a
    process for an op and the arguments absent. Strides, flags and dtypes change what an op's fake returns, not
    how it is traced: every call has its fake compared with the kernel."""
    case = (str(op), *(arg is None for arg in args))
    if case in traced:
        options.setdefault("test_utils", ("test_schema", "test_faketensor"))
    traced.add(case)
    return opcheck(op, args, kwargs, **options)


torch.library.opcheck = opcheck_traced_once

if os.environ.get("TRITON_INTERPRET") == "1":
    import interpreter

    interpreter.remember_builtins()
    # One random direction instead of every element: each element costs a run of the kernel.
    torch.autograd.gradcheck = functools.partial(torch.autograd.gradcheck, fast_mode=True)
    # Whether an op traces is its fake's matter, not the kernel's: what is left is whether the two agree.
    torch.library.opcheck = functools.partial(
        torch.library.opcheck, test_utils=("test_schema", "test_faketensor")
    )
    # The second derivative is the reference's graph on every backend: the C++ run checks it.
    torch.autograd.gradgradcheck = lambda *args, **options: True


@pytest.fixture(autouse=True)
def _poisoned_and_seeded():
    """torch.empty gives NaN (an element nobody wrote shows); every test starts from one seed."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


def tests_a_core(path: Path) -> bool:
    """Whether a test file belongs to a core rather than to functions over cores, by their names."""
    root = Path(__file__).resolve().parent.parent
    folders = (root / "csrc/cpu", root / "triton_kernels", root / "python/solera/triton_kernels")
    cores = [p.stem for f in folders for p in (f / path.parent.name).glob("[!_]*.*")]
    return any(f"{path.stem}_".startswith(f"test_{core}_") for core in cores)


CORES_ALONE = os.environ.get("SOLERA_TEST_CORES", "0") not in ("", "0")


def pytest_ignore_collect(collection_path):
    """A file that holds no test of a core is not even imported: some import jax or scikit-learn."""
    if not CORES_ALONE or not collection_path.match("test_*.py") or tests_a_core(collection_path):
        return None
    return "mark.kernel" not in collection_path.read_text() or None


def pytest_collection_modifyitems(config, items):
    if CORES_ALONE:
        of_core = {path: tests_a_core(path) for path in {item.path for item in items}}
        left_out = [i for i in items if not of_core[i.path] and not i.get_closest_marker("kernel")]
        config.hook.pytest_deselected(items=left_out)
        left_out = set(left_out)
        items[:] = [item for item in items if item not in left_out]
    if os.environ.get("TRITON_INTERPRET") == "1":
        spare_the_interpreter(items)


def spare_the_interpreter(items):
    """It is a hundred times slower, and the C++ run has it all."""
    minutes = pytest.mark.skip(reason="the interpreter takes minutes here; the C++ run covers it")
    fakes = pytest.mark.skip(reason="compilation traces fakes, not kernels; the C++ run covers it")
    again = pytest.mark.skip(reason="interpreted with its first parameters only")
    threads = pytest.mark.skip(reason="the interpreter knows no threads")
    once = set()
    for item in items:
        name = getattr(item, "originalname", item.name)
        if item.get_closest_marker("no_interpreter"):
            item.add_marker(minutes)
        elif name.startswith(("test_compile", "test_engine_compiles")):
            item.add_marker(fakes)
        elif name == "test_same_bits_for_any_thread_count":
            item.add_marker(threads)
        elif name.startswith(("test_opcheck", "test_same_bits_for_any_thread_count")):
            if (item.fspath, name) in once:
                item.add_marker(again)
            once.add((item.fspath, name))

"""The package as a whole: importing, broken builds, the table of ops, docstrings, the command line."""

import importlib
import importlib.util
import inspect
import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from helpers import INTERPRETED

import solera
from solera import _cli, _info, _registry

ROOT = Path(__file__).resolve().parent.parent
FAMILIES = ("ensemble", "norm", "sinkhorn", "weights")

pytestmark = pytest.mark.skipif(
    INTERPRETED, reason="the C++ run covers it; nothing here runs a kernel"
)


def run(code, *flags, path=None, **environment):
    """A new Python process running `code`, with nothing of this one's settings but its search path."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("SOLERA_", "TRITON_"))}
    if path is not None:
        env["PYTHONPATH"] = str(path)
    env |= environment
    done = subprocess.run(
        [sys.executable, *flags, "-c", code], env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done


# ---- importing ---------------------------------------------------------------------------------------


def test_import_is_quick_and_silent_and_leaves_triton_alone():
    code = (
        "import sys, time, torch; before = 'triton' in sys.modules; t = time.process_time();"
        "import solera; print(time.process_time() - t);"
        "assert ('triton' in sys.modules) == before, 'importing solera imported triton'"
    )
    done = [run(code, "-W", "error::UserWarning") for _ in range(2)]
    assert all(d.stderr == "" for d in done)
    seconds = min(float(d.stdout) for d in done)
    assert seconds < 0.9, f"{seconds} s beyond torch's own import"  # 0.3 on a quiet machine


def test_unknown_backend_is_named():
    env = {**os.environ, "SOLERA_BACKEND": "cuda"}
    done = subprocess.run(
        [sys.executable, "-c", "import solera"],
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (
        done.returncode != 0 and "SOLERA_BACKEND must be auto, reference or triton" in done.stderr
    )


# ---- without the compiled library --------------------------------------------------------------------

USE = """
import json, sys, warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import solera
    import solera.norm, solera.nn, solera.weights
    from solera import _info
    x = torch.randn(5, 16, requires_grad=True)
    y = solera.norm.rms_norm(x, torch.ones(16))
    torch.testing.assert_close(y, torch.nn.functional.rms_norm(x, (16,), torch.ones(16)))
    y.sum().backward()
    assert x.grad.isfinite().all()
ours = [str(w.message) for w in caught if "solera" in str(w.message)]
print(json.dumps({"file": solera.__file__, "warnings": ours, "info": _info.collect()}))
"""


@pytest.fixture
def bare(tmp_path):
    """A copy of the package without its compiled library."""
    source = Path(solera.__file__).parent
    skip = shutil.ignore_patterns("_C*", "__pycache__", "triton_kernels")
    shutil.copytree(source, tmp_path / "solera", ignore=skip)
    kernels = importlib.util.find_spec("solera.triton_kernels").submodule_search_locations[0]
    shutil.copytree(kernels, tmp_path / "solera/triton_kernels", ignore=skip)
    return tmp_path


@pytest.mark.parametrize("library", ["missing", "garbage", "another torch's"])
def test_broken_library_warns_once_and_runs_on_the_reference(bare, library):
    file = bare / "solera" / "_C.abi3.so"
    if library == "garbage":
        file.write_bytes(b"not a library")
    elif library == "another torch's":
        if shutil.which("g++") is None:
            pytest.skip("needs g++ to make a library with an unknown symbol")
        source = bare / "unknown.cpp"
        source.write_text("extern int symbol_of_no_torch; int use() { return symbol_of_no_torch; }")
        subprocess.run(["g++", "-shared", "-fPIC", source, "-o", file, "-Wl,-z,now"], check=True)
    out = json.loads(run("import torch\n" + USE, path=bare).stdout)
    assert out["file"].startswith(str(bare))
    assert len(out["warnings"]) == 1, out["warnings"]
    assert "CPU kernels unavailable" in out["warnings"][0]
    assert out["info"]["library"]["path"] is None and out["info"]["library"]["error"]
    assert {row["CPU"] for cores in out["info"]["backends"].values() for row in cores.values()} == {
        "reference"
    }


def test_reference_backend_asks_for_no_library(bare):
    assert run("import solera", path=bare, SOLERA_BACKEND="reference").stderr == ""


# ---- the table of ops --------------------------------------------------------------------------------


def has_kernel(op, key):
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"solera::{op}", key)


@pytest.mark.parametrize("op", _registry.CORES)
def test_every_op_has_its_three_implementations(op):
    assert has_kernel(op, "CompositeExplicitAutograd"), "no reference"
    assert _registry.load_error is None, _registry.load_error
    assert has_kernel(op, "CPU"), "no CPU kernel in the compiled library"
    if importlib.util.find_spec("triton") is None:
        return
    module = importlib.import_module(f"solera.triton_kernels.{_registry.CORES[op]}")
    launcher = getattr(module, op, None)
    assert callable(launcher), f"{module.__name__} has no launcher called {op}"
    schema = getattr(torch.ops.solera, op).default._schema
    expected = len(schema.arguments)
    try:
        inspect.signature(launcher).bind(*range(expected))
    except TypeError as error:
        pytest.fail(f"launcher {op} does not take the {expected} arguments of its schema: {error}")


def test_no_op_outside_the_table():
    names = {
        n.split("::")[1].split(".")[0]
        for n in torch._C._dispatch_get_all_op_names()
        if n.startswith("solera::")
    }
    assert names == set(_registry.CORES) | set(_registry.COMPOSED)


def test_every_core_has_its_four_rooms():
    missing = [
        path
        for core in set(_registry.CORES.values())
        for path in (
            f"python/solera/{core.replace('.', '/')}.py",
            f"triton_kernels/{core.replace('.', '/')}.py",
            f"csrc/cpu/{core.replace('.', '/')}.cpp",
        )
        if not (ROOT / path).exists()
    ]
    assert not missing


# ---- what users see ----------------------------------------------------------------------------------


def public():
    for place in (*FAMILIES, "nn"):
        module = importlib.import_module(f"solera.{place}")
        for name in getattr(module, "__all__", ()):
            yield f"{place}.{name}", getattr(module, name)


@pytest.mark.parametrize("name, thing", list(public()), ids=[name for name, _ in public()])
def test_docstring_states_shapes(name, thing):
    assert thing.__doc__, f"{name} has no docstring"
    assert "shape" in thing.__doc__.lower(), f"{name}: the docstring has no line of shapes"


def test_every_family_and_module_is_exported():
    assert {"backend", "nn", *FAMILIES} <= set(solera.__all__)
    assert all(hasattr(solera, name) for name in solera.__all__)


def test_versions_and_packages_agree_with_pyproject():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["version"] == solera.__version__
    folders = {
        "solera" + str(path.parent).removeprefix(str(base)).replace("/", ".")
        for base in (ROOT / "python/solera",)
        for path in base.rglob("__init__.py")
        if "triton_kernels" not in path.parts
    } | {
        "solera." + str(path.parent.relative_to(ROOT)).replace("/", ".")
        for path in (ROOT / "triton_kernels").rglob("__init__.py")
    }
    assert set(project["tool"]["setuptools"]["packages"]) == folders


def test_info_as_json_and_as_text(capsys):
    assert _cli.main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["cpu"]["threads"] == torch.get_num_threads()
    assert {f"{f}.{c}" for f, cores in facts["backends"].items() for c in cores} == set(
        _registry.CORES.values()
    )
    if _registry.compiled_library:
        assert facts["cpu"]["instruction_set"] in ("generic", "avx2", "avx512")
    assert _cli.main(["info"]) == 0
    text = capsys.readouterr().out
    assert "instruction set" in text and "norm.row_norm" in text


def test_info_without_rich(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    _info.show(_info.collect())
    assert "instruction set" in capsys.readouterr().out


@pytest.mark.skipif(_registry.compiled_library is None, reason="the compiled library is not there")
def test_info_follows_the_instruction_set_asked_for():
    code = "from solera import _info; print(_info.collect()['cpu']['instruction_set'])"
    assert run(code, SOLERA_ISA="generic").stdout.strip() == "generic"


def test_command_line(capsys):
    assert _cli.main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == solera.__version__
    assert _cli.main([]) == 2
    assert "info" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        _cli.main(["inof"])
    assert stop.value.code == 2
    assert "invalid choice: 'inof'" in capsys.readouterr().err

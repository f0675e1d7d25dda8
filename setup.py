"""Builds `solera._C`: the CPU kernels, on LibTorch's stable ABI (one abi3 library for torch >= 2.11).

Every file under csrc/cpu/<family>/ is compiled once per instruction set; the generic object also holds
the registration. Nothing is compiled with -march=native. Environment:

SOLERA_GENERIC=1    leave the x86 instruction sets out (what aarch64 and macOS get)
SOLERA_SANITIZE=1   AddressSanitizer and UBSan (see `make sanitize`)
SOLERA_NO_CPP=1     install without the compiled library: reference and Triton only
SOLERA_WERROR=1     a failing build is an error instead of a warning (what CI sets)
FORCE_CUDA=1        compile csrc/cuda/ even where torch has no CUDA (none needed so far)
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
SOURCES = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc/cpu").glob("*/*.cpp"))


def flag(name: str) -> bool:
    return os.environ.get(name, "0") not in ("", "0")


X86 = platform.machine() in ("x86_64", "AMD64") and not flag("SOLERA_GENERIC")
ISA_FLAGS = {
    "generic": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c", "-mbmi2"],
    "avx512": [
        "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq",
        "-mfma", "-mf16c", "-mbmi2", "-mprefer-vector-width=512",
    ],
}  # fmt: skip


class Build(build_ext):
    """Compiles each (file, instruction set) pair in parallel, skipping what is newer than its sources."""

    def build_extension(self, ext: Extension) -> None:
        try:
            self._build(ext)
        except Exception as error:
            if flag("SOLERA_WERROR"):
                raise
            print(
                f"warning: the CPU kernels were not built ({error}); "
                "solera will run on its Python reference and Triton",
                file=sys.stderr,
            )

    def _build(self, ext: Extension) -> None:
        import torch
        from torch.utils.cpp_extension import include_paths, library_paths

        compiler = os.environ.get("CXX", "g++" if sys.platform != "darwin" else "clang++")
        common = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wno-psabi", "-Icsrc/cpu"]
        common += ["-Wno-unknown-pragmas", "-Wno-attributes", "-Wno-maybe-uninitialized", "-Wno-ignored-attributes"]
        common += ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-DPy_LIMITED_API=0x030B0000"]
        link = ["-shared", *(f"-L{p}" for p in library_paths()), "-ltorch_cpu", "-ltorch", "-lc10"]
        if flag("SOLERA_SANITIZE"):
            common += ["-O1", "-g", "-fsanitize=address,undefined", "-fno-omit-frame-pointer"]
            common += ["-fno-sanitize-recover=undefined"]
            link += ["-fsanitize=address,undefined"]
        else:
            common += ["-O3"]
        if sys.platform == "darwin":
            link += ["-undefined", "dynamic_lookup"]
        includes = [f"-isystem{p}" for p in include_paths()]
        headers = max(p.stat().st_mtime for p in (ROOT / "csrc/cpu").glob("*.h"))
        headers = max(headers, Path(__file__).stat().st_mtime)
        stamp = f"{torch.__version__}-{'san' if flag('SOLERA_SANITIZE') else 'opt'}-{int(X86)}"
        temp = Path(self.build_temp) / stamp

        jobs: list[tuple[Path, list[str]]] = []
        objects: list[str] = []
        for source in ext.sources:
            for isa in ISA_FLAGS if X86 else ("generic",):
                target = temp / isa / Path(source).relative_to("csrc/cpu").with_suffix(".o")
                objects.append(str(target))
                newest = max(headers, (ROOT / source).stat().st_mtime)
                if target.exists() and target.stat().st_mtime > newest:
                    continue
                target.parent.mkdir(parents=True, exist_ok=True)
                front = ["-DSOLERA_FRONT", *includes] if isa == "generic" else []
                front += ["-DSOLERA_X86"] if X86 else []
                command = [compiler, *common, *ISA_FLAGS[isa], f"-DSOLERA_ISA={isa}", *front]
                jobs.append((target, [*command, "-c", source, "-o", str(target)]))

        def run(job: tuple[Path, list[str]]) -> None:
            print(" ".join(job[1]), flush=True)
            subprocess.run(job[1], check=True, cwd=ROOT)

        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))) as pool:
            list(pool.map(run, jobs))
        output = Path(self.get_ext_fullpath(ext.name))
        output.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run([compiler, *objects, *link, "-o", str(output)], check=True)

    def copy_extensions_to_source(self) -> None:
        present = [
            e for e in self.extensions if Path(self.get_ext_fullpath_built(e)).exists()
        ]
        self.extensions, kept = present, self.extensions
        super().copy_extensions_to_source()
        self.extensions = kept

    def get_ext_fullpath_built(self, ext: Extension) -> str:
        return str(Path(self.build_lib) / self.get_ext_filename(self.get_ext_fullname(ext.name)))


extensions = (
    []
    if flag("SOLERA_NO_CPP") or sys.platform == "win32"
    else [Extension("solera._C", SOURCES, py_limited_api=True, optional=not flag("SOLERA_WERROR"))]
)
setup(
    ext_modules=extensions,
    cmdclass={"build_ext": Build},
    options={"bdist_wheel": {"py_limited_api": "cp311"}} if extensions else {},
)

"""Builds `solera._C`: the CPU kernels, on LibTorch's stable ABI (one abi3 library for torch >= 2.11).

Every file under csrc/cpu/<family>/ is compiled once per instruction set; the generic object also holds
the registration. Nothing is compiled with -march=native.

And `solera._io`, of csrc/io: threads that read and write files, for merge_files. It is a pybind11 module, hence for
one Python version; elsewhere, or where it does not build, threads in Python do the same. Its pybind11 is the
one that torch brings. Environment:

SOLERA_GENERIC=1    leave the x86 instruction sets out (what aarch64 and macOS get)
SOLERA_GENERIC=avx2 the same sources and choices, but that one set's code: a third of the objects, for tests
SOLERA_AVX512=0     leave that one out, for tests on a machine that cannot run it
SOLERA_SANITIZE=1   AddressSanitizer and UBSan (see `make sanitize`), not optimised
SOLERA_OPTIMIZE=0   compiles in a third of the time, for tests of values
SOLERA_NO_CPP=1     install without the compiled library: reference and Triton only
SOLERA_WERROR=1     a failing build is an error instead of a warning (what CI sets)
CXX                 the compiler (g++, on macOS clang++); MAX_JOBS how many run at once
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
SOURCES = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc/cpu").glob("*/*.cpp"))


def flag(name: str, default: str = "0") -> bool:
    return os.environ.get(name, default) not in ("", "0")


def compiler() -> str:
    return os.environ.get("CXX", "g++" if sys.platform != "darwin" else "clang++")


X86 = platform.machine() in ("x86_64", "AMD64") and not flag("SOLERA_GENERIC")
ONE_SET = os.environ.get("SOLERA_GENERIC", "1")
ISA_FLAGS = {
    "generic": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c", "-mbmi2"],
    "avx512": [
        "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq",
        "-mfma", "-mf16c", "-mbmi2", "-mprefer-vector-width=512",
    ],
}  # fmt: skip
if not flag("SOLERA_AVX512", "1"):
    del ISA_FLAGS["avx512"]
COMPILE = [
    "-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Icsrc/cpu",
    "-Wno-psabi", "-Wno-unknown-pragmas", "-Wno-attributes", "-Wno-ignored-attributes",
    "-Wno-uninitialized", "-Wno-maybe-uninitialized",  # of operands that GCC 12's intrinsics leave out
    "-DTORCH_TARGET_VERSION=0x020b000000000000", "-DPy_LIMITED_API=0x030B0000",
]  # fmt: skip


class Build(build_ext):
    """Compiles each (file, instruction set) pair in parallel, skipping what is newer than its sources."""

    def build_extension(self, ext: Extension) -> None:
        kernels = ext.name == "solera._C"
        try:
            self._build(ext) if kernels else self._build_io(ext)
        except Exception as error:
            if flag("SOLERA_WERROR"):
                raise
            self._output(ext).unlink(missing_ok=True)
            what = "the CPU kernels were" if kernels else "solera._io was"
            instead = (
                "on its Python reference and Triton"
                if kernels
                else "merge_files on Python's threads"
            )
            print(
                f"warning: {what} not built ({error}); solera will run {instead}", file=sys.stderr
            )

    def _build_io(self, ext: Extension) -> None:
        from torch.utils.cpp_extension import include_paths

        output = self._output(ext)
        newest = max(Path(p).stat().st_mtime for p in (__file__, *ext.sources))
        if output.exists() and output.stat().st_mtime > newest:
            return
        sanitize = ["-g1", "-fsanitize=address,undefined", "-fno-omit-frame-pointer"]
        sanitize += ["-fno-sanitize=null,vptr,object-size", "-fno-sanitize-recover=undefined"]
        command = [
            compiler(),
            "-std=c++17",
            "-O2",
            "-fPIC",
            "-fvisibility=hidden",
            "-Wall",
            "-pthread",
        ]
        command += sanitize if flag("SOLERA_SANITIZE") else []
        # Both directories hold system headers: no warnings from there.
        command += [f"-isystem{p}" for p in (*include_paths(), sysconfig.get_path("include"))]
        command += [
            "-shared",
            *(["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else []),
        ]
        output.parent.mkdir(parents=True, exist_ok=True)
        part = output.with_suffix(".part")
        print(f"compiling {ext.sources[0]}", flush=True)
        subprocess.run([*command, *ext.sources, "-o", str(part)], check=True, cwd=ROOT)
        part.replace(output)

    def _build(self, ext: Extension) -> None:
        import torch
        from torch.utils.cpp_extension import include_paths, library_paths

        optimized = flag("SOLERA_OPTIMIZE", "1") and not flag("SOLERA_SANITIZE")
        common = list(COMPILE)
        link = ["-shared", *(f"-L{p}" for p in library_paths()), "-ltorch_cpu", "-ltorch", "-lc10"]
        common += ["-O3" if optimized else "-O0"]
        if flag("SOLERA_SANITIZE"):
            # Left out: what AddressSanitizer covers.
            common += ["-g1", "-fsanitize=address,undefined", "-fno-omit-frame-pointer"]
            common += ["-fno-sanitize=null,vptr,object-size", "-fno-sanitize-recover=undefined"]
            link += ["-fsanitize=address,undefined"]
        if sys.platform == "darwin":
            link += ["-undefined", "dynamic_lookup"]
        includes = [f"-isystem{p}" for p in include_paths()]
        kind = "san" if flag("SOLERA_SANITIZE") else "opt" if optimized else "plain"
        sets = len(ISA_FLAGS) if X86 else ONE_SET
        stamp = f"{torch.__version__}-{kind}-{sets}"
        temp = Path(self.build_temp) / stamp

        jobs: list[tuple[Path, list[str]]] = []
        objects: list[str] = []
        for source in ext.sources:
            for isa in ISA_FLAGS if X86 else ("generic",):
                target = temp / isa / Path(source).relative_to("csrc/cpu").with_suffix(".o")
                objects.append(str(target))
                if target.exists() and target.stat().st_mtime > self._newest(target):
                    continue
                target.parent.mkdir(parents=True, exist_ok=True)
                front = ["-DSOLERA_FRONT", *includes] if isa == "generic" else []
                front += ["-DSOLERA_X86"] if X86 else []
                front += ["-DSOLERA_AVX512"] if X86 and "avx512" in ISA_FLAGS else []
                vectors = ISA_FLAGS[isa] if X86 else ISA_FLAGS.get(ONE_SET, [])
                command = [compiler(), *common, *vectors, f"-DSOLERA_ISA={isa}", *front]
                command += ["-MMD", "-MF", str(target.with_suffix(".d"))]
                jobs.append((target, [*command, "-c", source, "-o"]))

        def run(job: tuple[Path, list[str]]) -> None:
            # Under another name until complete, and as old as its start: neither an interrupted compiler
            # nor a source edited meanwhile leaves an object that looks new.
            target, command = job
            started = time.time()
            part = target.with_suffix(".part.o")
            print(f"compiling {command[-2]} for {target.relative_to(temp).parts[0]}", flush=True)
            subprocess.run([*command, str(part)], check=True, cwd=ROOT)
            os.utime(part, (started, started))
            part.replace(target)

        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))) as pool:
            list(pool.map(run, jobs))
        output = self._output(ext)
        output.parent.mkdir(parents=True, exist_ok=True)
        output.unlink(missing_ok=True)
        subprocess.run([compiler(), *objects, *link, "-o", str(output)], check=True)

    def _newest(self, target: Path) -> float:
        """When what an object was made of (as the compiler listed it beside it) last changed."""
        listed = target.with_suffix(".d")
        if not listed.exists():
            return float("inf")
        made_of = listed.read_text().replace("\\\n", " ").split()[1:]
        sources = [Path(__file__), *(ROOT / name for name in made_of)]
        return max(p.stat().st_mtime if p.exists() else float("inf") for p in sources)

    def copy_extensions_to_source(self) -> None:
        """In place and editable builds. Replaced in one step: a running process keeps the old library."""
        for ext in self.extensions:
            built = self._output(ext)
            if not built.exists():
                continue
            package = self.get_finalized_command("build_py").get_package_dir("solera")
            target = ROOT / package / built.name
            part = target.with_suffix(".part")
            shutil.copy2(built, part)
            part.replace(target)

    def _output(self, ext: Extension) -> Path:
        return Path(self.build_lib) / self.get_ext_filename(self.get_ext_fullname(ext.name))


# Not for Windows: the kernels use the vector extensions of GCC and clang.
extensions = (
    []
    if flag("SOLERA_NO_CPP") or sys.platform == "win32"
    else [
        Extension("solera._C", SOURCES, py_limited_api=True, optional=not flag("SOLERA_WERROR")),
        Extension("solera._io", ["csrc/io/ring.cpp"], optional=not flag("SOLERA_WERROR")),
    ]
)
setup(
    ext_modules=extensions,
    cmdclass={"build_ext": Build},
    options={"bdist_wheel": {"py_limited_api": "cp311"}} if extensions else {},
)

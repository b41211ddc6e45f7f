"""The CPU kernels of engines/kernels as a shared library: compiled where a bundle is exported, loaded from the bundle.

Knows: which compiler, with which flags. Refuses to know: what the kernels compute, which graphs call them.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import engines

SOURCES = Path(engines.__file__).parent / "kernels"
LIBRARY = "kernels.so"  # in the bundle
SETS = {  # instruction set -> what it may use; ops.cc picks one when it is loaded
    "avx2": ("-mavx2", "-mfma"),
    "avx512": ("-mavx2", "-mfma", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni", "-mprefer-vector-width=512"),
}  # fmt: skip
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall")
NEEDS = "a C++ compiler (g++ 9 or newer, or what CXX names) on Linux x86-64"


class KernelsError(ValueError):
    """Why there are no kernels here: one sentence."""


def library() -> bytes:
    """The compiled library. Raises KernelsError."""
    return built(os.environ.get("CXX", ""))


@cache
def built(named: str) -> bytes:
    """Once a process: some three seconds. named: a compiler, or "" for g++, c++ or clang++, whichever is there."""
    if (system := (platform.system(), platform.machine())) != ("Linux", "x86_64"):
        raise KernelsError(f"this is {' '.join(system)}; the CPU kernels need {NEEDS}.")
    compiler = next(filter(None, map(shutil.which, [named] if named else ["g++", "c++", "clang++"])), None)
    if compiler is None:
        raise KernelsError(f"there is no compiler {named!r}; the CPU kernels need {NEEDS}." if named else f"the CPU kernels need {NEEDS}.")
    with TemporaryDirectory() as folder:
        objects = [Path(folder) / f"{name}.o" for name in (*SETS, "ops")]
        for (name, wide), into in zip(SETS.items(), objects):
            run(compiler, *FLAGS, f"-DISA={name}", *wide, "-c", SOURCES / "kernels.cc", "-o", into)
        run(compiler, *FLAGS, "-c", SOURCES / "ops.cc", "-o", objects[-1])
        run(compiler, "-shared", *objects, "-o", into.with_name(LIBRARY))
        return into.with_name(LIBRARY).read_bytes()


def run(*command) -> None:
    """Raises KernelsError with the compiler's first error."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
        raise KernelsError(f"{command[0]} cannot compile the CPU kernels ({(lines or ['no message'])[0].strip()}).")

"""What Triton needs of the machine beside itself: it compiles C at run time.

Triton builds a module with the driver's calls when it is first needed, and up to 3.6 a launcher for
every signature of a kernel (triton/runtime/build.py, triton/backends/nvidia/driver.py of 3.6 and
3.7.1). For that it takes, in this order, ``triton.knobs.build.impl`` if a program has set it, the
program that CC names, gcc, clang; it includes Python.h, and links libcuda.so.1 as found by
TRITON_LIBCUDA_PATH, /sbin/ldconfig or LD_LIBRARY_PATH. ptxas and the CUDA headers are in its wheel.
What lies in its cache (TRITON_CACHE_DIR) is not built again.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import torch

from fpdm.settings import one_line


def missing() -> list[str]:
    """Why Triton could not launch a kernel of ours on a CUDA device; empty when it can.

    Every reason is part of one line. Nothing is asked on Windows, whose Triton brings a compiler,
    and of a ROCm device, whose backend is another.
    """
    if sys.platform == "win32" or torch.version.hip:
        return []
    reasons = [reason for reason in (_compiler(), _libcuda()) if reason]
    return [] if reasons and _built() else reasons


def _compiler() -> str | None:
    from triton import knobs

    if knobs.build.impl is not None:
        return None
    named = os.environ.get("CC")
    if named is not None and shutil.which(named) is None:
        # handed over as one program: options in it are no options
        return f"C compiler: got CC={named!r}, expected the name or path of a program"
    compiler = named or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return "C compiler: got none, expected gcc or clang in PATH, or CC (Triton compiles C)"
    folders = [_include(), *knobs.build.backend_dirs]
    if any((Path(folder) / "Python.h").is_file() for folder in folders) or _finds(compiler):
        return None
    return f"Python.h: got none in {folders[0]}, expected Python's headers (python3-dev)"


def _include() -> str:
    """Where Triton looks for Python.h: not in Debian's own layout."""
    scheme = sysconfig.get_default_scheme()
    return sysconfig.get_paths("posix_prefix" if scheme == "posix_local" else scheme)["include"]


def _finds(compiler: str) -> bool:
    """Whether it knows itself where Python.h is: by CPATH, or a wrapper's own options."""
    command = [compiler, "-E", "-x", "c", "-o", os.devnull, "-"]
    try:
        done = subprocess.run(command, input=b"#include <Python.h>\n", capture_output=True)
    except OSError:
        return False
    return done.returncode == 0


def _libcuda() -> str | None:
    from triton.backends.nvidia import driver

    try:
        # a later Triton may have no need of it
        getattr(driver, "libcuda_dirs", list)()
    except Exception as error:
        return f"libcuda.so.1: {one_line(error)} (TRITON_LIBCUDA_PATH names its folder)"
    return None


def _built() -> bool:
    """Whether all that Triton compiles lies in its cache: one module, with the launcher in it. Up
    to 3.6 there are launchers beside it, and nobody can say whether those are all there."""
    from triton import knobs
    from triton.backends.nvidia import driver

    def refuse(*args: object) -> str:
        raise RuntimeError("not in the cache")

    if not hasattr(driver, "PyKernelArg"):
        return False
    try:
        with knobs.build.scope():
            knobs.build.impl = refuse
            driver.CudaUtils()
    except Exception:
        return False
    return True

"""What Triton needs of the machine beside itself: it compiles C at run time.

Triton builds a module with the driver's calls, and a launcher for every signature of a kernel,
when they are first needed (triton/runtime/build.py, triton/backends/nvidia/driver.py of 3.6). For
that it takes, in this order, ``triton.knobs.build.impl`` if a program has set it, the program that
CC names, gcc, clang; it includes Python.h, and links libcuda.so.1 as found by TRITON_LIBCUDA_PATH,
/sbin/ldconfig or LD_LIBRARY_PATH. ptxas and the CUDA headers are in its wheel. What lies in its
cache (TRITON_CACHE_DIR) is not built again, but nobody can say whether that is everything.
"""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
from pathlib import Path


def missing() -> list[str]:
    """Why Triton could not launch a kernel of ours on a CUDA device; empty when it can.

    Every reason is part of one line. Nothing is asked on Windows, whose Triton brings a compiler.
    """
    if sys.platform == "win32":
        return []
    return [reason for reason in (_compiler(), _libcuda()) if reason]


def _compiler() -> str | None:
    from triton import knobs

    if knobs.build.impl is not None:
        return None
    named = os.environ.get("CC")
    if named is not None and shutil.which(named) is None:
        # handed over as one program: options in it are no options
        return f"C compiler: got CC={named!r}, expected the name or path of a program"
    if named is None and not any(map(shutil.which, ("gcc", "clang"))):
        return (
            "C compiler: got none, expected gcc or clang in PATH, or CC (Triton builds launchers)"
        )
    paths = (p for name in ("CPATH", "C_INCLUDE_PATH") for p in os.environ.get(name, "").split(":"))
    folders = [_include(), *knobs.build.backend_dirs, *filter(None, paths)]
    if not any((Path(folder) / "Python.h").is_file() for folder in folders):
        return f"Python.h: got none in {folders[0]}, expected Python's headers (python3-dev)"
    return None


def _include() -> str:
    """Where Triton looks for Python.h: not in Debian's own layout."""
    scheme = sysconfig.get_default_scheme()
    return sysconfig.get_paths("posix_prefix" if scheme == "posix_local" else scheme)["include"]


def _libcuda() -> str | None:
    try:
        from triton.backends.nvidia import driver

        driver.libcuda_dirs()
    except Exception as error:
        return (
            f"libcuda.so.1: {' '.join(str(error).split())} (TRITON_LIBCUDA_PATH names its folder)"
        )
    return None

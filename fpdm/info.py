"""What this machine has and what fpdm can use of it: ``python -m fpdm.info [--json]``.

Versions, devices, processor, the implementations of the operators on every device with the reason
why the others cannot run, what was compiled, and the optional packages. It imports no optional
package but the implementations' own, and does not fail: a part that does says why in its place.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import json
import os
import platform
import sys
from collections.abc import Callable
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any, TypeVar

from fpdm.cli import run_main
from fpdm.settings import ConfigError

KERNELS = Path(__file__).parent / "kernels"
F = TypeVar("F", bound=Callable[..., Any])

# module, the registry names it may come from, what it would give
PACKAGES: tuple[tuple[str, tuple[str, ...], str], ...] = (
    ("triton", ("triton", "triton-windows"), "the triton operators on sm_80 and newer"),
    ("cupy", ("cupy", "cupy-cuda12x", "cupy-cuda13x"), "the cuda operators (extra cuda12, cuda13)"),
    ("flash_attn", ("flash-attn",), "one more attention route on sm_80 and newer"),
    ("apex", ("apex",), "nothing: optim.impl=onepass does more in one pass"),
    (
        "diffusers",
        ("diffusers",),
        "its schedulers, its VAE: photos to latents, latents to pictures (extra diffusers)",
    ),
    ("matplotlib", ("matplotlib",), "loss and residual curves (extra eval)"),
    ("PIL", ("pillow",), "reading image folders (extra eval)"),
    ("tensorboard", ("tensorboard",), "train.tensorboard=true (extra dev)"),
    ("pynvml", ("nvidia-ml-py",), "joules in the benchmarks (extra bench)"),
)
# x86, then Arm
FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "asimd", "bf16")


def _guarded(fn: F) -> F:
    """A report that fails says so in its place: this command is for broken installations too."""

    @functools.wraps(fn)
    def call(*args: Any) -> Any:
        try:
            return fn(*args)
        except Exception as error:
            return {"failed": f"{type(error).__name__}: {' '.join(str(error).split())}"}

    return call  # type: ignore[return-value]


def _version(*names: str) -> str | None:
    """Of the first installed one."""
    for name in names:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


@_guarded
def versions() -> dict[str, str]:
    """Of python, fpdm and what its numbers depend on."""
    from fpdm import __version__

    found = {"python": platform.python_version(), "fpdm": __version__}
    for name in ("torch", "triton", "numpy"):
        found[name] = _version(name) or "absent"
    found["platform"] = f"{platform.system()} {platform.machine()}"
    return found


def apex_is_nvidia(folders: list[str]) -> bool:
    """NVIDIA apex has optimizers and multi_tensor_apply; the registry's apex, a package that signs
    users in to Pyramid, has neither. Looked up as files: importing it would run it."""
    return any(
        (Path(folder) / name).is_dir()
        for folder in folders
        for name in ("optimizers", "multi_tensor_apply")
    )


def package(module: str, names: tuple[str, ...], gives: str) -> str:
    """``found VERSION`` or ``absent: what it would give``."""
    spec = importlib.util.find_spec(module)
    if spec is None:
        return f"absent: {gives}"
    if module == "apex" and not apex_is_nvidia(list(spec.submodule_search_locations or [])):
        return (
            "refused: the registry's apex is an unrelated sign-in package for Pyramid; "
            "NVIDIA apex is built from its own source"
        )
    return f"found {_version(*names) or '(version unknown)'}"


def packages() -> dict[str, Any]:
    """Registry name -> ``found ...`` or ``absent: ...``."""
    return {names[0]: _guarded(package)(module, names, gives) for module, names, gives in PACKAGES}


@_guarded
def processor() -> dict[str, Any]:
    """Name, cores, threads torch will use, instruction sets."""
    import torch

    info: dict[str, str] = {}
    path = Path("/proc/cpuinfo")
    if path.exists():
        for line in path.read_text().splitlines():
            key, _, value = line.partition(":")
            info.setdefault(key.strip(), value.strip())
    has = set((info.get("flags") or info.get("Features") or "").split())
    return {
        "name": info.get("model name") or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "flags": [flag for flag in FLAGS if flag in has],
        "torch_kernels": torch.backends.cpu.get_cpu_capability(),
        "memory_gib": _memory_gib(),
    }


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, ValueError, OSError):
        return None


@_guarded
def devices() -> dict[str, Any]:
    """CUDA devices: name, capability, memory, multiprocessors, torch's CUDA; else why there are
    none."""
    import torch

    if not torch.cuda.is_available():
        built = torch.version.cuda
        why = "no device or driver found" if built else "this torch is built without CUDA"
        return {"cuda": f"none: {why}"}
    found = {}
    for index in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(index)
        found[f"cuda:{index}"] = {
            "name": p.name,
            "capability": f"sm_{p.major}{p.minor}",
            "memory_gib": round(p.total_memory / 2**30, 1),
            "multiprocessors": p.multi_processor_count,
            "cuda": torch.version.cuda,
        }
    return found


@_guarded
def implementations(device: str) -> dict[str, str]:
    """Implementation -> ``available`` or the reason why not; ``auto``: the one that would run."""
    from fpdm.kernels.implementations import ImplError, availability, choose

    told = {name: reason or "available" for name, reason in availability(device).items()}
    try:
        told["auto"] = choose("auto", device)
    except ImplError as error:
        # of what the environment asks for
        told["auto"] = f"none: {error}"
    return told


def _at_run_time() -> str:
    """Whether csrc/cuda can be compiled where it is first used."""
    from fpdm.kernels import cuda_compile

    try:
        return f"NVRTC {cuda_compile.compiler_version()} compiles them when they are first used"
    except cuda_compile.CompileError:
        return "and no NVRTC to compile them when they are first used"


def _extension(kernels: Path, record: dict[str, Any]) -> str:
    """How csrc/cpu was built, from what lies in ``kernels`` and the ``record`` beside it."""
    there = any((kernels / f"_cpu{end}").is_file() for end in EXTENSION_SUFFIXES)
    if there and "compiler" in record:
        missing = [f"; no {name}: {why}" for name, why in record.get("left_out", {}).items()]
        return f"{record['compiler']}: {' '.join(record['variants'])}{''.join(missing)}"
    if there:
        return "built, with no record beside it (_build.json) of how"
    if "compiler" in record:
        return f"missing, though _build.json records a build: {record['compiler']}"
    return f"not built: {record['missing']}"


@_guarded
def native(kernels: Path = KERNELS) -> dict[str, Any]:
    """What was compiled when the package was installed: pip hides the build's own words."""
    try:
        record = json.loads((kernels / "_build.json").read_text())
    except OSError:
        record = {}
    never = {"missing": "this installation was never built"}
    cpu, cuda = record.get("cpu", never), record.get("cuda", never)
    told: dict[str, Any] = {"csrc/cpu": _extension(kernels, cpu)}
    from fpdm.kernels import cuda_compile

    if cubins := cuda_compile.manifest():
        return (
            told
            | {"csrc/cuda": f"{len(cubins)} cubins"}
            | {name: f"sha256 {digest}" for name, digest in cubins.items()}
        )
    why = "built from other headers than these"
    if "missing" in cuda:
        # NVRTC may have come later
        why = f"when it was built, {cuda['missing']}" if record else cuda["missing"]
    told["csrc/cuda"] = f"no cubins: {why}; {_at_run_time()}"
    return told


@_guarded
def attention(device: str) -> str:
    """The route of a (T, K) = (256, 72) attention in the half precision of ``device``, and why."""
    import torch

    from fpdm.kernels.attention_routes import route

    newer = torch.cuda.get_device_capability(device) >= (8, 0)
    dtype = torch.bfloat16 if newer else torch.float16
    name, why = route(256, 72, dtype, torch.device(device))
    return f"{name}: {why}"


def routes(names: list[str]) -> dict[str, Any]:
    """Device -> route; without a CUDA device, whether there is anything to choose by."""
    cuda = [name for name in names if name != "cpu"]
    if cuda:
        return {name: attention(name) for name in cuda}
    return {"cuda": _measured()}


@_guarded
def _measured() -> str:
    from fpdm.kernels.attention_routes import TABLE, entries

    count = len(entries()) or "no"
    return f"none: no device; {TABLE.name} has {count} measurement{'' if count == 1 else 's'}"


def collect() -> dict[str, Any]:
    """Everything, ready for JSON."""
    found = devices()
    names = ["cpu", *(name for name in found if name.startswith("cuda:"))]
    return {
        "versions": versions(),
        "processor": processor(),
        "devices": found,
        "implementations": {name: implementations(name) for name in names},
        "native": native(),
        "attention": routes(names),
        "packages": packages(),
    }


def render(report: dict[str, Any]) -> str:
    """The report as indented lines."""
    lines: list[str] = []

    def add(name: str, value: Any, depth: int) -> None:
        pad = "  " * depth
        if isinstance(value, dict):
            lines.append(f"{pad}{name}")
            for key, item in value.items():
                add(key, item, depth + 1)
        else:
            text = " ".join(map(str, value)) if isinstance(value, list) else str(value)
            lines.append(f"{pad}{name:<{19 - len(pad)}} {text}")

    for name, value in report.items():
        add(name, value, 0)
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    """``python -m fpdm.info [--json]``."""
    if argv in (["-h"], ["--help"]):
        print("usage: python -m fpdm.info [--json]\n\nWhat this machine can run, else why not.")
        return 0
    if argv not in ([], ["--json"]):
        raise ConfigError(f"got {' '.join(argv)}, expected nothing or --json")
    report = collect()
    print(json.dumps(report, indent=2) if argv else render(report))
    return 0


if __name__ == "__main__":
    sys.exit(run_main("fpdm.info", main))

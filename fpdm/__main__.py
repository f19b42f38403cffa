"""``python -m fpdm`` lists the commands; with the name of one it runs ``python -m fpdm.NAME``."""

from __future__ import annotations

import runpy
import sys
from importlib.util import find_spec

from fpdm.cli import run_main
from fpdm.settings import ConfigError, suggest

COMMANDS = {
    "train": "RECIPE [--section.key value]  a run, in runs/NAME",
    "sample": "[SOURCE] [--steps, --budget, ...]  images of a run or export",
    "evaluate": "[SOURCE] [--sweep]  how good they are",
    "info": "[--json]  what this machine can run",
    "interop": "FILE OUT  a published .pt as an export",
    "data": "encode, convert-fastdit, verify, ...  latents and image folders",
}


def main(argv: list[str]) -> None:
    """Lists the commands, or runs the one that is named. Raises ConfigError for another name."""
    if not argv or argv[0] in ("-h", "--help"):
        print("\n".join(f"python -m fpdm.{name} {text}" for name, text in COMMANDS.items()))
        if find_spec("bench") is not None:
            print("python -m bench [--suite, --row, ...]  every part against its baselines")
        print("each explains its options with --help")
        return
    if argv[0] not in COMMANDS:
        near = suggest(argv[0], COMMANDS)
        raise ConfigError(f"got {argv[0]}, expected one of {', '.join(COMMANDS)}{near}")
    sys.argv = [f"fpdm.{argv[0]}", *argv[1:]]
    runpy.run_module(f"fpdm.{argv[0]}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    run_main("fpdm", main)

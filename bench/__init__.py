"""Measurements: ours and its baselines in one process, on a CPU or a GPU."""

import sys

from fpdm import process

# of every arm alike: a baseline's threads spin away each other's time as ours do
if process.is_command(sys.argv, sys.orig_argv, "bench"):
    process.set_threads()

"""One result of a machine from several raw files: what was measured in pieces, one run each.

    python -m bench.compose FILE...     bench.json beside them, of the files of one folder
    python -m bench.compose             every committed result again, from the files it names

A file is what ``python -m bench --out`` or a part of ``python -m bench.gpu`` wrote, as
bench/gpu_check.sh does. Of rows with one key the last file's is taken, whole; each row names its
``source``, under whose commit, command, ceilings and company it stands. Two things are not as they
were written down: FLOPs are counted again (bench.counted), and a peak that a graph's replay was
measured at is left out, as it allocates nothing. notes.json of the folder has what no run can
tell: how its rows are to be read, and rows that say why they were not measured.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from bench import counted, machine
from bench.against import Found, key
from bench.rows import LAUNCHED, OURS
from fpdm.cli import run_main
from fpdm.config import ConfigError

RESULT, NOTES = "bench.json", "notes.json"
# parts of bench.gpu that a table or a picture shows
PARTS = ("memory", "profile", "replays")
_WRONG = f"another file, expected one of python -m bench, or of bench.gpu {', '.join(PARTS)}"
# of a raw file, what is the machine's and not the run's
MACHINE = ("machine", "processor", "devices")


def compose(folder: Path, names: Sequence[str]) -> Found:
    """The result of the files ``names`` in ``folder``. Raises ConfigError."""
    result: Found = {}
    sources: dict[str, Found] = {}
    rows: dict[tuple[str, str], Found] = {}
    notes = _read(folder / NOTES) if (folder / NOTES).is_file() else {}
    for name in names:
        found = _read(folder / name)
        source = {k: v for k, v in found.items() if k not in ("rows", *MACHINE)}
        if "ceilings" in found:
            _same(name, result, found)
            result |= {k: found[k] for k in (*MACHINE, "versions", "gpu")}
            for row in found["rows"]:
                rows[key(row)] = {**_as_today(row, found["ceilings"]), "source": name}
        elif (part := found.get("command", "").split(" ")[-1]) in PARTS:
            result[part] = found["rows"]
        else:
            raise ConfigError(f"{folder / name}: got {_WRONG}")
        sources[name] = source
    if "machine" not in result:
        raise ConfigError(f"{folder}: got no result of python -m bench, expected one")
    for row in notes.get("rows", []):
        rows.setdefault(key(row), row)
    commits = [s["commit"] for s in sources.values() if "commit" in s]
    told = {
        "commit": ", ".join(dict.fromkeys(commits)),
        "command": " ".join(("python -m bench.compose", *names)),
        **{k: v for k, v in notes.items() if k != "rows"},
    }
    return {**result, **told, "sources": sources, "rows": list(rows.values())}


def _same(name: str, result: Found, found: Found) -> None:
    """Raises ConfigError where a file is another machine's than those before it."""
    for what in ("machine", "devices"):
        if result.get(what, found[what]) != found[what]:
            raise ConfigError(f"{name}: {what}: got {found[what]}, expected {result[what]}")


def _as_today(row: Found, ceilings: dict[str, float]) -> Found:
    """``row`` as it would be written down now; its times and ratios as they are."""
    row = counted.recount(row, ceilings)
    if row["suite"] in ("sampler", "training") and LAUNCHED not in row["arms"]:
        arms = {name: dict(arm) for name, arm in row["arms"].items()}
        arms.get(OURS, {}).pop("peak_bytes", None)
        row = {**row, "arms": arms}
    if not row.get("joules_per_image", 1):
        # without NVML's counter a 0 was written
        row = {k: v for k, v in row.items() if k != "joules_per_image"}
    return row


def again(path: Path) -> Found:
    """A committed result from the files that it names; of one run with FLOPs counted again."""
    result = _read(path)
    if "sources" in result:
        return compose(path.parent, list(result["sources"]))
    return {**result, "rows": [counted.recount(r, result["ceilings"]) for r in result["rows"]]}


def _read(path: Path) -> Found:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: got {error}, expected a JSON file") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{path}: got {_WRONG}")
    return found


def main(argv: list[str]) -> int:
    """The command; see the module."""
    about = (__doc__ or "").split("\n")[0]
    p = argparse.ArgumentParser("python -m bench.compose", description=about)
    p.add_argument("files", nargs="*", type=Path, help="raw files of one folder, the newest last")
    files = p.parse_args(argv).files
    if len({f.parent.resolve() for f in files}) > 1:
        raise ConfigError("files: got several folders, expected the files of one")
    if any(f.name in (RESULT, NOTES) for f in files):
        raise ConfigError(f"files: got {RESULT} or {NOTES}, expected raw files beside them")
    if files:
        folder = files[0].parent
        written = {folder / RESULT: compose(folder, [f.name for f in files])}
    else:
        committed = sorted(machine.ROOT.glob(f"bench/results/*/{RESULT}"))
        written = {path: again(path) for path in committed}
    for path, result in written.items():
        path.write_text(json.dumps(result, indent=1) + "\n")
        print("wrote", path)
    return 0


if __name__ == "__main__":
    sys.exit(run_main("bench.compose", main))

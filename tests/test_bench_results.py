"""What the committed results say: counts of today, rows as their raw files have them, tables that
say what stands in them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from test_bench import row as row_of

from bench import compose, counted, machine, operators, page, report, rows, suites, summary
from fpdm.config import ConfigError

RESULTS = machine.ROOT / "bench" / "results"
H200 = RESULTS / "nvidia-h200"


def test_tables_are_what_render_writes() -> None:
    results, counted = report.load(RESULTS)
    assert counted is not None
    assert (RESULTS / "README.md").read_text() == report.document(results, counted)
    text = (machine.ROOT / "README.md").read_text()
    assert summary.readme(text, RESULTS) == text
    # a number changed by hand is written over
    head, block = text.split(summary.BEGIN)
    changed = block.replace("| 14.1 |", "| 4.1 |")
    assert changed != block
    assert summary.readme(head + summary.BEGIN + changed, RESULTS) == text
    changed = head.replace("guidance 1 | 1.", "guidance 1 | 9.")
    assert changed != head
    assert summary.readme(changed + summary.BEGIN + block, RESULTS) == text
    assert summary.readme(text.replace(summary.GAIN_END, ""), RESULTS) is None


def test_the_readme_shows_the_largest_rows_and_says_what_is_missing() -> None:
    def made(suite: str, name: str, flops: int) -> dict[str, Any]:
        return {**row_of(1.5), "suite": suite, "name": name, "flops": flops, "missing": {},
                "dtype": name.split(" ")[2]}  # fmt: skip

    rows = [
        made("network", "S/2 B2 float32 k=1", 1),
        made("network", "S/2 B2 float32 k=9", 9),
        made("network", "S/2 B8 bfloat16 k=4", 4),
        made("sampler", "S/2 B1 float32", 1),
        made("sampler", "S/2 B8 float32", 8),
        made("operators", "S/2 B2 float32 adaln", 99),
    ]
    rows[3]["missing"] = {"published compiled": "no compiler"}
    result = {"rows": rows, "machine": "box", "commit": "abc", "note": "One. Two.",
              "processor": {"name": "P", "threads": 2, "cores": 2}, "devices": {}}  # fmt: skip
    names = [r["name"] for r in summary.headlines(result)]
    assert names == ["S/2 B8 bfloat16 k=4", "S/2 B1 float32", "S/2 B8 float32"]
    text = summary.section([result], None)
    assert "**P, 2 of 2 cores**, commit abc. One. Two.\n" in text
    assert "sampler, published compiled (box): no compiler; anything on a V100" in text
    # no row has it, so it is no column
    assert "frozen" not in text
    rows += [made("sampler", "S/2 B8 float32 compiled", 8), made("training", "S/2 B2 float32", 1)]
    rows[-2]["arms"]["published compiled"] = {"ratio": 2.0}
    rows[-1]["arms"]["published eager"] = {"ratio": 3.0}
    told = summary.gain([result], None).splitlines()
    assert told[0].startswith("| P: times as fast as the published architecture written plainly")
    assert told[2:5] == [
        "| sampling, S/2 float32, batch 1 |  | not measured | not measured |",
        "| sampling, S/2 float32, batch 8 |  | not measured | 2.00x |",
        "| training, S/2 float32, batch 2 |  | 3.00x | not measured |",
    ]
    assert "two rows" not in told[-1]


def test_every_committed_result_has_a_page() -> None:
    for path in RESULTS.glob("*/bench.json"):
        result = json.loads(path.read_text())
        assert f"{result['machine']}" in page.page(result, None), path


def test_two_ratios_of_a_line_are_of_one_row_or_say_of_which() -> None:
    """XL/2's two training rows have other draws of (n, m): no line may put them side by side."""

    def made(name: str, source: str, flops: int, **arms: float) -> dict[str, Any]:
        found = {a.replace("_", " "): {"ratio": r} for a, r in arms.items()}
        found["fpdm"] = {"median_s": 1.0, "spread": 0.0}
        draws = [[5, 6]] * flops
        return {"suite": "training", "name": name, "flops": flops, "dtype": "bfloat16",
                "source": source, "arms": found, "missing": {}, "draws": draws}  # fmt: skip

    runs = [
        made("S/2 B2 bfloat16 none", "a.json", 8, published_eager=1.5),
        made("S/2 B2 bfloat16 none compiled", "b.json", 2, published_compiled=1.25),
    ]
    result = {"rows": runs, "machine": "box", "devices": {"cuda:0": {"name": "G"}}, "gpu": {"a": 1}}
    result["processor"] = {"name": "P"}
    text = summary.gain([result], None)
    assert "1.50x (8 draws of (n, m), [a.json](bench/results/box/a.json))" in text
    assert "1.25x ((n, m) = (5, 6), (5, 6), [b.json](bench/results/box/b.json))" in text
    runs[1]["arms"]["published eager"] = {"ratio": 1.75}
    assert "| (n, m) = (5, 6), (5, 6) | 1.75x | 1.25x |" in summary.gain([result], None)
    # of two compiled arms the one that is closer to ours
    runs[1]["arms"]["published compiled, replayed"] = {"ratio": 1.125}
    assert "| 1.75x | 1.12x |" in summary.gain([result], None)


def test_memory_says_what_is_counted_and_what_was_measured() -> None:
    results, found = report.load(RESULTS)
    assert found is not None
    gpu = next(r for r in results if r["machine"] == "nvidia-h200")
    peaks = summary.measured_peaks(gpu, found)
    plain = next(r for r in gpu["memory"] if r["arm"] == summary.PLAIN)
    assert peaks["fpdm-xl-2", summary.PLAIN] == f"{plain['peak_gb']:.1f}"
    assert ("dit-xl-2", summary.PLAIN) not in peaks
    text = summary.gain(results, found)
    assert f"the rewrite {plain['peak_gb']:.1f}; that DiT not measured" in text
    other = {**gpu, "memory": [{**r, "batch": 1} for r in gpu["memory"]]}
    assert summary.measured_peaks(other, found) == {}
    assert "Measured by the allocator: not yet" in summary.gain([other], found)


def committed() -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """(result, row) of every row with a time."""
    found = [(r, row) for r in report.load(RESULTS)[0] for row in r["rows"]]
    return [(r, row) for r, row in found if report.reason(row) is None]


def test_flops_and_shares_are_those_of_today() -> None:
    """After a change of the counts: python -m bench.compose."""
    known = 0
    for result, row in committed():
        count = counted.flops(row)
        needed = row["suite"] in ("network", "sampler", "training", "iteration", "operators")
        assert (count is not None) == needed, row["name"]
        if count:
            rate = machine.gemm_ceiling(report.origin(result, row)["ceilings"], row["dtype"])
            share = count / row["arms"]["fpdm"]["median_s"] / rate
            assert row["flops"] == count, row["name"]
            assert row["gemm_share"] == pytest.approx(share), row["name"]
            known += 1
    assert known > 60


@pytest.mark.parametrize("suite", ["network", "sampler", "training", "operators", "iteration"])
def test_names_count_what_their_rows_count(suite: str) -> None:
    """The counts by name beside those that a run writes down."""
    setting = rows.Setting("digits", rows.DIGITS, 2, torch.float32, torch.device("cpu"))
    made = {
        "network": [suites.network(setting, 3)],
        "sampler": [suites.sampling(setting, g, 5, 3) for g in (1.0, 1.1)],
        "training": [suites.training(setting, 1, 2), suites.training(setting, 1, 3, "full")],
        "operators": list(operators.operators(setting)),
        "iteration": list(operators.iteration(setting)),
    }[suite]
    for row in made:
        arms = row.build()
        named = {"suite": suite, "name": row.name, **arms.facts}
        assert counted.flops(named) == arms.flops, row.name
    assert counted.flops({"suite": suite, "name": "another model"}) is None
    assert counted.flops({"suite": "third party", "name": made[0].name}) is None


def test_draws_are_counted_one_by_one() -> None:
    name = "XL/2 B64 bfloat16 n=5.5 m=6 over 2 draws none compiled"
    both = counted.flops({"suite": "training", "name": name, "draws": [[5, 6], [6, 6]]})
    one = [counted.flops({"suite": "training", "name": f"XL/2 B64 bfloat16 n={n} m=6 none"})
           for n in (5, 6)]  # fmt: skip
    assert both == sum(x or 0 for x in one)
    assert counted.flops({"suite": "training", "name": name}) is None


def test_committed_results_are_composed_from_their_raw_files() -> None:
    for path in RESULTS.glob("*/bench.json"):
        assert path.read_text() == json.dumps(compose.again(path), indent=1) + "\n", path
    found = json.loads((H200 / "bench.json").read_text())
    for row in (r for r in found["rows"] if "source" in r):
        raw = json.loads((H200 / row["source"]).read_text())
        same = next(
            r for r in raw["rows"] if (r["suite"], r["name"]) == (row["suite"], row["name"])
        )
        for name, arm in same["arms"].items():
            assert {k: v for k, v in arm.items() if k != "peak_bytes"}.items() <= (
                row["arms"][name].items()
            )
        run = report.origin(found, row)
        assert all(run[k] == raw[k] for k in ("commit", "command", "ceilings"))
    # a row without a run has no time either
    assert all(r["arms"] == {} for r in found["rows"] if "source" not in r)


def raw(folder: Path, name: str, seconds: float, **facts: Any) -> Path:
    """A run's file with one row of the network."""
    arms = {"fpdm": {"median_s": seconds, "best_s": seconds, "spread": 0.0, "ratio": 1.0}}
    row = {"suite": "network", "name": "S/2 B2 bfloat16 k=4", "arms": arms, "missing": {},
           "flops": 1, "bytes": 0}  # fmt: skip
    result = {"machine": "box", "processor": {}, "devices": {}, "versions": {}, "gpu": {},
              "commit": "abc+", "command": "python -m bench", "rows": [row],
              "ceilings": {"gemm float32": 1e12, "gemm bfloat16": 1e12, "copy": 1e11}}  # fmt: skip
    (folder / name).write_text(json.dumps({**result, **facts}))
    return folder / name


def test_the_last_file_of_a_row_is_taken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [raw(tmp_path, "a.json", 1.0), raw(tmp_path, "b.json", 2.0, commit="def")]
    files.append(tmp_path / "memory.json")
    peaks = [{"arm": "fpdm", "peak_gb": 1.0}]
    files[-1].write_text(json.dumps({"command": "python -m bench.gpu memory", "rows": peaks}))
    gap = {"suite": "sampler", "name": "x", "arms": {}, "missing": {"fpdm": "why"}}
    (tmp_path / "notes.json").write_text(json.dumps({"note": "Read so.", "rows": [gap]}))
    assert compose.main([str(f) for f in files]) == 0
    found = json.loads((tmp_path / "bench.json").read_text())
    assert found["command"] == "python -m bench.compose a.json b.json memory.json"
    assert (found["commit"], found["note"], found["memory"]) == ("abc+, def", "Read so.", peaks)
    assert found["sources"]["memory.json"] == {"command": "python -m bench.gpu memory"}
    second, last = found["rows"]
    assert last == gap
    assert (second["source"], second["arms"]["fpdm"]["median_s"]) == ("b.json", 2.0)
    assert second["flops"] == suites.network_flops(rows.S2, 2, 4)
    assert second["gemm_share"] == second["flops"] / 2.0 / 1e12
    assert compose.again(tmp_path / "bench.json") == found
    compose.main([str(f) for f in files[::-1]])
    found = json.loads((tmp_path / "bench.json").read_text())
    assert found["rows"][0]["source"] == "a.json"


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("0123456789abcdef", "0123456789ab"),
        ("0123456789abcdef+", "0123456789ab+"),
        ("abc+", "abc+"),
    ],
)
def test_a_changed_tree_stays_marked(
    given: str, kept: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FPDM_COMMIT", given)
    assert machine.commit() == kept


def test_what_cannot_be_composed_is_refused(tmp_path: Path) -> None:
    file = raw(tmp_path, "a.json", 1.0)
    other = raw(tmp_path, "b.json", 1.0, machine="another")
    with pytest.raises(ConfigError, match=r"b\.json: machine: got another, expected box"):
        compose.main([str(file), str(other)])
    with pytest.raises(ConfigError, match="expected a JSON file"):
        compose.main([str(tmp_path / "gone.json")])
    with pytest.raises(ConfigError, match="expected raw files beside them"):
        compose.main([str(tmp_path / "bench.json")])
    with pytest.raises(ConfigError, match="got several folders"):
        compose.main([str(file), str(H200 / "compiled_64.json")])
    shutil.copy(H200 / "attention.json", tmp_path)
    with pytest.raises(ConfigError, match="got another file, expected one of python -m bench"):
        compose.main([str(tmp_path / "attention.json")])


def test_a_replays_peak_is_not_a_peak(tmp_path: Path) -> None:
    """Of a row without a launched arm, what its replay allocated is left out."""
    file = raw(tmp_path, "a.json", 1.0)
    found = json.loads(file.read_text())
    for suite, kept in (("training", False), ("network", True)):
        found["rows"][0]["suite"] = suite
        found["rows"][0]["arms"]["fpdm"]["peak_bytes"] = 5
        file.write_text(json.dumps(found))
        compose.main([str(file)])
        arms = json.loads((tmp_path / "bench.json").read_text())["rows"][0]["arms"]
        assert ("peak_bytes" in arms["fpdm"]) is kept


def test_a_composed_page_shows_its_runs_and_kernels() -> None:
    result = json.loads((H200 / "bench.json").read_text())
    text = page.page(result, None)
    for name in result["sources"]:
        assert f"<td>{name}</td>" in text
    assert text.count("device time by kernel, ") == len(result["profile"])
    parts = "<h2>Parts of an iteration against their floor</h2><p class=note>"
    assert parts in text
    assert f"{parts}Not measured" not in text
    whole = [r for r in result["rows"] if r["suite"] != "iteration"]
    assert f"{parts}Not measured" in page.page({**result, "rows": whole}, None)
    assert "<h2>Operators against their floor</h2><p class=note>Forward" in text
    without = {k: v for k, v in result.items() if k != "profile"}
    title = "<h2>Device time by kernel</h2><p class=note>"
    assert f"{title}Not measured" in page.page(without, None)
    # a CPU has no such profile, and its page no such title
    assert title not in page.page({**without, "gpu": {}}, None)

"""``python -m bench --count MODEL``: memory by kind and tensor, and the cost model, of any size."""

from __future__ import annotations

import json
import resource
from dataclasses import replace
from pathlib import Path

import pytest

from bench import __main__ as bench
from bench import cost, counted, memory
from fpdm.config import ConfigError, ExecutionConfig, ModelConfig

SMALL = ModelConfig(input_size=8, hidden_size=48, num_heads=4, num_classes=10)
DIT = replace(SMALL, kind="dit", pre_depth=0, post_depth=0, depth=3)
YAML = """recipe: digits
model: {hidden_size: 48, num_heads: 4}
train: {batch: 8, accumulate: 2, precision: bf16}
fixed_point: {n_max: 1, m_max: 3}
execution: {recompute: elementwise, chunks: 2}
"""


def asked(*argv: str) -> counted.Asked:
    """What the options of the command ask for."""
    return counted.asked(bench.parser().parse_args(["--count", *argv]))


@pytest.mark.parametrize("residual", ["compute", "float32"])
@pytest.mark.parametrize("mode", cost.RECOMPUTE)
def test_the_ledger_names_all_that_grows(mode: str, residual: str) -> None:
    """What it does not name is the same for every m, and in a DiT for every mode, of one depth."""

    def rest(config: ModelConfig, m: int, mode: str = mode) -> int:
        execution = ExecutionConfig(recompute=mode, residual_dtype=residual)  # type: ignore[arg-type]
        found = memory.training(config, 4, execution, 2, m)
        return found.saved - sum(
            sum(sizes.values()) for sizes in memory.kept(config, 4, execution, m)
        )

    unit = 4 * SMALL.tokens * SMALL.hidden_size * 2
    assert rest(SMALL, 2) == rest(SMALL, 7)
    assert 0 < rest(SMALL, 2) < 20 * unit
    assert rest(DIT, 1) == rest(DIT, 1, "none")
    # of each block its input
    one = replace(DIT, depth=2)
    grown = rest(DIT, 1) - rest(one, 1)
    assert unit <= grown < (3 if residual == "float32" else 2) * unit


def test_a_table_of_a_yaml_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, out = tmp_path / "mine.yaml", tmp_path / "out.json"
    file.write_text(YAML)
    assert bench.main(["--count", str(file)]) == 0
    text = capsys.readouterr().out
    assert f"{file}, batch 4, n = 1, m = 3, bf16: memory of a training step in MB" in text
    assert "fpdm elementwise, 2 chunks  published bf16 eager" in text
    for word in ("gradients", "EMA", "AdamW's two moments", "kept, iterations: qkv", "workspace",
                 "fc2 injection", "launches", "V100", "predicted by the cost model"):  # fmt: skip
        assert word in text
    assert "wrote" not in text
    assert list(tmp_path.iterdir()) == [file]
    options = ["--precision", "fp32", "--n", "0", "--m", "2", "--recompute", "none", "full"]
    assert bench.main(["--count", str(file), *options, "--out", str(out)]) == 0
    assert "no times: the devices' rates are of half precision" in capsys.readouterr().out
    found = json.loads(out.read_text())
    assert [r["arm"] for r in found["memory"]] == ["fpdm none", "fpdm full", "published fp32 eager"]
    # the file's own
    assert [r["chunks"] for r in found["memory"]] == [2, 2, 1]
    assert (found["n"], found["m"], found["batch"]) == (0, 2, 4)
    first = found["memory"][0]
    kinds = [*first["iterations"].values(), *first["blocks"].values(), first["rest"]]
    assert sum(kinds) == pytest.approx(first["saved"])
    # two iterations keep 2 U of pre each, of 4 samples, 16 tokens, width 48 and 4 bytes
    assert first["iterations"]["pre"] == pytest.approx(2 * 2 * 4 * 16 * 48 * 4 / memory.GB)


def test_a_preset_is_the_papers_step(capsys: pytest.CaptureFixture[str]) -> None:
    found = asked("fpdm-b-4")
    assert (found.batch, found.n, found.m, found.precision) == (64, 12, 12, "bf16")
    assert [(e.recompute, e.chunks) for e in found.executions] == [
        ("none", 1), ("elementwise", 4), ("full", 4)
    ]  # fmt: skip
    assert found.devices == tuple(cost.DEVICES)
    found = asked("fpdm-b-4", "--chunks", "2", "--batch", "3", "--device", "A100", "--m", "1")
    assert (found.batch, found.m, found.devices) == (3, 1, ("A100",))
    assert {e.chunks for e in found.executions} == {2}
    # the same numbers as the tables of XL/2
    written = json.loads((bench.RESULTS / "counted.json").read_text())
    device = asked("fpdm-xl-2", "--device", "H200", "--n", "5", "--m", "6")
    (times,) = counted.predicted(device)
    row = next(r for r in written["training"] if r["device"] == "H200")
    assert {mode: 1e3 * s for mode, s in times["step"].items()} == {
        mode: pytest.approx(row[mode]) for mode in cost.RECOMPUTE
    }


def test_the_hand_count_of_a_dit() -> None:
    """12 D^2 + 2 T D MACs a token and block; twice the products again and 2.5 times attention."""
    found = replace(asked("dit-s-8", "--batch", "2"), model=DIT)
    t, d = DIT.tokens, DIT.hidden_size
    parts = counted.parts(found, "library")
    assert cost.flops(parts["one"]) == 2 * 2 * t * (12 * d * d + 2 * t * d)
    assert cost.flops(parts["step"]) == 3 * 2 * 2 * t * (3 * 12 * d * d + 7 * t * d)


def test_nothing_is_allocated() -> None:
    """A step that no machine could hold."""
    huge = asked("fpdm-xl-2", "--batch", "100000", "--recompute", "none", "--device", "H200")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    ours, plain = counted.count(huge)["memory"]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1e6
    assert plain["total"] > ours["total"] > 10_000


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--count", "dit-b-4", "--n", "3"], "--n: got 3, expected a model with iterations"),
        (["--count", "fpdm-b-4", "--m", "0"], "--m: got 0, expected at least 1"),
        (["--count", "fpdm-b-44"], "--count: got fpdm-b-44, expected a YAML file or one of fpdm"),
        (["--count", "gone.yaml"], "expected a file"),
        (["--count", "--batch", "8"], "--batch: got 8, expected it with --count MODEL"),
        (["--recompute", "full"], "expected it with --count MODEL"),
    ],
)
def test_what_would_be_ignored_is_refused(argv: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        bench.main(argv)
    assert message in str(error.value)

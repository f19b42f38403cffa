"""The table that decides between fused GEMMs and the library: look-up, validation, candidates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fpdm.kernels import gemm_table as table

ENTRY: dict[str, Any] = {
    "op": "linear_bias_gelu", "keep": False, "m": [8192, 32768], "n": 4608, "k": 1152,
    "dtype": "bfloat16", "device": "cpu", "route": "fused",
    "tile": [128, 256, 64, 8, 3, True, False],
    "ms": {"library": 0.31, "fused": 0.29}, "source": "bench/results/example.json",
}  # fmt: skip
SHAPE = (16384, 4608, 1152)


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A table of our own."""
    path = tmp_path / "table.json"
    path.write_text('{"entries": []}')
    monkeypatch.setattr(table, "TABLE", path)
    forget()
    yield path
    monkeypatch.undo()
    forget()


def forget() -> None:
    table.entries.cache_clear()
    table._choice.cache_clear()


def choice(op: str = "linear_bias_gelu", m: int = 16384, **changes: Any) -> table.Choice:
    args = {"dtype": torch.bfloat16, "device": "cpu", "keep": False, **changes}
    return table.choice(op, m, *SHAPE[1:], **args)


def test_the_committed_table_is_valid_and_reads_back() -> None:
    forget()
    for entry in table.entries():
        table.validate(entry)
    assert json.loads(table.TABLE.read_text())["entries"] == list(table.entries())


def test_what_was_not_measured_is_the_librarys(scratch: Path) -> None:
    found = choice()
    assert (found.route, found.tile) == ("library", None)
    assert found.reason == "not measured on cpu for bfloat16 16384 x 4608 x 1152"


def test_an_entry_decides_for_its_own_key_only(scratch: Path) -> None:
    table.write([ENTRY], scratch)
    found = choice()
    assert found.route == "fused"
    assert found.tile == table.Tile(128, 256, 64, 8, 3, tma=True)
    assert "library 0.31 ms, fused 0.29 ms (bench/results/example.json)" in found.reason
    assert choice(m=8192).route == choice(m=32768).route == "fused"
    for other in (choice(m=8191), choice(m=32769), choice(op="linear_add_gelu"), choice(keep=True),
                  choice(dtype=torch.float16), choice(device="meta")):  # fmt: skip
        assert other.route == "library"


def test_a_name_comes_before_a_capability(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "names", lambda device: ("NVIDIA H200", "sm_90"))
    slower = {"route": "library", "ms": {"library": 0.3, "fused": 0.4}}
    table.write([ENTRY | {"device": "sm_90"}, ENTRY | slower | {"device": "NVIDIA H200"}], scratch)
    assert choice().route == "library"
    assert "measured on NVIDIA H200" in choice().reason
    monkeypatch.setattr(table, "names", lambda device: ("NVIDIA H100", "sm_90"))
    assert choice().route == "fused"


def test_the_very_rows_come_before_a_range(scratch: Path) -> None:
    """Of entries that overlap, one measured at M itself, whatever their order in the file."""
    library = {"route": "library", "ms": {"library": 0.2, "fused": 0.29}}
    wide, one = ENTRY | {"at": 16384}, ENTRY | library | {"at": 32768}
    for other in ({"m": [32768, 32768]}, {"m": [32768, 262144]}, {"m": [256, 65536]}):
        table.write([wide, one | other], scratch)
        assert (choice(m=16384).route, choice(m=32768).route) == ("fused", "library")


def test_writing_replaces_an_entry_and_keeps_the_others(scratch: Path) -> None:
    table.write([ENTRY, ENTRY | {"keep": True}], scratch)
    table.write([ENTRY | {"route": "library", "ms": {"library": 0.2, "fused": 0.29}}], scratch)
    assert [(e["keep"], e["route"]) for e in table.entries()] == [
        (False, "library"),
        (True, "fused"),
    ]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"op": "dgrad"}, "op: got 'dgrad'"),
        ({"route": "magic"}, "route: got 'magic'"),
        ({"ms": {"fused": 0.2}}, "expected library"),
        ({"ms": {"library": 0.2, "fused": 0.29}}, "slower than library"),
        ({"route": "cublaslt"}, "expected library and the route's"),
        ({"tile": [128, 256]}, "tile: got"),
        ({"route": "cublaslt", "keep": True, "ms": {"library": 1.0, "cublaslt": 0.5}}, "cublaslt"),
    ],
)
def test_a_bad_entry_is_refused(scratch: Path, change: dict[str, Any], words: str) -> None:
    with pytest.raises(table.TableError, match=words):
        table.write([ENTRY | change], scratch)
    scratch.write_text(json.dumps({"entries": [ENTRY | change]}))
    forget()
    with pytest.raises(table.TableError, match=words):
        choice()


def test_an_entry_without_its_measurement_is_refused() -> None:
    with pytest.raises(table.TableError, match=r"without \['ms', 'source'\]"):
        table.validate({k: v for k, v in ENTRY.items() if k not in ("ms", "source")})


@pytest.mark.parametrize("op", table.OPERATORS)
@pytest.mark.parametrize("m", [1, 512, 16384, 10**7])
def test_candidates_are_few_and_pure(op: str, m: int) -> None:
    for arch in (80, 86, 90, 100, 120):
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            found = table.tiles(op, m, 1152, dtype, arch)
            assert 1 <= len(found) <= 8
            assert len(set(found)) == len(found)
            assert found == table.tiles(op, m, 1152, dtype, arch)
            assert not any(t.tma for t in found) or 90 <= arch < 120

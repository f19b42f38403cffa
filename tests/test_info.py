from __future__ import annotations

import json
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any, NoReturn

import pytest

from fpdm import info
from fpdm.config import ConfigError
from fpdm.kernels import cuda_compile, implementations


def test_the_report_tells_every_implementation_and_why_not() -> None:
    report = info.collect()
    told = report["implementations"]["cpu"]
    assert set(told) == {*implementations.IMPLEMENTATIONS, "auto"}
    for name, reason in implementations.availability("cpu").items():
        assert told[name] == (reason or "available")
    assert told["reference"] == "available"
    assert told["auto"] == implementations.choose("auto", "cpu")


def test_both_forms_print_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    assert info.main(["--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    parts = "versions processor devices implementations native attention packages"
    assert list(report) == parts.split()
    assert info.main([]) == 0
    text = capsys.readouterr().out
    for value in (report["versions"]["torch"], *report["packages"].values()):
        assert value in text
    assert "failed" not in text
    with pytest.raises(ConfigError, match="--jsn"):
        info.main(["--jsn"])


BUILT = {"compiler": "c++ 12", "variants": {"avx2": [], "portable": []}}


@pytest.mark.parametrize(
    ("there", "record", "says"),
    [
        (True, {"cpu": BUILT}, "c++ 12: avx2 portable"),
        (
            True,
            {"cpu": BUILT | {"left_out": {"avx512": "c++ failed: unknown"}}},
            "c++ 12: avx2 portable; no avx512: c++ failed: unknown",
        ),
        (True, None, "built, with no record beside it (_build.json) of how"),
        (True, {"cpu": {"missing": "no c++"}}, "built, with no record"),
        (False, {"cpu": BUILT}, "missing, though _build.json records a build: c++ 12"),
        (False, {"cpu": {"missing": "no c++"}}, "not built: no c++"),
        (False, None, "not built: this installation was never built"),
    ],
)
def test_what_was_built(there: bool, record: Any, says: str, tmp_path: Path) -> None:
    """By the file that is there, not by the record alone: either comes without the other."""
    if there:
        (tmp_path / f"_cpu{EXTENSION_SUFFIXES[0]}").touch()
    if record is not None:
        (tmp_path / "_build.json").write_text(json.dumps(record))
    assert info.native(tmp_path)["csrc/cpu"].startswith(says)


def test_nvrtc_that_came_after_the_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_compile, "manifest", dict)
    (tmp_path / "_build.json").write_text(json.dumps({"cuda": {"missing": "got no NVRTC"}}))
    told = info.native(tmp_path)["csrc/cuda"]
    assert told.startswith("no cubins: when it was built, got no NVRTC; ")
    assert told.endswith(" them when they are first used")
    (tmp_path / "_build.json").unlink()
    assert info.native(tmp_path)["csrc/cuda"].startswith("no cubins: this installation was never b")


def test_no_heading_is_empty() -> None:
    report = info.collect()
    assert all(report.values())
    assert info.routes(["cpu"])["cuda"].startswith("none: no device; attention_table.json has ")
    assert list(info.routes(["cpu", "cuda:0", "cuda:1"])) == ["cuda:0", "cuda:1"]


def test_packages_are_found_or_absent() -> None:
    assert info.package("numpy", ("numpy",), "numbers").startswith("found 2.")
    assert info.package("no_such_thing", ("no-such-thing",), "a dream") == "absent: a dream"
    # a module without a distribution is found all the same
    assert info.package("tests", ("no-such-thing",), "x") in (
        "found (version unknown)",
        "absent: x",
    )
    assert all(
        text.startswith(("found ", "absent: ", "refused: ")) for text in info.packages().values()
    )


@pytest.mark.parametrize(
    ("folder", "says"),
    [("optimizers", "found"), ("multi_tensor_apply", "found"), ("models", "refused: ")],
)
def test_the_registrys_apex_is_not_nvidias(
    folder: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "apex" / folder).mkdir(parents=True)
    # importing either would be a mistake: the one runs a web framework, the other needs a GPU
    (tmp_path / "apex" / "__init__.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    told = info.packages()["apex"]
    assert told.startswith(says)
    assert ("unrelated" in told) == (says != "found")
    assert "\n" not in told


def test_it_never_raises(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*args: object) -> NoReturn:
        raise RuntimeError("driver\nis broken")

    # with cubins nobody looks for NVRTC, which would be one more failure
    monkeypatch.setattr(cuda_compile, "manifest", lambda: {"adaln.sm_70.bin": "0"})
    monkeypatch.setattr(implementations, "availability", broken)
    monkeypatch.setattr("torch.cuda.is_available", broken)
    monkeypatch.setattr("torch.get_num_threads", broken)
    monkeypatch.setattr("importlib.util.find_spec", broken)
    monkeypatch.setattr("importlib.metadata.version", broken)
    assert info.main([]) == 0
    text = capsys.readouterr().out
    assert text.count("RuntimeError: driver is broken") == 4 + len(info.PACKAGES)

"""Published files in, exports out; nothing that is read is run."""

from __future__ import annotations

import argparse
import ast
import json
import os
import resource
import time
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import EXTRA, TINY, TINY_DIT, published, worst_relative
from safetensors.torch import save_file
from torch import Tensor

from fpdm.config import ConfigError, DiffusionConfig, ExecutionConfig, ModelConfig, UserError
from fpdm.exports import export, infer_config, read_export
from fpdm.files import CheckpointError
from fpdm.interop import command, load_official
from fpdm.model import FPDM, build_model, from_pretrained, model_of
from fpdm.pretrained import load_source

Golden = dict[str, Tensor]
FLAG = "fixed_point_pre_post_timestep_conditioning"


def fpdm_state(golden: Golden) -> Golden:
    return published(golden, "state_dict.")


def check_tiny(model: torch.nn.Module, golden: Golden) -> None:
    with torch.no_grad():
        out = model(golden["x"], golden["t"], golden["y"], iters=4)
    assert worst_relative(out, golden["forward.iters4"]) <= 5e-6


# architecture


def test_a_model_runs_as_it_is_told_to(tiny: Golden, tmp_path: Path) -> None:
    """``execution`` is no part of a file: whoever reads it says."""
    told = ExecutionConfig(impl="reference", recompute="full")
    state = fpdm_state(tiny)
    assert load_official(state, num_heads=4, execution=told).execution == told
    path = make_export(tmp_path / "a", state, TINY)
    assert from_pretrained(path, told).execution == told
    assert FPDM.from_pretrained(path, told).execution == told
    assert FPDM.from_pretrained(path).execution == ExecutionConfig()


def test_architecture_is_read_from_shapes(tiny: Golden, extra: Golden) -> None:
    assert infer_config(fpdm_state(tiny), num_heads=4) == TINY
    assert infer_config(published(tiny, "dit.state_dict."), num_heads=4) == TINY_DIT
    assert infer_config(fpdm_state(extra), True, num_heads=2) == EXTRA


@pytest.mark.parametrize(("width", "heads"), [(384, 6), (768, 12), (1024, 16), (1152, 16)])
def test_heads_of_the_published_widths(width: int, heads: int) -> None:
    config = ModelConfig(
        kind="dit", depth=2, pre_depth=0, post_depth=0, hidden_size=width, num_heads=heads
    )
    with torch.device("meta"):
        state = build_model(config).state_dict()
    assert infer_config(state) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x_embedder.proj.weight": None}, "x_embedder.proj.weight is missing"),
        ({"pos_embed": None}, "pos_embed is missing"),
        ({"pos_embed": torch.zeros(1, 15, 48)}, "15 tokens"),
        ({"pos_embed": torch.zeros(16, 48)}, r"pos_embed: got shape \(16, 48\)"),
        ({"final_layer.linear.weight": torch.zeros(16, 48)}, "got 16 rows, expected 32"),
        ({"blocks_pre.0.mlp.fc1.weight": None}, "blocks_pre.0.mlp.fc1.weight is missing"),
        ({"blocks_pre.2.mlp.fc1.weight": torch.zeros(1)}, "is unexpected"),
        ({"block_pre_projection.bias": torch.zeros(47)}, r"got shape \(47,\), expected \(48,\)"),
        ({"block_pre_projection.bias": torch.full((48,), torch.nan)}, "holds NaN or Inf"),
        ({"block_pre_projection.bias": torch.zeros(48).long()}, "expected names with float"),
        ({"x_embedder.proj.weight": torch.zeros(10**8, 1, 1, 1, dtype=torch.half)}, "final_layer"),
    ],
)
def test_other_states_are_refused_in_one_line(
    tiny: Golden, change: Mapping[str, Tensor | None], message: str
) -> None:
    merged = {**fpdm_state(tiny), **change}
    state = {name: tensor for name, tensor in merged.items() if tensor is not None}
    with pytest.raises(CheckpointError, match=message) as error:
        load_official(state, num_heads=4)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500


def test_a_small_file_cannot_claim_a_large_model(tiny: Golden) -> None:
    state = fpdm_state(tiny)
    state["x_embedder.proj.weight"] = torch.zeros(1 << 20, 4, 2, 2, dtype=torch.half)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError, match=r"and [0-9]+ more"):
        load_official(state, num_heads=4)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000


def test_a_state_that_does_not_fit_makes_no_model(tiny: Golden) -> None:
    state = fpdm_state(tiny)
    state["final_layer.linear.bias"] = torch.zeros(3)
    with pytest.raises(CheckpointError, match=r"x: .*final_layer\.linear\.bias: got shape"):
        model_of(TINY, state, "x")


# published files


def test_mapping_safetensors_and_pt_give_the_published_outputs(
    tmp_path: Path, tiny: Golden
) -> None:
    state = fpdm_state(tiny)
    check_tiny(load_official(state, num_heads=4), tiny)
    save_file(state, tmp_path / "a.safetensors")
    check_tiny(load_official(tmp_path / "a.safetensors", num_heads=4), tiny)
    torch.save(state, tmp_path / "bare.pt")
    check_tiny(load_official(str(tmp_path / "bare.pt"), num_heads=4), tiny)
    dit = load_official(published(tiny, "dit.state_dict."), num_heads=4)
    with torch.no_grad():
        out = dit(tiny["x"], tiny["t"], tiny["y"])
    assert worst_relative(out, tiny["dit.forward"]) <= 5e-6


def test_a_published_file_becomes_an_export_that_samples(
    tmp_path: Path, extra: Golden, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = tmp_path / "full.pt", tmp_path / "export"
    torch.save(training_file(extra, **{FLAG: True}), file)
    with pytest.raises(ConfigError, match=rf"python -m fpdm\.interop {file} OUT"):
        load_source(file)
    argv = ["--num_heads", "2", "--diffusion.prediction", "eps", "--diffusion.zero_terminal_snr",
            "false", "--latent_scale", "0.5"]  # fmt: skip
    command([str(file), str(out), *argv])
    told = capsys.readouterr().out
    assert f"wrote {out}: fpdm, 0.1 M parameters, width 32, 2 heads; taken to predict eps" in told
    source = load_source(out)
    assert (source.model.config, source.which, source.latent_scale) == (EXTRA, "ema", 0.5)
    assert source.diffusion.config == DiffusionConfig(prediction="eps", zero_terminal_snr=False)
    with torch.no_grad():
        y = source.model(extra["x"], extra["t"], extra["y"], iters=3)
    assert worst_relative(y, extra["forward.iters3"]) <= 5e-6
    for wrong, says in (
        ([str(file), str(out)], "OUT: got .*, which holds files, expected a new directory"),
        ([str(file)], "got 1 places, expected two: FILE and OUT"),
        ([str(file), str(out), "--prediction", "v"], "unknown option --prediction"),
    ):
        with pytest.raises(ConfigError, match=says):
            command(wrong)


def training_file(golden: Golden, **args: object) -> dict[str, Any]:
    state = fpdm_state(golden)
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([parameter])
    parameter.sum().backward()
    optimizer.step()
    return {
        "model": {f"module.{name}": tensor + 1 for name, tensor in state.items()},
        "ema": {f"module.{name}": tensor for name, tensor in state.items()},
        "opt": optimizer.state_dict(),
        "args": argparse.Namespace(results_dir=Path("x").name, global_seed=0, **args),
        "train_steps": 7,
    }


def test_training_file_gives_the_ema_and_obeys_its_args(tmp_path: Path, extra: Golden) -> None:
    torch.save(training_file(extra, **{FLAG: True}), tmp_path / "full.pt")
    model = load_official(tmp_path / "full.pt", num_heads=2)
    assert model.config == EXTRA
    with torch.no_grad():
        out = model(extra["x"], extra["t"], extra["y"], iters=3)
    assert worst_relative(out, extra["forward.iters3"]) <= 5e-6
    # the flag leaves no trace in the tensors: without it another function is computed
    torch.save(training_file(extra, num_heads=2), tmp_path / "full.pt")
    plain = load_official(tmp_path / "full.pt")
    assert not plain.config.pre_post_timestep_conditioning
    flagged = load_official(tmp_path / "full.pt", pre_post_timestep_conditioning=True)
    with torch.no_grad():
        off = plain(extra["x"], extra["t"], extra["y"], iters=3)
        on = flagged(extra["x"], extra["t"], extra["y"], iters=3)
    assert worst_relative(on, extra["forward.iters3"]) <= 5e-6
    assert worst_relative(off, extra["forward.iters3"]) > 1e-3


def test_heads_must_be_known(extra: Golden) -> None:
    with pytest.raises(CheckpointError, match=r"num_heads=None, expected a number \(width 32"):
        load_official(fpdm_state(extra))
    with pytest.raises(CheckpointError, match="got num_heads=4, expected 2"):
        load_official(training_file(extra, num_heads=2), num_heads=4)
    with pytest.raises(CheckpointError, match="got num_heads=two"):
        load_official(training_file(extra, num_heads="two"))
    with pytest.raises(UserError, match=r"multiple of model\.num_heads"):
        load_official(fpdm_state(extra), num_heads=3)


class Canary:
    """Touches a file when unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_file_is_refused_and_not_run(tmp_path: Path, tiny: Golden, zipped: bool) -> None:
    canary, file = tmp_path / "canary", tmp_path / "evil.pt"
    payload = {"model": fpdm_state(tiny), "extra": Canary(canary)}
    torch.save(payload, file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError) as error:
        load_official(file, num_heads=4)
    assert not canary.exists()
    assert "\n" not in str(error.value)
    if zipped:
        assert "asks to run posix.system" in str(error.value)
    # the control: the file does what it threatens when it is trusted
    torch.load(file, weights_only=False)
    assert canary.exists()


def bomb(path: Path, state: Golden) -> None:
    """256 MB of zeros in a compressed archive of 300 KB."""
    torch.save(state, path)
    with zipfile.ZipFile(path) as source:
        parts = {info.filename: source.read(info) for info in source.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target:
        for name, data in parts.items():
            target.writestr(name, data)
        with target.open("archive/data/999", "w", force_zip64=True) as file:
            for _ in range(64):
                file.write(bytes(1 << 22))


def test_bombs_and_false_claims_are_refused_cheaply(tmp_path: Path, tiny: Golden) -> None:
    state = fpdm_state(tiny)
    expanded = state | {"y_embedder.embedding_table.weight": torch.zeros(1, 1).expand(1 << 40, 48)}
    bomb(tmp_path / "bomb.pt", state)
    torch.save(expanded, tmp_path / "expanded.pt")
    torch.save({"model": state, "ema": expanded}, tmp_path / "ema.pt")
    (tmp_path / "text.pt").write_text("hello, this is no checkpoint")
    (tmp_path / "claim.safetensors").write_bytes((1 << 42).to_bytes(8, "little") + b"{}")
    whole = (tmp_path / "expanded.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.pt").write_bytes(b"")
    (tmp_path / "folder.pt").mkdir()
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"model": 3, "x": torch.zeros(1)}, tmp_path / "odd.pt")
    for file in [*sorted(tmp_path.iterdir()), tmp_path / "missing.pt"]:
        before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
        with pytest.raises(CheckpointError) as error:
            load_official(file, num_heads=4)
        assert str(file) in str(error.value)
        assert "\n" not in str(error.value)
        assert time.process_time() - start < 1.0
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000


# exports


def make_export(path: Path, state: Golden, config: ModelConfig = TINY) -> Path:
    diffusion = DiffusionConfig(timesteps=100, prediction="x0", beta_end=0.03)
    return export(
        path, config, state, which="ema", diffusion=diffusion, extra={"sample": {"steps": 5}}
    )


def test_export_comes_back(tmp_path: Path, tiny: Golden, extra: Golden) -> None:
    path = make_export(tmp_path / "a" / "b", fpdm_state(tiny))
    assert sorted(p.name for p in path.iterdir()) == ["config.json", "model.safetensors"]
    found = read_export(path)
    assert (found.model, found.weights, found.extra) == (TINY, "ema", {"sample": {"steps": 5}})
    assert found.diffusion == DiffusionConfig(timesteps=100, prediction="x0", beta_end=0.03)
    check_tiny(from_pretrained(path), tiny)
    half = {name: tensor.bfloat16() for name, tensor in fpdm_state(extra).items()}
    model = from_pretrained(make_export(tmp_path / "c", half, EXTRA))
    assert model.config == EXTRA
    assert all(
        torch.equal(tensor, half[name].float()) for name, tensor in model.state_dict().items()
    )
    dit = published(tiny, "dit.state_dict.")
    assert from_pretrained(make_export(tmp_path / "d", dit, TINY_DIT)).config == TINY_DIT


def test_a_run_is_not_an_export(tmp_path: Path, tiny: Golden) -> None:
    """Nor opened silently: it has checkpoints too. The message names the one inside."""
    path = make_export(tmp_path / "run" / "export", fpdm_state(tiny))
    with pytest.raises(CheckpointError, match=r"run: got a run, expected an export, such as its"):
        from_pretrained(tmp_path / "run")
    check_tiny(from_pretrained(path), tiny)


def test_export_refuses_what_it_should_not_write(tmp_path: Path, tiny: Golden) -> None:
    state = fpdm_state(tiny)
    with pytest.raises(CheckpointError, match="weights with pre_depth=1, expected 2"):
        make_export(tmp_path / "x", state, replace(TINY, pre_depth=2))
    infinite = {"final_layer.linear.bias": torch.full((32,), torch.inf)}
    with pytest.raises(CheckpointError, match="NaN or Inf"):
        make_export(tmp_path / "x", state | infinite)
    assert not list((tmp_path / "x").iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="expected a directory"):
        make_export(tmp_path / "file" / "x", state)


def test_damaged_exports_are_refused(tmp_path: Path, tiny: Golden) -> None:
    path = make_export(tmp_path / "x", fpdm_state(tiny))
    weights, config = path / "model.safetensors", path / "config.json"
    good_weights, good_config = weights.read_bytes(), config.read_text()

    def refused(message: str) -> None:
        with pytest.raises(UserError, match=message) as error:
            from_pretrained(path)
        assert "\n" not in str(error.value)
        weights.write_bytes(good_weights)
        config.write_text(good_config)

    weights.write_bytes(good_weights[:-1] + bytes([good_weights[-1] ^ 1]))
    refused(r"model.safetensors: tensor '.*' damaged")
    weights.write_bytes(good_weights[:-1])
    refused("got [0-9]+ bytes, expected")
    weights.unlink()
    refused("model.safetensors: missing")
    config.unlink()
    refused("config.json: missing")

    def edited(section: str | None, **values: object) -> None:
        body = json.loads(good_config)
        (body if section is None else body[section]).update(values)
        config.write_text(json.dumps(body))

    for section, values, message in [
        (None, {"format": 2}, "got format 2, expected 1"),
        ("model", {"hidden_size": 96}, "hidden_size=48, expected 96"),
        ("model", {"hidden_size": 10**12, "num_heads": 1}, "hidden_size=48"),
        ("model", {"pre_depth": 10**9}, "pre_depth=1"),
        ("model", {"hidden_size": "48"}, "hidden_size: got '48'"),
        ("model", {"hidden_size": True}, "hidden_size: got True"),
        ("model", {"kind": "unet"}, "expected one of"),
        ("model", {"color": 1}, "unknown key model.color"),
        ("diffusion", {"timesteps": 1}, "diffusion.timesteps: got 1"),
        ("diffusion", {"beta_end": "x"}, "beta_end"),
        (None, {"model": 3}, "no description of an export"),
        (None, {"weights": "best"}, "weights: got 'best', expected one of ema, raw"),
        (None, {"file": {}}, "no description of an export"),
    ]:
        edited(section, **values)  # type: ignore[arg-type]
        refused(message)
    for text in ("", "{}", "[]", "[" * 100_000, '{"format": 1}'):
        config.write_text(text)
        refused("config.json: got no description")
    check_tiny(from_pretrained(path), tiny)


# what the source may not do

FORBIDDEN_IMPORTS = {"pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "joblib"}
FORBIDDEN_CALLS = {"eval", "exec", "os.system", "os.popen", "yaml.unsafe_load"}


def unsafe(source: str) -> list[str]:
    """Lines of a module that could run what they read."""
    found = []
    tree = list(ast.walk(ast.parse(source)))
    loaders = [node for node in tree if isinstance(node, ast.ClassDef)]
    safe = {
        node.name for node in loaders if [ast.unparse(b) for b in node.bases] == ["yaml.SafeLoader"]
    }
    for node in tree:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = {alias.name.split(".")[0] for alias in node.names}
            if isinstance(node, ast.ImportFrom):
                names = {(node.module or "").split(".")[0]}
            found += [f"{node.lineno}: import {name}" for name in names & FORBIDDEN_IMPORTS]
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
            load = name == "torch.load" and keywords.get("weights_only") != "True"
            if name == "yaml.load":
                load = ast.unparse(node.args[-1]) not in safe
            if load or name in FORBIDDEN_CALLS or keywords.get("allow_pickle", "False") != "False":
                found.append(f"{node.lineno}: {ast.unparse(node)}")
    return found


def test_no_module_can_run_what_it_reads() -> None:
    package = Path(__file__).parents[1] / "fpdm"
    modules = sorted(package.rglob("*.py"))
    assert len(modules) > 5
    found = {path.name: unsafe(path.read_text()) for path in modules}
    assert {name: lines for name, lines in found.items() if lines} == {}


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from pickle import loads",
        "import os, dill",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path, allow_pickle=True)",
        "np.load(path, allow_pickle=flag)",
        "eval(text)",
        "os.system('x')",
        "yaml.load(text)",
        "yaml.load(text, yaml.UnsafeLoader)",
    ],
)
def test_the_gate_bites(line: str) -> None:
    assert unsafe(line)
    assert not unsafe("torch.load(p, weights_only=True); np.load(p, allow_pickle=False)")

"""Who may import whom, read from the source: imports inside functions count, those for type
checkers alone (TYPE_CHECKING) do not."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise
from pathlib import Path

import pytest

from fpdm.__main__ import COMMANDS

ROOT = Path(__file__).parents[1]
Sources = dict[str, str]
Graph = dict[str, set[str]]


def sources() -> Sources:
    """Module -> its text."""
    found = {}
    for path in (ROOT / "fpdm").rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts).removesuffix(".__init__")] = path.read_text()
    return found


def statements(node: ast.AST, typing: bool) -> Iterator[ast.AST]:
    """Every node, those for type checkers only when ``typing``."""
    for child in ast.iter_child_nodes(node):
        if not typing and isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            continue
        yield child
        yield from statements(child, typing)


def imports(text: str, typing: bool) -> Iterator[str]:
    for node in statements(ast.parse(text), typing):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute here"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        # importlib.import_module("fpdm.kernels.update")
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            first = node.args[0]
            yield from [first.value] if isinstance(first, ast.Constant) else []


def graph(of: Sources, typing: bool = False) -> Graph:
    """Module -> modules of fpdm that it imports. The package itself holds lazy names only."""
    found: Graph = {}
    for name, text in of.items():
        wanted = set(imports(text, typing))
        wanted |= {w.rpartition(".")[0] for w in wanted}
        found[name] = {w for w in wanted if w in of and w not in (name, "fpdm")}
    return found


def reach(edges: Graph, start: set[str]) -> set[str]:
    """What ``start`` leads to, itself included."""
    found, queue = set(start), list(start)
    while queue:
        for name in edges[queue.pop()] - found:
            found.add(name)
            queue.append(name)
    return found


def layers(edges: Graph) -> list[tuple[str, set[str]]]:
    """The README's line, from the lowest: its names with their modules."""
    (line,) = re.findall(r"Imports point one way: (.*?)\.", (ROOT / "README.md").read_text(), re.S)
    found = []
    for name in line.split(" <- "):
        if name == "kernels":
            members = {m for m in edges if m.startswith("fpdm.kernels")}
        elif name == "commands":
            members = {f"fpdm.{command}" for command in COMMANDS}
        else:
            members = {f"fpdm.{name}"}
        assert members <= set(edges), name
        found.append((name, members))
    return found


def violations(of: Sources) -> list[str]:
    """Circles, and layers that lead to a higher one."""
    edges = graph(of)
    found = []
    try:
        TopologicalSorter({k: v for k, v in edges.items() if k != "fpdm"}).prepare()
    except CycleError as error:
        found.append("circle: " + " -> ".join(error.args[1]))
    order = layers(edges)
    for i, (low, members) in enumerate(order):
        leads = reach(edges, members)
        found += [f"{low} -> {high}" for high, theirs in order[i + 1 :] if leads & theirs]
    return found


def test_imports_point_one_way() -> None:
    of = sources()
    assert violations(of) == []
    order = layers(graph(of))
    names = [name for name, _ in order]
    assert names[:3] == ["config", "kernels", "block"]
    # the line says something: from there on each leads to the one before
    for (_, lower), (name, members) in pairwise(order[2:]):
        assert reach(graph(of), members) & lower, name


def test_kernels_know_no_model() -> None:
    edges = graph(sources())
    kernels = {m for m in edges if m.startswith("fpdm.kernels")}
    assert reach(edges, kernels) - kernels == {"fpdm.config", "fpdm.settings"}


PLANTED: dict[str, tuple[str, str, Callable[[list[str]], bool]]] = {
    "at the top": (
        "fpdm.block", "from fpdm.engine import Sampler", lambda v: "block -> engine" in v),
    "in a function": (
        "fpdm.kernels.ops", "def f():\n    from fpdm import model",
        lambda v: "kernels -> model" in v),
    "a command": ("fpdm.weights", "import fpdm.train", lambda v: "model -> commands" in v),
    "by name": (
        "fpdm.fixed_point", "def f():\n    import_module('fpdm.model')",
        lambda v: "fixed_point -> model" in v),
    "a circle": (
        "fpdm.exports", "def f():\n    from fpdm.interop import load_official",
        lambda v: any(line.startswith("circle: ") for line in v)),
}  # fmt: skip


@pytest.mark.parametrize("case", PLANTED)
def test_a_violation_is_seen(case: str) -> None:
    module, line, seen = PLANTED[case]
    of = sources()
    of[module] += f"\n{line}\n"
    assert seen(violations(of))


def test_type_checkers_look_up_in_few_places() -> None:
    """Where a function is given an object of a higher layer."""
    of = sources()

    def upward() -> set[tuple[str, str]]:
        plain, typed = graph(of), graph(of, typing=True)
        found = {(a, b) for a, wanted in typed.items() for b in wanted - plain[a] if a != "fpdm"}
        return {(a.removeprefix("fpdm."), b.removeprefix("fpdm.")) for a, b in found}

    known = {
        ("run", "engine"), ("kernels.cpu_loop", "block"), ("kernels.cpu_loop", "walk"),
        ("kernels.update", "steps"),
    }  # fmt: skip
    assert upward() == known
    of["fpdm.block"] += "\nif TYPE_CHECKING:\n    from fpdm.engine import Sampler\n"
    assert violations(of) == []
    assert upward() == {*known, ("block", "engine")}


# a state of a run and a calibration are both read and written
FILES = {"save", "load"}


def twins(of: Sources) -> set[str]:
    """Public names that two modules define: classes anywhere, functions of the library. What a
    command calls its own is nobody else's business, and implementations share their operators'."""
    seen: set[str] = set()
    found: set[str] = set()
    for module, text in of.items():
        own = module.startswith("fpdm.kernels") or module.removeprefix("fpdm.") in ALONE
        for node in ast.parse(text).body:
            wanted = ast.ClassDef if own else (ast.ClassDef, ast.FunctionDef)
            if isinstance(node, wanted) and not node.name.startswith("_"):
                (found if node.name in seen else seen).add(node.name)
    return found - FILES


ALONE = (*COMMANDS, "__main__", "fpdm")


def test_a_public_name_means_one_thing() -> None:
    of = sources()
    assert twins(of) == set()
    of["fpdm.walk"] += "\n\nclass Run:\n    pass\n"
    of["fpdm.gradients"] += "\n\ndef solve() -> None:\n    pass\n"
    assert twins(of) == {"Run", "solve"}

"""Imports run down: schemas know nothing of ours, stages know schemas, pipeline knows both; no circle between files."""

import ast
from collections.abc import Iterator
from pathlib import Path

from tests.support.places import ROOT

LAYERS = ("schemas", "stages", "pipeline")
MACHINES = ("stores", "units", "plan", "fleet", "commands", "cli")
"""Rooms of pipeline/, each of which imports only those before it; `launch` stands beside `commands`."""
HEAVY = {"torch", "transformers", "vllm", "tokenizers", "safetensors", "peft"}


def modules() -> dict[str, Path]:
    """Every module of the three layers, by its name below `bytecache`."""
    paths = [path for layer in LAYERS for path in (ROOT / layer).rglob("*.py")]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in paths}


MODULES = modules()


def imported(path: Path) -> Iterator[str]:
    """Names of modules that a file imports anywhere in it, ours below `bytecache`."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.removeprefix("bytecache.") for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            module = node.module.removeprefix("bytecache.")
            for alias in node.names:
                yield f"{module}.{alias.name}" if f"{module}.{alias.name}" in MODULES else module


ARROWS = {name: {target for target in imported(path) if target in MODULES} - {name} for name, path in MODULES.items()}


def rank(name: str) -> int:
    """The layer of a module, the lowest first."""
    return LAYERS.index(name.split(".")[0])


def machine(name: str) -> int:
    """The room of a module of pipeline/ among MACHINES, -1 for what lies beside them."""
    room = name.split(".")[1] if name.count(".") else ""
    return MACHINES.index(room) if room in MACHINES else -1


def test_no_arrow_runs_up() -> None:
    assert sum(len(targets) for targets in ARROWS.values()) > 500, "the imports were found"
    up = [(name, target) for name in ARROWS for target in ARROWS[name] if rank(target) > rank(name)]
    assert up == []
    within = [(name, target) for name in ARROWS for target in ARROWS[name] if min(machine(name), machine(target)) >= 0]
    assert [(name, target) for name, target in within if machine(target) > machine(name)] == []


def test_only_the_command_line_imports_commands() -> None:
    outside = [
        (name, target)
        for name in ARROWS
        for target in ARROWS[name]
        if target.startswith("pipeline.commands.") and not name.startswith(("pipeline.cli", "pipeline.commands"))
    ]
    assert outside == []


def test_no_circle_between_files() -> None:
    """Files that import nothing are taken away, and so on; what is left stands in a circle or above one."""
    left = {name: set(targets) for name, targets in ARROWS.items()}
    while True:
        free = {name for name, targets in left.items() if not targets}
        if not free:
            break
        left = {name: targets - free for name, targets in left.items() if name not in free}
    assert left == {}


def test_schemas_need_no_torch_and_bare_names_are_not_imported() -> None:
    for name, path in MODULES.items():
        tops = {target.split(".")[0] for target in imported(path) if target not in MODULES}
        assert not tops & set(LAYERS), f"{name} imports a bare name"
        if name.startswith("schemas"):
            assert not tops & HEAVY, name

"""Imports run down: schemas know nothing of ours, stages know schemas, pipeline knows both; no circle between files."""

import ast
from collections.abc import Iterator
from pathlib import Path

from tests.support.places import ROOT

LAYERS = ("schemas", "stages", "pipeline")
MACHINES = ("stores", "units", "plan", "fleet", "commands", "cli")
"""Rooms of pipeline/, each of which imports only those before it; `launch` stands beside `commands`."""
STAGES = (
    "corpus", "tokens", "lattice", "targets", "models", "fidelity", "mix", "student", "engines", "teacher", "foreign",
    "convert", "train", "evaluate", "loop", "export",
)  # fmt: skip
"""Rooms of stages/, each of which imports only those before it."""
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


def room(name: str, floor: str) -> str:
    """What of a folder a module is in: a folder or a file below it; "" of other modules."""
    return name.removeprefix(f"{floor}.").split(".")[0] if name.startswith(f"{floor}.") else ""


def arrows_up(floor: str, order: tuple[str, ...]) -> list[tuple[str, str]]:
    """Imports from one room of a folder to a later one of `order`; rooms that it does not name are left out."""
    height = {name: at for at, name in enumerate(order)}
    return [
        (name, target)
        for name, targets in ARROWS.items()
        for target in targets
        if room(name, floor) in height and height.get(room(target, floor), -1) > height[room(name, floor)]
    ]


def in_circles(arrows: dict[str, set[str]]) -> dict[str, set[str]]:
    """What imports nothing is taken away, and so on; what is left stands in a circle or above one."""
    left = {name: set(targets) for name, targets in arrows.items()}
    while free := {name for name, targets in left.items() if not targets}:
        left = {name: targets - free for name, targets in left.items() if name not in free}
    return left


def test_no_arrow_runs_up() -> None:
    assert sum(len(targets) for targets in ARROWS.values()) > 500, "the imports were found"
    up = [(name, target) for name in ARROWS for target in ARROWS[name] if rank(target) > rank(name)]
    assert up == []
    assert arrows_up("pipeline", MACHINES) == []
    assert {room(name, "stages") for name in MODULES} - {""} == set(STAGES)
    assert arrows_up("stages", STAGES) == []


def test_no_circle_between_rooms() -> None:
    """Of no folder do two files or folders import each other, by whatever way."""
    floors = {name.rpartition(".")[0] for name in MODULES} - {""}
    assert {"stages", "stages.train", "pipeline.commands"} <= floors
    for floor in floors:
        rooms: dict[str, set[str]] = {room(name, floor): set() for name in MODULES if room(name, floor)}
        for name in MODULES:
            if own := room(name, floor):
                rooms[own] |= {room(target, floor) for target in ARROWS[name]} - {"", own}
        assert in_circles(rooms) == {}, floor


def test_only_the_command_line_imports_commands() -> None:
    outside = [
        (name, target)
        for name in ARROWS
        for target in ARROWS[name]
        if target.startswith("pipeline.commands.") and not name.startswith(("pipeline.cli", "pipeline.commands"))
    ]
    assert outside == []


def test_who_reads_targets_loads_no_writer() -> None:
    """Of shards, nor any stage but `targets`: a stranger's training loop reads a zip."""
    reached, ahead = set[str](), {"stages.targets.dataset", "stages.targets.mixed"}
    while ahead:
        reached |= ahead
        ahead = {target for name in ahead for target in ARROWS[name]} - reached
    assert "schemas.shard.reader" in reached
    assert not {"schemas.shard.builder", "schemas.shard.quantise", "schemas.shard.gather"} & reached
    assert {room(name, "stages") for name in reached} - {""} == {"targets"}


def test_no_circle_between_files() -> None:
    assert in_circles(ARROWS) == {}


def test_schemas_need_no_torch_and_bare_names_are_not_imported() -> None:
    for name, path in MODULES.items():
        tops = {target.split(".")[0] for target in imported(path) if target not in MODULES}
        assert not tops & set(LAYERS), f"{name} imports a bare name"
        if name.startswith("schemas"):
            assert not tops & HEAVY, name

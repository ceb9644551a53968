"""The committed results, what documents call the texts in them, and tables in Markdown."""

import ast
import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
TEXTS = {"encyclopedia": "encyclopedia", "prose": "manual", "code": "code", "cjk": "CJK"}
"""Texts as results call them, and as documents do, in their order."""
PRESETS = ("fast", "balanced", "exact")
KINDS = {
    "novel": "novel", "encyclopedia": "encyclopedia", "manual": "manual", "code": "deep code", "tables": "JSON, tables",
    "numbers": "numbers", "handbooks": "five scripts", "scripts": "CJK, es, fr", "chat": "chat",
}  # fmt: skip
"""Kinds of text as benchmarks/exactness.py calls them, and as documents do."""


def result(name: str) -> Any:
    """One result file."""
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def table(head: str, rows: list[list[str]]) -> str:
    """A Markdown table; `head` has its titles, `>` before those of right-aligned columns."""
    titles = head.split(" | ")
    rule = ["---:" if title.startswith(">") else "---" for title in titles]
    lines = [[title.removeprefix(">") for title in titles], rule, *rows]
    return "\n".join("|" + "|".join(f" {cell} " if line is not rule else cell for cell in line) + "|" for line in lines)


def constant(module: str, name: str) -> Any:
    """The value of a module's constant, without importing what it imports."""
    for node in ast.parse((ROOT / module).read_text(encoding="utf-8")).body:
        match node:
            case (
                ast.Assign(targets=[ast.Name(id=found)], value=value)
                | ast.AnnAssign(target=ast.Name(id=found), value=ast.expr() as value)
            ):
                if found == name:
                    return ast.literal_eval(value)
    raise KeyError(f"{module} has no {name}")

"""Write the reference from the code: commands.md, configuration.md and api.md beside this file, and pipeline.toml.

    python docs/reference/generate.py

Everything said there is said in the code: options and docstrings of the commands, docstrings and limits of the keys,
signatures and docstrings of the public names. A test compares the files with what this would write.
"""

import ast
import importlib
import inspect
import math
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

import bytecache
from bytecache.pipeline.cli import app
from bytecache.pipeline.config_text import default_of, describe_limits, render_template, sections
from bytecache.schemas.settings import PRESETS, TRANSFER, Settings

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
NOTE = "<!-- Made by docs/reference/generate.py from the code; change the code and run `make docs`. -->"
ALSO = {
    "TargetWindow": "bytecache.stages.targets.dataset",
    "ByteShard": "bytecache.schemas.shard.reader",
    "Triples": "bytecache.schemas.shard.reader",
    "Dataset": "bytecache.schemas.dataset.index",
    "ShardEntry": "bytecache.schemas.dataset.index",
    "Problem": "bytecache.schemas.dataset.verification",
}
"""What the public names give: documented with them."""


def commands_page() -> str:
    """Every command with its arguments and options."""
    group = typer.main.get_command(app)
    lines = ["# Commands", "", NOTE, "", _prose(group.help or ""), ""]
    listed = list(_commands(group, "bytecache"))
    lines += [f"- [`{name}`](#{name.replace(' ', '-')}): {_first_line(command)}" for name, command in listed]
    for name, command in listed:
        lines += ["", f"## {name}", "", _prose(command.help or "")]
        rows = [_option_row(parameter) for parameter in command.params if not parameter.hidden]
        if rows:
            lines += ["", "| argument or option | default | |", "|---|---|---|", *rows]
    return "\n".join(lines) + "\n"


def _commands(group: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from _commands(command, f"{prefix} {name}")
        else:
            yield f"{prefix} {name}", command


def _first_line(command: Any) -> str:
    return " ".join((command.help or "").strip().split("\n\n")[0].split())


def _prose(text: str) -> str:
    """A docstring's paragraphs; an example as a block of code."""
    paragraphs = []
    for paragraph in inspect.cleandoc(text).split("\n\n"):
        joined = " ".join(paragraph.split())
        start, colon, example = joined.partition("Example: ")
        if colon and not start:
            paragraphs.append("\n".join(f"    {line}" for line in example.split("; or: ")))
        else:
            paragraphs.append(textwrap.fill(joined, 120, break_long_words=False, break_on_hyphens=False))
    return "\n\n".join(paragraphs)


def _option_row(parameter: Any) -> str:
    if parameter.opts and parameter.opts[0].startswith("-"):
        spelled = ", ".join(f"`{name}`" for name in (*parameter.opts, *parameter.secondary_opts))
    else:
        spelled = f"`{(parameter.metavar or parameter.name).upper()}`"
    return f"| {spelled} | {_default(parameter)} | {_cell(getattr(parameter, 'help', '') or '')} |"


def _default(parameter: Any) -> str:
    value = parameter.default
    if parameter.required:
        return "required"
    if value is None or value == "" or value is False or (isinstance(value, float) and math.isinf(value)):
        return ""
    return f"`{'on' if value is True else value}`"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


_CONFIGURATION = """
`pipeline.toml` holds these keys in tables of these names. Order: defaults, then the settings that the run folder was
used with last (unless `--fresh`), then the file (`--config`, else `./pipeline.toml`), then `--set section.key=value`,
then options of a command that stand for a key. Types are strict (`"8"` is not 8); an unknown key is refused with the
nearest name. `bytecache config` prints what results. Where there are two defaults, the first is of the default student
and any other existing model under another tokenizer (`student.model` and `student.tokenizer`), the second of any other
student. A key that may hold a secret can come from the environment, as
`$BYTECACHE_SECTION_KEY`; no file that bytecache writes holds it.
"""


def configuration_page() -> str:
    """Every key with its documentation, limits and default."""
    lines = ["# Configuration", "", NOTE, ""]
    lines += [_prose(_CONFIGURATION)]
    for name, kind in sections().items():
        lines += ["", f"## [{name}]", "", inspect.cleandoc(kind.__doc__ or ""), "", "| key | default | limits | |"]
        lines.append("|---|---|---|---|")
        for key, field in kind.model_fields.items():
            default = render_value(default_of(name, key))
            if name == "train" and key in TRANSFER:
                default += f"; {render_value(field.default)}"
            limits = describe_limits(field).replace("|", "\\|")
            lines.append(f"| `{name}.{key}` | {default} | {limits} | {_cell(field.description or '')} |")
    lines += ["", "## Presets of the teacher", "", "What `teacher.preset` stands for:", ""]
    keys = list(next(iter(PRESETS.values())))
    lines += [f"| preset | {' | '.join(f'`teacher.{key}`' for key in keys)} |", "|---|" + "---:|" * len(keys)]
    lines += [f"| `{name}` | {' | '.join(str(values[key]) for key in keys)} |" for name, values in PRESETS.items()]
    return "\n".join(lines) + "\n"


def render_value(value: object) -> str:
    """A default as code; the word for empty text."""
    if value == "":
        return "empty"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def api_page() -> str:
    """The public names: what `from bytecache import ...` gives."""
    lines = ["# Python", "", NOTE, ""]
    lines += [
        "`from bytecache import NAME`. Names load what they need when they are first asked for: `import bytecache`",
        "needs no torch, and neither does anything here that does not come from `bytecache.stages`.",
    ]
    values = {name: getattr(bytecache, name) for name in sorted(bytecache.__all__, key=str.lower)}
    errors = {name for name, value in values.items() if isinstance(value, type) and issubclass(value, Exception)}
    for name in [*(name for name in values if name not in errors), *(name for name in values if name in errors)]:
        lines += _documented(name, values[name])
    lines += ["", "# What they give", ""]
    lines += [
        "Not imported by their names, as a rule: `read_shard` gives a `ByteShard`, `ByteTargets` a `TargetWindow`."
    ]
    for name, module in ALSO.items():
        lines += _documented(name, getattr(importlib.import_module(module), name))
    return "\n".join(lines) + "\n"


def _documented(name: str, value: Any) -> list[str]:
    tree = ast.parse(textwrap.dedent(inspect.getsource(value))).body[0]
    lines = ["", f"## {name}", "", f"`{inspect.getmodule(value).__name__}`", "", "```text"]  # type: ignore[union-attr]
    if isinstance(tree, ast.FunctionDef):
        lines += [_signature(tree), *_indented(ast.get_docstring(tree))]
    else:
        assert isinstance(tree, ast.ClassDef)
        initialise = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "__init__"]
        bases = f" ({', '.join(ast.unparse(base) for base in tree.bases)})" if tree.bases else ""
        lines += [f"class {_signature(initialise[0], name)}" if initialise else f"class {name}{bases}"]
        lines += _indented(ast.get_docstring(tree))
        if initialise and ast.get_docstring(initialise[0]):
            lines += _indented(ast.get_docstring(initialise[0]))
        lines += _fields(tree)
        for node in tree.body:
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                shown = _property(node) if node.decorator_list else _signature(node)
                lines += ["", textwrap.indent(shown, "    "), *_indented(ast.get_docstring(node), 8)]
    return [*lines, "```"]


def _signature(node: ast.FunctionDef, name: str = "") -> str:
    arguments = [argument for argument in ast.unparse(node.args).split(", ") if argument not in ("self", "cls")]
    returns = f" -> {ast.unparse(node.returns)}" if node.returns and not name else ""
    return textwrap.fill(f"{name or node.name}({', '.join(arguments)}){returns}", 112, subsequent_indent="        ")


def _property(node: ast.FunctionDef) -> str:
    names = {ast.unparse(decorator).rsplit(".", 1)[-1] for decorator in node.decorator_list}
    if names & {"property", "cached_property"} and node.returns:
        return f"{node.name}: {ast.unparse(node.returns)}"
    return _signature(node)


def _fields(tree: ast.ClassDef) -> list[str]:
    """Annotated attributes with the docstrings below them."""
    lines: list[str] = []
    for node, after in zip(tree.body, [*tree.body[1:], None], strict=True):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id[0] != "_":
            lines.append(f"    {node.target.id}: {ast.unparse(node.annotation)}")
            if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
                lines += _indented(inspect.cleandoc(str(after.value.value)), 8)
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "exit_code":
            lines.append(f"    {ast.unparse(node)}")
    return ["", *lines] if lines else []


def _indented(text: str | None, by: int = 4) -> list[str]:
    return [textwrap.indent(line, " " * by) for line in (text or "").splitlines()]


PAGES = {
    HERE / "commands.md": commands_page,
    HERE / "configuration.md": configuration_page,
    HERE / "api.md": api_page,
    ROOT / "pipeline.toml": lambda: render_template(Settings()),
}


def main() -> None:
    """Write every page."""
    for path, page in PAGES.items():
        path.write_text(page(), encoding="utf-8")
        print(f"{path.relative_to(ROOT)} written")


if __name__ == "__main__":
    main()

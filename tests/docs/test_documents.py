"""What the documents say is so: links, commands, options, keys, paths, programs; and the reference is the code's."""

import ast
import importlib.util
import re
import shutil
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import typer

from bytecache.pipeline.cli import app
from bytecache.pipeline.cli.options import SHORTHANDS
from bytecache.pipeline.config import load_settings
from bytecache.pipeline.config_text import sections
from bytecache.schemas.dataset.index import describe_shard, write_dataset
from bytecache.schemas.settings import Settings
from bytecache.schemas.shard.builder import ShardBuilder
from tests.support.documents import Document, documents
from tests.support.places import ROOT

every_document = pytest.mark.parametrize("document", documents(), ids=lambda document: document.name)
GROUP = typer.main.get_command(app)
TOP_FOLDERS = ("benchmarks", "bytecache", "docs", "lock", "pipeline", "schemas", "stages", "tests")
OTHERS_OPTIONS = {
    "--data-parallel-size",
    "--steps",
    "--max-logprobs",
    "--served-model-name",
    "--no-deps",
    "--nproc-per-node",
    "--no-build-isolation",
    "--editable",
    "--help",
}
"""Options of pip, torchrun and the like that the documents mention."""


def script(path: Path) -> ModuleType:
    """A program of the repository that lies outside its packages."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def command_of(words: list[str]) -> tuple[Any, list[str]]:
    """The command that the words name, and the words after it."""
    command = GROUP
    while hasattr(command, "commands"):
        assert words and words[0] in command.commands, f"no command {words[:1]}"
        command, words = command.commands[words[0]], words[1:]
    return command, words


def options_of(command: Any) -> dict[str, Any]:
    """Its options by every spelling."""
    return {name: each for each in command.params for name in (*each.opts, *each.secondary_opts)}


ALL_OPTIONS = {
    name
    for top in GROUP.commands.values()
    for command in getattr(top, "commands", {"": top}).values()
    for name in options_of(command)
}


@every_document
def test_links_lead_somewhere(document: Document) -> None:
    for link in document.links():
        if re.match(r"https?://|mailto:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (document.path.parent / path).resolve() if path else document.path
        assert target.exists(), link
        assert target.is_relative_to(ROOT), link
        if anchor:
            assert anchor in Document(target).anchors(), link


@every_document
def test_commands_parse_and_set_what_there_is(document: Document) -> None:
    keys = {name: key for key, (name, _) in SHORTHANDS.items()}
    for words in document.commands():
        command, arguments = command_of(words)
        context = command.make_context(words[0], list(arguments))
        overrides = list(context.params.get("overrides") or [])
        for name, key in {**keys, "run_dir": "run.dir"}.items():
            if context.params.get(name):  # some commands have another option of that name, which is empty
                overrides.append(f"{key}={context.params[name]}")
        load_settings(None, overrides)


def test_documents_were_taken_apart() -> None:
    """The checks above see what they check."""
    every = documents()
    assert {"README.md", "docs/quickstart.md", "docs/howto/gpu.md", "schemas/SPEC.md"} <= {each.name for each in every}
    for count, least in (
        (sum(len(list(each.commands())) for each in every), 40),
        (sum(len(each.links()) for each in every), 80),
        (sum(len(each.inline()) for each in every), 500),
        (sum(len(each.blocks("toml")) for each in every), 4),
        (sum(len(each.blocks("python")) for each in every), 4),
    ):
        assert count >= least
    with pytest.raises(AssertionError):
        command_of(["transmogrify"])
    with pytest.raises(AssertionError):
        load_settings_from("[teacher]\ntop_kk = 3\n")


@every_document
def test_commands_and_options_in_prose_exist(document: Document) -> None:
    for words in document.inline():
        if words.startswith("bytecache ") and not words.startswith("bytecache COMMAND"):
            command, rest = command_of(words.split()[1:])
            unknown = {word for word in rest if word.startswith("-")} - options_of(command).keys()
            assert not unknown, words
        elif re.fullmatch(r"--[a-z][a-z-]*( \S+)?", words):
            assert words.split()[0] in ALL_OPTIONS | OTHERS_OPTIONS, words


@every_document
def test_keys_of_the_configuration_exist(document: Document) -> None:
    names = "|".join(sections())
    files = ("json", "md", "parquet", "py", "toml", "zip", "zarr")
    for words in [*document.inline(), *document.shell_lines()]:
        for section, key in re.findall(rf"(?<![\w/.-])({names})\.([a-z_]+)\b(?![(/])", words):
            assert key in sections()[section].model_fields or key in files, f"{section}.{key} in `{words}`"
    for block in document.blocks("toml"):
        assert load_settings_from(block)


def load_settings_from(block: str) -> Settings:
    """Settings from TOML text; every key must exist and hold a value that it allows."""
    table = tomllib.loads(block)
    for section, keys in table.items():
        assert section in sections(), section
        assert not keys.keys() - sections()[section].model_fields.keys(), (section, keys)
    return Settings.model_validate(table, strict=True)


@every_document
def test_files_folders_and_programs_named_exist(document: Document) -> None:
    for words in document.inline():
        path = re.fullmatch(rf"((?:{'|'.join(TOP_FOLDERS)})/[\w./-]*|\.ci/[\w]+)", words)
        if path:
            assert (ROOT / path[1]).exists(), words
    called = [*document.inline(), *document.shell_lines()]
    makefile = (ROOT / "Makefile").read_text()
    for words in called:
        for target in re.findall(r"^make ([a-z]+)\b", words):
            assert re.search(rf"^{target}:", makefile, re.M), words
        for module in re.findall(r"python -m (benchmarks\.\w+|tests\.\w+)", words):
            place = ROOT / module.replace(".", "/")
            file = place / "__main__.py" if place.is_dir() else place.with_suffix(".py")
            assert file.is_file(), words
            for option in re.findall(r" (--[a-z-]+)", words.split(module, 1)[1]):
                assert option in file.read_text(), words


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small data set, which the programs in the documents read as `targets`."""
    folder = tmp_path_factory.mktemp("documents") / "targets"
    folder.mkdir()
    entries = []
    for number, split in enumerate(("train", "train", "heldout")):
        builder = ShardBuilder()
        rows = np.full((400, 257), 0.1 / 254, np.float32)
        rows[:, [97, 98, 99]] = 0.5, 0.3, 0.1
        builder.append(np.full(399, 97 + number, np.uint8), rows, np.zeros(400, np.float32))
        builder.end_document(f"document {number}")
        path = folder / f"{split}-{number:05d}-aaaaaaaaaaaa.zarr.zip"
        entries.append(describe_shard(path, split, f"{number:012d}", builder.write(path, {})))
    write_dataset(folder, entries, {})
    return folder


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("document", [each for each in documents() if each.name[:5] in ("READM", "docs/")], ids=str)
def test_python_programs_run(
    document: Document, targets: Path, tiny_checkpoint: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks of one document run one after another, in a folder with a data set `targets` and a model `student`."""
    shutil.copytree(targets, tmp_path / "targets")
    shutil.copytree(tiny_checkpoint("bytelevel"), tmp_path / "student")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for block in document.blocks("python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("bytecache"):
                assert node.module == "bytecache", "documents import public names"
        exec(compile(block, document.name, "exec"), names)


def test_tables_are_what_the_results_say(monkeypatch: pytest.MonkeyPatch) -> None:
    """No figure drifts from the file that it comes from."""
    monkeypatch.syspath_prepend(ROOT / "docs")
    tables = script(ROOT / "docs" / "fill_tables.py")
    seen = set()
    for path in tables.DOCUMENTS:
        text = path.read_text(encoding="utf-8")
        seen |= set(re.findall(r"<!-- table ([a-z-]+) -->", text))
        assert tables.filled(text) == text, f"{path.name} is not what the results say: python docs/fill_tables.py"
    assert seen == set(tables.TABLES)


def test_reference_is_what_the_code_says() -> None:
    generate = script(ROOT / "docs" / "reference" / "generate.py")
    for path, page in generate.PAGES.items():
        assert path.read_text(encoding="utf-8") == page(), f"{path.name} is not what the code says: run `make docs`"


def test_pictures_are_drawn_by_their_program() -> None:
    drawings = script(ROOT / "docs" / "pictures" / "draw.py").PICTURES
    files = sorted((ROOT / "docs" / "pictures").glob("*.svg"))
    assert [path.stem for path in files] == sorted(drawings)
    linked = {link.split("/")[-1] for document in documents() for link in document.links() if link.endswith(".svg")}
    assert linked == {path.name for path in files}
    for path in files:
        assert path.read_text(encoding="utf-8") == drawings[path.stem](), "run: python docs/pictures/draw.py"
        assert ElementTree.fromstring(path.read_text(encoding="utf-8")).tag.endswith("svg")


def test_readme_fits_two_screens() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 120

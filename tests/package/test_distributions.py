"""The package as a user has it: what the wheel and the sdist hold, beside whose modules it works, what it needs."""

import json
import tarfile
import zipfile
from collections import Counter
from pathlib import Path

import pytest

import bytecache
from tests.support.installed import Environment, build
from tests.support.places import ROOT


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The sdist and the wheel of this tree."""
    sdist, wheel = sorted(build(tmp_path_factory.mktemp("dist")), key=lambda path: path.suffix)
    return sdist, wheel


@pytest.fixture(scope="module")
def users(distributions: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """An environment of a user who has everything."""
    return Environment(tmp_path_factory.mktemp("user") / "env", distributions[1]).everything()


@pytest.fixture(scope="module")
def readers(distributions: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """An environment of somebody who installed bytecache without extras."""
    return Environment(tmp_path_factory.mktemp("reader") / "env", distributions[1]).requirements()


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """A data set folder of one small shard."""
    from bytecache.schemas.dataset.index import describe_shard, write_dataset
    from tests.support.shard_cases import golden_builder

    folder = tmp_path / "targets"
    folder.mkdir()
    path = folder / "train-00000-aaaaaaaaaaaa.zarr.zip"
    statistics = golden_builder().write(path, {})
    write_dataset(folder, [describe_shard(path, "train", "aaaaaaaaaaaa", statistics)], {})
    return folder


def sources() -> set[str]:
    """The files that bytecache is made of, as they are called in the package."""
    files = {"__init__.py", "__main__.py", "py.typed"}
    for layer in ("schemas", "stages", "pipeline"):
        for path in (ROOT / layer).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                files.add(str(path.relative_to(ROOT)))
    return {f"bytecache/{name}" for name in files}


def test_wheel_holds_bytecache_and_nothing_else(distributions: tuple[Path, Path]) -> None:
    names = Counter(zipfile.ZipFile(distributions[1]).namelist())
    assert set(names.values()) == {1}
    assert {name for name in names if ".dist-info/" not in name} == sources()


def test_sdist_holds_each_file_once_and_builds_the_same_wheel(distributions: tuple[Path, Path], tmp_path: Path) -> None:
    with tarfile.open(distributions[0]) as archive:
        members = archive.getmembers()
        # Older ones of Python 3.11 know no filter; the archive is our own.
        archive.extractall(tmp_path, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    names = Counter(member.name.split("/", 1)[1] for member in members)
    assert set(names.values()) == {1}
    assert sources() <= names.keys()
    assert not {name.split("/")[0] for name in names} & {"schemas", "stages", "pipeline"}, "once, in the package"
    assert all(member.isfile() for member in members), "no links"
    (wheel,) = build(tmp_path / "again", tmp_path / members[0].name.split("/")[0], "wheel")
    again, first = zipfile.ZipFile(wheel), zipfile.ZipFile(distributions[1])
    assert set(again.namelist()) == set(first.namelist())
    for name in sources():
        assert again.read(name) == first.read(name), name


LIGHT_SCRIPT = """
import sys, bytecache
heavy = {"torch", "transformers", "vllm", "numpy", "numba"} & sys.modules.keys()
assert not heavy, heavy
"""
NAMES_SCRIPT = """
import bytecache.pipeline.cli, bytecache.stages.train.train, bytecache.stages.export
for name in bytecache.__all__:
    getattr(bytecache, name)
bare = {name for name in sys.modules if name.split(".")[0] in ("schemas", "stages", "pipeline")}
assert not bare, bare
assert "site-packages" in bytecache.__file__, bytecache.__file__
import schemas, stages, pipeline
assert {module.MARK for module in (schemas, stages, pipeline)} == {"of the user"}
"""


@pytest.mark.slow
def test_works_beside_a_users_own_modules_of_the_same_names(users: Environment, tmp_path: Path) -> None:
    for name in ("schemas", "stages", "pipeline"):
        (tmp_path / f"{name}.py").write_text('MARK = "of the user"\n')
    (tmp_path / "script.py").write_text(LIGHT_SCRIPT + NAMES_SCRIPT)
    done = users.run("script.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    # Launchers start workers like this, in whatever folder they are.
    (tmp_path / "corpus.txt").write_text("a text of a user\n" * 200)
    settings = ["--source", "corpus.txt", "--set", "corpus.heldout_fraction=0"]
    planned = users.run("-m", "bytecache", "plan", *settings, cwd=tmp_path)
    assert planned.returncode == 0, planned.stderr
    assert (tmp_path / "runs" / "default" / "plan").is_dir()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_users_mypy_sees_types(users: Environment, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(
        "from bytecache import ByteTargets, Settings, read_shard\n"
        'reveal_type(read_shard("shard.zarr.zip"))\n'
        "reveal_type(Settings().teacher.top_k)\n"
        'for window in ByteTargets("targets", window=64, seed=0):\n'
        "    reveal_type(window)\n"
        "read_shard(3)\n"
    )
    done = users.run("-m", "mypy", "--cache-dir", tmp_path / "cache", "own.py", cwd=tmp_path)
    said = done.stdout
    assert 'own.py:2: note: Revealed type is "bytecache.schemas.shard.reader.ByteShard"' in said, said + done.stderr
    assert "own.py:3: note: Revealed type is" in said and "int" in said.splitlines()[1]
    assert "TargetWindow" in said.splitlines()[2] or "bytecache.stages.targets.dataset.TargetWindow" in said
    assert 'own.py:6: error: Argument 1 to "read_shard"' in said
    assert said.count("error:") == 1


READER_SCRIPT = """
import json, sys
from bytecache import open_dataset, read_shard, verify_dataset
dataset = open_dataset("targets")
entry, = dataset.entries
shard = read_shard(dataset.path(entry))
print(json.dumps({
    "problems": verify_dataset("targets"), "text": shard.document(0).decode(),
    "sums": shard.dense(0, len(shard), spread_tail=True).sum(1).tolist(),
    "heavy": sorted({"torch", "transformers", "vllm", "tokenizers", "safetensors"} & sys.modules.keys()),
}))
"""


@pytest.mark.slow
def test_without_extras_a_data_set_can_be_read_verified_and_inspected(
    readers: Environment, dataset: Path, tmp_path: Path
) -> None:
    absent = "import torch"
    assert "No module named 'torch'" in readers.run("-c", absent, cwd=tmp_path).stderr
    done = readers.run("-c", READER_SCRIPT, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["problems"] == [] and report["text"] == "hi" and report["heavy"] == []
    assert report["sums"] == pytest.approx([1.0] * len(report["sums"]), abs=1e-5)
    verified = readers.run("-m", "bytecache", "verify", "targets", cwd=tmp_path)
    assert verified.returncode == 0 and "match their hashes" in verified.stdout, verified.stderr
    shard = next(dataset.glob("*.zarr.zip"))
    shown = readers.run("-m", "bytecache", "inspect", shard, "--html", "page.html", cwd=tmp_path)
    assert shown.returncode == 0 and (tmp_path / "page.html").stat().st_size > 1000, shown.stderr
    shown = readers.run("-m", "bytecache", "inspect", shard, "--json", cwd=tmp_path)
    assert shown.returncode == 0 and json.loads(shown.stdout), shown.stderr
    # One flipped bit is found there too.
    damaged = bytearray(shard.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    shard.write_bytes(damaged)
    assert readers.run("-m", "bytecache", "verify", "targets", cwd=tmp_path).returncode == 4


@pytest.mark.slow
def test_without_extras_what_needs_torch_says_what_to_install(readers: Environment, tmp_path: Path) -> None:
    done = readers.run("-c", "from bytecache import ByteTargets", cwd=tmp_path)
    assert done.returncode == 1 and "pip install '.[train]'" in done.stderr, done.stderr
    (tmp_path / "text.txt").write_text("some text\n" * 50)
    refused = readers.run("-m", "bytecache", "probe", "--text-file", "text.txt", "--out", "out.npz", cwd=tmp_path)
    assert refused.returncode == 2, refused.stderr
    assert refused.stderr.startswith("error: ") and "pip install '.[train]'" in refused.stderr, refused.stderr


def test_every_public_name_is_listed_once_and_documented() -> None:
    assert sorted(bytecache.__all__, key=str.lower) == sorted(set(bytecache.__all__), key=str.lower)
    for name in bytecache.__all__:
        assert getattr(bytecache, name).__doc__, name

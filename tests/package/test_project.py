"""The files around the code agree with each other: version, extras, checks, citation."""

import re
import tomllib
from typing import Any

import yaml

import bytecache
from bytecache.schemas.errors import EXTRAS
from tests.support.places import ROOT


def project() -> dict[str, Any]:
    """`[project]` of pyproject.toml."""
    table: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return table


def load(name: str) -> Any:
    """A YAML file of the repository."""
    return yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))


def requirement_names(requirements: list[str]) -> set[str]:
    """Names of packages as they are imported, more or less."""
    return {re.split(r"[\[<>=!~ ;]", text)[0].replace("-", "_") for text in requirements}


def test_version_is_one() -> None:
    version = project()["version"]
    assert load("CITATION.cff")["version"] == version
    assert version in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_extras_are_named_where_a_package_is_missed() -> None:
    extras = project()["optional-dependencies"]
    base = requirement_names(project()["dependencies"])
    for extra, packages in EXTRAS.items():
        assert set(packages) <= requirement_names(extras[extra]), extra
        assert not set(packages) & base, "what every install has is not missed"
    for extra in ("cpu", "gpu", "evaluation"):
        assert "bytecache[train]" in extras[extra]


def test_what_is_locked_is_what_is_asked_for() -> None:
    """Every requirement of the project has one exact version in the lock file of its machine."""
    extras = project()["optional-dependencies"]
    for name, chosen in (("cpu", ("train", "cpu", "default-models", "remote", "ray")), ("gpu", ("train", "gpu"))):
        lines = (ROOT / "lock" / f"{name}.txt").read_text(encoding="utf-8").split()
        locked = {line.split("==")[0].replace("-", "_").lower() for line in lines if "==" in line}
        asked = requirement_names([*project()["dependencies"], *(each for extra in chosen for each in extras[extra])])
        assert asked - {"bytecache"} <= locked, asked - locked


def test_hooks_and_forges_run_the_checks_that_make_runs() -> None:
    recipe = re.search(r"^check:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    assert recipe
    commands = [line.strip().replace("$(BIN)", ".venv/bin") for line in recipe[1].splitlines()]
    hooks = [hook["entry"] for repository in load(".pre-commit-config.yaml")["repos"] for hook in repository["hooks"]]
    assert hooks == commands
    steps = load(".github/workflows/ci.yml")["jobs"]["test"]["steps"]
    assert "bash .ci/run" in [step.get("run") for step in steps]
    assert "make test" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_public_names_are_those_of_the_type_checker() -> None:
    """`__all__` and the imports that only type checkers see name the same."""
    source = (ROOT / "bytecache" / "__init__.py").read_text(encoding="utf-8")
    block = source[source.index("if TYPE_CHECKING:") : source.index("__all__")]
    imported = set(re.findall(r"\b[A-Z]\w+\b(?=[,\n])|\b[a-z]+_[a-z_]+\b(?=[,\n])", block.replace("TYPE_CHECKING", "")))
    assert imported == set(bytecache.__all__)

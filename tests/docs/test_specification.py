"""The formats' specifications and the tests that hold the code to them: every clause that says MUST is cited by one."""

import re
from collections import Counter

import pytest

from tests.support.places import ROOT

SPECIFICATIONS = {"SPEC": r"\d+\.\d+", "TOKEN_DUMP": r"\d+"}
"""Files in schemas/, and how their clauses are numbered."""


def clauses(name: str) -> dict[str, str]:
    """Number and text of every clause."""
    text = (ROOT / "schemas" / f"{name}.md").read_text(encoding="utf-8")
    text = re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)
    parts = re.split(rf"^\*\*({SPECIFICATIONS[name]})\*\* |^#.*$", text, flags=re.M)
    found = [(number, body) for number, body in zip(parts[1::2], parts[2::2], strict=True) if number]
    assert max(Counter(number for number, _ in found).values()) == 1, "two clauses of one number"
    return dict(found)


def cited(name: str) -> set[str]:
    """Numbers of clauses that the tests cite, as in `SPEC 4.5, 4.6 and 4.8`."""
    number = SPECIFICATIONS[name]
    numbers: set[str] = set()
    for path in (ROOT / "tests").rglob("*.py"):
        if path.name != "test_specification.py":
            for run in re.findall(rf"\b{name} ((?:{number}(?:, | and |\b))+)", path.read_text(encoding="utf-8")):
                numbers |= set(re.findall(number, run))
    return numbers


@pytest.mark.parametrize("name", SPECIFICATIONS)
def test_every_clause_that_binds_is_cited_by_a_test_and_no_other(name: str) -> None:
    text = clauses(name)
    binding = {number for number, body in text.items() if "MUST" in body}
    assert len(binding) >= 5
    assert not cited(name) - text.keys(), "cited, but there is no such clause"
    assert not binding - cited(name), "binding, but no test cites it"


@pytest.mark.parametrize("name", SPECIFICATIONS)
def test_clauses_refer_to_clauses(name: str) -> None:
    text = clauses(name)
    if name == "SPEC":
        for body in text.values():
            for number in re.findall(r"\((\d+\.\d+)[,)]", body):
                assert number in text

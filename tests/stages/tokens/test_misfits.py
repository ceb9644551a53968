"""Whose fault it is that documents were set aside: every reason that the code can give has its kind."""

import re

import pytest

from bytecache.stages.tokens import misfits
from tests.support.places import ROOT


def test_every_reason_in_the_code_is_of_the_kind_it_should_be() -> None:
    """A template's refusal must not be called the tokenizer's; found by the texts that the code passes to Misfit."""
    found = set()
    for file in sorted((ROOT / "stages").rglob("*.py")):
        found |= set(re.findall(r"Misfit\(\s*f?\"([^\"]+)\"", file.read_text(encoding="utf-8")))
    kinds = {reason: misfits.kind_of(reason) for reason in found}
    assert len(found) > 10
    assert {reason for reason, kind in kinds.items() if kind is misfits.TEMPLATE} == {
        reason for reason in found if reason.startswith("template:")
    }
    assert kinds["control token in a message"] is misfits.MESSAGE
    assert {reason for reason, kind in kinds.items() if kind is misfits.LENGTH} == {
        reason for reason in found if "context longer" in reason or "longer than" in reason
    }
    assert kinds["lone surrogate"] is kinds["normalised"] is misfits.TOKENIZER


@pytest.mark.parametrize(("reasons", "first", "remedy"), [
    ({"unk": 1, "template: no system": 8}, "its chat template refuses them (template: no system: 8); its tokenizer",
     "give the student another chat template, choose another student, or change the records"),
    ({"unk": 2, "mismatch": 9, "template: x": 10}, "its tokenizer cannot reproduce them (mismatch: 9, unk: 2); its",
     "choose another student, or clean the corpus"),
])  # fmt: skip
def test_the_commonest_kind_comes_first_and_has_the_remedy(reasons: dict[str, int], first: str, remedy: str) -> None:
    assert misfits.words(reasons).startswith(first)
    assert misfits.remedy(reasons, "student") == remedy

"""Why documents were set aside, in words that name what is at fault and what to do: the reasons of `Misfit` by kind."""

from collections.abc import Mapping
from typing import Literal, NamedTuple

Role = Literal["teacher", "student"]


class Kind(NamedTuple):
    """What a reason says of whoever set a document aside; `{}` stands for the teacher or the student."""

    words: str
    remedy: str


TEMPLATE = Kind(
    "its chat template refuses them",
    "give the {} another chat template, choose another {}, or change the records",
)
MESSAGE = Kind("they spell a control token", "take such records out of the corpus")
LENGTH = Kind("their context is too long for it", "shorten the records, or choose a {} that reads longer ones")
TOKENIZER = Kind("its tokenizer cannot reproduce them", "choose another {}, or clean the corpus")
_BEGINNINGS = {
    "template:": TEMPLATE, "no messages before": MESSAGE, "control token in": MESSAGE, "context longer": LENGTH,
    "longer than": LENGTH,
}  # fmt: skip


def kind_of(reason: str) -> Kind:
    """The kind of a reason; what is not known is the tokenizer's."""
    return next((kind for start, kind in _BEGINNINGS.items() if reason.startswith(start)), TOKENIZER)


def words(reasons: Mapping[str, int]) -> str:
    """`its chat template refuses them (template: no system role: 8); its tokenizer ... (unk: 1)`, the most first."""
    kinds: dict[Kind, dict[str, int]] = {}
    for reason, count in sorted(reasons.items(), key=lambda item: (-item[1], item[0])):
        kinds.setdefault(kind_of(reason), {})[reason] = count
    listed = sorted(kinds.items(), key=lambda item: -sum(item[1].values()))
    return "; ".join(f"{kind.words} ({', '.join(f'{r}: {n}' for r, n in each.items())})" for kind, each in listed)


def remedy(reasons: Mapping[str, int], role: Role) -> str:
    """What to do about the commonest kind."""
    counts: dict[Kind, int] = {}
    for reason, count in reasons.items():
        counts[kind_of(reason)] = counts.get(kind_of(reason), 0) + count
    commonest = max(counts, key=lambda kind: counts[kind], default=TOKENIZER)
    return commonest.remedy.replace("{}", role)

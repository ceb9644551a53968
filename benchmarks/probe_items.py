"""Items of `benchmarks.probes`, made by rule from held-out text: last words, changed sentences, lines to copy.

Everything comes from the given texts and a seed, so that no item of anybody's has to be kept. A text's name begins with
its kind, as `transfer_texts` names them; of the kind `code` lines take the place of sentences. Items are spread over
the texts: nothing gives a second one before all have given one.

    cloze   up to `CONTEXT` bytes, the last word of a sentence, what follows it up to the next space; against three
            other words. These end clauses of the same kind of text, do not occur in the context, as the true one does
            not, and are those nearest to it in length and in the logarithm of frequency.
    pairs   a sentence beside the same with one change: two neighbouring words swapped, or one of `WORDS` for its
            partner. In code a line between its neighbours, without its colon, with a bracket of another kind, or with
            `=` for `==` or the other way round. Rules take turns, so that rare ones are not drowned.
    copies  words, identifiers or numbers of the texts in a drawn order, to be read twice.

What a rule makes may by chance be as good as the truth. Nobody reaches everything; the original says what there is.
"""

import hashlib
import json
import keyword
import math
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass

CONTEXT = 160
"""Bytes before a cloze's word, or before a line of code, at most."""
SHORTEST = 60
"""Bytes before a cloze's word, at least."""
COPY = 48
"""Bytes of what is to be copied, at least."""
OTHERS = 3
WORDS = (("a", "an"), ("is", "are"), ("has", "have"), ("was", "were"), ("this", "these"))
CLOSING = ")]}"
Text = tuple[str, str]
"""Name, which begins with the kind, and text."""


@dataclass(frozen=True)
class Item:
    """Strings of which the first is the true one, or for a copy the string to be read twice."""

    kind: str
    rule: str
    strings: tuple[str, ...]


@dataclass(frozen=True)
class Probes:
    """What `measure` asks a student."""

    cloze: tuple[Item, ...]
    pairs: tuple[Item, ...]
    copies: tuple[Item, ...]

    @property
    def digest(self) -> str:
        """Of all items: figures of equal digests are of the same items in the same order."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]


def make_probes(texts: Sequence[Text], seed: int = 0, *, each: int = 50, copies: int = 12) -> Probes:
    """Probes of texts.

    Args:
        texts: held-out texts, in an order that does not change. each: items of a kind, of cloze and of pairs; fewer
            where the texts give no more. copies: items of words, of identifiers and of numbers.

    Raises:
        ValueError: the texts give no cloze item or no pair.
    """
    by_kind: dict[str, list[Text]] = {}
    for name, text in texts:
        by_kind.setdefault(name.split()[0], []).append((name, text))
    cloze: list[Item] = []
    pairs: list[Item] = []
    for kind in sorted(by_kind):
        draw = random.Random(f"{seed} {kind}")
        cloze += cloze_items(kind, by_kind[kind], draw)[:each]
        pairs += pair_items(kind, by_kind[kind], draw)[:each]
    if not cloze or not pairs:
        raise ValueError(f"{len(texts)} texts give {len(cloze)} cloze items and {len(pairs)} pairs; give longer ones")
    return Probes(tuple(cloze), tuple(pairs), tuple(copy_items(by_kind, copies, random.Random(seed))))


def in_turns(groups: Iterable[Sequence[Item]]) -> Iterator[Item]:
    """The first of every group, then the second of every group, and so on."""
    left = [list(group) for group in groups]
    for number in range(max(map(len, left), default=0)):
        yield from (group[number] for group in left if number < len(group))


def ending(text: str, size: int) -> str:
    """The last whole words of a text, at most `size` bytes; all of it if it is shorter."""
    raw = text.encode()
    if len(raw) <= size:
        return text
    return re.sub(r"^\S*\s+", "", raw[-size:].decode(errors="ignore"))


# --- the last word of a sentence ---

LAST_WORD = re.compile(r"(?<= )([a-z]{4,12})([.!?]\S{0,2})(?=\s)")
LAST_NAME = re.compile(r"(?<![\w.])([A-Za-z_]\w{2,})([^\w\n]{0,4}\n)")
ENDS_CLAUSE = re.compile(r"(?<= )([a-z]{4,12})[.,;:!?]")


def cloze_items(kind: str, texts: Sequence[Text], draw: random.Random) -> list[Item]:
    """All items of a kind, those first that should be taken first."""
    last, clause = (LAST_NAME, LAST_NAME) if kind == "code" else (LAST_WORD, ENDS_CLAUSE)
    joined = "\n".join(text for _, text in texts)
    frequency = Counter(re.findall(r"\w+", joined))
    ends = sorted({m[1] for m in clause.finditer(joined) if not keyword.iskeyword(m[1])})
    by_text = []
    for _, text in texts:
        items = []
        for match in last.finditer(text):
            context = ending(text[: match.start()], CONTEXT)
            seen = set(re.findall(r"\w+", context))
            if len(context.encode()) < SHORTEST or match[1] in seen or keyword.iskeyword(match[1]):
                continue
            others = nearest(match[1], [word for word in ends if word not in seen], frequency, draw)
            if len(others) == OTHERS:
                strings = tuple(context + word + match[2] for word in (match[1], *others))
                items.append(Item(kind, "last word", strings))
        draw.shuffle(items)
        by_text.append(items)
    draw.shuffle(by_text)
    return list(in_turns(by_text))


def nearest(word: str, others: Sequence[str], frequency: Counter[str], draw: random.Random) -> list[str]:
    """The `OTHERS` words that are most like one in length and frequency; a drawn number decides between equals."""

    def apart(other: str) -> float:
        length = abs(len(other.encode()) - len(word.encode()))
        return length + abs(math.log2(max(frequency[other], 1) / max(frequency[word], 1))) + draw.random() / 2

    return sorted((other for other in others if other != word), key=apart)[:OTHERS]


# --- a sentence and a changed one ---

SENTENCE = re.compile(r"(?:(?<=[.!?] )|(?<=\n)|^)[A-Z“\"][^.!?\n]{30,110}[.!?](?=\s)", re.MULTILINE)
NEIGHBOURS = re.compile(r"(?<= )(?=([a-z]{2,}) ([a-z]{2,})\b)")
OPENS_BLOCK = re.compile(r"\s*(?:if|elif|else|for|while|def|class|try|except|finally|with)\b.*:")
ASSIGNS = re.compile(r"(?<=\w )=(?= )")
COMPARES = re.compile(r"(?<= )==(?= )")


def pair_items(kind: str, texts: Sequence[Text], draw: random.Random) -> list[Item]:
    """All items of a kind, rules in turns, those first that should be taken first; of a sentence one item."""
    by_rule: dict[str, list[list[Item]]] = {}
    for _, text in texts:
        of_text: dict[str, list[Item]] = {}
        for before, sentence, after in lines_of(text) if kind == "code" else sentences_of(text):
            for rule, changed in changes(kind, sentence, draw):
                strings = (before + sentence + after, before + changed + after)
                of_text.setdefault(rule, []).append(Item(kind, rule, strings))
        for rule, items in of_text.items():
            draw.shuffle(items)
            by_rule.setdefault(rule, []).append(items)
    for of_texts in by_rule.values():
        draw.shuffle(of_texts)
    queues = [list(in_turns(by_rule[rule])) for rule in sorted(by_rule)]
    taken: dict[str, Item] = {}
    while any(queues):
        for queue in queues:
            while queue and queue[0].strings[0] in taken:
                queue.pop(0)
            if queue:
                item = queue.pop(0)
                taken[item.strings[0]] = item
    return list(taken.values())


def sentences_of(text: str) -> Iterator[tuple[str, str, str]]:
    """("", sentence, "") of prose."""
    yield from (("", match[0], "") for match in SENTENCE.finditer(text))


def lines_of(text: str) -> Iterator[tuple[str, str, str]]:
    """(lines before, line, line after) of code, at most about `CONTEXT` bytes."""
    lines = text.split("\n")
    for number in range(2, len(lines) - 1):
        after = f"\n{lines[number + 1]}\n"
        room = CONTEXT - len((lines[number] + after).encode())
        before = "".join(f"{line}\n" for line in lines[number - 2 : number])
        if lines[number].strip() and len(before.encode()) <= room:
            yield before, lines[number], after


def changes(kind: str, sentence: str, draw: random.Random) -> Iterator[tuple[str, str]]:
    """(rule, changed sentence): of every rule that applies one change, at a drawn place."""
    if kind == "code":
        yield from code_changes(sentence, draw)
        return
    swaps = [m for m in NEIGHBOURS.finditer(sentence) if m[1] != m[2]]
    if swaps:
        m = draw.choice(swaps)
        yield "swap", f"{sentence[: m.start()]}{m[2]} {m[1]}{sentence[m.end(2) :]}"
    for one, other in WORDS:
        found = list(re.finditer(rf"(?<![\w’'-])(?:{one}|{other})(?![\w’'-])", sentence))
        if found:
            m = draw.choice(found)
            yield f"{one}/{other}", sentence[: m.start()] + (other if m[0] == one else one) + sentence[m.end() :]


def code_changes(line: str, draw: random.Random) -> Iterator[tuple[str, str]]:
    """The same of a line of code; a bracket is changed where the one that it closes stands in the line."""
    if OPENS_BLOCK.fullmatch(line):
        yield "colon", line[:-1]
    places = closing_places(line)
    if places:
        at = draw.choice(places)
        yield "bracket", line[:at] + draw.choice(CLOSING.replace(line[at], "")) + line[at + 1 :]
    for rule, other in ((ASSIGNS, "=="), (COMPARES, "=")):
        found = list(rule.finditer(line))
        if found:
            sign = draw.choice(found)
            yield "equals", line[: sign.start()] + other + line[sign.end() :]


def closing_places(line: str) -> list[int]:
    """Where brackets close what the line opened."""
    opened: list[str] = []
    places = []
    for at, letter in enumerate(line):
        if letter in "([{":
            opened.append(letter)
        elif letter in CLOSING and opened and opened.pop() == "([{"[CLOSING.index(letter)]:
            places.append(at)
    return places


# --- what is read twice ---


def copy_items(by_kind: dict[str, list[Text]], number: int, draw: random.Random) -> Iterator[Item]:
    """`number` items of each: words of prose, identifiers of code, numbers of all texts; none where there are none."""
    code = "\n".join(text for _, text in by_kind.get("code", []))
    rest = "\n".join(text for kind in sorted(by_kind) if kind != "code" for _, text in by_kind[kind])
    sources = {
        "words": re.findall(r"\b[^\W\d_]{3,12}\b", rest),
        "identifiers": re.findall(r"\b[A-Za-z_]\w{3,15}\b", code),
        "numbers": re.findall(r"\b\d{2,8}\b", rest + "\n" + code),
    }
    for rule, found in sources.items():
        pieces = sorted(set(found))
        for _ in range(number if pieces else 0):
            line = draw.choice(pieces)
            while len(line.encode()) < COPY:
                line += " " + draw.choice(pieces)
            yield Item(rule, "copy", (line,))

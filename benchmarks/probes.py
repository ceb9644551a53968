"""What a student can do besides bits per byte: last words of sentences, small errors, copying, and samples to read.

    python -m benchmarks.probes STUDENTFOLDER... --texts TEXTS/corpus.jsonl --out FILE [--dtype bfloat16] [--sample 160]

Items are made by rule from held-out text (`probe_items`; TEXTS is of `transfer_texts`, of whose texts the `test` ones
are taken). A folder is a prepared or an exported student. In a program: `make_probes(texts, seed)` once,
`measure(opened, probes, dtype)` of each student, then `table({"name": [record of each seed]})` or `lead(ours, control,
"cloze")`.

    cloze    share of sentences whose own last word is likelier than three others; chance is 25 %
    pairs    share of sentences that are likelier than with the one change that a rule made; chance is 50 %
    margin   of either, bits between the likeliest other string and the true one; moves before shares do
    copy     bits per byte of random words, identifiers and numbers, and of the same read a second time

Every string is scored whole, its context included, as a document's beginning: bits of its tokens after the start token.
So students of any tokenizer are compared by the same bytes. What it leaves out: a string is cut into tokens in the
tokenizer's one way, so that all other ways, and tokens that would reach beyond the string's end, count as lost. That
makes bits a little too high, by more for tokenizers of longer tokens, and equally for all strings of an item save where
a change alters how its surroundings are cut; strings end in punctuation or a line's end, where most cuts agree. Of a
copy, a token belongs to the line in which it begins.

Intervals are a bootstrap over items, 95 %. Price: about 14,000 tokens in forward passes where tokens are as SmolLM2's,
four times that for bytes; strings of an item share what they have in common. Samples are decoded in one batch.
"""

import argparse
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from benchmarks.probe_items import Item, Probes, Text, make_probes
from bytecache.schemas.errors import InputError
from bytecache.schemas.files import write_text
from bytecache.stages.student import student
from bytecache.stages.tokens.vocab import Misfit

__all__ = ["MEASURES", "Probes", "interval", "lead", "make_probes", "measure", "samples", "table", "texts_of", "values"]

Record = dict[str, Any]
MICRO_TOKENS = 768
"""Padded tokens of a forward pass, at most, of vocabularies up to 49k."""
MEASURES = ("cloze", "cloze margin", "pairs", "pairs margin", "copy, first", "copy, second")
"""What `values` knows of a record."""
DRAWS = 2000
"""Of the bootstrap."""
PROMPTS = ("She opened the letter and", "The Danube is a river that", "def mean(values):\n    ")
TEMPERATURE = 0.8


class Scored(NamedTuple):
    """Bits of each token of a string, and the byte at which each begins."""

    bits: npt.NDArray[np.float64]
    starts: npt.NDArray[np.int64]


class Tree(NamedTuple):
    """Strings of tokens that share a beginning, as one row of a batch: the beginning, then what is each one's own."""

    inputs: list[int]
    depth: list[int]
    branch: list[int]
    """0: shared; else a string's number from one."""
    rows: list[list[int]]
    """Of each string: the inputs that predict its tokens."""


def tree_of(start: int, strings: Sequence[Sequence[int]]) -> Tree:
    """The tree of token strings of at least one token each; `start` stands before all of them."""
    shared = min(map(len, strings)) - 1
    shared = next((at for at in range(shared) if len({ids[at] for ids in strings}) > 1), shared)
    tree = Tree([start, *strings[0][:shared]], list(range(shared + 1)), [0] * (shared + 1), [])
    for number, ids in enumerate(strings, start=1):
        own = ids[shared:-1]
        tree.rows.append([*range(shared + 1), *range(len(tree.inputs), len(tree.inputs) + len(own))])
        tree.inputs.extend(own)
        tree.depth.extend(range(shared + 1, shared + 1 + len(own)))
        tree.branch.extend([number] * len(own))
    return tree


def hidden_from(branch: Tensor) -> Tensor:
    """What is added to attention [R, 1, T, T]: nothing for what a token may see, else a number that leaves nothing.

    branch: int64 [R, T], negative where a row is padded.
    """
    size = branch.shape[1]
    seen = (branch[:, None, :] == 0) | (branch[:, None, :] == branch[:, :, None])
    seen &= torch.ones(size, size, dtype=torch.bool).tril()
    # Of what is padded each sees itself: a row of attention that sees nothing is not a number.
    seen |= torch.eye(size, dtype=torch.bool)
    return torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.bfloat16).min)[:, None]


def padded(lists: Sequence[Sequence[int]], filler: int) -> Tensor:
    """int64 [R, T]."""
    width = max(map(len, lists))
    return torch.tensor([[*one, *[filler] * (width - len(one))] for one in lists])


def cast(dtype: str) -> torch.autocast:
    """As `train.dtype` on a CPU."""
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "bfloat16")


def forward(opened: student.Student, trees: Sequence[Tree], dtype: str) -> Tensor:
    """Logits [R, T, V] of trees; of trees without branches no mask is needed, since what is padded comes last."""
    inputs, depth = padded([t.inputs for t in trees], 0), padded([t.depth for t in trees], 0)
    branch = padded([t.branch for t in trees], -1)
    mask = hidden_from(branch) if any(t.branch[-1] for t in trees) else None
    with cast(dtype):
        logits: Tensor = opened.model(input_ids=inputs, position_ids=depth, attention_mask=mask, use_cache=False).logits
    return logits


@torch.inference_mode()
def scores(
    opened: student.Student, groups: Sequence[Sequence[str]], dtype: str, *, shared: bool | None = None
) -> list[list[Scored]]:
    """Of every string of every group the bits of its tokens.

    Args:
        groups: strings that begin alike where possible; it saves time only. dtype: as `train.dtype`. shared: whether
            strings of a group share a row; None: if the model can (`can_share`).

    Raises:
        InputError: a string that the student's tokenizer cannot spell.
    """
    encoded = [opened.vocabulary.encode_batch(group) for group in groups]
    for one, text in (
        (one, text) for pair in zip(encoded, groups, strict=True) for one, text in zip(*pair, strict=True)
    ):
        if isinstance(one, Misfit):
            raise InputError(
                f"{opened.folder}: its tokenizer cannot spell {text[:40]!r} ({one}); make probes without it"
            )
    ids = [[one.ids.tolist() for one in group if not isinstance(one, Misfit)] for group in encoded]
    if shared is None:
        shared = can_share(opened, next((g for g in groups if len(g) > 1), []), dtype)
    # Where a tree cannot be had, every string is a tree of its own.
    cut = ids if shared else [[one] for group in ids for one in group]
    trees = [tree_of(opened.vocabulary.start_id, strings) for strings in cut]
    bits: list[list[npt.NDArray[np.float64]]] = [[] for _ in trees]
    room = MICRO_TOKENS * 49_152 / max(opened.vocabulary.size, 49_152)
    opened.model.eval()
    for members in batches([len(t.inputs) for t in trees], room):
        logits = forward(opened, [trees[m] for m in members], dtype).float()
        sums = logits.logsumexp(-1)
        for row, member in enumerate(members):
            for rows, tokens in zip(trees[member].rows, cut[member], strict=True):
                nats = sums[row, rows] - logits[row, rows, tokens]
                bits[member].append(nats.double().numpy() / math.log(2))
    flat = iter([one for each in bits for one in each])
    return [
        [Scored(next(flat), one.starts[:-1] - one.synthetic) for one in group if not isinstance(one, Misfit)]
        for group in encoded
    ]


def batches(lengths: Sequence[int], room: float) -> list[list[int]]:
    """Numbers of rows, of like length together, as many as fit into `room` padded tokens."""
    groups: list[list[int]] = []
    for number in sorted(range(len(lengths)), key=lambda n: -lengths[n]):
        if groups and (len(groups[-1]) + 1) * lengths[groups[-1][0]] <= room:
            groups[-1].append(number)
        else:
            groups.append([number])
    return groups


def can_share(opened: student.Student, group: Sequence[str], dtype: str) -> bool:
    """Whether the model says of strings in one row what it says of each alone (a sliding window, say, does not)."""
    if not group:
        return False
    together, alone = (
        np.array([one.bits.sum() for one in scores(opened, [group], dtype, shared=shared)[0]])
        for shared in (True, False)
    )
    return bool(np.allclose(together, alone, rtol=0.01 if dtype == "bfloat16" else 1e-4))


def measure(
    opened: student.Student, probes: Probes, dtype: str = "float32", *, sample: int = 160, seed: int = 0
) -> Record:
    """What a student in memory makes of the probes; the model is left in evaluation mode.

    Args:
        dtype: as `train.dtype`. sample: bytes of each continuation, about; 0: no samples.

    Returns:
        JSON: by probe the kind and rule of each item and the bits of its strings (the true one first; of a copy the
        first and the second reading, with its bytes), "samples", and processor seconds of each part.

    Raises:
        InputError: an item that the student's tokenizer cannot spell.
    """
    record: Record = {"probes": probes.digest, "dtype": dtype, "seconds": {}}
    tick = time.process_time()

    def done(part: str) -> None:
        nonlocal tick
        now = time.process_time()
        record["seconds"][part], tick = round(now - tick, 2), now

    for part in ("cloze", "pairs"):
        items: tuple[Item, ...] = getattr(probes, part)
        bits = [[round(float(one.bits.sum()), 3) for one in group] for group in
                scores(opened, [item.strings for item in items], dtype)]  # fmt: skip
        record[part] = {"kind": [item.kind for item in items], "rule": [item.rule for item in items], "bits": bits}
        done(part)
    record["copy"] = copied(opened, probes.copies, dtype)
    done("copy")
    if sample:
        record["samples"] = samples(opened, dtype, sample, seed=seed)
        done("samples")
    return record


def copied(opened: student.Student, items: Sequence[Item], dtype: str) -> Record:
    """Bits of every line at its first and at its second reading, each with its line's end."""
    lines = [item.strings[0] + "\n" for item in items]
    sizes = [len(line.encode()) for line in lines]
    bits = []
    for (one,), size in zip(scores(opened, [[line * 2] for line in lines], dtype, shared=False), sizes, strict=True):
        edge = int(np.searchsorted(one.starts, size))
        bits.append([round(float(part.sum()), 3) for part in (one.bits[:edge], one.bits[edge:])])
    return {"kind": [item.kind for item in items], "bytes": sizes, "bits": bits}


@torch.inference_mode()
def samples(
    opened: student.Student, dtype: str, n_bytes: int, *, seed: int = 0, prompts: Sequence[str] = PROMPTS
) -> list[dict[str, str]]:
    """Each prompt's continuation by the likeliest tokens, and by drawn ones (`TEMPERATURE`), of about `n_bytes`."""
    vocabulary = opened.vocabulary
    starts = [[vocabulary.start_id, *vocabulary.encode(prompt).ids.tolist()] for prompt in prompts] * 2
    width = max(map(len, starts))
    ids = torch.tensor([[vocabulary.start_id] * (width - len(one)) + one for one in starts])
    seen = torch.tensor([[0] * (width - len(one)) + [1] * len(one) for one in starts])
    place = (seen.cumsum(1) - 1).clamp(min=0)
    draw = torch.Generator().manual_seed(seed)
    written = [b""] * len(starts)
    open_rows = set(range(len(starts)))
    cache = None
    opened.model.eval()
    while open_rows and seen.shape[1] < min(width + n_bytes, opened.max_tokens):
        with cast(dtype):
            said = opened.model(
                input_ids=ids, position_ids=place, attention_mask=seen, past_key_values=cache, use_cache=True
            )
        cache, logits = said.past_key_values, said.logits[:, -1].float()
        likeliest = logits.argmax(-1)
        drawn = torch.multinomial((logits / TEMPERATURE).softmax(-1), 1, generator=draw)[:, 0]
        ids = torch.cat([likeliest[: len(prompts)], drawn[len(prompts) :]])[:, None]
        for row in sorted(open_rows):
            token = int(ids[row, 0])
            spelt = vocabulary.token_bytes[token] if token < vocabulary.size else None
            written[row] += spelt or b""
            if token in vocabulary.end_ids or len(written[row]) >= n_bytes:
                open_rows.discard(row)
        seen = torch.cat([seen, torch.ones(len(starts), 1, dtype=seen.dtype)], dim=1)
        place = place[:, -1:] + 1
    texts = [one.decode(errors="replace") for one in written]
    return [
        {"prompt": prompt, "greedy": texts[number], "drawn": texts[number + len(prompts)]}
        for number, prompt in enumerate(prompts)
    ]


# --- figures ---


def values(record: Record, name: str, kind: str = "") -> npt.NDArray[np.float64]:
    """Of one of `MEASURES` the value of each item of a kind ('': of every kind): bits, bits/byte, or 1 for right."""
    part, _, which = name.replace(",", "").partition(" ")
    chosen = [number for number, one in enumerate(record[part]["kind"]) if kind in ("", one)]
    bits = np.array([record[part]["bits"][number] for number in chosen]).reshape(len(chosen), -1)
    if part == "copy":
        sizes = np.array(record[part]["bytes"])[chosen]
        return np.asarray(bits[:, 0 if which == "first" else 1] / sizes, np.float64)
    margin = bits[:, 1:].min(1) - bits[:, 0]
    return np.asarray(margin if which == "margin" else margin > 0, np.float64)


def interval(each: npt.ArrayLike, seed: int = 0) -> tuple[float, float, float]:
    """Mean over seeds and items, and the two ends of its bootstrap over items; [items] or [seeds, items]."""
    by_item = np.atleast_2d(np.asarray(each, np.float64)).mean(0)
    draws = np.random.default_rng(seed).integers(0, len(by_item), (DRAWS, len(by_item)))
    low, high = np.quantile(by_item[draws].mean(1), [0.025, 0.975])
    return float(by_item.mean()), float(low), float(high)


def lead(ours: Sequence[Record], control: Sequence[Record], name: str, kind: str = "") -> tuple[float, float, float]:
    """Difference of two students in one of `MEASURES`, item by item, with its interval; records pair by their place.

    Raises:
        ValueError: records of other probes than one another's.
    """
    if len({record["probes"] for record in (*ours, *control)}) != 1:
        raise ValueError("records are of different probes; measure all of them with the same texts and seed")
    pairs = zip(ours, control, strict=True)
    return interval([values(one, name, kind) - values(other, name, kind) for one, other in pairs])


def table(students: dict[str, Sequence[Record]]) -> str:
    """Every measure of every student, by kind, as a Markdown table; records of a student are its seeds'."""
    first = next(iter(students.values()))[0]
    lines = ["| probe | items | " + " | ".join(students) + " |", "|---|---:|" + "---:|" * len(students)]
    for name in MEASURES:
        kinds = dict.fromkeys(first[name.replace(",", "").split()[0]]["kind"])
        for kind in ("", *kinds) if "margin" not in name else ("",):
            cells = []
            for records in students.values():
                each = [values(record, name, kind) for record in records]
                shape = ".1%" if name in ("cloze", "pairs") else ".3f"
                mean, low, high = (format(x, shape) for x in interval(each))
                cells.append(f"{mean} [{low}, {high}]")
            title = f"{name}: {kind}" if kind else f"{name}{', bits' if 'margin' in name else ''}"
            lines.append(f"| {title} | {len(values(first, name, kind))} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def readable(students: dict[str, Sequence[Record]]) -> str:
    """The samples of every student's first record, as text."""
    lines = []
    for name, records in students.items():
        for one in records[0].get("samples", []):
            lines += [f"[{name}] {one['prompt']!r}", *(f"  {how}: {one[how]!r}" for how in ("greedy", "drawn"))]
    return "\n".join(lines)


def texts_of(path: Path, use: str = "test") -> list[Text]:
    """Texts of a use, by their ids (`transfer_texts`: kind, use, number, source)."""
    lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return [(line["id"], line["text"]) for line in lines if line["id"].split(" ", 2)[1] == use]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("students", type=Path, nargs="+", help="folders, prepared or exported")
    parser.add_argument("--texts", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--use", default="test", help="of the texts")
    parser.add_argument("--each", type=int, default=50, help="items of a kind")
    parser.add_argument("--seed", type=int, default=0, help="of the probes")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--sample", type=int, default=160, help="bytes of a sample; 0: none")
    args = parser.parse_args()
    probes = make_probes(texts_of(args.texts, args.use), args.seed, each=args.each)
    found = {}
    for folder in args.students:
        found[folder.name] = measure(student.load(folder), probes, args.dtype, sample=args.sample)
        write_text(args.out, json.dumps(found) + "\n")
    students: dict[str, Sequence[Record]] = {name: [record] for name, record in found.items()}
    print(table(students), readable(students), sep="\n\n")


if __name__ == "__main__":
    main()

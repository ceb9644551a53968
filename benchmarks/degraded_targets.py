"""Worse targets from the same dump, so that the value of exact ones can be shown; used by `student_gain.py`.

    python -m benchmarks.degraded_targets runs/default OUT --kind fast|topk [--k 20] [--teacher FOLDER]

fast: the canonical history only, renormalised: at every byte the mass of the tokens that go on, those that end there
    dropped. Inside a token this leaks that the token goes on.
topk: the same from the dumped top-k tokens of each row, or the first `--k` of them, and its true token, as an engine
    returns them. Inside a token
    often only the true token is left: the label leaks.
Both are ordinary data sets of byte targets, tail 0 where anything is known, that any trainer reads. They are not part
of the product.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from bytecache.schemas import settings as st
from bytecache.schemas.arrays import END
from bytecache.schemas.dataset.index import ShardEntry, read_dataset, write_dataset
from bytecache.schemas.dump.parquet import read_meta, read_windows
from bytecache.schemas.dump.window import Window
from bytecache.schemas.files import file_sha256
from bytecache.schemas.shard.builder import ShardBuilder
from bytecache.stages.models.locate import resolve_model
from bytecache.stages.tokens.vocab import load_vocabulary

KINDS = ("fast", "topk")


def fast(window: Window) -> np.ndarray:
    """[n + 1, 257] of a window; rows without anything known are 0."""
    probs = np.zeros((len(window.text) + 1, END + 1))
    level_start = np.cumsum(window.n_levels) - window.n_levels
    entry_start = np.concatenate([[0], np.cumsum(window.fanout, dtype=np.int64)])
    rows = np.flatnonzero(window.row_depth == 0)
    ends = np.append(window.row_start[rows[1:]], len(window.text) + 1)
    for row, stop in zip(rows, ends, strict=True):
        for depth in range(min(int(window.n_levels[row]), int(stop - window.row_start[row]))):
            level = level_start[row] + depth
            span = slice(entry_start[level], entry_start[level + 1])
            position = window.row_start[row] + depth
            probs[position, window.entry_byte[span]] = window.entry_mass[span]
            if depth == 0:
                probs[position, END] = window.end[row]
    return probs


def topk(window: Window, token_bytes: list[bytes | None], ends: set[int], most: int) -> np.ndarray:
    """[n + 1, 257] of a window from its rows' `most` likeliest tokens (0 = all that are listed) and the true one."""
    probs = np.zeros((len(window.text) + 1, END + 1))
    rows = np.flatnonzero(window.row_depth == 0)
    k = len(window.topk_id) // len(window.row_start)
    ids, logps = (each.reshape(-1, k)[:, : most or k] for each in (window.topk_id, window.topk_logp))
    stops = np.append(window.row_start[rows[1:]], len(window.text) + 1)
    for at, (row, stop) in enumerate(zip(rows, stops, strict=True)):
        listed = dict(zip(ids[row].tolist(), np.exp(logps[row]).tolist(), strict=True))
        if at + 1 < len(rows):
            listed[int(window.row_token[rows[at + 1]])] = float(np.exp(window.row_logp[rows[at + 1]]))
        first = int(window.row_start[row])
        for position in range(first, int(stop)):
            prefix = window.text[first:position].tobytes()
            for token, p in listed.items():
                spelled = token_bytes[token] if token < len(token_bytes) else None
                if spelled and spelled.startswith(prefix) and len(spelled) > len(prefix):
                    probs[position, spelled[len(prefix)]] += p
                elif token in ends and not prefix:
                    probs[position, END] += p
    return probs


def write_shard(builder: ShardBuilder, out: Path, split: str, made_from: str) -> ShardEntry:
    """Write the one shard of a split into the folder `out`; returns its entry in the manifest."""
    path = out / f"{split}-00000-{'0' * 12}.zarr.zip"
    counts = builder.write(path, {"degraded": made_from})
    known_counts = {name: count for name, count in counts.items() if name in ShardEntry.model_fields}
    identity = {"file": path.name, "split": split, "sha256": file_sha256(path), "size": path.stat().st_size}
    return ShardEntry(**{**known_counts, **identity, "key": "00" * 32})


def degrade(run: Path, out: Path, kind: str, teacher: str = "", most: int = 0) -> None:
    """Write the data set `out` beside that of a run folder: the same documents and splits, other probabilities.

    `teacher`: its checkpoint folder, where the dump's own name for it (a builtin, a hub id) does not lead
    there. `most`: see `topk`.
    """
    out.mkdir(parents=True)
    info: dict[str, Any] = {"teacher": {"degraded": kind}}
    entries = []
    for split in ("train", "heldout"):
        builder = ShardBuilder()
        for part in sorted((run / "teacher").glob(f"*-{split}-*.parquet")):
            token_bytes, ends = _vocabulary(part, teacher) if kind == "topk" else ([], set())
            for window in read_windows(part):
                if window.reference:
                    continue
                probs = fast(window) if kind == "fast" else topk(window, token_bytes, ends, most)
                kept = probs[window.score_start : None if window.is_last else -1]
                total = kept.sum(1, keepdims=True)
                known = total[:, 0] > 0
                kept = np.where(known[:, None], kept / np.where(known[:, None], total, 1), 0).astype(np.float32)
                builder.append(window.text[window.score_start :], kept, np.where(known, 0, 1).astype(np.float32))
                if window.is_last:
                    builder.end_document(window.doc_id)
        entries.append(write_shard(builder, out, split, kind))
    write_dataset(out, entries, info)
    read_dataset(out)


def _vocabulary(part: Path, teacher: str) -> tuple[list[bytes | None], set[int]]:
    model = teacher or read_meta(part)["teacher"]["model"]
    vocabulary = load_vocabulary(str(resolve_model(st.Teacher(model=model))))
    return vocabulary.token_bytes, set(vocabulary.end_ids.tolist())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--kind", choices=KINDS, required=True)
    parser.add_argument("--k", type=int, default=0, help="tokens of each row that `topk` keeps; 0 = all of the dump")
    parser.add_argument("--teacher", default="", help="the teacher's folder")
    args = parser.parse_args()
    degrade(args.run, args.out, args.kind, args.teacher, args.k)


if __name__ == "__main__":
    main()

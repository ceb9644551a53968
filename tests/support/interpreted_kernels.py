"""Path masses by the GPU's kernels under Triton's interpreter, against float64: run as a program, prints JSON.

    TRITON_INTERPRET=1 python -m tests.support.interpreted_kernels

In a process of its own, because Triton reads the variable when it is first imported.
"""

import json
import os

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch

from bytecache.stages.engines import path_kernels, paths_device
from bytecache.stages.engines.paths import PathReducer, plan_paths
from bytecache.stages.engines.rows import RowMasses
from bytecache.stages.tokens.vocab import Vocabulary


def some_vocabulary() -> Vocabulary:
    """Twelve thousand words and pieces of words, every byte, three control tokens of which two end a text."""
    generator = np.random.default_rng(0)
    letters = np.frombuffer(b" etaoinshrdlu", np.uint8)
    words = {generator.choice(letters, generator.integers(2, 8)).tobytes() for _ in range(14_000)}
    pieces = [bytes([value]) for value in range(256)] + sorted(words)[:12_000] + [b"the", b" teacher", b" cache"]
    token_bytes: list[bytes | None] = [None, *pieces, None, None]
    return Vocabulary(token_bytes, start_id=0, end_ids=[0, len(pieces) + 1], encoder=None)  # type: ignore[arg-type]


def compare(extra: int) -> dict[str, float]:
    """Greatest difference of every mass from the float64 form, relative; of logs and ids, absolute."""
    vocabulary = some_vocabulary()
    text = "the cache of the teacher, naïve".encode()
    data, starts = np.frombuffer(text, np.uint8), np.arange(0, len(text), 5, dtype=np.int64)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(len(starts), vocabulary.size + extra, generator=generator) * 6
    logits[1, :] -= 500  # a row far from the others
    logits[2, ::3] = -torch.inf
    plan, following = plan_paths(vocabulary, data, starts), np.full(len(starts), 4, np.int64)
    reducer = PathReducer(vocabulary, top_k=5, floor=0.0)
    expected = reducer.reduce(logits.double().float(), plan, following, where="x")
    tables = paths_device.make_tables(vocabulary.order, vocabulary.end_ids, logits.shape[1], logits.device)
    rows = np.arange(len(starts))
    found = reducer._assemble(_sums(reducer, logits, tables, plan, following), plan, following, rows)
    return _differences(found, expected)


def _sums(reducer: PathReducer, logits: torch.Tensor, tables: object, plan: object, following: np.ndarray) -> object:
    paths_device._kernels = lambda _: (path_kernels.launch_blocks, path_kernels.launch_ranges)  # type: ignore[assignment]
    ranges, children = reducer._ranges(plan, np.arange(len(following)))  # type: ignore[arg-type]
    rows = np.arange(len(following))
    return paths_device.sum_on_device(logits, tables, ranges, children, rows, following, reducer.top_k)()  # type: ignore[arg-type]


def _differences(found: RowMasses, expected: RowMasses) -> dict[str, float]:
    out = {}
    for name, theirs in vars(expected).items():
        ours = getattr(found, name)
        if len(ours) != len(theirs):
            out[name] = float("inf")
            continue
        difference = np.abs(ours.astype(np.float64) - theirs.astype(np.float64))
        scale = np.abs(theirs.astype(np.float64)) if "mass" in name or name in ("end", "control") else 1.0
        out[name] = float(np.max(difference / np.maximum(scale, 1e-30), initial=0.0))
    return out


if __name__ == "__main__":
    print(json.dumps([compare(extra) for extra in (0, 7)]))

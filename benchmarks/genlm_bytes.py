"""Beside genlm-bytes, the public reference for byte probabilities of token models: same checkpoint, same text, one run.

genlm-bytes (0.2.0) walks the text byte by byte with a beam of K histories and drops what is below a threshold; its
transformers backend is used as its documentation shows it, in float32, one thread pool for both sides. It is an
optional dependency and wants its own environment, with this project's packages visible to it:

    python3.11 -m venv runs/genlm
    echo "$PWD/.venv/lib/python3.11/site-packages" > runs/genlm/lib/python3.11/site-packages/shared.pth
    runs/genlm/bin/pip install --no-deps genlm-bytes==0.2.0 genlm-backend==0.3.1 arsenal==3.1.3
    runs/genlm/bin/pip install pandas ipython scipy
    runs/genlm/bin/python -m benchmarks.genlm_bytes --out benchmarks/results/genlm_bytes.json

Reported, loading, compilation, trie building and static rows excluded:

    bytes/s           of wall clock, and of the process's CPU time, which other work on the machine disturbs less and
                      which leaves out that genlm-bytes waits up to 20 ms ("tuned": 1 ms) for histories to batch
    tokens            fed to the model per byte of text, padding included: genlm-bytes keeps no key/value cache unless
                      told ("tuned": of the best history, every 16 tokens), so a history costs its whole context again
    histories         evaluated per byte of text
    KL, JSD, leak     per byte, against the same teacher at tau = 2e-4, depth 5 (stages.fidelity.divergence;
                      genlm-bytes has no tail)

"many" is documents of 80 to 200 bytes all at once, in batches of each side's own making ("tuned" raises genlm-bytes'
limit of 20 histories to 64). "long" is this project alone on more of the same text: what a corpus runs at. Ours are
medians of three runs; genlm-bytes runs once. The rows of an earlier --out stay where this run has none, so that --only
and --streams can fill one file in several commands.
"""

import argparse
import asyncio
import json
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.texts import builtin_texts, clip, folder_texts
from bytecache.schemas import settings as st
from bytecache.schemas.arrays import END
from bytecache.stages.fidelity.divergence import divergence
from bytecache.stages.lattice.effort import REFERENCE
from bytecache.stages.lattice.lattice import Lattice
from bytecache.stages.models.locate import resolve_model
from bytecache.stages.teacher.teacher import Teacher, open_teacher

THEIRS: list[tuple[str, dict[str, Any], int]] = [
    ("K=10, prune 0.01", {"K": 10, "prune_threshold": 0.01}, 0),
    ("K=10, prune 0.01, tuned", {"K": 10, "prune_threshold": 0.01}, 16),
]
ROUNDS = 3
"""Runs of each of our own rows, of which the median counts: they take seconds."""
Rows = tuple[np.ndarray, np.ndarray]


@contextmanager
def counted(model: torch.nn.Module) -> Iterator[list[int]]:
    """Tokens that pass through `model` meanwhile, padding included."""
    seen = [0]

    def hook(_: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        seen[0] += ids.numel()

    handle = model.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


def ours(teacher: Teacher, pieces: list[str], effort: dict[str, float]) -> tuple[list[Rows], int]:
    """Rows and tails of each piece (END left out), and histories evaluated; `effort`: tau, depth, static."""
    teacher.settings = teacher.settings.model_copy(update=effort)
    documents = [(str(i), i, teacher.vocabulary.encode(piece)) for i, piece in enumerate(pieces)]
    windows = [w for group in teacher.windows(documents) for w in group]
    targets = [Lattice(window).targets() for window in windows]
    return [(t.probs[:-1], t.tail[:-1]) for t in targets], sum(int((w.row_static == 0).sum()) for w in windows)


async def walk(beam: Any, piece: bytes, llm: Any, kv_every: int) -> np.ndarray:
    """genlm-bytes' distribution before every byte of a piece: float64 [n, 257]."""
    out = np.zeros((len(piece), END + 1))
    cached = 0
    for i, byte in enumerate(piece):
        beam = beam.prune()
        logp = np.exp((await beam.logp_next()).ps)
        out[i, :256], out[i, END] = logp[:256], logp[257]
        if kv_every and len(beam.states[0].lm_state.context) >= cached + kv_every:
            cached = len(beam.states[0].lm_state.context)
            llm.cache_kv(beam.states[0].lm_state.context)
        beam = await (beam << byte)
    return out


def theirs(llm: Any, initial: Callable[[], Any], pieces: list[str], kv_every: int) -> tuple[list[Rows], int]:
    calls = [0]
    ask = llm.next_token_logprobs

    async def asked(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        return await ask(*args, **kwargs)

    async def everything() -> list[np.ndarray]:
        beam = await initial()
        return await asyncio.gather(*(walk(beam, piece.encode(), llm, kv_every) for piece in pieces))

    llm.next_token_logprobs = asked
    llm.timeout, llm.batch_size = (0.001, 64) if kv_every else (0.02, 20)
    try:
        found = asyncio.run(everything())
    finally:
        llm.next_token_logprobs = ask
    llm.clear_cache()
    return [(rows, np.zeros(len(rows))) for rows in found], calls[0]


def distance(reference: list[Rows], found: list[Rows], pieces: list[str]) -> dict[str, float]:
    symbols = np.concatenate([np.frombuffer(piece.encode(), np.uint8) for piece in pieces]).astype(np.int64)
    p, p_tail = (np.concatenate(parts) for parts in zip(*reference, strict=True))
    q, q_tail = (np.concatenate(parts) for parts in zip(*found, strict=True))
    d = divergence(p, p_tail, q, q_tail, symbols)
    return {
        "kl": float(d.kl.mean()), "kl_p99": float(np.quantile(d.kl, 0.99)), "jsd": float(d.jsd.mean()),
        "leak_bits": float(d.leak.mean()),
    }  # fmt: skip


def load_genlm(folder: Path, ends: list[bytes], warm: str) -> tuple[Any, Callable[[dict[str, Any]], Callable[[], Any]]]:
    """The model, and a factory of beams that share one trie (building it is not timed)."""
    from genlm.backend import load_model_by_name
    from genlm.bytes import BeamParams, ByteBeamState
    from genlm.bytes.byte_lm.trie_state import LazyTrieState
    from genlm.bytes.trie import AsyncTokenByteTrie, TrieMode

    llm = load_model_by_name(str(folder), backend="hf", llm_opts={"hf_opts": {"dtype": torch.float32}})
    began = time.perf_counter()
    trie = AsyncTokenByteTrie.from_vocab(llm.byte_vocab, eos_byte_strings=set(ends))
    print(f"genlm-bytes: trie built in {time.perf_counter() - began:.1f} s", flush=True)

    def beams(options: dict[str, Any]) -> Callable[[], Any]:
        async def initial() -> Any:
            state = LazyTrieState.initial(llm, trie, mode=TrieMode.WITH_EOS)
            return ByteBeamState([await state.materialize()], BeamParams(eos_byte_strings=ends, **options))

        return initial

    theirs(llm, beams({"K": 2}), [warm], 0)
    return llm, beams


def documents(text: str, count: int) -> list[str]:
    """The start of `text` as `count` documents of 80 to 200 bytes, cut at characters."""
    draw, data, at = random.Random(0), text.encode(), 0
    found = []
    for _ in range(count):
        found.append(clip(data[at:].decode(errors="ignore"), draw.randint(80, 200)))
        at += len(found[-1].encode())
    return found


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="builtin:smollm2-135m-instruct")
    parser.add_argument("--bytes", type=int, default=400, help="of each text")
    parser.add_argument("--long", type=int, default=2000, help="bytes of each text for `long`")
    parser.add_argument("--documents", type=int, default=16, help="documents of 80 to 200 bytes for `many`")
    parser.add_argument("--streams", action="append", default=[], help="single, many, long; default: all")
    parser.add_argument("--texts", type=Path, help="a folder of further .txt files")
    parser.add_argument("--only", action="append", default=[], help="texts to run, by name; default: all")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def ends_of(teacher: Teacher, folder: Path) -> list[bytes]:
    """The tokens that end a text, as the peer takes them."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    if tokenizer.bos_token_id != teacher.vocabulary.start_id:
        raise SystemExit(
            f"the two start a document differently: {tokenizer.bos_token_id}, {teacher.vocabulary.start_id}"
        )
    return [str(name).encode() for name in tokenizer.convert_ids_to_tokens(teacher.vocabulary.end_ids.tolist())]


@dataclass
class Comparison:
    """What systems make of one set of pieces, each beside the same reference."""

    text: str
    streams: str
    pieces: list[str]
    reference: list[Rows]

    def measure(
        self, system: str, model: Any, run: Callable[[], tuple[list[Rows], int]], rounds: int = 1
    ) -> dict[str, Any]:
        """Speed, what the model computed for it and how far the rows are from the reference; printed as a row."""
        size = sum(len(piece.encode()) for piece in self.pieces)
        wall, cpu = [], []
        for _ in range(rounds):
            with counted(model) as tokens:
                began = time.perf_counter(), time.process_time()
                rows, histories = run()
                wall.append(time.perf_counter() - began[0])
                cpu.append(time.process_time() - began[1])
        seconds, cpu_seconds = statistics.median(wall), statistics.median(cpu)
        row = {
            "text": self.text, "streams": self.streams, "documents": len(self.pieces), "system": system, "bytes": size,
            "seconds": seconds, "cpu_seconds": cpu_seconds, "bytes_per_s": size / seconds,
            "bytes_per_cpu_s": size / cpu_seconds, "tokens_per_byte": tokens[0] / size,
            "histories_per_byte": histories / size, **distance(self.reference, rows, self.pieces),
        }  # fmt: skip
        print(
            f"| {self.text} | {self.streams} | {system} | {row['bytes_per_s']:.1f} | {row['bytes_per_cpu_s']:.1f} | "
            f"{row['tokens_per_byte']:.2f} | "
            f"{row['histories_per_byte']:.2f} | {row['kl']:.5f} | {row['jsd']:.6f} | {row['leak_bits']:+.4f} |",
            flush=True,
        )
        return row


def compared(
    teacher: Teacher, llm: Any, beams: Callable[[dict[str, Any]], Callable[[], Any]], text: str, streams: str,
    pieces: list[str],
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """Our presets and the peer's beams on some pieces, a row of the results each."""
    reference, _ = ours(teacher, pieces, {**REFERENCE, "static": 0.0})
    for effort in st.PRESETS.values():  # static rows are made once per teacher, not per text
        ours(teacher, pieces, effort)
    comparison = Comparison(text, streams, pieces, reference)
    for preset, effort in st.PRESETS.items():
        model = teacher.engine.model  # type: ignore[attr-defined]
        yield comparison.measure(f"bytecache {preset}", model, partial(ours, teacher, pieces, effort), ROUNDS)
    for label, options, kv in THEIRS:
        if streams != "long":
            yield comparison.measure(
                f"genlm-bytes {label}", llm.model, partial(theirs, llm, beams(options), pieces, kv)
            )


def main() -> None:
    args = parsed()
    texts, more, source = (
        builtin_texts(limit) | (folder_texts(args.texts, limit) if args.texts else {})
        for limit in (args.bytes, args.long, 200 * args.documents + 4)
    )
    settings = st.Teacher(model=args.model, backend="hf", top_k=0, floor=1e-6)
    teacher = open_teacher(settings)
    ours(teacher, ["warm up: compile every kernel"], st.PRESETS["balanced"])
    folder = resolve_model(settings)
    llm, beams = load_genlm(folder, ends_of(teacher, folder), "warm up")
    machine = f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    results: list[dict[str, Any]] = []
    if args.out and args.out.exists():
        results = json.loads(args.out.read_text())["results"]
    print("| text | streams | system | bytes/s | bytes/CPU s | tokens/byte | histories/byte | KL | JSD | leak, bits |")
    print("|---|---|---|---:|---:|---:|---:|---:|---:|---:|")
    same = ("text", "streams", "system")
    for name, text in texts.items():
        if args.only and name not in args.only:
            continue
        many = documents(source[name], args.documents)
        for streams, pieces in (("single", [text]), ("many", many), ("long", [more[name]])):
            if args.streams and streams not in args.streams:
                continue
            for row in compared(teacher, llm, beams, name, streams, pieces):
                results = [r for r in results if [r[k] for k in same] != [row[k] for k in same]] + [row]
        if args.out:  # after every text: the peer is slow
            facts = {"machine": machine, "model": args.model, "reference": REFERENCE, "presets": st.PRESETS}
            args.out.write_text(json.dumps(facts | {"results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""The presets before a judge that is not ours: genlm-bytes with wide beams, which has no rule of effort to share.

The reference of `exactness` spends its effort by the rule that the presets obey, so what the rule overlooks neither
would show. genlm-bytes (0.2.0) walks the text byte by byte with a beam of K histories and drops those below a threshold
of the beam's mass; with no K and no threshold it would be exact. Here beams get wider until they agree with each other,
which says how far the judge can be trusted; then the presets are held against the widest. Environment: see genlm_bytes.

    runs/genlm/bin/python -m benchmarks.independent_judge --texts FOLDER --kinds manual code tables numbers handbooks \
        --out benchmarks/results/independent_judge.json

KL, JSD in nats and leak in bits per byte, all against the widest beam, over `--documents` documents of `--bytes` bytes
of each kind, at even distances in 10 kB of it. The JSON is written after each document, and the same command goes on
where it stopped.
"""

import argparse
import json
import os
import platform
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.genlm_bytes import Rows, load_genlm, ours, theirs
from benchmarks.texts import clip, kinds_of
from bytecache.schemas import settings as st
from bytecache.schemas.files import write_text
from bytecache.stages.fidelity.divergence import divergence
from bytecache.stages.lattice.effort import REFERENCE, RULE
from bytecache.stages.models.locate import resolve_model
from bytecache.stages.teacher.teacher import open_teacher

BEAMS: list[tuple[int, float]] = [(10, 0.01), (30, 1e-3), (100, 1e-4), (300, 1e-5)]
"""K and threshold, the widest last."""


def documents_of(text: str, count: int, size: int) -> list[str]:
    """Pieces of at most `size` bytes, whole characters, at even distances."""
    data = text.encode()
    starts = range(0, len(data) - size, max(1, (len(data) - size) // count))
    return [clip(data[at:].decode(errors="ignore"), size) for at in starts][:count]


def measured(judge: Rows, judged: Rows, piece: str) -> dict[str, float]:
    """Means over the bytes of a piece, and the greatest KL."""
    symbols = np.frombuffer(piece.encode(), np.uint8).astype(np.int64)
    found = divergence(*judge, *judged, symbols)
    means = {name: float(np.mean(getattr(found, name))) for name in ("kl", "jsd", "leak")}
    return {**means, "kl_greatest": float(found.kl.max())}


def summary(documents: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """By what is judged, means over all bytes, and the standard error of the KL over documents."""
    sizes = [one["bytes"] for one in documents]
    table = {}
    for name in documents[0]["judged"]:
        parts = [one["judged"][name] for one in documents]
        of = {key: [part[key] for part in parts] for key in parts[0]}
        table[name] = {
            "kl": float(np.average(of["kl"], weights=sizes)), "jsd": float(np.average(of["jsd"], weights=sizes)),
            "leak": float(np.average(of["leak"], weights=sizes)), "kl_greatest": max(of["kl_greatest"]),
            "kl_stderr": float(np.std(of["kl"], ddof=1) / len(parts) ** 0.5) if len(parts) > 1 else None,
            "bytes": sum(sizes),
        }  # fmt: skip
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="builtin:smollm2-135m-instruct")
    parser.add_argument("--texts", type=Path, help="a folder of further .txt files")
    parser.add_argument("--kinds", nargs="+", default=["manual", "code", "tables", "numbers"])
    parser.add_argument("--documents", type=int, default=4)
    parser.add_argument("--bytes", type=int, default=120)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    texts = kinds_of(args.texts, 10_000)
    settings = st.Teacher(model=args.model, backend="hf", top_k=0, floor=1e-6)
    teacher = open_teacher(settings)
    folder = resolve_model(settings)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    # genlm-bytes knows no other start than the tokenizer's own.
    teacher.vocabulary.start_id = tokenizer.bos_token_id
    ends = [str(name).encode() for name in tokenizer.convert_ids_to_tokens(teacher.vocabulary.end_ids.tolist())]
    llm, beams = load_genlm(folder, ends, "warm up")
    efforts = {**st.PRESETS, "reference": {**REFERENCE, "static": 0.0}}
    result: dict[str, Any] = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "model": args.model, "effort": RULE, "beams": BEAMS, "documents": [],
    }  # fmt: skip
    if args.out.exists():
        result |= {"documents": json.loads(args.out.read_text())["documents"]}
    done = {(one["kind"], one["number"]) for one in result["documents"]}
    for number in range(args.documents):
        for kind in args.kinds:
            if (kind, number) in done:
                continue
            piece = documents_of(texts[kind], args.documents, args.bytes)[number]
            began = time.process_time()
            walked = {
                f"K = {k}, {threshold:g}": theirs(llm, beams({"K": k, "prune_threshold": threshold}), [piece], 16)
                for k, threshold in BEAMS
            }
            widest = list(walked.values())[-1][0][0]
            judged = {name: rows[0] for name, (rows, _) in list(walked.items())[:-1]}
            judged |= {name: ours(teacher, [piece], effort)[0][0] for name, effort in efforts.items()}
            result["documents"].append(
                {
                    "kind": kind, "number": number, "bytes": len(piece.encode()),
                    "histories": {name: calls for name, (_, calls) in walked.items()},
                    "seconds": round(time.process_time() - began, 1),
                    "judged": {name: measured(widest, rows, piece) for name, rows in judged.items()},
                }
            )  # fmt: skip
            result["table"] = {
                name: summary([one for one in result["documents"] if name in (one["kind"], "all")])
                for name in [*dict.fromkeys(one["kind"] for one in result["documents"]), "all"]
            }
            write_text(args.out, json.dumps(result) + "\n")
            last = result["documents"][-1]
            print(kind, number, last["seconds"], last["histories"], flush=True)
            for name, rows in last["judged"].items():
                print(f"  {name:16} " + " ".join(f"{key} {value:+.6f}" for key, value in rows.items()), flush=True)


if __name__ == "__main__":
    main()

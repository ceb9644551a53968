"""Caches as other tools write them, made from a function of the history; each layout as its project documents it."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from typer.testing import CliRunner

from bytecache.pipeline.cli import app
from bytecache.stages.tokens.vocab import Vocabulary


def teacher_rows(vocabulary: Vocabulary, tokens: list[int], *, seed: int = 0, true_weight: float = 4.0) -> np.ndarray:
    """float64 [T, size]: a distribution after each token, in which the token that follows is likely."""
    logits = np.random.default_rng([seed, len(tokens)]).standard_normal((len(tokens), vocabulary.size)) * 2
    for place, following in enumerate(tokens[1:]):
        logits[place, following] += true_weight
    p = np.exp(logits - logits.max(1, keepdims=True))
    return np.asarray(p / p.sum(1, keepdims=True))


def top_k(p: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """(ids, log-probabilities) [T, k], most likely first."""
    ids = np.argsort(-p, axis=1, kind="stable")[:, :k]
    return ids, np.log(np.take_along_axis(p, ids, axis=1))


def import_plain(cache: Path, teacher: Path, run: Path) -> Any:
    """`bytecache import` of a cache of layout plain whose documents are all trained on; its result."""
    return CliRunner().invoke(app, [
        "import", str(cache), "--from", "plain", "--teacher", str(teacher), "--run-dir", str(run),
        "--set", "corpus.heldout_fraction=0",
    ])  # fmt: skip


def write_records(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Parquet or lines of JSON, by the name's ending."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def pack_bits(values: np.ndarray, bits: int) -> np.ndarray:
    """uint8 [P, ceil(N * bits / 8)]: integers from the most significant bit on."""
    every = (values[..., None] >> np.arange(bits - 1, -1, -1)) & 1
    return np.packbits(every.reshape(len(values), -1).astype(np.uint8), axis=1)


def distillkit_row(tokens: list[int], ids: np.ndarray, logps: np.ndarray, settings: dict[str, Any]) -> dict[str, Any]:
    """A row of DistillKit's packed columns: exact values, a polynomial fit, quantised residuals."""
    exact_k, k = settings["exact_k"], settings["k"]
    values = logps.copy()
    if settings["delta_encoding"]:
        values[:, 1:] = np.diff(logps, axis=1)
    chunks = [values[:, :exact_k].astype(np.float32)]
    rest = values[:, exact_k:]
    terms = settings.get("polynomial_terms") or []
    if terms:
        rank = np.arange(k - exact_k, dtype=np.float64)
        basis = np.stack([np.sqrt(rank) if term == "sqrt" else rank**term for term in terms], axis=1)
        coefficients = np.linalg.lstsq(basis, rest.T, rcond=None)[0].T.astype(np.float32)
        chunks.append(coefficients)
        rest = rest - coefficients.astype(np.float64) @ basis.T
    raw = [np.ascontiguousarray(chunk).view(np.uint8).reshape(len(values), -1) for chunk in chunks]
    at = 0
    for bin_ in settings["residual_bins"]:
        bits, count = bin_["element_bits"], bin_["num_elements"]
        part = rest[:, at : at + count]
        half = 1 << (bits - 1)
        scale = np.maximum(np.abs(part).max(1, keepdims=True), 1e-9).astype(np.float16) / np.float16(half)
        scale = scale.astype(np.float16)
        codes = np.clip(np.round(part / scale.astype(np.float64)), -half, half - 1).astype(np.int64) + half
        raw += [np.ascontiguousarray(scale).view(np.uint8).reshape(len(values), -1), pack_bits(codes, bits)]
        at += count
    packed_ids = pack_bits(ids.astype(np.int64), math.ceil(math.log2(settings["d"])))
    return {
        "input_ids": tokens,
        "compressed_logprobs": np.concatenate(raw, axis=1).tolist(),
        "bytepacked_indices": packed_ids.tolist(),
    }

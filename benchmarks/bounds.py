"""Inputs that cost their reader without bound: seconds of processor and megabytes until each is refused or done.

    python -m benchmarks.bounds --out benchmarks/results/bounds.json

Each case is made in a scratch folder and run in a process of its own that is ended after `LIMIT_S` seconds, or at
`LIMIT_GB` of memory: what says "ended" had no bound of its own.
"""

import argparse
import contextlib
import gzip
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

LIMIT_S, LIMIT_GB = 300, 12


def manifest(folder: Path) -> None:
    """400,000 rows in a few kB."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from bytecache.schemas.dataset import index

    row = {
        "file": "train-00000.zarr.zip", "split": "train", "sha256": "a" * 64, "size": 1, "n_documents": 1, "n_bytes": 1,
        "n_positions": 2, "n_supervised": 2, "n_entries": 2, "tail_mean": 0.0, "tail_max": 0.0, "key": "k",
    }  # fmt: skip
    table = pa.table(
        {field.name: pa.repeat(pa.scalar(row[field.name], field.type), 400_000) for field in index._SCHEMA}
    )
    pq.write_table(table.cast(index._SCHEMA), folder / "m.parquet", compression="zstd", store_schema=False)
    begin(folder / "m.parquet")
    index._parse_manifest("manifest.parquet", (folder / "m.parquet").read_bytes())


def repeated_key(folder: Path) -> None:
    """A dataset.json of 379 kB whose last key is its last but one."""
    from bytecache.schemas import strict_json

    keys = [f'"{number:x}":0' for number in range(42_000)]
    (folder / "d.json").write_text("{" + ",".join([*keys, keys[-1]]) + "}")
    begin(folder / "d.json")
    strict_json.parse((folder / "d.json").read_bytes())


def shard(folder: Path) -> None:
    """A valid shard of 64 Mi positions, one letter over and over, read and cut into the tokens of a byte student."""
    import numpy as np

    from bytecache.schemas.errors import IntegrityError
    from bytecache.schemas.shard.builder import ShardBuilder

    builder, piece = ShardBuilder(), 1 << 16
    text, certain = np.full(piece, 97, np.uint8), np.full(piece, 0.999, np.float32)
    for _ in range(1 << 10):
        builder.append_sparse(text, np.ones(piece, np.int64), text.astype(np.int16), certain, 1 - certain)
    end = np.full(1, 0.999, np.float32)
    builder.append_sparse(text[:0], np.ones(1, np.int64), np.array([256], np.int16), end, 1 - end)
    builder.end_document("d")
    with contextlib.suppress(IntegrityError):  # the writer refuses it as well, once it is there
        builder.write(folder / "s.zarr.zip", {})
    again = [sys.executable, "-m", "benchmarks.bounds", "--case", "read_shard", "--file", str(folder / "s.zarr.zip")]
    os.execv(sys.executable, again)


def read_the_shard(file: Path) -> None:
    """The second half of `shard`, in a process that did not write it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    from bytecache.schemas.shard.reader import read_shard
    from bytecache.stages.tokens.vocab import load_vocabulary
    from bytecache.stages.train.batches.token_shard import tokenise

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.add_special_tokens(["<|end|>"])
    made.save(str(file.with_name("tokenizer.json")))
    vocabulary = load_vocabulary(file.with_name("tokenizer.json"), start="<|end|>", end="<|end|>")
    begin(file)
    tokenise(read_shard(file), vocabulary, vocabulary.start_id)


def long_line(folder: Path) -> None:
    """A line of 300 MB in a .gz of 1.4 MB."""
    from bytecache.schemas.settings import Corpus
    from bytecache.stages.corpus.reader import CorpusReader

    path = folder / "c.jsonl.gz"
    with gzip.open(path, "wb", compresslevel=1) as stream:
        stream.write(b'{"text": "one"}\n{"text": "')
        for _ in range(300):
            stream.write(b"a" * (1 << 20))
        stream.write(b'"}\n')
    begin(path)
    for _ in CorpusReader(Corpus(source=str(path), max_bytes=0)):
        pass


def _tokenizer(folder: Path, **changes: Any) -> Path:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    cut = pre_tokenizers.Split(Regex(r"a{1,40}?b?a{1,40}?b?a{1,40}?b?a{1,40}?b?c"), "isolated")
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.pre_tokenizer, made.decoder = pre_tokenizers.Sequence([cut, bytes_]), decoders.ByteLevel()
    made.add_special_tokens(["<|end|>"])
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>", **changes}))
    return folder


def regular_expression(folder: Path) -> None:
    """A document on which a tokenizer's regular expression does not end."""
    from bytecache.stages.tokens.vocab import load_vocabulary

    vocabulary = load_vocabulary(_tokenizer(folder))
    begin(folder / "tokenizer.json")
    vocabulary.encode_batch(["a" * 200_000 + "b", "the next one"])


def template(folder: Path, text: str) -> None:
    """A chat template that loops or builds a string."""
    from bytecache.stages.tokens.chat import Template
    from bytecache.stages.tokens.vocab import load_vocabulary

    _tokenizer(folder, chat_template=text, tokenizer_class="PreTrainedTokenizerFast")
    vocabulary = load_vocabulary(folder)
    begin(folder / "tokenizer_config.json")
    Template.open(folder, vocabulary, setting="teacher.model")


def vocabulary_id(folder: Path) -> None:
    """A token that tokenizer_config.json gives the id 10^9."""
    from bytecache.stages.tokens.vocab import load_vocabulary

    _tokenizer(folder, added_tokens_decoder={"1000000000": {"content": "<x>", "special": True}})
    begin(folder / "tokenizer_config.json")
    load_vocabulary(folder)


def pipe(folder: Path) -> None:
    """A named pipe in the place of a data set's card."""
    from bytecache.schemas.dataset import card

    os.mkfifo(folder / "README.md")
    begin(folder / "README.md")
    card.is_ours(folder / "README.md")


LOOP = "{% for i in range(99999) %}"
CASES: dict[str, Callable[[Path], None]] = {
    "manifest of 400,000 rows": manifest,
    "dataset.json with a repeated key": repeated_key,
    "shard of 64 Mi positions": shard,
    "line of 300 MB in a .gz": long_line,
    "regular expression that does not end": regular_expression,
    "chat template with nested loops": lambda folder: template(folder, 3 * LOOP + 3 * "{% endfor %}"),
    "chat template with a wide number": lambda folder: template(folder, "{{ '%2000000000d' % 1 }}"),
    "chat template with a string of 8 GB": lambda folder: template(folder, "{{ 'x' * 8000000000 }}"),
    "token with id 10^9": vocabulary_id,
    "named pipe as README.md": pipe,
}


def begin(file: Path) -> None:
    """The input is there: what comes now is measured."""
    size = file.stat().st_size
    print(json.dumps({"input_bytes": size, "before_mb": _megabytes(), "cpu": time.process_time()}), flush=True)


def _megabytes() -> int:
    """The most that this program has had at a time; unlike the usage that is counted for the process, of it alone."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) >> 10


def one_case(run: Callable[[], None]) -> None:
    """In the child: run it, say how it ended and what it took."""
    resource.setrlimit(resource.RLIMIT_AS, (LIMIT_GB << 30, LIMIT_GB << 30))
    try:
        run()
        end = "done"
    except BaseException as error:
        end = f"{type(error).__name__}: {str(error)[:200]}"
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    peak = max(_megabytes(), children.ru_maxrss >> 10)
    cpu = time.process_time() + children.ru_utime + children.ru_stime
    print(json.dumps({"end": end, "peak_mb": peak, "cpu": cpu}), flush=True)
    os._exit(0)


def measure(name: str) -> dict[str, Any]:
    """One case in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.bounds", "--case", name, "--file", folder]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
        try:
            out, _ = child.communicate(timeout=LIMIT_S)
            ended = False
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            out, ended = child.communicate()[0], True
    lines = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    first = next((line for line in lines if "input_bytes" in line), {})
    last = lines[-1] if lines and "end" in lines[-1] else {}
    lost = f"ended after {LIMIT_S} s" if ended else "the process died"
    return {
        "case": name,
        "input_bytes": first.get("input_bytes"),
        "cpu_s": round(last["cpu"] - first["cpu"], 2) if first and last else None,
        "peak_mb": last.get("peak_mb"),
        "end": (last.get("end") or lost).replace(f"{folder}/", "").replace(folder, "FOLDER"),
    }


def main() -> None:
    """Every case, or in a child one of them."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path)
    parser.add_argument("--case")
    parser.add_argument("--file", type=Path)
    args = parser.parse_args()
    if args.case:
        known = CASES.get(args.case, read_the_shard)
        one_case(lambda: known(args.file))
    results = [measure(name) for name in CASES]
    text = json.dumps({"machine": "2 cores, x86-64", "cases": results}, indent=1) + "\n"
    print(text)
    if args.out:
        args.out.write_text(text)


if __name__ == "__main__":
    main()

"""What of a foreign cache is nothing: counted and said. And settings that stand for more than they are."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from bytecache.schemas.errors import ConfigError
from bytecache.stages.foreign.packed import MAX_CONFIG, Packing
from bytecache.stages.tokens.vocab import load_vocabulary
from tests.support.foreign_caches import import_plain, teacher_rows, top_k, write_records

PLAIN = {"d": 1000, "k": 24, "exact_k": 24}
BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{name}: &{name} [{','.join([f'*{before}'] * 9)}]\n"
    for before, name in zip("abcdefghijk", "bcdefghijkl", strict=True)
)


@pytest.mark.parametrize(("text", "words"), [
    (BOMB, "line 1 has the anchor or alias 'a'.*spell the values out"), ("k: *k\n", "anchor or alias 'k'"),
    ("d: 1000\nk: &k 24\nexact_k: *k\n", "line 2 has the anchor or alias 'k'"), ("a: &a [*a]\n", "anchor or alias 'a'"),
    ("x: " + "[" * (MAX_CONFIG - 3), "not DistillKit's compression settings .nested deeper"),
    ("#" * MAX_CONFIG + "#", "more than 65536 bytes"),
    ("x: !!python/object/apply:os.system ['true']", "not DistillKit's"), ("d: " + "9" * 9000, "not DistillKit's"),
])  # fmt: skip
def test_settings_are_as_large_as_they_are_long(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "compression_config.yaml").write_text(text)
    with pytest.raises(ConfigError, match=f"compression_config.yaml: .*{words}"):
        Packing.beside(tmp_path / "data.parquet")
    (tmp_path / "compression_config.yaml").write_text(yaml.safe_dump(PLAIN))
    assert Packing.beside(tmp_path / "data.parquet").k == 24


def test_records_of_nothing_are_counted_and_said(tiny_checkpoint: Any, tmp_path: Path) -> None:
    folder = tiny_checkpoint("bytelevel")
    vocabulary = load_vocabulary(folder)
    end = int(vocabulary.end_ids[0])

    def row(tokens: list[int]) -> dict[str, Any]:
        ids, logps = top_k(teacher_rows(vocabulary, tokens), 6)
        return {"input_ids": tokens, "topk_ids": ids.tolist(), "topk_logprobs": logps.tolist()}

    texts = [
        [vocabulary.start_id, *vocabulary.encode(text).ids.tolist(), end] for text in ("One text.", "Another one.")
    ]
    nothing = {"input_ids": [], "topk_ids": [], "topk_logprobs": []}
    unlisted = {"input_ids": texts[1], "topk_ids": [None] * len(texts[1]), "topk_logprobs": [None] * len(texts[1])}
    rows = [row(texts[0]), nothing, row([vocabulary.start_id, end]), nothing, row([end]), *map(row, texts), unlisted]
    write_records(tmp_path / "c.jsonl", rows)
    result = import_plain(tmp_path / "c.jsonl", folder, tmp_path / "run")
    assert result.exit_code == 0, result.output
    assert "documents set aside (control tokens alone: 2, empty record: 2)" in result.output
    assert "1 documents have nothing listed about them" in result.output

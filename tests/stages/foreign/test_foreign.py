"""Caches of every layout, from their files to targets: alignment, marked tokens, refusals, what a target must be."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from bytecache.schemas.dataset.index import read_dataset
from bytecache.schemas.dump.window import Window
from bytecache.schemas.errors import ConfigError, InputError
from bytecache.schemas.shard.reader import read_shard
from bytecache.stages.engines.listing import ListingReducer
from bytecache.stages.foreign import records
from bytecache.stages.foreign.cache import Aside, ForeignTeacher, Reading, read_off
from bytecache.stages.foreign.packed import Packing
from bytecache.stages.foreign.records import Cache, Columns
from bytecache.stages.tokens.vocab import Vocabulary, load_vocabulary
from tests.support.foreign_caches import distillkit_row, import_plain, teacher_rows, top_k, write_records
from tests.support.places import ROOT

SAID = (
    "The teacher reads the text once.",
    "A cache is a promise, naïve 日本語.",
    "  indented\n\n\n12345 isn't",
    "notes",
)
TEXTS = [*SAID] * 4
PACKED = {
    "d": 1000, "k": 24, "exact_k": 4, "exact_dtype": "float32", "polynomial_terms": [0, 1, "sqrt"],
    "term_dtype": "float32", "delta_encoding": False, "normalize_t": False, "error_diffusion": False,
    "residual_bins": [{"scale_dtype": "float16", "element_bits": 8, "num_elements": 12}],
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tiny_checkpoint) -> Path:
    return tiny_checkpoint("bytelevel")


@pytest.fixture(scope="module")
def vocabulary(folder: Path) -> Vocabulary:
    return load_vocabulary(folder)


def sequences(vocabulary: Vocabulary) -> list[list[int]]:
    """Start token, text, END: as most caches hold them."""
    end = int(vocabulary.end_ids[0])
    return [[vocabulary.start_id, *vocabulary.encode(text).ids.tolist(), end] for text in TEXTS]


def plain_rows(vocabulary: Vocabulary, k: int, **changes: Any) -> list[dict[str, Any]]:
    """Entry j is the distribution after token j."""
    rows = []
    for number, tokens in enumerate(sequences(vocabulary)):
        ids, logps = top_k(teacher_rows(vocabulary, tokens, seed=number), k)
        rows.append({"input_ids": tokens, "topk_ids": ids.tolist(), "topk_logprobs": logps.tolist(), **changes})
    return rows


def of(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same, entry j about token j; nothing about the first, as engines return prompt log-probabilities."""
    return [
        {**row, "topk_ids": [None, *row["topk_ids"][:-1]], "topk_logprobs": [None, *row["topk_logprobs"][:-1]]}
        for row in rows
    ]


def window_of(cache: Cache, number: int, alignment: str, vocabulary: Vocabulary) -> Window:
    """The window of a record's only document. The prior is even: counted on the lists, it differs as they do."""
    teacher = ForeignTeacher(cache, vocabulary, read_off(cache, alignment, False))
    teacher.reducer = ListingReducer(vocabulary, np.ones(vocabulary.size))
    (document,) = teacher.documents(cache[number])
    assert not isinstance(document, Aside)
    return teacher.window(f"{number}.0", 0, cache[number], document)


def test_alignment_is_read_off_and_gives_equal_windows(vocabulary: Vocabulary, tmp_path: Path) -> None:
    rows = plain_rows(vocabulary, 12)
    short = [{**row, **{name: row[name][:-1] for name in ("topk_ids", "topk_logprobs")}} for row in rows]
    windows = {}
    for name, content in (("after", rows), ("of", of(rows)), ("short", short)):
        cache = Cache(write_records(tmp_path / f"{name}.jsonl", content), "plain")
        windows[name] = window_of(cache, 0, "", vocabulary)
        assert windows[name].text.tobytes().decode() == TEXTS[0]
        assert windows[name].score_start == 0
    assert windows["after"].canonical_nll == pytest.approx(windows["of"].canonical_nll)
    np.testing.assert_allclose(windows["after"].entry_mass, windows["of"].entry_mass, atol=1e-7)
    np.testing.assert_allclose(windows["after"].entry_mass, windows["short"].entry_mass, atol=1e-7)


def test_an_alignment_that_cannot_be_told_is_asked_for(vocabulary: Vocabulary, tmp_path: Path) -> None:
    rows = plain_rows(vocabulary, 12)
    for row in rows:
        row["input_ids"] = [3] * len(row["input_ids"])
    cache = Cache(write_records(tmp_path / "same.jsonl", rows), "plain")
    with pytest.raises(ConfigError, match="--alignment of"):
        read_off(cache, "", False)
    assert read_off(cache, "after", False).alignment == "after"


def test_a_true_token_that_is_listed_because_it_is_true_is_taken_off(vocabulary: Vocabulary, tmp_path: Path) -> None:
    """Top 4, and the true token where it is not among them: the targets are those of the top 4 alone."""
    plain, marked = plain_rows(vocabulary, 4), []
    extra = 0
    for number, row in enumerate(plain):
        p = teacher_rows(vocabulary, row["input_ids"], seed=number, true_weight=2.0)
        ids, logps = top_k(p, 4)
        row["topk_ids"], row["topk_logprobs"] = ids.tolist(), logps.tolist()
        listed_ids, listed_logps = [], []
        for place, following in enumerate([*row["input_ids"][1:], -1]):
            is_extra = following >= 0 and following not in ids[place]
            extra += is_extra
            listed_ids.append([*ids[place].tolist(), *([following] if is_extra else [])])
            listed_logps.append([*logps[place].tolist(), *([float(np.log(p[place, following]))] if is_extra else [])])
        marked.append({"input_ids": row["input_ids"], "topk_ids": listed_ids, "topk_logprobs": listed_logps})
    assert extra > 10
    entries, priors = [], []
    for name, rows in (("plain", plain), ("marked", marked)):
        cache = Cache(write_records(tmp_path / f"{name}.jsonl", rows), "plain")
        entries.append(window_of(cache, 1, "after", vocabulary).entry_mass)
        reading = Reading("after", k=4, always_true=False, listed_mass=1.0, hit_rate=1.0)
        priors.append(ForeignTeacher(cache, vocabulary, reading).reducer.prior)
    np.testing.assert_allclose(entries[0], entries[1], atol=1e-7)
    # Nor does the prior know the text by them.
    np.testing.assert_allclose(priors[0], priors[1], atol=1e-12)


def packed_rows(rows: list[dict[str, Any]], **changes: Any) -> list[dict[str, Any]]:
    """Rows as DistillKit packs them."""
    return [
        distillkit_row(
            row["input_ids"], np.array(row["topk_ids"]), np.array(row["topk_logprobs"]), {**PACKED, **changes}
        )
        for row in rows
    ]


def in_every_layout(rows: list[dict[str, Any]], folder: Path) -> dict[str, Cache]:
    """The same records as each layout keeps them."""
    write_records(folder / "packed" / "data_0.parquet", packed_rows(rows))
    (folder / "packed" / "compression_config.yaml").write_text(yaml.safe_dump(PACKED))
    axolotl, numbers, trl, raw, renamed = [], [], [], [], []
    for row in rows:
        tokens, ids, logps = row["input_ids"], row["topk_ids"], row["topk_logprobs"]
        entries = [
            [{"token": f"token_id:{token}", "logprob": logp} for token, logp in zip(*position, strict=True)]
            for position in zip(ids, logps, strict=True)
        ]
        axolotl.append({"input_ids": tokens, "logprobs": entries})
        numbers.append({"input_ids": tokens, "target_token_ids": ids, "logprobs": logps})
        halves = {"prompt_ids": tokens[:3], "completion_ids": tokens[3:]}
        trl.append({**halves, "teacher_topk_ids": ids, "teacher_topk_logprobs": logps})
        raw.append({"input_ids": tokens, "token_ids": ids, "top_values": logps})
        renamed.append({"t": tokens, "i": ids, "p": logps})
    return {
        "plain": Cache(write_records(folder / "plain.parquet", rows), "plain"),
        "axolotl": Cache(write_records(folder / "axolotl.jsonl", axolotl), "axolotl"),
        "axolotl, numbers": Cache(write_records(folder / "numbers.parquet", numbers), "axolotl"),
        "trl": Cache(write_records(folder / "trl.parquet", trl), "trl"),
        "distillkit": Cache(folder / "packed", "distillkit"),
        "raw": Cache(write_records(folder / "raw.parquet", raw), "distillkit"),
        "renamed": Cache(write_records(folder / "renamed.parquet", renamed), "plain", Columns("t", "i", "p")),
    }


def test_every_layout_says_the_same(vocabulary: Vocabulary, tmp_path: Path) -> None:
    rows = plain_rows(vocabulary, 24)
    caches = in_every_layout(rows, tmp_path)
    for number in range(len(rows)):
        want = caches["plain"][number]
        for name, cache in caches.items():
            record = cache[number]
            assert record.tokens.tolist() == want.tokens.tolist(), name
            assert record.ids.tolist() == want.ids.tolist(), name
            # Packed values are fitted and quantised; the exact ones are float32.
            close = 0.35 if name == "distillkit" else 1e-6
            np.testing.assert_allclose(record.logps, want.logps, atol=close, err_msg=name)
    assert caches["distillkit"][0].logps[:4] == pytest.approx(caches["plain"][0].logps[:4], abs=1e-6)


@pytest.mark.parametrize(
    "changes",
    [
        {"delta_encoding": True},
        {"exact_k": 24, "polynomial_terms": None, "residual_bins": []},
        {"residual_bins": [{"scale_dtype": "float16", "element_bits": 12, "num_elements": 20}]},
    ],
)
def test_packed_values_come_back(vocabulary: Vocabulary, changes: dict[str, Any]) -> None:
    settings = {**PACKED, **changes}
    tokens = sequences(vocabulary)[0]
    ids, logps = top_k(teacher_rows(vocabulary, tokens), 24)
    row = distillkit_row(tokens, ids, logps, settings)
    unpacked_ids, values = Packing.model_validate(settings).unpack(
        row["compressed_logprobs"], row["bytepacked_indices"]
    )
    assert unpacked_ids.tolist() == ids.tolist()
    np.testing.assert_allclose(values, logps, atol=0.02 if "delta_encoding" not in changes else 0.5)
    np.testing.assert_allclose(values[:, : settings["exact_k"]], logps[:, : settings["exact_k"]], atol=1e-4)


def test_refusals_name_what_is_wrong(vocabulary: Vocabulary, tmp_path: Path) -> None:
    rows = plain_rows(vocabulary, 6)
    places = len(rows[0]["topk_ids"])

    def cache(name: str, layout: str = "plain", **changes: Any) -> Cache:
        return Cache(write_records(tmp_path / f"{name}.jsonl", [{**rows[0], **changes}, *rows[1:]]), layout)

    with pytest.raises(ConfigError, match="known layouts are plain"):
        cache("a", "other")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"no \.parquet"):
        Cache(tmp_path / "empty", "plain")
    with pytest.raises(InputError, match=r"record 0: not of layout axolotl \(column 'logprobs' is missing"):
        _ = cache("b", "axolotl")[0]
    with pytest.raises(InputError, match=r"column 'teacher_topk_ids' is missing, it has .*topk_ids.*--from, or plain"):
        _ = cache("t", "trl", teacher_topk_logprobs=rows[0]["topk_logprobs"])[0]
    for layout in ("axolotl", "trl", "distillkit"):
        with pytest.raises(InputError, match=r"column 'input_ids' is missing, it has ids, tokens; take another --from"):
            _ = Cache(write_records(tmp_path / f"{layout}.jsonl", [{"tokens": [1], "ids": [[2]]}]), layout)[0]
    with pytest.raises(InputError, match="above 0"):
        _ = cache("c", topk_logprobs=[[0.5] * 6] * places)[0]
    with pytest.raises(InputError, match="same id twice"):
        _ = cache("d", topk_ids=[[1] * 6] * places)[0]
    with pytest.raises(InputError, match="different lengths"):
        _ = cache("e", topk_ids=[[1] * 5] * places)[0]
    write_records(tmp_path / "f" / "data.parquet", packed_rows(plain_rows(vocabulary, 24)))
    with pytest.raises(ConfigError, match=r"compression_config.yaml is missing"):
        Cache(tmp_path / "f", "distillkit")


def test_renormalised_lists_are_taken_only_when_asked(vocabulary: Vocabulary, tmp_path: Path) -> None:
    rows = plain_rows(vocabulary, 6)
    for row in rows:
        row["topk_logprobs"] = [(np.array(p) - np.log(np.exp(p).sum())).tolist() for p in row["topk_logprobs"]]
    lists = Cache(write_records(tmp_path / "lists.jsonl", rows), "plain")
    with pytest.raises(ConfigError, match="--renormalised"):
        read_off(lists, "after", False)
    assert read_off(lists, "after", True).listed_mass == pytest.approx(1.0)


def test_documents_are_cut_at_end_and_set_aside_with_a_reason(vocabulary: Vocabulary, tmp_path: Path) -> None:
    first, second = sequences(vocabulary)[:2]
    other = next(
        i
        for i, piece in enumerate(vocabulary.token_bytes)
        if not piece and i not in vocabulary.end_ids and i != vocabulary.start_id
    )
    rows = []
    for tokens in ([*first, *second[1:]], [*first[:4], other, *first[4:]]):
        ids, logps = top_k(teacher_rows(vocabulary, tokens), 8)
        rows.append({"input_ids": tokens, "topk_ids": ids.tolist(), "topk_logprobs": logps.tolist()})
    cache = Cache(write_records(tmp_path / "packed.jsonl", rows), "plain")
    teacher = ForeignTeacher(cache, vocabulary, read_off(cache, "after", False))
    documents = list(teacher.documents(cache[0]))
    assert [teacher.text(document).decode() for document in documents if not isinstance(document, Aside)] == TEXTS[:2]
    assert list(teacher.documents(cache[1])) == [Aside("control token inside")]


@pytest.mark.slow
def test_from_a_cache_to_targets_on_the_command_line(vocabulary: Vocabulary, folder: Path, tmp_path: Path) -> None:
    """At a token's first byte a target holds what is listed, at least: the rest is the prior's share, or tail."""
    rows = of(plain_rows(vocabulary, 12))
    cache = write_records(tmp_path / "cache" / "part.parquet", rows)
    (tmp_path / "cache" / "notes.txt").write_text("by hand")
    run = tmp_path / "run"
    common = ["--run-dir", str(run), "--set", "corpus.heldout_fraction=0.2", "--set", "convert.precision=precise"]

    def bytecache(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "bytecache", *arguments]
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300, check=False)

    imported = bytecache("import", str(cache.parent), "--from", "plain", "--teacher", str(folder), *common)
    assert imported.returncode == 0, imported.stderr
    assert "alignment of" in imported.stdout and "1 files of other kinds" in imported.stdout
    again = bytecache("import", str(cache.parent), "--from", "plain", "--teacher", str(folder), *common)
    assert again.returncode == 0 and "nothing to do" in again.stdout, again.stdout
    source = ["--set", f"corpus.source={run}/import/corpus.parquet", "--set", "corpus.max_bytes=0"]
    converted = bytecache("convert", "--set", f"teacher.model={folder}", *source, *common)
    assert converted.returncode == 0, converted.stderr
    measured = bytecache("fidelity", str(run), "--teacher", str(folder), "--sample", "2", "--tokens", "8", "--out",
                         str(tmp_path / "fidelity.json"))  # fmt: skip
    assert measured.returncode == 0 and "no certificate to compare with" in measured.stdout, measured.stderr
    dataset = read_dataset(run / "targets")
    assert json.dumps(dataset.info["teacher"]).count("foreign") == 1
    texts = {}
    for entry in dataset.entries:
        shard = read_shard(dataset.path(entry))
        for number, doc_id in enumerate(shard.doc_id):
            lo, hi = shard.doc_start[number], shard.doc_start[number + 1]
            texts[doc_id] = (bytes(shard.text[lo : hi - 1]), shard.dense(lo, hi))
    assert len(texts) == len(TEXTS)
    record = Cache(cache, "plain")[0]
    text, dense = texts["0.0"]
    assert text.decode() == TEXTS[0]
    listed = np.zeros(257)
    span = slice(int(record.counts[0]), int(record.counts[0] + record.counts[1]))
    for token, logp in zip(record.ids[span], record.logps[span], strict=True):
        piece = vocabulary.token_bytes[token] if token < vocabulary.size else None
        listed[piece[0] if piece else 256] += np.exp(logp) if piece or token in vocabulary.end_ids else 0.0
    assert (dense[0, :257] >= listed - 0.02).all()
    assert dense[0, :257].sum() <= 1.001 and dense[0, text[0]] > 0


@pytest.mark.parametrize("wrong", [3.5, True, "3", None, 2**63, 2**80])
def test_an_id_is_a_whole_number(vocabulary: Vocabulary, tmp_path: Path, wrong: object) -> None:
    """Not what can be made into one: 3.5 would be token 3."""
    rows = plain_rows(vocabulary, 6)
    for name in ("topk_ids", "input_ids"):
        row = {**rows[0], name: [*rows[0][name]]}
        row[name][1] = wrong if name == "input_ids" else [wrong, *row[name][1][1:]]
        with pytest.raises(InputError, match="record 0: not of layout plain"):
            _ = Cache(write_records(tmp_path / f"{name}.jsonl", [row, *rows[1:]]), "plain")[0]


def test_a_log_probability_is_a_number(vocabulary: Vocabulary, tmp_path: Path) -> None:
    rows = plain_rows(vocabulary, 6)
    for number, wrong in enumerate(("-1.5", True, None)):
        row = {**rows[0], "topk_logprobs": [[wrong] * 6, *rows[0]["topk_logprobs"][1:]]}
        with pytest.raises(InputError, match="record 0: not of layout plain"):
            _ = Cache(write_records(tmp_path / f"{number}.jsonl", [row, *rows[1:]]), "plain")[0]


def test_listed_ids_of_no_token_are_counted_and_said(vocabulary: Vocabulary, folder: Path, tmp_path: Path) -> None:
    rows = plain_rows(vocabulary, 6)
    rows[1]["topk_ids"][2][5] = 10**6
    write_records(tmp_path / "c.jsonl", rows)
    result = import_plain(tmp_path / "c.jsonl", folder, tmp_path / "run")
    assert result.exit_code == 0, result.output
    assert "1 listed ids are none of the tokenizer's" in result.output


@pytest.mark.parametrize("ending", ["parquet", "jsonl"])
@pytest.mark.parametrize("column", ["input_ids", "topk_ids", "topk_logprobs"])
def test_a_record_has_a_size(column: str, ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of some kB became gigabytes of Python numbers: 2^27 equal ids take 3 kB of Parquet."""
    monkeypatch.setattr(records, "MAX_VALUES", 1000)
    row: dict[str, Any] = {"input_ids": [5] * 9, "topk_ids": [[5, 6]] * 9, "topk_logprobs": [[-0.1, -4.0]] * 9}
    path = write_records(tmp_path / f"x.{ending}", [row, row | {column: row[column] * 200}])
    cache = Cache(path, "plain")
    assert len(cache[0].tokens) == 9
    with pytest.raises(InputError, match=r"record 1: \d+ values, at most 1000 are read of one record"):
        cache[1]


def test_values_are_counted_at_all_depths() -> None:
    table = pa.table({"a": [[{"x": [1, 2], "y": 3}, {"x": [], "y": 4}]], "b": [[[1], [2, 3]]]})
    assert [records._values(column.chunk(0)) for column in table.columns] == [1 + 2 + (2 + 2) + 2, 1 + 2 + 3]
    assert records._values(table.slice(1, 0).column("a").combine_chunks()) == 0


def test_two_columns_or_keys_of_one_name(tmp_path: Path) -> None:
    ids = pa.array([[5]])
    pq.write_table(pa.Table.from_arrays([ids, ids], names=["input_ids", "input_ids"]), tmp_path / "x.parquet")
    with pytest.raises(InputError, match="two columns of one name"):
        Cache(tmp_path / "x.parquet", "plain")
    (tmp_path / "x.jsonl").write_text('{"input_ids": [5], "input_ids": [6]}\n')
    with pytest.raises(InputError, match="'input_ids' appears twice"):
        Cache(tmp_path / "x.jsonl", "plain")[0]


@pytest.mark.parametrize("entry", [
    {"token": "token_id:5", "logprob": "-0.1"}, {"token": "token_id:5", "logprob": True},
    {"token": "1_0", "logprob": -1}, {"token": "\u0665", "logprob": -1},
    {"token": " 5", "logprob": -1}, {"token": 5.5, "logprob": -1},
    {"token": True, "logprob": -1}, {"token": "-5", "logprob": -1},
])  # fmt: skip
def test_named_entries_are_numbers_too(entry: dict[str, Any], tmp_path: Path) -> None:
    path = write_records(tmp_path / "x.jsonl", [{"input_ids": [5], "logprobs": [[entry]]}])
    with pytest.raises(InputError, match="not of layout axolotl"):
        Cache(path, "axolotl")[0]

"""Corpora on the hub, streamed through `datasets` from a server on loopback that speaks the hub's protocol."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bytecache.schemas.errors import ConfigError
from bytecache.stages.corpus.hub import HubCorpus
from tests.support.hub_server import on_hub

READ = """
import json, sys
from bytecache.schemas.errors import BytecacheError
from bytecache.schemas.settings import Corpus
from bytecache.stages.corpus.reader import CorpusReader
for source in sys.argv[2:]:
    reader = CorpusReader(Corpus(source=source, kind="chat" if "chats" in source else "text"))
    try:
        print(json.dumps([[d.doc_id, d.text, d.context] for d in reader]))
    except BytecacheError as error:
        print(json.dumps(type(error).__name__ + ": " + str(error)))
"""


@pytest.mark.parametrize(
    ("source", "want"),
    [
        ("hf://datasets/me/set", ("me/set", "main", "default", "train")),
        ("hf://datasets/me/set@v1/en", ("me/set", "v1", "en", "train")),
        ("hf://datasets/me/set/en/test", ("me/set", "main", "en", "test")),
    ],
)
def test_sources_are_taken_apart(source: str, want: tuple[str, ...]) -> None:
    assert HubCorpus.parse(source) == want
    assert HubCorpus.parse(HubCorpus.parse(source).url) == want


@pytest.mark.parametrize("source", ["hf://me/set", "hf://datasets/me", "hf://datasets/a/b/c/d/e", "hf://datasets//b"])
def test_other_addresses_are_refused(source: str) -> None:
    with pytest.raises(ConfigError, match="OWNER/NAME"):
        HubCorpus.parse(source)


@pytest.mark.slow
def test_records_are_streamed_and_what_is_missing_is_named(tmp_path: Path) -> None:
    pytest.importorskip("datasets", reason="lock/hub.txt is not installed (make hub): no hub corpus was tried")
    repository = tmp_path / "hub"
    (repository / "data").mkdir(parents=True)
    pq.write_table(pa.table({"id": ["a", "b"], "text": ["one", "zwei ü"]}), repository / "data/train-00000.parquet")
    chat = [{"from": "human", "value": "Sea?"}, {"from": "gpt", "value": "Mare."}]
    pq.write_table(pa.table({"id": ["c"], "conversations": [chat]}), repository / "data/chats.parquet")
    (repository / "README.md").write_text(
        "---\nconfigs:\n- config_name: plain\n  data_files: data/train-*\n- config_name: chats\n"
        "  data_files: data/chats.parquet\n---\n# a set\n"
    )
    root = "hf://datasets/me/set"
    said = on_hub(
        repository, READ, str(tmp_path), f"{root}/plain", f"{root}@main/chats/train", root, f"{root}/plain/test"
    )  # fmt: skip
    plain, chats, unnamed, split = (json.loads(line) for line in said.splitlines())
    assert plain == [["a", "one", ""], ["b", "zwei ü", ""]]
    assert chats == [["c", "Mare.", '[{"role":"user","content":"Sea?"}]']]
    assert unnamed.startswith("InputError") and "plain" in unnamed and "name another configuration" in unnamed
    assert split.startswith("InputError") and "test" in split and "train" in split

"""A checkpoint that cannot be meant is one refusal that names file, key, value and limit, before anything is loaded."""

import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from bytecache.schemas.errors import InputError
from bytecache.stages.models.locate import locate
from bytecache.stages.models.soundness import MAX_IDS, refuse_unsound
from bytecache.stages.student import student
from tests.support.tiny_models import make_checkpoint


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"), family="bytelevel")


def altered(folder: Path, sound: Path, name: str = "config.json", **changes: Any) -> Path:
    for file in sound.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
    (folder / name).write_text(json.dumps(config | changes))
    return folder


def test_a_real_one_passes(sound: Path) -> None:
    refuse_unsound(sound, "teacher.model")


@pytest.mark.parametrize(("key", "value"), [
    ("hidden_size", -1), ("hidden_size", 0), ("hidden_size", 10**9), ("hidden_size", "64"), ("hidden_size", 64.0),
    ("hidden_size", True), ("hidden_size", [64, -1]), ("hidden_size", {}),
    ("num_attention_heads", 0), ("num_hidden_layers", 10**9), ("num_key_value_heads", -4),
    ("vocab_size", 10**9), ("vocab_size", "many"), ("vocab_size", 2**22), ("intermediate_size", -1),
    ("max_position_embeddings", 0), ("max_position_embeddings", "all"), ("head_dim", 10**9),
    ("bos_token_id", "one"), ("bos_token_id", [1, "x"]), ("eos_token_id", 10**9), ("eos_token_id", -2),
    ("pad_token_id", {}), ("hidden_act", 3), ("hidden_act", ["gelu", 1]),
])  # fmt: skip
def test_every_impossible_number_is_named(key: str, value: Any, sound: Path, tmp_path: Path) -> None:
    folder = altered(tmp_path, sound, **{key: value})
    with pytest.raises(InputError, match=rf"student\.model = .*config\.json.*({key}|rows)"):
        locate(str(folder), "student.model")


def test_numbers_of_a_nested_text_model_count_too(sound: Path, tmp_path: Path) -> None:
    folder = altered(tmp_path, sound, text_config={"hidden_size": -1})
    with pytest.raises(InputError, match=r"text_config: hidden_size = -1: must be a whole number in 1\.\."):
        refuse_unsound(folder, "x")


@pytest.mark.parametrize("text", ["", "[]", "3", '{"a": ', "[" * 100_000, '{"vocab_size": 1e999}'])
def test_configurations_that_are_none(text: str, sound: Path, tmp_path: Path) -> None:
    folder = altered(tmp_path, sound)
    (folder / "config.json").write_text(text)
    with pytest.raises(InputError, match=r"config\.json"):
        refuse_unsound(folder, "x")


def test_a_configuration_of_another_size_than_its_weights(sound: Path, tmp_path: Path) -> None:
    folder = altered(tmp_path, sound, vocab_size=MAX_IDS, hidden_size=4096)
    with pytest.raises(InputError, match=r"claims 4194304 rows .* but the weights hold \d+ numbers in all"):
        refuse_unsound(folder, "x")


@pytest.mark.parametrize("head", [
    b"", b"\xff" * 8, struct.pack("<Q", 10**15), struct.pack("<Q", 2) + b"[]", struct.pack("<Q", 7) + b'{"a":1}',
    struct.pack("<Q", 45) + b'{"a":{"shape":[-1],"data_offsets":[0,"x"]}}  ', struct.pack("<Q", 2) + b"{",
])  # fmt: skip
def test_weights_that_are_none(head: bytes, sound: Path, tmp_path: Path) -> None:
    folder = altered(tmp_path, sound)
    (folder / "model.safetensors").write_bytes(head)
    with pytest.raises(InputError, match=r"model\.safetensors (is no safetensors file|has)|numbers in all"):
        refuse_unsound(folder, "x")


def test_weights_that_are_cut_short(sound: Path, tmp_path: Path) -> None:
    folder = altered(tmp_path, sound)
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-1])
    with pytest.raises(InputError, match=rf"has {len(whole) - 1} bytes, its header asks for {len(whole)}"):
        refuse_unsound(folder, "x")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "extra.safetensors", "chat_template.jinja"])
def test_what_is_no_file_is_not_opened(name: str, sound: Path, tmp_path: Path) -> None:
    folder = altered(tmp_path, sound)
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    with pytest.raises(InputError, match="is a named pipe, not a regular file"):
        locate(str(folder), "teacher.model")


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "_attn_implementation_internal",
                                 "experts_implementation", "_experts_implementation"])  # fmt: skip
@pytest.mark.parametrize("value", ["somebody/kernels", "somebody/kernels@main:function", {"": "sdpa", "text": "a/b"}])
def test_code_of_a_repository_is_not_named(key: str, value: Any, sound: Path, tmp_path: Path) -> None:
    """transformers would fetch compiled code from there and run it, whatever trust_remote_code says."""
    for changes in ({key: value}, {"text_config": {key: value}}):
        with pytest.raises(InputError, match=f"{key} = .* names code of somebody's repository"):
            refuse_unsound(altered(tmp_path, sound, **changes), "x")
    refuse_unsound(altered(tmp_path, sound, **{key: "sdpa"}), "x")


@pytest.mark.parametrize("changes", [{"rope_parameters": 5}, {"rope_scaling": [1]}, {"layer_types": {"a": 1}}])
def test_what_a_library_makes_of_a_strange_configuration_is_a_refusal(
    changes: dict[str, Any], sound: Path, tmp_path: Path
) -> None:
    folder = altered(tmp_path, sound, **changes)
    with pytest.raises(InputError, match=r"config\.json|cannot open"):
        student._open(AutoConfig, str(folder))


@pytest.mark.parametrize("name", [
    "a\nerror: run this", "a\rb", "\x1b[2J", "\u202eb", "a\u2028b", "\ud800", "x" * 1001, "a\x00",
])  # fmt: skip
def test_a_weights_name_is_one(name: str, sound: Path, tmp_path: Path) -> None:
    """What transformers prints of a name it does not know would be lines of a stranger's."""
    folder = altered(tmp_path, sound)
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    header = json.loads(whole[8 : 8 + length])
    end = max(entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__")
    header[name] = {"dtype": "F32", "shape": [1], "data_offsets": [end, end + 4]}
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + whole[8 + length :] + bytes(4))
    with pytest.raises(InputError, match=r"model\.safetensors names a weight .* which is none"):
        refuse_unsound(folder, "x")

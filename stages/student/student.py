"""The student: a folder with model and tokenizer, made once, that every training run starts from.

`prepare` writes an ordinary Hugging Face folder (safetensors weights, tokenizer, `student.json` with its identity) from
the settings: a new small Llama with tied embeddings, a copy of an existing causal LM in float32, or such a copy under
another tokenizer (`transfer`). `bpe:N` trains a byte-level BPE on the training documents, `bytes` has a token for every
byte (`new_tokenizer`); any other is copied to the byte (`tokenizer_files`). `load` opens the folder and joins model,
tokenizer and exact token bytes. The same settings, data set and seed give the same weights.
Price: BPE training reads at most 64 MiB of text and takes about 1 s per 3 MB; the folder appears by one rename.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from bytecache.schemas import settings as st
from bytecache.schemas import strict_json
from bytecache.schemas.dataset.index import Dataset
from bytecache.schemas.errors import ConfigError, InputError, IntegrityError
from bytecache.schemas.files import flush_to_disk, read_regular, scratch_folder
from bytecache.stages.models.fitness import refuse_unfit_student
from bytecache.stages.models.locate import locate
from bytecache.stages.models.ordinary import make_ordinary
from bytecache.stages.models.weights import refuse_missing
from bytecache.stages.student.logits import logits_of
from bytecache.stages.student.new_tokenizer import byte_tokenizer, train_bpe, write_tokenizer
from bytecache.stages.student.tokenizer_files import check_kept, keep, open_kept
from bytecache.stages.student.transfer import transfer
from bytecache.stages.targets.source import load_shard, open_dataset
from bytecache.stages.tokens.chat import Template
from bytecache.stages.tokens.vocab import Vocabulary, load_vocabulary

BPE_BYTES = 64 * 1024 * 1024
"""Text that a `bpe:N` tokenizer is trained on, at most."""
MAX_RECORD = 1 << 24
"""Bytes of a student.json, at most."""
NEW_TOKENIZER = "bpe:2048"
"""Of a new student that names none."""
CONTEXT = 4096
"""Position limit written into a new student's configuration."""


@dataclass
class Student:
    """A model with its tokenizer and token bytes; `end_id` is the token trained to close a document."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    vocabulary: Vocabulary
    end_id: int
    identity: str
    """sha256 over weights, configuration and vocabulary as prepared."""
    folder: Path

    def template(self) -> Template:
        """Its chat template, proven (ConfigError if there is none that works)."""
        return Template.open(self.folder, self.vocabulary, setting="student.model, student.tokenizer")

    @property
    def max_tokens(self) -> int:
        """Longest row the model accepts."""
        return int(getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or CONTEXT)

    @property
    def hidden_size(self) -> int:
        """Width of the lm_head's input."""
        return int(self.model.get_output_embeddings().weight.shape[1])

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Token logits [R, T, V] and the lm_head's own input [R, T, hidden], whatever the architecture calls it.

        Args:
            input_ids: int64 [R, T]. position_ids: int64 [R, T] where rows are packed (`packing`), else None.
        """
        seen: list[Tensor] = []
        handle = self.model.get_output_embeddings().register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        try:
            logits = self.model(input_ids=input_ids, position_ids=position_ids, use_cache=False).logits
        finally:
            handle.remove()
        return logits, seen[0]


def split_model(opened: Student) -> tuple[Callable[[Tensor, Tensor | None], Tensor], Callable[[Tensor], Tensor]]:
    """(input_ids and position_ids to hidden states, hidden states to logits), so that logits can be made in pieces.

    Raises:
        ConfigError: the model does more to its logits than `logits_of` knows, checked on a few ids.
    """
    model = opened.model

    # Adapters sit inside the model that peft wraps.
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model

    def trunk(input_ids: Tensor, position_ids: Tensor | None) -> Tensor:
        states: Tensor = inner.base_model(
            input_ids=input_ids, position_ids=position_ids, use_cache=False
        ).last_hidden_state
        return states

    to_logits = logits_of(model)
    training = model.training
    model.eval()
    with torch.no_grad():
        ids = torch.arange(8, device=model.device)[None] % model.config.get_text_config().vocab_size
        whole, pieces = model(input_ids=ids, use_cache=False).logits, to_logits(trunk(ids, None))
    model.train(training)
    if not torch.allclose(whole.float(), pieces.float(), rtol=1e-3, atol=1e-3):
        raise ConfigError("train.chunk: this student alters the logits of its lm_head; set train.chunk = 0")
    return trunk, to_logits


def split_texts(targets: Path | Dataset, split: str, limit: int) -> Iterator[str]:
    """The documents of a split as text, in manifest order, until `limit` bytes; shards verified first."""
    dataset = open_dataset(targets)
    for entry in dataset.split(split):
        if limit <= 0:
            return
        shard = load_shard(dataset, entry)
        text = np.asarray(shard.text)
        for lo, hi in zip(shard.doc_start[:-1], shard.doc_start[1:], strict=True):
            if limit <= 0:
                return
            limit -= int(hi - lo)
            yield text[int(lo) : int(hi) - 1].tobytes().decode("utf-8", errors="ignore")


def write_student_tokenizer(settings: st.Student, source: Path | None, targets: Path | Dataset, out: Path) -> None:
    """Write the tokenizer that the settings ask for into `out`; `source`: the folder of `student.model`, if any.

    Raises ConfigError (bpe:N with no number, no end token) or InputError (no tokenizer there, or none that is exact).
    """
    name = settings.tokenizer or ("" if source else NEW_TOKENIZER)
    if name == "bytes":
        write_tokenizer(byte_tokenizer(), out)
    elif name.startswith("bpe:"):
        write_tokenizer(train_bpe(split_texts(targets, "train", BPE_BYTES), bpe_size(name)), out)
    elif name:
        where = f"student.tokenizer = {name!r}"
        keep(locate(name, "student.tokenizer", weights=False), out, where)
        if open_kept(out).eos_token_id is None:
            raise ConfigError(
                f"{where} declares no EOS token, so documents cannot end; "
                "name its end token as eos_token in its tokenizer_config.json"
            )
    else:
        assert source is not None
        keep(source, out, f"student.model = {settings.model!r}")


def bpe_size(name: str) -> int:
    """N of `bpe:N`. Raises ConfigError."""
    size = name.removeprefix("bpe:")
    if not size.isdigit():
        raise ConfigError(f"student.tokenizer = {name!r}: write bpe:N with N a number, e.g. bpe:2048")
    return int(size)


def _open(factory: Any, source: str, **options: Any) -> Any:
    try:
        return factory.from_pretrained(source, trust_remote_code=False, **options)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:  # the last two: damaged weights, other shapes
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"{source}: {factory.__name__} cannot open it ({reason}); check the path or id") from error
    except MemoryError:
        raise
    except Exception as error:  # whatever architectures, and what checks their configurations, make of strange values
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise InputError(f"{source}: its config.json describes no model ({why}); fetch it again") from error


def _open_model(source: str, **options: Any) -> Any:
    """The model in float32 with all of its weights, which transformers would draw at random; safetensors only."""
    model, report = _open(
        AutoModelForCausalLM, source, dtype=torch.float32, use_safetensors=True, output_loading_info=True, **options
    )
    refuse_missing(source, report, "fetch it again, or leave student.model empty for a new student")
    return model


def new_model(
    settings: st.Student, vocabulary_size: int, start_id: int | None, end_id: int, seed: int
) -> LlamaForCausalLM:
    """A small Llama with tied embeddings and fresh weights; the global random state is left as it was."""
    if settings.hidden_size % (2 * settings.heads):
        raise ConfigError(
            f"student.heads = {settings.heads}: hidden_size {settings.hidden_size} must be an even multiple of it"
        )
    config = LlamaConfig(
        vocab_size=vocabulary_size,
        hidden_size=settings.hidden_size,
        intermediate_size=-(-settings.hidden_size * 8 // (3 * 64)) * 64,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.heads,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=start_id,
        eos_token_id=end_id,
        pad_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def folder_hashes(folder: Path) -> dict[str, str]:
    """sha256 of every file directly in `folder` except `student.json`."""
    files = sorted(p for p in folder.iterdir() if p.is_file() and p.name != "student.json")
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def _recorded(folder: Path) -> dict[str, Any]:
    """What `student.json` says; nothing where it is missing or no JSON object."""
    try:
        record = strict_json.loads(read_regular(folder / "student.json", MAX_RECORD))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def prepare(settings: st.Student, targets_dir: Path | Dataset, out_dir: Path, *, seed: int) -> dict[str, Any]:
    """Write the student's starting folder; done already with the same inputs, only verify it.

    Args:
        settings: the `[student]` section.
        targets_dir: the data set; its training documents teach `bpe:N`.
        out_dir: the folder to create; both the distilled student and its control start from it.
        seed: of a new model's weights.

    Returns:
        `student.json`: recipe, file hashes, parameter and vocabulary counts, what a new tokenizer carried over.

    Raises:
        ConfigError: impossible sizes, or `out_dir` holds another student. InputError: a model that cannot be opened.
    """
    recipe = {"settings": settings.model_dump(), "seed": seed, "dataset": open_dataset(targets_dir).content_sha256}
    record = out_dir / "student.json"
    if out_dir.exists():
        recorded = _recorded(out_dir)
        if recorded.get("recipe") == recipe and recorded.get("files") == folder_hashes(out_dir):
            return recorded
        raise ConfigError(f"{out_dir}: a student of other settings, or damaged; delete it or choose another run.dir")
    source = locate(settings.model, "student.model") if settings.model else None
    if source:
        refuse_unfit_student(source, f"student.model = {settings.model!r}")
    model = _open_model(str(source)) if source else None
    with scratch_folder(out_dir.parent) as scratch:
        write_student_tokenizer(settings, source, targets_dir, scratch)
        new = load_vocabulary(str(scratch), for_student=True) if model is None or settings.tokenizer else None
        info: dict[str, Any] = {"recipe": recipe, "vocabulary": len(open_kept(scratch))}
        if model is None:
            assert new is not None
            tokenizer = open_kept(scratch)
            model = new_model(settings, new.size, tokenizer.bos_token_id, tokenizer.eos_token_id, seed)
        elif new is not None:
            rows = int(model.get_output_embeddings().weight.shape[0])
            old = load_vocabulary(str(source), lm_head_rows=rows, for_student=True)
            info["transfer"] = transfer(model, old, new)
        model.save_pretrained(scratch)
        make_ordinary(scratch)
        info["notes"] = check_kept(scratch, "student")
        info |= {"files": folder_hashes(scratch), "parameters": sum(p.numel() for p in model.parameters())}
        (scratch / record.name).write_text(json.dumps(info, indent=1, sort_keys=True))
        for path in scratch.iterdir():
            flush_to_disk(path)
        scratch.chmod(0o755)
        scratch.rename(out_dir)
    return info


def save_plain(model: Any, student_dir: Path, out: Path) -> None:
    """Write a model with the tokenizer files of its student folder, to the byte, as a checkpoint that anybody opens."""
    model.save_pretrained(out)
    keep(student_dir, out, str(student_dir))
    make_ordinary(out)


def load(folder: Path) -> Student:
    """Open a prepared (or exported) student folder in float32, on the CPU, in evaluation mode.

    Raises:
        InputError: no such folder. IntegrityError: its files are not those of `student.json`.
    """
    if (folder / "student.json").is_file() and _recorded(folder).get("files") != folder_hashes(folder):
        raise IntegrityError(
            f"{folder}: files differ from student.json; run `bytecache train` to make the student again"
        )
    config = _open(AutoConfig, str(folder))
    tokenizer = open_kept(folder)
    model = _open_model(str(folder), config=config)
    rows = int(model.get_output_embeddings().weight.shape[0])
    vocabulary = load_vocabulary(str(folder), lm_head_rows=rows, for_student=True)
    ends = [int(i) for i in vocabulary.end_ids]
    end_id = tokenizer.eos_token_id if tokenizer.eos_token_id in ends else ends[0]
    digest = hashlib.sha256(vocabulary.fingerprint.encode())
    for name, sha256 in folder_hashes(folder).items():
        if name.endswith((".safetensors", "config.json")):
            digest.update(f"{name}={sha256};".encode())
    return Student(model.eval(), tokenizer, vocabulary, int(end_id), digest.hexdigest(), folder)

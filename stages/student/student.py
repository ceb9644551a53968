"""The student: a folder with model and tokenizer, made once, that every training run starts from.

`prepare` writes an ordinary Hugging Face folder (safetensors weights, tokenizer, `student.json` with its identity) from
the settings: a new small Llama with tied embeddings, a copy of an existing causal LM in float32, or such a copy under
another tokenizer (`transfer`). `bpe:N` trains a byte-level BPE on the training documents, `bytes` has a token for every
byte, so every text can be encoded and every token maps to bytes. `load` opens the folder and joins model, tokenizer and
exact token bytes. The same settings, data set and seed give the same weights.
Price: BPE training reads at most 64 MiB of text and takes about 1 s per 3 MB; the folder appears by one rename.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
from safetensors import SafetensorError
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from bytecache.schemas.dataset.index import Dataset
from bytecache.schemas.errors import ConfigError, InputError, IntegrityError
from bytecache.schemas.files import flush_to_disk, scratch_folder
from bytecache.schemas.settings import Student as StudentSettings
from bytecache.schemas.settings import Teacher as TeacherSettings
from bytecache.stages.models.weights import refuse_missing
from bytecache.stages.student.transfer import transfer
from bytecache.stages.targets.source import load_shard, open_dataset
from bytecache.stages.tokens.chat import Template
from bytecache.stages.tokens.token_bytes import byte_alphabet
from bytecache.stages.tokens.vocab import Vocabulary, load_vocabulary

BOS, EOS = "<|bos|>", "<|eos|>"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] + '\n' + message['content'] }}"
    "{{ eos_token if message['role'] == 'assistant' }}{{ '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant\n' }}{% endif %}"
)
"""Of a new student: plain words for roles, its end token after an answer."""
BPE_BYTES = 64 * 1024 * 1024
"""Text that a `bpe:N` tokenizer is trained on, at most."""
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
        return Template.open(self.folder, self.vocabulary, setting="student")

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
        ConfigError: the model does more to its logits than its lm_head (soft-capping, scaling), checked on a few ids.
    """
    model = opened.model

    # Adapters sit inside the model that peft wraps.
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model

    def trunk(input_ids: Tensor, position_ids: Tensor | None) -> Tensor:
        states: Tensor = inner.base_model(
            input_ids=input_ids, position_ids=position_ids, use_cache=False
        ).last_hidden_state
        return states

    def to_logits(hidden: Tensor) -> Tensor:
        logits: Tensor = model.get_output_embeddings()(hidden)
        return logits

    training = model.training
    model.eval()
    with torch.no_grad():
        ids = torch.arange(8, device=model.device)[None] % model.config.get_text_config().vocab_size
        whole, pieces = model(input_ids=ids, use_cache=False).logits, to_logits(trunk(ids, None))
    model.train(training)
    if not torch.allclose(whole.float(), pieces.float(), rtol=1e-3, atol=1e-3):
        raise ConfigError("train.chunk: this student alters the logits of its lm_head; set train.chunk = 0")
    return trunk, to_logits


def train_bpe(texts: Iterator[str], size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most `size` tokens (256 bytes and two control tokens included); deterministic.

    Raises:
        ConfigError: `size` leaves no room for the 256 bytes and two control tokens.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if size < len(alphabet) + 2:
        raise ConfigError(f"student.tokenizer = 'bpe:{size}': at least {len(alphabet) + 2} tokens are needed; raise N")
    tokenizer = _byte_level(models.BPE(), use_regex=True)
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=[BOS, EOS], initial_alphabet=alphabet, show_progress=False, min_frequency=2
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _finished(tokenizer)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Every byte is a token: id 2 + byte, after the start and the end token."""
    letters = {BOS: 0, EOS: 1, **{letter: 2 + byte for letter, byte in byte_alphabet().items()}}
    tokenizer = _byte_level(models.BPE(vocab=letters, merges=[]), use_regex=False)
    tokenizer.add_special_tokens([BOS, EOS])
    return _finished(tokenizer)


def _byte_level(model: Any, *, use_regex: bool) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _finished(tokenizer: tokenizers.Tokenizer) -> PreTrainedTokenizerFast:
    """As transformers loads it: the start token in front of every text, our chat template."""
    start = tokenizer.token_to_id(BOS)
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, start)]),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )  # fmt: skip


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


def _tokenizer(name: str, targets_dir: Path | Dataset) -> PreTrainedTokenizerBase:
    if name == "bytes":
        return byte_tokenizer()
    if name.startswith("bpe:"):
        size = name.removeprefix("bpe:")
        if not size.isdigit():
            raise ConfigError(f"student.tokenizer = {name!r}: write bpe:N with N a number, e.g. bpe:2048")
        return train_bpe(split_texts(targets_dir, "train", BPE_BYTES), int(size))
    tokenizer = _open(AutoTokenizer, name)
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"student.tokenizer = {name!r} declares no EOS token, so documents cannot end; declare one")
    return tokenizer


def model_source(model: str) -> str:
    """What transformers opens for `student.model`: a folder or hub id as it is, a builtin's folder in the cache."""
    if not model.startswith("builtin:"):
        return model
    from bytecache.stages.models.locate import resolve_model

    return str(resolve_model(TeacherSettings(model=model)))


def _open(factory: Any, source: str, **options: Any) -> Any:
    try:
        return factory.from_pretrained(source, trust_remote_code=False, **options)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:  # the last two: damaged weights, other shapes
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"{source}: {factory.__name__} cannot open it ({reason}); check the path or id") from error


def _open_model(source: str, **options: Any) -> Any:
    """The model in float32 with all of its weights, which transformers would draw at random; safetensors only."""
    model, report = _open(
        AutoModelForCausalLM, source, dtype=torch.float32, use_safetensors=True, output_loading_info=True, **options
    )
    refuse_missing(source, report, "fetch it again, or leave student.model empty for a new student")
    return model


def new_model(
    settings: StudentSettings, vocabulary_size: int, start_id: int | None, end_id: int, seed: int
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


def prepare(settings: StudentSettings, targets_dir: Path | Dataset, out_dir: Path, *, seed: int) -> dict[str, Any]:
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
    recipe = {"settings": settings.model_dump(), "seed": seed, "dataset": open_dataset(targets_dir).manifest_hash}
    record = out_dir / "student.json"
    if out_dir.exists():
        found = json.loads(record.read_text()) if record.is_file() else {}
        if found.get("recipe") == recipe and found.get("files") == folder_hashes(out_dir):
            return dict(found)
        raise ConfigError(f"{out_dir}: a student of other settings, or damaged; delete it or choose another run.dir")
    source = model_source(settings.model)
    model = _open_model(source) if source else None
    if model is not None and not settings.tokenizer:
        tokenizer = _open(AutoTokenizer, source)
    else:
        tokenizer = _tokenizer(settings.tokenizer or NEW_TOKENIZER, targets_dir)
    with scratch_folder(out_dir.parent) as scratch:
        tokenizer.save_pretrained(scratch)
        info: dict[str, Any] = {"recipe": recipe, "vocabulary": len(tokenizer)}
        if model is None:
            model = new_model(settings, len(tokenizer), tokenizer.bos_token_id, tokenizer.eos_token_id, seed)
        elif settings.tokenizer:
            new = load_vocabulary(str(scratch), lm_head_rows=len(tokenizer))
            old = load_vocabulary(source, lm_head_rows=int(model.get_output_embeddings().weight.shape[0]))
            info["transfer"] = transfer(model, old, new)
        model.save_pretrained(scratch)
        info |= {"files": folder_hashes(scratch), "parameters": sum(p.numel() for p in model.parameters())}
        (scratch / record.name).write_text(json.dumps(info, indent=1, sort_keys=True))
        for path in scratch.iterdir():
            flush_to_disk(path)
        scratch.chmod(0o755)
        scratch.rename(out_dir)
    return info


def load(folder: Path) -> Student:
    """Open a prepared (or exported) student folder in float32, on the CPU, in evaluation mode.

    Raises:
        InputError: no such folder. IntegrityError: its files are not those of `student.json`.
    """
    record = folder / "student.json"
    if record.is_file() and json.loads(record.read_text())["files"] != folder_hashes(folder):
        raise IntegrityError(f"{folder}: files differ from student.json; delete it and prepare the student again")
    config = _open(AutoConfig, str(folder))
    tokenizer = _open(AutoTokenizer, str(folder))
    model = _open_model(str(folder), config=config)
    vocabulary = load_vocabulary(str(folder), lm_head_rows=int(model.get_output_embeddings().weight.shape[0]))
    ends = [int(i) for i in vocabulary.end_ids]
    end_id = tokenizer.eos_token_id if tokenizer.eos_token_id in ends else ends[0]
    digest = hashlib.sha256(vocabulary.fingerprint.encode())
    for name, sha256 in folder_hashes(folder).items():
        if name.endswith((".safetensors", "config.json")):
            digest.update(f"{name}={sha256};".encode())
    return Student(model.eval(), tokenizer, vocabulary, int(end_id), digest.hexdigest(), folder)

"""All that can be known of a student before its weights are read or a step is taken; each refusal names its setting.

Price: its tokenizer is read (1 s at 50k tokens) and its architecture built without memory.
"""

from pathlib import Path
from typing import Any

from bytecache.schemas.errors import ConfigError, InputError
from bytecache.schemas.settings import Student, Train
from bytecache.stages.models.fitness import refuse_unfit_student
from bytecache.stages.models.locate import locate
from bytecache.stages.tokens.vocab import Vocabulary, load_vocabulary

LEAST_TOKENS = 258
"""Of `bpe:N`: every byte, a start and an end token."""
MOST_TOKENS = 1 << 22
"""The largest vocabularies that are published have 2 ** 18."""


def is_new_tokenizer(name: str) -> bool:
    """Whether `student.tokenizer` names one that is made here."""
    return name == "bytes" or name.startswith("bpe:")


def check_student(student: Student, train: Train, *, chat: bool = False) -> None:
    """Raise ConfigError or InputError for a student that could not be made, trained, saved or, of `chat`, prompted."""
    name, model = student.tokenizer, student.model
    if name.startswith("bpe:"):
        size = name[4:]
        # Nine digits: int() takes other scripts' as well, and thousands of them not at all.
        if not (size.isascii() and size.isdigit() and len(size) < 10 and LEAST_TOKENS <= int(size) <= MOST_TOKENS):
            raise ConfigError(
                f"student.tokenizer = {name[:40]!r}: write bpe:N with N a number from {LEAST_TOKENS} to {MOST_TOKENS}"
            )
    if not model and student.hidden_size % (2 * student.heads):
        raise ConfigError(
            f"student.heads = {student.heads}: hidden_size {student.hidden_size} must be an even multiple of it"
        )
    if model:
        refuse_sizes(student)
    folder = locate(model, "student.model") if model else None
    if folder is not None:
        refuse_unfit_student(folder, f"student.model = {model!r}")
        if train.lora_rank:
            refuse_tied_targets(_empty_model(folder, model), train.lora_targets)
    elif train.lora_rank:
        refuse_tied_names(train.lora_targets, "a new student's")
    if (opened := open_vocabulary(student)) is not None and chat:
        from bytecache.stages.tokens.chat import Template

        where, place, vocabulary = opened
        Template.open(place, vocabulary, setting=where)


def refuse_sizes(student: Student) -> None:
    """Raise ConfigError for sizes of a new student beside a model that has its own; nothing would come of them."""
    for key in ("hidden_size", "layers", "heads"):
        if getattr(student, key) != getattr(Student(), key):
            raise ConfigError(
                f"student.{key} = {getattr(student, key)}: is of a new student, and student.model = {student.model!r} "
                f'has its own; leave student.{key} out, or set student.model = "" for a new one'
            )


def open_vocabulary(student: Student) -> tuple[str, Path, Vocabulary] | None:
    """(setting, folder, vocabulary) of the tokenizer that a student brings; None where it is made here."""
    setting = "student.tokenizer" if student.tokenizer else "student.model"
    name = student.tokenizer or student.model
    if not name or is_new_tokenizer(name):
        return None
    folder = locate(name, setting, weights=False)
    return setting, folder, load_vocabulary(folder, for_student=True)


def refuse_tied_targets(model: Any, targets: str) -> None:
    """Raise ConfigError where adapters would be put beside a head that is the embedding as well (train.lora_targets).

    Merging them would change one weight for two purposes, so such a run could never be exported.
    """
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    tied = getattr(model.config.get_text_config(), "tie_word_embeddings", False)
    if head is None or not (tied or head.weight is embedding.weight):
        return
    for name, module in model.named_modules():
        if module is head or module is embedding:
            for target in targets.split():
                if name == target or name.endswith(f".{target}"):
                    raise _tied(targets, name, "this student's")


def refuse_tied_names(targets: str, whose: str) -> None:
    """The same of a new student, by the names that its modules will have."""
    for target in targets.split():
        if target in ("lm_head", "embed_tokens", "model.embed_tokens"):
            raise _tied(targets, target, whose)


def _tied(targets: str, name: str, whose: str) -> ConfigError:
    return ConfigError(
        f"train.lora_targets = {targets!r}: {whose} head and embedding are one tensor, and adapters beside {name} "
        "could not be merged into it at export; leave it out (train.lora_embeddings = true trains the tensor itself)"
    )


def _empty_model(folder: Path, model: str) -> Any:
    """The architecture of a checkpoint, without weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # whatever architectures raise
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"student.model = {model!r}: no causal language model ({reason}); choose another") from error

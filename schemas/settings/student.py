"""The student, how it learns, and the training that goes with an existing model under another tokenizer."""

from typing import Any, Literal

from pydantic import Field

from bytecache.schemas.settings.section import Section


class Student(Section):
    """The small model: one to start from, or the sizes of a new one."""

    model: str = ""
    """A checkpoint folder, hub id or builtin to start from; empty = a new one from the sizes below."""
    tokenizer: str = ""
    """A tokenizer folder or hub id; `bpe:N`, a byte-level BPE trained on the corpus; `bytes`, every byte a token.
    Empty = the model's own, or bpe:2048. Another one than the model's: its embeddings are carried over. The default is
    the default model's; one that `student.model` names keeps its own."""
    hidden_size: int = Field(128, ge=8, le=1 << 16)
    """Width of a new student."""
    layers: int = Field(4, ge=1, le=1 << 10)
    """Layers of a new student."""
    heads: int = Field(4, ge=1, le=1 << 12)
    """Attention heads of a new student; must divide hidden_size."""


class Train(Section):
    """How the student learns."""

    steps: int = Field(400, ge=1)
    """Optimiser steps. More of them go on from a finished run where `schedule` and `kl_schedule` are `constant`."""
    batch: int = Field(4, ge=1, le=1 << 16)
    """Windows per step."""
    window_bytes: int = Field(1024, ge=32, le=1 << 26)
    """Bytes of text in one training window."""
    context_bytes: int = Field(0, ge=0)
    """Bytes of the document before a window that the student reads and is not trained on: long documents."""
    heldout_bytes: int = Field(0, ge=0)
    """Bytes of held-out text that `evaluate` gives a student in one window; 0 = window_bytes."""
    packing: bool = False
    """Put several rows into one sequence, each attending to itself alone, instead of padding them to one length."""
    micro_tokens: int = Field(0, ge=0)
    """Tokens of one forward pass; a step accumulates as many as its windows need. 0 = 768 on a CPU, 16384 on a GPU."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of forward and backward; weights, moments and sums of gradients are float32 always."""
    activation_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them: less memory, about a third slower."""
    compile: bool = False
    """Compile the student's layers with torch.compile; where that fails the run goes on without and says so."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """Under torchrun: a whole copy of the student on every process, or its weights and moments divided among them."""
    lora_rank: int = Field(0, ge=0, le=1 << 16)
    """Rank of low-rank adapters on a frozen student, merged at export; 0 = train every weight."""
    lora_alpha: int = Field(32, ge=1)
    """Adapters are scaled by lora_alpha / lora_rank."""
    lora_targets: str = "all-linear"
    """Modules that get adapters: `all-linear` (all but the head), or ends of their names separated by spaces."""
    lora_embeddings: bool = False
    """Train the token embeddings beside the adapters; wanted where the student has a new vocabulary."""
    learning_rate: float = Field(2e-3, gt=0)
    """Peak of the schedule."""
    embedding_rate: float = Field(1.0, gt=0)
    """Rate of the token embeddings, as a share of `learning_rate`."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the rate falls after the warm-up, to `final_rate` of the peak at the last step."""
    final_rate: float = Field(0.1, ge=0.0, le=1.0)
    """Share of the peak that the schedule ends at; unused by `constant`."""
    warmup: int = Field(30, ge=0)
    """Steps of linear warm-up."""
    weight_decay: float = Field(0.1, ge=0)
    """AdamW weight decay on matrices."""
    head: Literal[
        "marginal", "parallel", "autoregressive", "alm", "uld", "shared_topk", "strict_topk", "mapped_topk"
    ] = "marginal"
    """What meets the teacher: the student's own token distribution as bytes, or a byte head (the paper: parallel).
    Baselines: `alm` (likelihoods of chunks of bytes); from the run's token dump `uld` (sorted probabilities),
    `shared_topk` (tokens of equal bytes), `strict_topk` (sixteen of them, where both have the same token) and
    `mapped_topk` (tokens of the student that the text has where the teacher has its own)."""
    head_width: int = Field(0, ge=0)
    """Hidden width of the autoregressive head; 0 = the student's own, 256 at most."""
    lambda_token: float = Field(1.0, ge=0)
    """Weight of the token cross-entropy; the control always has 1."""
    lambda_byte: float = Field(1.0, ge=0)
    """Weight of the byte head's cross-entropy (paper: 1.0); `marginal` has none, it would be the token's."""
    lambda_kl: float = Field(1.0, ge=0)
    """Weight of the divergence from the teacher (paper: 0.1 on a parallel head); 0 = the control."""
    kl_schedule: Literal["constant", "decay", "rise"] = "constant"
    """How that weight moves over the run: not at all, down to 0 at the last step, or up from 0, linearly."""
    divergence: Literal["forward", "reverse", "js"] = "forward"
    """KL(teacher || student), KL(student || teacher) or Jensen-Shannon, unlisted symbols as one bucket."""
    temperature: float = Field(1.0, ge=1e-3, le=1e3)
    """Temperature of both sides of the divergence, which is multiplied by its square."""
    max_tail: float = Field(1.0, ge=0, le=1)
    """Positions with more unlisted teacher mass than this give no divergence; 1 = all count."""
    chunk: int = Field(0, ge=0)
    """Positions whose token logits exist at once, made again in the backward pass; 0 = all. For large vocabularies."""
    byte_reduction: Literal["sum", "mean"] = "sum"
    """How a token's byte terms combine: `sum` makes them a token's own, as `marginal` needs (the paper: mean)."""
    checkpoint_every: int = Field(100, ge=1)
    """Steps between checkpoints."""
    tensorboard: bool = True
    """Write TensorBoard events beside the checkpoints."""
    wandb: str = ""
    """Project to log to with wandb, which must be installed; empty = none."""
    control: bool = True
    """`run` also trains the same student without the teacher's targets."""


NEUTRAL = frozenset(
    {
        "checkpoint_every",
        "control",
        "heldout_bytes",
        "tensorboard",
        "wandb",
        "parallel",
        "micro_tokens",
        "activation_checkpointing",
        "compile",
    }
)
"""Keys of `[train]` that leave the mathematics of a run as it is: a run may continue with others."""


BASELINES = ("uld", "shared_topk", "strict_topk", "mapped_topk")
"""Values of `train.head` that read the teacher's tokens, the top k of the run's dump."""


TRANSFER_STUDENT: dict[str, Any] = {"model": "builtin:smollm2-135m-instruct", "tokenizer": "bpe:2048"}
"""The student of a configuration that names none: a pretrained model, and the tokenizer that it is given."""
TRANSFER: dict[str, Any] = {
    "steps": 40, "batch": 2, "window_bytes": 512, "heldout_bytes": 2048, "lora_rank": 16, "lora_embeddings": True,
    "embedding_rate": 0.15, "warmup": 5, "checkpoint_every": 10,
}  # fmt: skip
"""Defaults of `[train]` for a student that is an existing model under another tokenizer."""


def is_transfer(student: Student | dict[str, Any]) -> bool:
    """Whether a student is an existing model under another tokenizer than its own."""
    section = student if isinstance(student, dict) else student.model_dump()
    return bool(section.get("model") and section.get("tokenizer"))

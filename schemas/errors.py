"""Errors a user can act on: each names the thing, the value, the limit and the remedy in one line.

Exit codes are part of the command line's contract, so that a batch scheduler can tell a mistake (do not
retry) from an interruption (retry the same command).
"""


class BytecacheError(Exception):
    """A refusal with a remedy; printed as one line, never as a traceback."""

    exit_code = 1


class ConfigError(BytecacheError):
    """A setting that cannot be honoured."""

    exit_code = 2


class InputError(BytecacheError):
    """A corpus, model, tokenizer or file that cannot be used."""

    exit_code = 3


class IntegrityError(BytecacheError):
    """Bytes on disk that do not match their receipt, manifest or schema."""

    exit_code = 4


class EngineError(BytecacheError):
    """The teacher's engine failed or gave numbers that fail its self-test."""

    exit_code = 5


class StorageError(BytecacheError):
    """The disk or object store refused a write or read (full, read-only, gone)."""

    exit_code = 6


class Interrupted(BytecacheError):  # noqa: N818 - a request, not a fault
    """SIGTERM or SIGINT: whole units are on disk; rerun the same command to continue."""

    exit_code = 75


EXTRAS = {
    "train": (
        "accelerate",
        "peft",
        "safetensors",
        "sentencepiece",
        "tensorboard",
        "tiktoken",
        "tokenizers",
        "torch",
        "transformers",
    ),
    "remote": ("huggingface_hub", "obstore", "s3fs"),
    "datasets": ("datasets",),
    "trl": ("trl",),
}
"""Packages that come with an extra, by the names they are imported by; pyproject.toml says why they are extras."""


def install(*extras: str) -> str:
    """How to get extras, in words: bytecache is on no package index, so from a checkout, as README says."""
    return " or ".join(f"pip install '.[{extra}]'" for extra in extras) + " in a checkout of bytecache"


def missing_package(error: ImportError) -> ConfigError | None:
    """What to install where an import failed for want of an extra's package; None if it failed for another reason."""
    package = (error.name or "").partition(".")[0]
    for extra, packages in EXTRAS.items():
        if package in packages and isinstance(error, ModuleNotFoundError):
            return ConfigError(f"this needs the package {package}, which is not installed: {install(extra)}")
    return None

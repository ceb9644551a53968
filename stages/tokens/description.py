"""A tokenizer as its files describe it, whatever their kind."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from bytecache.schemas.errors import InputError
from bytecache.stages.tokens.encoders import Encoder
from bytecache.stages.tokens.token_bytes import Json, TokenTable


@dataclass(frozen=True)
class TokenizerFiles:
    """A tokenizer as its files describe it, and what the model beside it says about start, end and size."""

    where: str
    table: TokenTable
    make_encoder: Callable[[list[bytes | None]], Encoder]
    """Builds the encoder once the final table (None = unreachable from text) is known."""
    bos: int | None = None
    """The tokenizer's own start token."""
    eos: int | None = None
    config: Json = field(default_factory=dict)
    """config.json, with the text model's settings on top where the model has several."""
    generation: Json = field(default_factory=dict)
    """generation_config.json."""


def read_json(path: Path) -> Json:
    """The object in a JSON file, empty where there is no file. Raises InputError for anything else."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON ({error}); fetch the file again") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a {type(content).__name__}, not an object; fetch the file again")
    return content

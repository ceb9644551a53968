"""DistillKit's packed log-probabilities (github.com/arcee-ai/DistillKit, `distillkit.compression`), decoded.

A position's k entries, most likely first, are: `exact_k` values as they are; then a fit of the others by the terms of a
polynomial in their rank, its coefficients; then for each residual bin a scale and signed integers of `element_bits`,
packed from the most significant bit. With `delta_encoding` every value but the first is a difference to the one before.
Ids are integers of ceil(log2 d) bits, packed alike. Decoding computes in float64; what the writer rounded stays so.
"""

import math
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from bytecache.schemas.errors import ConfigError
from bytecache.schemas.files import read_regular
from bytecache.schemas.whole import Whole

CONFIG = "compression_config.yaml"
MAX_CONFIG = 1 << 16
"""Bytes of it, at most: DistillKit's own have some hundred."""
MAX_DEPTH = 16
"""Lists and mappings of it in each other, at most: DistillKit's own have three."""
_NUMBERS = Literal["float16", "bfloat16", "float32", "float64"]
_WIDTH = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}


class _Bin(BaseModel):
    model_config = ConfigDict(extra="forbid")
    scale_dtype: _NUMBERS
    element_bits: Whole = Field(gt=0, le=32)
    num_elements: Whole = Field(gt=0, le=1 << 20)


class Packing(BaseModel):
    """The settings of DistillKit's `DistributionQuantizationConfig`."""

    model_config = ConfigDict(extra="forbid")
    d: Whole = Field(gt=1, le=1 << 32)
    k: Whole = Field(gt=0, le=1 << 20)
    exact_k: Whole = Field(ge=0)
    exact_dtype: _NUMBERS = "float32"
    polynomial_terms: list[Literal["sqrt", "exp"] | Whole] | None = None
    term_dtype: _NUMBERS = "float32"
    residual_bins: list[_Bin] = Field(default_factory=list)
    delta_encoding: bool = True
    error_diffusion: bool = False
    normalize_t: bool = False

    @classmethod
    def beside(cls, file: Path) -> "Packing":
        """The settings in compression_config.yaml beside a cache's files. Raises ConfigError."""
        import yaml

        path = file.parent / CONFIG
        try:
            return cls.model_validate(_plain_yaml(read_regular(path, MAX_CONFIG)))
        except FileNotFoundError as error:
            raise ConfigError(
                f"{path} is missing: packed columns cannot be read without the settings that DistillKit wrote there"
            ) from error
        except (OSError, ValueError, ValidationError, RecursionError, yaml.YAMLError) as error:
            raise ConfigError(f"{path}: not DistillKit's compression settings ({str(error)[:200]})") from error

    @property
    def id_bits(self) -> int:
        """Bits of an id: ceil(log2 d)."""
        return math.ceil(math.log2(self.d))

    def unpack(self, logprobs: list[list[int]], ids: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
        """(ids int64 [P, k], log-probabilities float64 [P, k]) of P positions. Raises ValueError for other lengths."""
        packed = np.asarray(logprobs, np.uint8).reshape(len(logprobs), -1)
        return _integers(np.asarray(ids, np.uint8).reshape(len(ids), -1), self.id_bits, self.k), self._values(packed)

    def _values(self, packed: np.ndarray) -> np.ndarray:
        rest = packed
        exact, rest = _take_numbers(rest, self.exact_k, self.exact_dtype)
        terms = self.polynomial_terms or []
        coefficients, rest = _take_numbers(rest, len(terms), self.term_dtype)
        fitted = self.k - self.exact_k
        values = np.zeros((len(packed), fitted))
        if terms:
            rank = np.linspace(0, 1, fitted) if self.normalize_t else np.arange(fitted, dtype=np.float64)
            powers = {"sqrt": np.sqrt, "exp": np.exp}
            basis = [rank**term if isinstance(term, int) else powers[term](rank) for term in terms]
            values += coefficients @ np.stack(basis)
        at = 0
        for bin_ in self.residual_bins:
            scale, rest = _take_numbers(rest, 1, bin_.scale_dtype)
            width = (bin_.num_elements * bin_.element_bits + 7) // 8
            codes = _integers(rest[:, :width], bin_.element_bits, bin_.num_elements)
            rest = rest[:, width:]
            signed = 2 * codes - 1 if bin_.element_bits == 1 else codes - (1 << (bin_.element_bits - 1))
            values[:, at : at + bin_.num_elements] += signed * scale
            at += bin_.num_elements
        if rest.shape[1]:
            raise ValueError(f"{rest.shape[1]} bytes too many for these compression settings")
        every = np.concatenate([exact, values], axis=1)
        every = np.cumsum(every, axis=1) if self.delta_encoding else every
        log_probs: np.ndarray = np.minimum(every, 0.0)  # a fit may pass above certainty by its error
        return log_probs


def _plain_yaml(data: bytes) -> Any:
    """The value of a small YAML document without references.

    A few lines of aliases to aliases stand for more values than any memory holds, and what is nested takes time with
    the square of its depth. Raises ValueError, YAMLError.
    """
    import yaml

    if len(data) > MAX_CONFIG:
        raise ValueError(f"more than {MAX_CONFIG} bytes")
    depth = 0
    for event in yaml.parse(data, yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise ValueError(f"nested deeper than {MAX_DEPTH}")
        if getattr(event, "anchor", None) is not None:
            raise ValueError(
                f"line {event.start_mark.line + 1} has the anchor or alias {event.anchor[:40]!r}, which these settings "
                "never have; spell the values out"
            )
    return yaml.safe_load(data)


def _take_numbers(packed: np.ndarray, count: int, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """The first `count` numbers of every row as float64, and what is left of the rows."""
    width = count * _WIDTH[kind]
    if packed.shape[1] < width:
        raise ValueError(f"{packed.shape[1]} bytes where these compression settings need at least {width}")
    data = np.ascontiguousarray(packed[:, :width])
    if kind == "bfloat16":
        numbers = (data.view("<u2").astype(np.uint32) << 16).view(np.float32)
    else:
        numbers = data.view({"float16": "<f2", "float32": "<f4", "float64": "<f8"}[kind])
    return numbers.reshape(len(packed), count).astype(np.float64), packed[:, width:]


def _integers(packed: np.ndarray, bits: int, count: int) -> np.ndarray:
    """int64 [P, count] of integers of `bits` bits, packed from the most significant bit."""
    if packed.shape[1] != (count * bits + 7) // 8:
        raise ValueError(
            f"{packed.shape[1]} packed bytes, {count} integers of {bits} bits need {(count * bits + 7) // 8}"
        )
    every = np.unpackbits(packed, axis=1)[:, : count * bits].reshape(len(packed), count, bits).astype(np.int64)
    weights: np.ndarray = 1 << np.arange(bits - 1, -1, -1, dtype=np.int64)
    integers: np.ndarray = every @ weights
    return integers


def settings_of(packing: "Packing | None") -> dict[str, Any]:
    """What identifies the decoding in a dump's provenance."""
    return packing.model_dump(mode="json") if packing is not None else {}

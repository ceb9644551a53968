"""Readers of vocabularies that list bytes: tiktoken's and Tekken's by rank, RWKV's by id."""

import ast
import base64
import re
from pathlib import Path

from bytecache.schemas.errors import InputError
from bytecache.stages.tokens.byte_trie import build_trie, sort_tokens
from bytecache.stages.tokens.description import TokenizerFiles, read_json
from bytecache.stages.tokens.encoders import Encoder, GreedyEncoder, RankEncoder
from bytecache.stages.tokens.token_bytes import Json, TokenTable, refuse_twins, room_for

RANK_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n")
"""How a file of ranks begins."""

# How rank files cut text before merging; the files themselves do not say (facts of the published encodings).
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
    r"[^\r\n\p{L}\p{N}]?\p{L}+",
    r"\p{N}{1,3}",
    r" ?[^\s\p{L}\p{N}]+[\r\n]*",
)
_SPACES = (r"\s*[\r\n]+", r"\s+(?!\S)", r"\s+")
# tiktoken keeps white space at the end of a text together, whatever new lines are in it.
_CL100K = "|".join((*_WORDS, r"\s+$", *_SPACES))
_QWEN = "|".join((*_WORDS, *_SPACES)).replace(r"\p{N}{1,3}", r"\p{N}")
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_O200K = "|".join(
    (
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTION}",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTION}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        *_SPACES,
    )
)
_QWEN_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205))]
_RANK_FILES: dict[str, tuple[str, dict[str, int]]] = {
    "cl100k_base": (
        _CL100K,
        {
            "<|endoftext|>": 100257,
            "<|fim_prefix|>": 100258,
            "<|fim_middle|>": 100259,
            "<|fim_suffix|>": 100260,
            "<|endofprompt|>": 100276,
        },
    ),
    "o200k_base": (_O200K, {"<|endoftext|>": 199999, "<|endofprompt|>": 200018}),
    "qwen": (_QWEN, {text: 151643 + i for i, text in enumerate(_QWEN_SPECIAL)}),
}


def read_ranks(file: Path, where: str, tokenizer_config: Json) -> TokenizerFiles:
    """A tiktoken file whose way to cut text is known."""
    known = _RANK_FILES.get(file.stem)
    if known is None:
        raise InputError(
            f"{file}: a rank file does not say how text is cut and this one is not known "
            f"({', '.join(sorted(_RANK_FILES))} are); put the model's tokenizer.json beside it"
        )
    pattern, special = known
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(file.read_bytes().splitlines(), 1):
        if line.strip():
            try:
                encoded, number_text = line.split()
                ranks[base64.b64decode(encoded, validate=True)] = int(number_text)
            except ValueError as error:
                raise InputError(f"{file} line {number} is no `base64 rank` pair ({error}); fetch it again") from error
    table: list[bytes | None] = [None] * room_for([*ranks.values(), *special.values()], where)
    refuse_twins({repr(data): rank for data, rank in ranks.items()}, where, "ranks")
    for data, rank in ranks.items():
        table[rank] = data
    return TokenizerFiles(
        where,
        TokenTable("tiktoken", table, dict(special), frozenset()),
        lambda _: RankEncoder(ranks, pattern),
        eos=special["<|endoftext|>"],
    )


def read_tekken(file: Path, where: str, tokenizer_config: Json) -> TokenizerFiles:
    """A Tekken file, which says itself how text is cut."""
    content = read_json(file)
    try:
        config = content["config"]
        n_special, size = int(config["default_num_special_tokens"]), int(config["default_vocab_size"])
        # The file lists more entries than the model has rows; only the first ones are live.
        live = content["vocab"][: size - n_special]
        ranks = {base64.b64decode(entry["token_bytes"]): int(entry["rank"]) for entry in live}
        pattern = config["pattern"]
        listed = content.get("special_tokens") or []
        special = {entry["token_str"]: int(entry["rank"]) for entry in listed}
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{file} is no Tekken vocabulary ({error!r}); fetch the file again") from error
    # Files from before the list existed all begin like this.
    special = special or {"<unk>": 0, "<s>": 1, "</s>": 2}
    room_for([size - 1], where)
    highest = 1 + max([*special.values(), *(rank + n_special for rank in ranks.values())], default=-1)
    if not 0 <= n_special <= size or highest > size:
        raise InputError(
            f"{file} is no Tekken vocabulary (ids up to {highest - 1}, {n_special} of them special, in {size}); "
            "fetch the file again"
        )
    refuse_twins({repr(data): rank for data, rank in ranks.items()}, where, "ranks")
    table: list[bytes | None] = [None] * size
    for data, rank in ranks.items():
        table[rank + n_special] = data
    return TokenizerFiles(
        where,
        TokenTable("tekken", table, special, frozenset({special["<unk>"]} if "<unk>" in special else ())),
        lambda _: RankEncoder(ranks, pattern, offset=n_special),
        bos=special.get("<s>"),
        eos=special.get("</s>"),
    )


def read_rwkv(file: Path, where: str, tokenizer_config: Json) -> TokenizerFiles:
    """An RWKV file: the longest piece that fits is the next token."""
    pieces: dict[int, bytes] = {}
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        # `id literal length`; the literal may itself hold spaces.
        try:
            head, rest = line.split(" ", 1)
            literal, length = rest.rsplit(" ", 1)
            value = ast.literal_eval(literal)
            data = value.encode() if isinstance(value, str) else bytes(value)
            if len(data) != int(length):
                raise ValueError(f"{len(data)} bytes, not {length}")
            pieces[int(head)] = data
        except (ValueError, SyntaxError) as error:
            raise InputError(f"{file} line {number} is no `id literal length` row ({error}); fetch it again") from error
    table: list[bytes | None] = [pieces.get(i) for i in range(room_for(pieces, where) or 1)]

    def make_encoder(final: list[bytes | None]) -> Encoder:
        order = sort_tokens(final)
        return GreedyEncoder(build_trie(final, order), order)

    # Id 0 is in no file: it both starts and ends documents.
    return TokenizerFiles(
        where, TokenTable("rwkv", table, {"<|endoftext|>": 0}, frozenset()), make_encoder, bos=0, eos=0
    )

"""Small tokenizers built on the spot, in the families of real teachers, and folders that look like checkpoints."""

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

LINES = [
    "The quick brown fox jumps over the lazy dog; the dog sleeps.",
    "    def f(x):\n        return x + 1234567890\n",
    "na\u00efve caf\u00e9 r\u00e9sum\u00e9, "
    "\u4f60\u597d\u4e16\u754c, \u041f\u0440\u0438\u0432\u0435\u0442 \u043c\u0438\u0440",
] * 4
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def byte_level(
    *, alphabet: bool = True, unicode_form: normalizers.Normalizer | None = None, prefix: bool = False, size: int = 400
) -> Tokenizer:
    """A byte-level BPE; without `alphabet` it lacks the bytes that LINES lack, and drops them silently."""
    tokenizer = Tokenizer(models.BPE())
    if unicode_form is not None:
        tokenizer.normalizer = unicode_form
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix, trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet() if alphabet else []
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=CONTROL, initial_alphabet=letters, show_progress=False
    )
    tokenizer.train_from_iterator(LINES, trainer)
    return tokenizer


def sentencepiece(*, style: str = "prepend", byte_fallback: bool = True) -> Tokenizer:
    """A SentencePiece-like BPE; `style` is where the leading space comes from: "prepend", "metaspace" or "none"."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2}
    if byte_fallback:
        vocab |= {f"<0x{b:02X}>": 3 + b for b in range(256)}
    for letter in "\u2581abcdefghijklmnopqrstuvwxyz<>/|_\u00e9":
        vocab[letter] = len(vocab)
    merges = [("\u2581", "t"), ("h", "e"), ("\u2581t", "he"), ("\u2581", "a"), ("\u2581", "\u2581")]
    for left, right in merges:
        vocab[left + right] = len(vocab)
    tokenizer = Tokenizer(
        models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=byte_fallback)
    )
    chain = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    if style == "metaspace":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        steps = [normalizers.Prepend("\u2581")] if style == "prepend" else []
        tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "\u2581")])
    if style != "none":
        chain.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(chain)
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


def without_byte_pieces(tokenizer: Tokenizer) -> Tokenizer:
    """The same without the byte pieces of U+2581, so that a literal one can only be read as a space."""
    spec = json.loads(tokenizer.to_str())
    spec["model"]["vocab"]["<0x00 again>"] = spec["model"]["vocab"].pop("<0x96>")
    return Tokenizer.from_str(json.dumps(spec))


def lossy() -> dict[str, Tokenizer]:
    """Tokenizers whose tokens do not spell the text, by the word their refusal must contain."""
    word_piece = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    word_piece.decoder = decoders.WordPiece()
    clip = byte_level()
    clip.normalizer = normalizers.Lowercase()
    ends = Tokenizer(models.BPE(vocab={"a</w>": 0}, merges=[], end_of_word_suffix="</w>"))
    ends.decoder = decoders.BPEDecoder("</w>")
    stripped = sentencepiece()
    stripped.normalizer = normalizers.Sequence([normalizers.Strip(), normalizers.Replace(" ", "\u2581")])
    split = sentencepiece()
    split.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    bare = Tokenizer(models.BPE(vocab={"a": 0}, merges=[]))
    bare.pre_tokenizer = pre_tokenizers.Split(Regex(r"\s+"), "isolated")
    return {
        "WordPiece": word_piece,
        "Lowercase": clip,
        "word ends": ends,
        "Strip": stripped,
        "WhitespaceSplit": split,
        "decoder": bare,
    }


def checkpoint(folder: Path, tokenizer: Tokenizer, **files: Any) -> Path:
    """`folder` with tokenizer.json and, by name, `config`, `generation_config`, `tokenizer_config` as JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def added(text: str, **flags: bool) -> AddedToken:
    """An added token that is not special."""
    return AddedToken(text, special=False, **flags)

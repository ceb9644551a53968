"""Another tokenizer for a trained model: Fast Vocabulary Transfer (Gee et al., EMNLP 2022 industry track).

A new token's embedding is the mean of the old embeddings of its old tokenisation; the same for a row of an untied
lm_head. A token that the old vocabulary holds byte for byte is copied. Start and end tokens come from the old start and
end tokens, other control tokens from those of the same text, else from the mean of all rows. Bytes that the old
tokenizer does not cut as text (parts of UTF-8 characters) are cut by longest match. The rest of the model is untouched.
Price: one pass over both vocabularies, seconds at 150k tokens.
"""

from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from bytecache.stages.tokens.byte_trie import longest_match
from bytecache.stages.tokens.vocab import Encoded, Vocabulary


def old_tokens(old: Vocabulary, new: Vocabulary) -> list[list[int]]:
    """For every new id the old ids whose rows it averages; empty where nothing old spells or names it."""
    exact: dict[bytes, int] = {}
    for i, spelled in enumerate(old.token_bytes):
        if spelled is not None:
            exact.setdefault(spelled, i)
    averaged_from: list[list[int]] = [[] for _ in range(new.size)]
    cut: list[tuple[int, str]] = []
    for i, spelled in enumerate(new.token_bytes):
        if spelled is None:
            continue
        if spelled in exact:
            averaged_from[i] = [exact[spelled]]
            continue
        try:
            cut.append((i, spelled.decode("utf-8")))
        except UnicodeDecodeError:
            averaged_from[i] = _matched(old, spelled)
    for (i, text), encoded in zip(cut, old.encode_batch([text for _, text in cut]), strict=True):
        as_text = isinstance(encoded, Encoded) and not encoded.synthetic
        averaged_from[i] = encoded.ids.tolist() if as_text else _matched(old, text.encode())  # type: ignore[union-attr]
    for name, i in new.control_names.items():
        if name in old.control_names:
            averaged_from[i] = [old.control_names[name]]
    averaged_from[new.start_id] = [old.start_id]
    for i in new.end_ids.tolist():
        averaged_from[i] = [int(old.end_ids[0])]
    return averaged_from


def _matched(old: Vocabulary, spelled: bytes) -> list[int]:
    ids = longest_match(old.trie, old.order, np.frombuffer(spelled, np.uint8)).tolist()
    whole = b"".join(old.token_bytes[i] or b"" for i in ids) == spelled
    return ids if whole else []


def transfer(model: PreTrainedModel, old: Vocabulary, new: Vocabulary) -> dict[str, Any]:
    """Give `model` the vocabulary `new`, in place.

    Returns:
        Counts of new tokens: copied (one old token), averaged (several), unmatched (mean of all rows).
    """
    tokens = old_tokens(old, new)
    tables: dict[int, nn.Module] = {}
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        tables.setdefault(id(module.weight), module)
    averaged = {}
    with torch.no_grad():
        for key, module in tables.items():
            rows: dict[str, Any] = {"weight": module.weight, "bias": getattr(module, "bias", None)}
            averaged[key] = {name: _averaged(value, tokens) for name, value in rows.items() if value is not None}
    tied = len(tables) == 1
    model.resize_token_embeddings(new.size, mean_resizing=False)
    with torch.no_grad():
        modules = (
            [model.get_input_embeddings()] if tied else [model.get_input_embeddings(), model.get_output_embeddings()]
        )
        for module, values in zip(modules, averaged.values(), strict=True):
            for name, value in values.items():
                getattr(module, name).copy_(value)
    config = model.config.get_text_config()
    for holder in (config, model.config, model.generation_config):
        if holder is not None:
            holder.bos_token_id, holder.eos_token_id, holder.pad_token_id = new.start_id, int(new.end_ids[0]), None
    count = [len(ids) for ids in tokens]
    return {"copied": count.count(1), "averaged": sum(n > 1 for n in count), "unmatched": count.count(0)}


def _averaged(table: torch.Tensor, tokens: list[list[int]]) -> torch.Tensor:
    """float [len(tokens), ...]: row i is the mean of the rows tokens[i] of `table`."""
    flat = torch.tensor([i for ids in tokens for i in ids], dtype=torch.int64)
    where = torch.repeat_interleave(torch.arange(len(tokens)), torch.tensor([len(ids) for ids in tokens]))
    sums = torch.zeros(len(tokens), *table.shape[1:], dtype=torch.float64).index_add_(0, where, table[flat].double())
    count = torch.tensor([max(len(ids), 1) for ids in tokens], dtype=torch.float64)
    mean = sums / count.reshape(-1, *[1] * (table.ndim - 1))
    unmatched = torch.tensor([not ids for ids in tokens])
    mean[unmatched] = table.double().mean(dim=0)
    return mean.to(table.dtype)

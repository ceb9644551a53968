"""Several windows in one forward pass of a transformers model: one row of tokens, and a mask that keeps them apart.

A *segment* is what one window brings to a pass: all of its tokens, or its branches as a tree over keys and values kept
from earlier passes, the window's own tokens and the branches that these extend. Segments lie one after the other in a
row; each token has its position in its own window and sees

    kept keys of its own window: up to its anchor, and its ancestors     nothing of the others'
    its ancestors in its own segment, and itself                         nothing of the others'

so no token is padding, and the layers' matrices are read once for all windows of a pass. Attention is computed over
the whole row and masked: a pass holds at most `NEW_TOKENS` new and `KEPT_TOKENS` kept ones of several windows, and no
more than `PAIRS` of a new and a kept one, which costs a tenth of the pass (SmolLM2-135M; a window that is larger goes
alone, without a mask). A pass of 16 tokens costs as much as one of 50 here, so short documents gain most, and late
passes, where each window asks for a branch or two.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch

from bytecache.stages.engines.engine import Branch, Prompt

NEW_TOKENS = 256
"""Tokens that several windows evaluate in one pass at most."""
KEPT_TOKENS = 4096
"""Tokens of several windows whose keys one pass of branches sees at most: they are copied into it."""
PAIRS = 256 * 512
"""New tokens times kept ones of one pass at most."""

Keys = list[tuple[torch.Tensor, torch.Tensor]]
"""Keys and values of each layer, [1, heads, tokens, width]."""


class Segment(NamedTuple):
    """What one window brings to a pass; n new tokens."""

    tokens: np.ndarray
    """int64 [n]"""
    position: np.ndarray
    """int64 [n]; of each token in its window."""
    wanted: np.ndarray
    """int64; places in `tokens` whose logits are wanted."""
    sees: np.ndarray | None = None
    """bool [n, n]; the new tokens that each new token sees; None: itself and all before it."""
    kept: Keys | None = None
    """Of K earlier tokens of the window and its branches; None: there are none."""
    kept_position: np.ndarray | None = None
    """int64 [K]; of each kept token in its window."""
    sees_kept: np.ndarray | None = None
    """bool [n, K]; the kept tokens that each new token sees."""


Place = tuple[int, tuple[int, ...]]
"""Anchor and chain of a branch."""


@dataclass
class KeptWindow:
    """Keys of a window's tokens, and of the last tokens of branches that were evaluated since, in that order."""

    prompt: Prompt
    keys: Keys
    slot: dict[Place, int] = field(default_factory=dict)
    """Where the key of each branch's last token lies."""

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values."""
        return size_of(self.keys)

    def grow(self, places: Sequence[Place], keys: Keys) -> None:
        """Take the keys of new tokens, the last ones of the branches at `places`."""
        known = len(self.prompt.tokens) + len(self.slot)
        fresh = [i for i, place in enumerate(places) if place not in self.slot]
        if not fresh:
            return
        chosen = slice(None) if len(fresh) == len(places) else torch.tensor(fresh, device=keys[0][0].device)
        self.keys = [
            (torch.cat([k, more_k[:, :, chosen]], dim=2), torch.cat([v, more_v[:, :, chosen]], dim=2))
            for (k, v), (more_k, more_v) in zip(self.keys, keys, strict=True)
        ]
        self.slot |= {places[i]: known + number for number, i in enumerate(fresh)}


def size_of(keys: Keys) -> int:
    """Bytes."""
    return sum(part.nbytes for layer in keys for part in layer)


def whole(prompt: Prompt) -> Segment:
    """All tokens of a window."""
    count = len(prompt.tokens)
    return Segment(prompt.tokens.astype(np.int64), np.arange(count), np.arange(prompt.first_row, count))


def new_places(branches: Sequence[Branch], window: KeptWindow) -> list[Place]:
    """Tokens that a pass computes for some branches: their last ones, and those before that no key is kept of."""
    places = dict.fromkeys((branch.anchor, branch.chain) for branch in branches)
    for anchor, chain in list(places):
        for length in range(len(chain) - 1, 0, -1):
            if (anchor, chain[:length]) in window.slot:
                break
            places[anchor, chain[:length]] = None
    return list(places)


def tree(branches: Sequence[Branch], window: KeptWindow) -> Segment:
    """Branches of one window; a branch sees its canonical prefix and its own chain."""
    places = new_places(branches, window)
    new = {place: index for index, place in enumerate(places)}
    ancestors = [
        [(anchor, chain[:length]) for length in range(1, len(chain))] for anchor, chain in places
    ]  # the chain's own last token is new
    old = dict.fromkeys(place for chain in ancestors for place in chain if place not in new)
    n_prompt = len(window.prompt.tokens)
    column = {place: n_prompt + index for index, place in enumerate(old)}
    sees, sees_kept = np.eye(len(new), dtype=bool), np.zeros((len(new), n_prompt + len(old)), bool)
    for row, ((anchor, _), chain) in enumerate(zip(places, ancestors, strict=True)):
        sees_kept[row, : anchor + 1] = True
        for place in chain:
            if place in new:
                sees[row, new[place]] = True
            else:
                sees_kept[row, column[place]] = True
    slots = torch.tensor([*range(n_prompt), *(window.slot[place] for place in old)])
    return Segment(
        np.array([chain[-1] for _, chain in places], np.int64),
        np.array([anchor + len(chain) for anchor, chain in places], np.int64),
        np.array([new[branch.anchor, branch.chain] for branch in branches], np.int64),
        sees,
        _chosen(window.keys, slots),
        np.array([*range(n_prompt), *(anchor + len(chain) for anchor, chain in old)], np.int64),
        sees_kept,
    )


def _chosen(keys: Keys, slots: torch.Tensor) -> Keys:
    """Keys at some places; the first ones as a view."""
    if torch.equal(slots, torch.arange(len(slots))):
        return [(k[:, :, : len(slots)], v[:, :, : len(slots)]) for k, v in keys]
    slots = slots.to(keys[0][0].device)
    return [(k.index_select(2, slots), v.index_select(2, slots)) for k, v in keys]


def runs(sizes: Sequence[tuple[int, int]]) -> Iterator[slice]:
    """Runs of windows that share a pass, given the new and the kept tokens of each: in order, one at least."""
    first = new = old = 0
    for index, (more_new, more_old) in enumerate(sizes):
        with_it = new + more_new, old + more_old
        if index > first and (with_it[0] > NEW_TOKENS or with_it[1] > KEPT_TOKENS or with_it[0] * with_it[1] > PAIRS):
            yield slice(first, index)
            first, with_it = index, (more_new, more_old)
        new, old = with_it
    if len(sizes):
        yield slice(first, len(sizes))


@torch.inference_mode()
def run(model: Any, segments: Sequence[Segment]) -> tuple[list[torch.Tensor], list[Keys]]:
    """One pass: each segment's wanted logits, [wanted, vocabulary], and the keys of its new tokens.

    The keys are views of one tensor per layer, which lives as long as any of them.
    """
    from transformers import DynamicCache

    device = model.device
    earlier = [segment.kept for segment in segments if segment.kept is not None]
    # An empty cache keeps all keys: one made for a model's sliding window would drop some, and a branch may leave the
    # window anywhere.
    cache = DynamicCache()
    for layer, parts in enumerate(zip(*earlier, strict=True)):
        cache.update(_joined([keys for keys, _ in parts]), _joined([values for _, values in parts]), layer)
    past = cache.get_seq_length() if earlier else 0
    begins = np.cumsum([0, *(len(segment.tokens) for segment in segments)])
    tokens, wanted = (
        torch.from_numpy(np.concatenate(parts)).to(device)
        for parts in (
            [segment.tokens for segment in segments],
            [begin + segment.wanted for begin, segment in zip(begins, segments, strict=False)],
        )
    )
    apart: dict[str, Any] = {}
    if len(segments) > 1 or segments[0].sees is not None:
        position = np.concatenate([segment.position for segment in segments])
        apart = {
            "position_ids": torch.from_numpy(position)[None].to(device),
            "attention_mask": _masks(model, *_visible(segments, past)),
        }
    logits = model(input_ids=tokens[None], past_key_values=cache, use_cache=True, logits_to_keep=wanted, **apart).logits
    new_keys: list[Keys] = []
    for begin, end in zip(begins[:-1] + past, begins[1:] + past, strict=True):
        new_keys.append([(layer.keys[:, :, begin:end], layer.values[:, :, begin:end]) for layer in cache.layers])
    return list(logits[0].split([len(segment.wanted) for segment in segments])), new_keys


def packs(model: Any, tokens: np.ndarray) -> bool:
    """Whether the windows of one pass stay apart, by trying: not where layers are recurrent or know no such mask.

    `tokens` int [T], T >= 4, are evaluated whole, as two windows alone, together, and as branches in company.
    """
    if not _layer_kinds(model) <= {"full_attention", "sliding_attention"}:
        return False
    nothing, half = np.zeros(0, np.uint8), len(tokens) // 2
    first, second = (whole(Prompt("", part, 0, nothing, nothing)) for part in (tokens[:half], tokens[half:]))
    chain = tuple(tokens[half:].tolist())
    branches = [Branch(half - 1, chain[: length + 1], 0) for length in range(len(chain))]
    try:
        ((one,), (keys,)), ((other,), (other_keys,)) = run(model, [first]), run(model, [second])
        together, _ = run(model, [first, second])
        (joined,), _ = run(model, [whole(Prompt("", tokens, half, nothing, nothing))])
        # The other window's branch comes first, so that places of keys differ from positions.
        windows = [
            KeptWindow(Prompt("", part, 0, nothing, nothing), part_keys)
            for part, part_keys in ((tokens[half:], other_keys), (tokens[:half], keys))
        ]
        (_, branched), _ = run(model, [tree([Branch(0, chain[:1], 0)], windows[0]), tree(branches, windows[1])])
    except Exception:  # a model that takes no such mask says so in its own way
        return False
    expected, packed = (torch.cat(rows).float().softmax(-1) for rows in ((one, other, joined), (*together, branched)))
    # Rounding to half precision moves single probabilities by a few percent.
    return bool((expected - packed).abs().sum(-1).max() < (1e-3 if model.dtype == torch.float32 else 0.1))


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def _visible(segments: Sequence[Segment], past: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which keys each new token sees, bool [new, past + new], and the positions of the new tokens and of all keys."""
    position = np.concatenate([segment.position for segment in segments])
    visible = np.zeros((len(position), past + len(position)), bool)
    key_position = np.concatenate([np.zeros(past, np.int64), position])
    row = column = 0
    for segment in segments:
        count = len(segment.tokens)
        visible_here = visible[row : row + count]
        visible_here[:, past + row : past + row + count] = (
            np.tri(count, dtype=bool) if segment.sees is None else segment.sees
        )
        if segment.kept_position is not None and segment.sees_kept is not None:
            length = len(segment.kept_position)
            key_position[column : column + length] = segment.kept_position
            visible_here[:, column : column + length] = segment.sees_kept
            column += length
        row += count
    return visible, position, key_position


def _layer_kinds(model: Any) -> set[str]:
    """Kinds of attention that the model's layers have."""
    config = model.config.get_text_config()
    if kinds := getattr(config, "layer_types", None):
        return set(kinds)
    sliding = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    return {"sliding_attention" if sliding else "full_attention"}


def _masks(model: Any, visible: np.ndarray, position: np.ndarray, key_position: np.ndarray) -> Any:
    """The mask to add to the scores, or one per kind of attention for models that mix full and sliding layers."""
    kinds = _layer_kinds(model)

    def added(seen: np.ndarray) -> torch.Tensor:
        # Masked entries take the lowest finite value: -inf would turn fully masked rows into NaN.
        zero = torch.zeros((), dtype=model.dtype)
        mask = torch.where(torch.from_numpy(seen), zero, torch.finfo(model.dtype).min)
        return mask[None, None].to(model.device)

    masks: dict[str, torch.Tensor] = {}
    if "full_attention" in kinds:
        masks["full_attention"] = added(visible)
    if "sliding_attention" in kinds:
        near = position[:, None] - key_position[None, :] < model.config.get_text_config().sliding_window
        masks["sliding_attention"] = added(visible & near)
    named = getattr(model.config.get_text_config(), "layer_types", None)
    return masks if named and "sliding_attention" in masks else next(iter(masks.values()))

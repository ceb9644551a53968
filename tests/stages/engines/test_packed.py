"""Several windows in one forward pass: each as if it were alone, whatever attention the model has."""

import numpy as np
import pytest
import torch
import transformers
from transformers import PreTrainedModel

from bytecache.schemas import settings as st
from bytecache.schemas.errors import ConfigError
from bytecache.stages.engines import packed
from bytecache.stages.engines.engine import Branch, Prompt
from bytecache.stages.lattice.lattice import Lattice
from bytecache.stages.teacher.teacher import open_teacher

SHAPE = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
}  # fmt: skip
WINDOW = {"sliding_window": 3}
MODELS = {
    "Llama": {},
    "Qwen2": {},
    "Mistral": WINDOW,  # all layers slide and no layer is named
    "Gemma2": {**WINDOW, "head_dim": 16, "final_logit_softcapping": 30.0},
    "Gemma3": {**WINDOW, "head_dim": 16, "layer_types": ["sliding_attention", "full_attention"]},
}


def tiny(family: str, **changes) -> PreTrainedModel:
    """A random model of two layers, its probabilities far from uniform."""
    torch.manual_seed(0)
    name = "Gemma3Text" if family == "Gemma3" else family
    config = getattr(transformers, f"{name}Config")(**{**SHAPE, **changes})
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for weights in model.parameters():
            weights.mul_(3 if weights.dim() > 1 else 1)
    return model


def window(length: int, first_row: int = 0, seed: int = 0) -> Prompt:
    tokens = np.random.default_rng([length, seed]).integers(3, 64, length).astype(np.int32)
    return Prompt("w", tokens, first_row, np.zeros(0, np.uint8), np.zeros(0, np.int64))


def alone(model: PreTrainedModel, tokens: list[int]) -> np.ndarray:
    """p(. | tokens) by an ordinary forward pass: no mask, no cache, no neighbours."""
    with torch.inference_mode():
        return model(torch.tensor([tokens]), use_cache=False).logits[0, -1].softmax(-1).numpy()


@pytest.mark.parametrize("family", MODELS)
def test_windows_and_branches_of_one_pass_do_not_see_each_other(family):
    model = tiny(family, **MODELS[family])
    windows = [window(9), window(1), window(5, first_row=3), window(9, seed=1)]
    logits, keys = packed.run(model, [packed.whole(prompt) for prompt in windows])
    for prompt, rows in zip(windows, logits, strict=True):
        histories = [prompt.tokens[: j + 1].tolist() for j in range(prompt.first_row, len(prompt.tokens))]
        np.testing.assert_allclose(rows.softmax(-1), [alone(model, h) for h in histories], atol=1e-5)

    branches = [
        [Branch(8, (7,), 0), Branch(2, (7, 9), 0), Branch(2, (7, 9, 11), 0), Branch(2, (9,), 0)],
        [Branch(0, (5, 6, 7, 8, 9), 0)],
        [Branch(4, (3,), 0), Branch(1, (3,), 0)],
        [Branch(3, (7, 9), 0)],
    ]
    kept = [packed.KeptWindow(prompt, own) for prompt, own in zip(windows, keys, strict=True)]
    longer = [[Branch(b.anchor, (*b.chain, *more), 0) for b in some for more in ((4,), (4, 8))] for some in branches]
    # Kept keys are not always wanted in the order in which they came.
    longer = [[some[-2], some[-1], *some[:-2]] if len(some) > 4 else some for some in longer]
    computed = []
    for some_of_each in (branches, longer, longer):  # the last finds all keys there
        segments = [packed.tree(some, held) for some, held in zip(some_of_each, kept, strict=True)]
        computed.append(sum(len(segment.tokens) for segment in segments))
        places = [packed.new_places(some, held) for some, held in zip(some_of_each, kept, strict=True)]
        logits, found = packed.run(model, segments)
        for prompt, some, rows in zip(windows, some_of_each, logits, strict=True):
            histories = [[*prompt.tokens[: b.anchor + 1].tolist(), *b.chain] for b in some]
            np.testing.assert_allclose(rows.softmax(-1), [alone(model, h) for h in histories], atol=1e-5)
        for held, new, own in zip(kept, places, found, strict=True):
            held.grow(new, own)
            assert held.keys[0][0].shape[2] == len(held.prompt.tokens) + len(held.slot)
    # A branch of a branch costs one token.
    assert computed[1:] == [sum(map(len, longer))] * 2


@pytest.mark.parametrize(
    ("family", "changes", "apart"),
    [
        *((family, changes, True) for family, changes in MODELS.items()),
        ("Mamba", {}, False),
        ("Bloom", {"n_head": 2}, False),
        ("Qwen3Next", {"head_dim": 16, "num_experts": 2, "num_experts_per_tok": 1}, False),
    ],
)
def test_the_trial_tells_models_that_keep_windows_apart(family, changes, apart):
    assert packed.packs(tiny(family, **changes), window(7).tokens) is apart


@pytest.mark.parametrize("part", [0, 1])
def test_the_trial_notices_a_wrong_mask(monkeypatch, part):
    """Neighbours that are seen; with a sliding window, positions that are those of the row."""
    right = packed._visible

    def wrong(*args):
        found = list(right(*args))
        found[part] = np.ones_like(found[part]) if part == 0 else np.arange(len(found[part]))
        return tuple(found)

    model = tiny("Mistral", sliding_window=3)
    assert packed.packs(model, window(7).tokens)
    monkeypatch.setattr(packed, "_visible", wrong)
    assert not packed.packs(model, window(7).tokens)


def test_a_model_that_mixes_windows_is_refused(tiny_checkpoint, monkeypatch):
    monkeypatch.setattr(packed, "packs", lambda model, tokens: False)
    with pytest.raises(ConfigError, match=r"teacher\.backend"):
        open_teacher(st.Teacher(model=str(tiny_checkpoint("bytelevel")), backend="hf", context=64, overlap=8))


def test_runs_keep_order_and_limits():
    sizes = [(100, 0), (100, 0), (57, 0), (300, 0), (10, 4000), (10, 97), (1, 0), (200, 540), (1, 1)]
    found = list(packed.runs(sizes))
    # Too many new tokens, one window that is too long by itself, too many kept, too many pairs of a new and a kept one.
    assert [(run.start, run.stop) for run in found] == [(0, 2), (2, 3), (3, 4), (4, 5), (5, 7), (7, 9)]
    assert list(packed.runs([])) == []


@pytest.mark.parametrize("family", ["bytelevel", "sliding"])
def test_how_windows_share_passes_changes_nothing(tiny_checkpoint, monkeypatch, family):
    """Every window alone, and all in a few passes: the same rows, branches of branches and static rows among them."""
    settings = st.Teacher(
        model=str(tiny_checkpoint(family)), backend="hf", context=64, overlap=16, tau=1e-4, depth=3, static=1e-6
    )
    teacher = open_teacher(settings)
    texts = ["the cache", "", "n\u00e9", "A cache is a promise kept in advance. " * 9, "e"]
    documents = [(str(i), i, teacher.vocabulary.encode(text)) for i, text in enumerate(texts)]
    passes: list[int] = []
    run = packed.run
    monkeypatch.setattr(packed, "run", lambda model, segments: passes.append(len(segments)) or run(model, segments))
    found = []
    for limit in (1, 256):
        monkeypatch.setattr("bytecache.stages.engines.packed.NEW_TOKENS", limit)
        passes.clear()
        found.append([window for group in teacher.windows(documents) for window in group])
        assert (max(passes) == 1) == (limit == 1)
    assert any((w.row_depth > 1).any() for w in found[0]) and sum(int(w.row_static.sum()) for w in found[0]) > 5
    for one, other in zip(*found, strict=True):
        for name in ("row_start", "row_token", "row_parent", "row_static", "fanout", "stop_token"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
        np.testing.assert_allclose(one.entry_mass, other.entry_mass, rtol=1e-3, atol=1e-7)
        np.testing.assert_allclose(Lattice(one).targets().probs, Lattice(other).targets().probs, atol=1e-5)


@pytest.mark.parametrize("slots", [[0, 1, 2], [0, 2, 1, 3], [3, 0]])
def test_kept_keys_come_in_the_order_asked_for(slots):
    keys = [(torch.arange(4.0).reshape(1, 1, 4, 1), -torch.arange(4.0).reshape(1, 1, 4, 1))]
    ((key, value),) = packed._chosen(keys, torch.tensor(slots))
    assert key.flatten().tolist() == (-value).flatten().tolist() == slots

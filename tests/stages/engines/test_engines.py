"""The real vLLM engine against the transformers reference, on the same tiny weights; refusals at the door."""

import hashlib
import shutil
from dataclasses import fields

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPTJConfig, Phi3Config

from bytecache.schemas import settings as st
from bytecache.schemas.dump.parquet import read_windows
from bytecache.schemas.errors import ConfigError, EngineError, InputError, Interrupted
from bytecache.stages.engines.engine import Branch, Prompt, refuse_long_branches
from bytecache.stages.lattice.lattice import Lattice
from bytecache.stages.teacher.identity import branch_reach, fit_context, longest_history, teacher_identity
from bytecache.stages.teacher.teacher import Teacher, open_teacher
from tests.support.tiny_models import byte_level_tokenizer

TEXTS = ["A cache is a promise kept in advance. " * 12, "the naïve façade 日本語", "", "e"]
BASE = {"context": 128, "overlap": 32, "tau": 0.01, "depth": 2, "top_k": 5, "floor": 1e-5, "max_batched_tokens": 96}


@pytest.fixture(scope="module")
def vllm_teacher(tiny_checkpoint):
    teacher = open_teacher(st.Teacher(model=str(tiny_checkpoint("bytelevel")), backend="vllm", **BASE))
    yield teacher
    teacher.close()


@pytest.fixture
def by_share_alone(monkeypatch) -> None:
    """This teacher finds all text absurd: the text would bear out nearly everything, and leave no static rows."""
    monkeypatch.setattr("bytecache.stages.lattice.effort.BORNE_OUT", np.inf)


def encoded(teacher: Teacher):
    return [(f"d{i}", i, e) for i, e in enumerate(teacher.vocabulary.encode_batch(TEXTS))]


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.usefixtures("by_share_alone")
def test_vllm_gives_the_reference_rows(vllm_teacher, tiny_checkpoint):
    reference = open_teacher(st.Teacher(model=str(tiny_checkpoint("bytelevel")), backend="hf", **BASE))
    (ours,), (theirs,) = vllm_teacher.windows(encoded(vllm_teacher)), reference.windows(encoded(reference))
    assert len(ours) == len(theirs) > len(TEXTS)  # the long text takes several windows
    assert sum(int(a.row_static.sum()) for a in ours) > 5
    for a, b in zip(ours, theirs, strict=True):
        assert (a.row_depth > 0).any() or len(a.text) < 3
        for name in (
            "text",
            "row_start",
            "row_parent",
            "row_token",
            "row_depth",
            "row_static",
            "stop_token",
            "n_levels",
        ):
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
        np.testing.assert_allclose(a.row_logp, b.row_logp, atol=1e-4)
        np.testing.assert_allclose(a.log_norm, b.log_norm, atol=1e-3)
        np.testing.assert_allclose(np.log(a.stop_mass), np.log(b.stop_mass), atol=1e-4)
        np.testing.assert_allclose(a.topk_logp, b.topk_logp, atol=1e-4)
        np.testing.assert_allclose(Lattice(a).targets().probs, Lattice(b).targets().probs, atol=1e-5)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_unit_has_the_same_bytes_each_time(vllm_teacher, tmp_path):
    piece = tmp_path / "slice.parquet"
    texts = [*TEXTS, "a misfit is set aside"]
    pq.write_table(pa.table({"doc_id": [f"d{i}" for i in range(len(texts))], "text": texts}), piece)
    hashes, ticks = set(), []
    for name in ("one", "two"):
        counts = vllm_teacher.dump_unit(piece, tmp_path / name, "key", lambda: False, ticks.append)
        hashes.add(hashlib.sha256((tmp_path / name).read_bytes()).hexdigest())
    assert len(hashes) == 1
    assert counts["documents"] == len(texts) and counts["bytes"] == sum(len(t.encode()) for t in texts)
    assert counts["branches"] > 0 and counts["canonical_nll"] > 0
    assert sum(tick["bytes"] for tick in ticks) == 2 * counts["bytes"]
    windows = [w for w in read_windows(tmp_path / "one") if not w.reference]
    scored = b"".join(w.text[w.score_start :].tobytes() for w in windows)
    assert scored == "".join(texts).encode()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_branches_as_requests_read_their_prefix_from_the_cache(vllm_teacher, monkeypatch):
    """Where the cache has no room for windows: a branch of a long prefix computes at most one block of it again."""
    engine = vllm_teacher.engine
    (document,) = [d for d in encoded(vllm_teacher) if d[0] == "d0"]
    computed: list[int] = []
    step = engine._engine.step

    def counting():
        outputs = step()
        computed.extend(len(o.prompt_token_ids) - (o.num_cached_tokens or 0) for o in outputs)
        return outputs

    monkeypatch.setattr(engine._blocks, "room", 1 << 40)
    monkeypatch.setattr(engine._engine, "step", counting)
    monkeypatch.setattr(vllm_teacher, "settings", vllm_teacher.settings.model_copy(update={"static": 0.0}))
    (windows,) = vllm_teacher.windows([document])
    branches = sum(int((w.row_depth > 0).sum()) for w in windows)
    assert branches > 20
    assert max(computed[-branches:]) <= 32 + 2
    assert np.mean(computed[-branches:]) < 25


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.usefixtures("by_share_alone")
@pytest.mark.parametrize("pass_tokens", [512, 7])
def test_branches_over_blocks_are_those_of_requests(vllm_teacher, monkeypatch, pass_tokens):
    """The same rows at a token or two each, without a request; and no block is left over."""
    engine = vllm_teacher.engine
    list(vllm_teacher.windows(encoded(vllm_teacher)))  # what follows asks for no static states
    requests, tokens, branches = engine._serial, engine.branch_tokens, engine.branches
    monkeypatch.setattr(engine, "_pass_tokens", pass_tokens)
    (over,) = vllm_teacher.windows(encoded(vllm_teacher))
    each = (engine.branch_tokens - tokens) / (engine.branches - branches)
    in_requests = engine._serial - requests
    assert engine.branches - branches >= sum(int(((w.row_depth > 0) & (w.row_static == 0)).sum()) for w in over) > 50
    assert each < 1.2
    assert in_requests == len(over)
    engine.forget()  # refuses while a block is held
    monkeypatch.setattr(engine, "_blocks", None)
    (asked,) = vllm_teacher.windows(encoded(vllm_teacher))
    for a, b in zip(over, asked, strict=True):
        for name in ("row_start", "row_parent", "row_token", "row_depth", "row_static", "stop_token"):
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
        np.testing.assert_allclose(a.log_norm, b.log_norm, atol=1e-3)
        np.testing.assert_allclose(np.log(a.stop_mass), np.log(b.stop_mass), atol=1e-4)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_groups_in_flight_are_those_of_one_after_the_other(vllm_teacher, monkeypatch):
    """The same bytes, whatever took turns; and no block is left over."""
    monkeypatch.setattr("bytecache.stages.teacher.teacher.GROUP_TOKENS", 120)
    engine = vllm_teacher.engine
    found = []
    for in_flight in (1, 2, 3):
        monkeypatch.setattr(engine, "in_flight", in_flight)
        engine.forget()
        found.append([window for group in vllm_teacher.windows(encoded(vllm_teacher)) for window in group])
        assert not engine._blocks._windows and not engine._blocks.tails._kept
    one, *others = found
    for other in others:
        assert len(one) == len(other) > 4
        for a, b in zip(one, other, strict=True):
            for field in fields(a):
                np.testing.assert_array_equal(getattr(a, field.name), getattr(b, field.name), err_msg=field.name)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_branches_may_pass_the_end_of_their_window(vllm_teacher, tiny_checkpoint):
    """A full window whose last token a branch cuts into single bytes: the rows of the other engine."""
    reference = open_teacher(st.Teacher(model=str(tiny_checkpoint("bytelevel")), backend="hf", **BASE))
    vocabulary = vllm_teacher.vocabulary
    document, room = vocabulary.encode(TEXTS[0] * 2), BASE["context"] - 2
    size = np.diff(document.starts)
    end = room + int(np.argmax(size[room - 1 :]))
    first = end - room
    text = np.frombuffer(document.data, np.uint8)[document.starts[first] : document.starts[end]]
    tokens = np.append(vocabulary.start_id, document.ids[first:end]).astype(np.int32)
    starts = document.starts[first : end + 1] - document.starts[first]
    prompt = Prompt("full window", tokens, 0, text, starts)
    single = {vocabulary.token_bytes[int(i)]: int(i) for i in vocabulary.order}
    last = int(starts[-2])
    chain = tuple(single[text[i : i + 1].tobytes()] for i in range(last, len(text)))
    branches = [Branch(len(tokens) - 2, chain[:length], last + length) for length in range(1, len(chain) + 1)]
    found = []
    for engine in (vllm_teacher.engine, reference.engine):
        list(engine.score([prompt]))
        (rows,) = engine.score_branches([(prompt, branches)])
        found.append(rows)
    assert len(tokens) == BASE["context"] - 1 and len(chain) > 2
    np.testing.assert_allclose(found[0].log_norm, found[1].log_norm, atol=1e-3)
    np.testing.assert_allclose(found[0].topk_logp, found[1].topk_logp, atol=1e-4)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("call", ["add_request", "step", "collective_rpc"])
def test_whatever_vllm_raises_becomes_a_refusal(vllm_teacher, monkeypatch, call):
    def fail(*args, **kwargs):
        raise ValueError("the prompt is longer than it may be")

    document = [d for d in encoded(vllm_teacher) if d[0] == "d3"]
    with monkeypatch.context() as patch:
        patch.setattr(vllm_teacher.engine._engine, call, fail)
        with pytest.raises(EngineError, match=r"vLLM failed while .*longer than it may be.*rerun"):
            list(vllm_teacher.windows(document))
    for running in list(vllm_teacher.engine._engine.output_processor.request_states):
        vllm_teacher.engine._engine.abort_request([running], internal=True)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_teacher_whose_branches_reuse_nothing_is_refused(vllm_teacher, monkeypatch):
    """As recurrent layers would have it: every branch computes its whole prefix again."""
    engine = vllm_teacher.engine
    step = engine._engine.step

    def forgetful():
        outputs = step()
        for output in outputs:
            output.num_cached_tokens = 0
        return outputs

    monkeypatch.setattr(engine, "_blocks", None)
    monkeypatch.setattr(engine._engine, "step", forgetful)
    for name in ("branches", "branch_tokens", "_prefix_tokens"):
        monkeypatch.setattr(engine, name, 0)
    document = [d for d in encoded(vllm_teacher) if d[0] == "d0"]
    with pytest.raises(EngineError, match=r"computes \d+ of a branch's \d+ tokens again.*teacher.depth = 0"):
        list(vllm_teacher.windows(document))


def test_a_branch_beyond_the_models_positions_is_refused():
    branches = [Branch(62, (1, 2), 0), Branch(60, (1,), 0)]
    refuse_long_branches("document 'd', window 0", branches, 65)
    with pytest.raises(ConfigError, match=r"document 'd', window 0: a branch of 65 .*exceeds the 64 .*teacher.depth"):
        refuse_long_branches("document 'd', window 0", branches, 64)


@pytest.mark.parametrize("context", [0, 256, 252, 128])
def test_windows_leave_room_for_branches_within_the_models_positions(tiny_checkpoint, context):
    """The tiny models hold 256; a reference's branches go deepest."""
    folder = tiny_checkpoint("bytelevel")
    settings = st.Teacher(model=str(folder), backend="hf", context=context)
    reach = branch_reach(settings)
    window, _ = fit_context(settings, folder)
    assert window == min(context or 256, 256 - reach)
    longest = longest_history(settings.model_copy(update={"context": window}), folder)
    assert longest == window - 1 + reach < 256


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_an_id_outside_the_vocabulary_never_reaches_the_engine(vllm_teacher):
    prompt = Prompt("x", np.array([0, 10_000_000], np.int32), 0, np.zeros(1, np.uint8), np.array([0, 1]))
    with pytest.raises(EngineError, match="outside the teacher's vocabulary"):
        list(vllm_teacher.engine.score([prompt]))


def test_groups_bound_what_is_held_at_once(tiny_checkpoint, monkeypatch):
    """One long document is evaluated a few windows at a time, and the cut into groups changes nothing."""
    teacher = open_teacher(st.Teacher(model=str(tiny_checkpoint("bytelevel")), backend="hf", context=64, overlap=8))
    document = [("d", 0, teacher.vocabulary.encode(TEXTS[0]))]
    (whole,) = teacher.windows(document)
    monkeypatch.setattr("bytecache.stages.teacher.teacher.GROUP_TOKENS", 100)
    groups = list(teacher.windows(document))
    assert len(groups) > 2 and max(map(len, groups)) <= 2
    for a, b in zip(whole, [w for group in groups for w in group], strict=True):
        np.testing.assert_array_equal(a.row_start, b.row_start)
        np.testing.assert_allclose(a.entry_mass, b.entry_mass, rtol=1e-5)


@pytest.mark.parametrize("family", ["bytelevel", "sliding"])
def test_keys_kept_between_passes_change_nothing(tiny_checkpoint, monkeypatch, family):
    """Long windows, and short ones that share a pass; with room for the keys of none of them, of some, of all."""
    monkeypatch.setattr("bytecache.stages.engines.packed.NEW_TOKENS", 70)
    monkeypatch.setattr("bytecache.stages.engines.packed.KEPT_TOKENS", 40)
    settings = st.Teacher(
        model=str(tiny_checkpoint(family)), backend="hf", context=64, overlap=8, tau=0.001, depth=3, static=0.0
    )
    teacher = open_teacher(settings)
    texts = ["the cache", "the notes", "the chess", TEXTS[0][:400]]
    documents = [("same name", 0, teacher.vocabulary.encode(text)) for text in texts]
    found = []
    for room in (0, 40_000, 1 << 30):
        monkeypatch.setattr("bytecache.stages.engines.hf.KEPT_BYTES", room)
        runs = []
        run = teacher.engine.model.forward
        monkeypatch.setattr(
            teacher.engine.model, "forward", lambda *a, runs=runs, run=run, **k: runs.append(1) or run(*a, **k)
        )
        found.append([w for group in teacher.windows(documents) for w in group])
        monkeypatch.setattr(teacher.engine.model, "forward", run)
        found[-1].append(len(runs))
    assert found[0].pop() > found[1].pop() > found[2].pop()
    assert any((w.row_depth > 1).any() for w in found[0])
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            np.testing.assert_array_equal(a.row_token, b.row_token)
            np.testing.assert_allclose(a.entry_mass, b.entry_mass, rtol=1e-4, atol=1e-7)


def test_stop_is_an_interruption(tiny_checkpoint, tmp_path):
    piece = tmp_path / "slice.parquet"
    pq.write_table(pa.table({"doc_id": ["a"], "text": ["the"]}), piece)
    teacher = open_teacher(st.Teacher(model=str(tiny_checkpoint("bytelevel")), backend="hf", context=64, overlap=8))
    with pytest.raises(Interrupted):
        teacher.dump_unit(piece, tmp_path / "out", "key", lambda: True, lambda _: None)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"context": 4096}, ConfigError, "exceeds the model's limit of 256"),
        ({"context": 64, "overlap": 60}, ConfigError, "keep overlap below"),
        ({"context": 5, "overlap": -1}, ConfigError, "context = 5 leaves no room.*at least 19"),
        ({"top_k": 100_000}, ConfigError, "vocabulary"),
        ({"model": "./no/such/folder"}, InputError, "no such folder"),
        ({"model": "builtin:unheard-of"}, InputError, "builtin"),
        ({"start": "<|absent|>"}, InputError, "absent"),
    ],
)
def test_bad_settings_name_the_limit_and_the_remedy(tiny_checkpoint, changes, error, words):
    base = {"model": str(tiny_checkpoint("bytelevel")), "backend": "hf", "context": 128, "overlap": 16}
    with pytest.raises(error, match=words):
        open_teacher(st.Teacher(**{**base, **changes}))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (GPTJConfig(n_embd=64, n_layer=1, n_head=2, rotary_dim=8), 'attention of its own.*backend = "vllm"'),
        (
            Phi3Config(
                hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, pad_token_id=0,
                original_max_position_embeddings=32,
                rope_scaling={"type": "longrope", "short_factor": [1.0] * 16, "long_factor": [4.0] * 16},
            ),
            "context = 64 exceeds the 32 tokens.*lower it to 32",
        ),
    ],
)  # fmt: skip
def test_models_whose_branches_would_be_others_are_refused(tmp_path, config, words):
    tokenizer = byte_level_tokenizer(300)
    config.vocab_size, config.bos_token_id, config.eos_token_id = tokenizer.get_vocab_size(), 0, 1
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ConfigError, match=words):
        open_teacher(st.Teacher(model=str(tmp_path), backend="hf", context=64, overlap=8))


def _without(name: str):
    def edit(weights):
        del weights[name]

    return edit


def _shorter(weights):
    weights["model.layers.0.self_attn.q_proj.weight"] = weights["model.layers.0.self_attn.q_proj.weight"][:8].clone()


def _not_a_number(weights):
    weights["lm_head.weight"][5] = torch.nan


@pytest.mark.parametrize(
    ("edit", "error", "words"),
    [
        (_without("lm_head.weight"), InputError, r"1 weights are not in .*, lm_head\.weight among them"),
        (_without("model.layers.1.self_attn.q_proj.weight"), InputError, "would be random; fetch the checkpoint again"),
        (_shorter, InputError, "damaged or not those of its config.json"),
        (_not_a_number, EngineError, "returns NaN logits.*float32"),
    ],
)
def test_a_checkpoint_with_other_weights_is_refused(tiny_checkpoint, tmp_path, edit, error, words):
    """What a checkpoint lacks would be drawn at random, and the teacher be another one on every run."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_checkpoint("bytelevel"), folder)
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(error, match=words):
        open_teacher(st.Teacher(model=str(folder), backend="hf", context=64, overlap=8))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("model.safetensors", b"", r"model\.safetensors is no safetensors file"),
        ("model.safetensors", b"\xff" * 5000, r"model\.safetensors is no safetensors file .a header of"),
        (
            "generation_config.json",
            b'{"eos_token_id": "</s>"}',
            r"generation_config\.json: eos_token_id = '</s>': must be an id",
        ),
    ],
)
def test_a_damaged_checkpoint_file_is_refused(tiny_checkpoint, tmp_path, name, content, words):
    folder = tmp_path / "model"
    shutil.copytree(tiny_checkpoint("bytelevel"), folder)
    (folder / name).write_bytes(content)
    with pytest.raises(InputError, match=words):
        open_teacher(st.Teacher(model=str(folder), backend="hf", context=64, overlap=8))


def test_identity_follows_weights_tokenizer_and_settings(tiny_checkpoint):
    def of(folder, **changes):
        return teacher_identity(st.Teacher(model=str(folder), backend="hf", **changes))

    first = tiny_checkpoint("bytelevel")
    assert of(first) == of(first)
    assert of(first)["weights"] != of(tiny_checkpoint("bytelevel", seed=1))["weights"]
    assert of(first)["vocabulary"] != of(tiny_checkpoint("sentencepiece"))["vocabulary"]
    assert of(first) != of(first, tau=0.5)
    for neutral in ({"kv_cache_gib": 2}, {"max_batched_tokens": 64}, {"tensor_parallel": 2}):  # how, not what
        assert of(first, **neutral) == of(first)
    assert of(first)["device"] == "cpu" and of(first)["dtype"] == of(first, dtype="float32")["dtype"] == "float32"
    assert of(first, dtype="bfloat16")["dtype"] == "bfloat16"

"""`bytecache mix`: data sets of one text become one that every other command takes; what does not fit is refused."""

import itertools
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from bytecache.schemas.arrays import END, SYMBOLS
from bytecache.schemas.dataset.index import describe_shard, read_dataset, write_dataset
from bytecache.schemas.shard.builder import ShardBuilder
from bytecache.schemas.shard.reader import ByteShard, read_shard
from bytecache.stages.mix import mix as mixing_stage
from bytecache.stages.mix.pool import FLOOR
from bytecache.stages.targets.dataset import ByteTargets
from tests.support.command_line import bytecache, refusal

TEXTS = {f"doc{i}": f"document {i}: {'once upon a time ' * (1 + i % 4)}".encode() for i in range(12)}
Row = Callable[[int, int], np.ndarray]


def rows_for(text: bytes, seed: int, sure: float) -> np.ndarray:
    """float64 [n + 1, 257]: a teacher that gives the true symbol `sure` of the mass, the rest to a few others."""
    generator = np.random.default_rng([seed, *text[:8]])
    rows = np.zeros((len(text) + 1, SYMBOLS))
    for at, symbol in enumerate([*text, END]):
        others = generator.choice(SYMBOLS, 6, replace=False)
        rows[at, others] = generator.dirichlet(np.ones(6)) * (1 - sure) * 0.9
        rows[at, symbol] += sure
    return rows


def make_set(
    folder: Path, seed: int, sure: float = 0.6, *, sizes: Sequence[int] = (5, 4, 3), heldout: Sequence[str] = ("doc3",),
    texts: dict[str, bytes] = TEXTS, mask: dict[str, int] | None = None,
) -> Path:  # fmt: skip
    """A data set of these texts in shards of so many documents; `mask`: positions of a document that are context."""
    folder.mkdir()
    entries = []
    names = [name for name in texts if name not in heldout]
    cuts = np.cumsum([0, *sizes])
    groups = [("train", names[lo:hi]) for lo, hi in itertools.pairwise(cuts) if names[lo:hi]]
    for number, (split, members) in enumerate([*groups, ("heldout", [name for name in heldout if name in texts])]):
        builder = ShardBuilder(precision="precise")
        for name in members:
            rows = rows_for(texts[name], seed, sure).astype(np.float32)
            supervised = np.ones(len(rows), np.uint8)
            hidden = (mask or {}).get(name, 0)
            supervised[:hidden], rows[:hidden] = 0, 0.0
            builder.append(np.frombuffer(texts[name], np.uint8), rows, 1 - rows.sum(1), supervised)
            builder.end_document(name)
        path = folder / f"{split}-{number:05d}-{seed:012x}.zarr.zip"
        statistics = builder.write(path, {"split": split})
        entries.append(describe_shard(path, split, f"{seed}-{number}", statistics))
    info = {"teacher": {"model": f"teacher {seed}"}, "license": "Apache-2.0", "attribution": f"by {seed}"}
    write_dataset(folder, entries, info, {"kl": {"mean": seed / 1000}})
    return folder


@pytest.fixture
def pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    monkeypatch.chdir(tmp_path)
    return make_set(tmp_path / "a", 1), make_set(tmp_path / "b", 2, 0.3, sizes=(2, 9))


def run_mix(*arguments: object, run: str = "mixed", code: int = 0) -> str:
    done = bytecache("mix", *arguments, "--run-dir", run, "--set", "convert.precision=precise")
    if code:
        return refusal(done, code)
    assert done.exit_code == 0, (done.output, done.exception)
    return done.output


def documents(folder: Path) -> dict[str, tuple[ByteShard, int, int]]:
    """Every document's shard and range of positions."""
    found = {}
    for entry in read_dataset(folder).entries:
        shard = read_shard(folder / entry.file)
        for number, name in enumerate(shard.doc_id):
            found[name] = (shard, int(shard.doc_start[number]), int(shard.doc_start[number + 1]))
    return found


def spread(shard: ByteShard, lo: int, hi: int) -> np.ndarray:
    rows = shard.dense(lo, hi, spread_tail=True).astype(np.float64)
    return rows / rows.sum(1, keepdims=True)


def brute(pool: str, a: np.ndarray, b: np.ndarray, weights: tuple[float, float], true: list[int]) -> np.ndarray:
    """The pools, one position after the other, over all symbols."""
    out = np.zeros_like(a)
    prior = list(weights)
    for at in range(len(a)):
        if pool == "log":
            row = np.maximum(a[at], FLOOR) ** weights[0] * np.maximum(b[at], FLOOR) ** weights[1]
            out[at] = row / row.sum()
            continue
        out[at] = (prior[0] * a[at] + prior[1] * b[at]) / sum(prior)
        if pool == "posterior":
            prior = [prior[0] * a[at, true[at]], prior[1] * b[at, true[at]]]
            prior = [each / sum(prior) for each in prior]
    return out


def kl(expected: np.ndarray, place: tuple[ByteShard, int, int]) -> float:
    """Mean over positions of a document, nats, with what it does not list as one symbol."""
    listed = place[0].dense(place[1], place[2]).astype(np.float64)
    p = np.column_stack([np.where(listed > 0, expected, 0.0), np.where(listed > 0, 0.0, expected).sum(1)])
    q = np.column_stack([listed, place[0].tails(place[1], place[2])])
    return float((p * np.log(np.maximum(p, 1e-300) / np.maximum(q, 1e-300))).sum(1).mean())


@pytest.mark.parametrize("pool", ["linear", "log", "posterior"])
def test_a_mixture_is_the_pool_of_what_its_sources_say(
    pair: tuple[Path, Path], pool: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mixing_stage, "PIECE", 17)  # documents in several pieces
    option = {"linear": [], "log": ["--log-pool"], "posterior": ["--posterior"]}[pool]
    run_mix(*pair, "--weights", "0.7,0.3", *option)
    sources, mixed = [documents(folder) for folder in pair], documents(Path("mixed/targets"))
    assert mixed.keys() == TEXTS.keys()
    for name, (shard, lo, hi) in mixed.items():
        assert shard.text[lo : hi - 1].tobytes() == TEXTS[name]
        a, b = (spread(*source[name]) for source in sources)
        expected = brute(pool, a, b, (0.7, 0.3), [*TEXTS[name], END])
        assert kl(expected, mixed[name]) < 0.02, "what quantisation costs"
        other = brute({"linear": "log", "log": "linear", "posterior": "linear"}[pool], a, b, (0.7, 0.3), [])
        assert kl(other, mixed[name]) > 2 * kl(expected, mixed[name])
        listed = [source[name][0].dense(*source[name][1:]) > 0 for source in sources]
        tail = np.where(listed[0] | listed[1], 0.0, expected).sum(1)
        assert (shard.tails(lo, hi) >= tail * 0.7 - 1e-3).all(), "what no teacher lists is not listed"


def test_the_result_is_an_ordinary_data_set(pair: tuple[Path, Path]) -> None:
    output = run_mix(*pair, "--posterior")
    assert "teacher 1: " in output and "mixture: " in output
    assert "files match their hashes" in bytecache("verify", "mixed", "--deep").output
    assert "files match their hashes" in bytecache("verify", "mixed/targets", "--deep").output
    dataset = read_dataset("mixed/targets")
    mixed = dataset.info["mix"]
    assert [source["fidelity"] for source in mixed["sources"]] == [{"kl": {"mean": 0.001}}, {"kl": {"mean": 0.002}}]
    assert [source["teacher"]["model"] for source in mixed["sources"]] == ["teacher 1", "teacher 2"]
    assert [source["content_sha256"] for source in mixed["sources"]] == [
        read_dataset(folder).content_sha256 for folder in pair
    ]
    assert dataset.fidelity is None and dataset.info["attribution"] == "by 1; by 2"
    assert mixed["bits_per_byte_mixed"] <= max(mixed["bits_per_byte"])
    windows = list(ByteTargets("mixed/targets", window=64, epochs=1))
    assert sum(len(window.text) for window in windows) == sum(entry.n_positions for entry in dataset.split("train"))
    shard = next(Path("mixed/targets").glob("train-*.zarr.zip"))
    assert bytecache("inspect", shard, "--limit", "5").exit_code == 0
    assert "data set published" in bytecache("status", "--run-dir", "mixed").output


def test_a_mixture_has_no_teacher_to_be_measured_against(pair: tuple[Path, Path]) -> None:
    run_mix(*pair)
    for more in ([], ["--teacher", "anything"]):
        done = bytecache("fidelity", "mixed", *more)
        assert done.exit_code == 3 and "measure the data sets that it was made of" in done.stderr


def test_divergences_lie_beside_the_shards(pair: tuple[Path, Path]) -> None:
    run_mix(*pair)
    sources = [documents(folder) for folder in pair]
    for name, (shard, lo, hi) in documents(Path("mixed/targets")).items():
        stored = np.load(shard.path.removesuffix(".zarr.zip") + ".jsd.npy")
        assert (stored.dtype, len(stored)) == (np.float32, len(shard))
        a, b = (spread(*source[name]) for source in sources)
        middle = (a + b) / 2
        brute_jsd = sum((row * np.log(np.maximum(row, 1e-300) / middle)).sum(1) for row in (a, b)) / 2
        np.testing.assert_allclose(stored[lo:hi], brute_jsd, atol=1e-5)
    victim = next(Path("mixed/targets").glob("*.jsd.npy"))
    whole = victim.read_bytes()
    victim.write_bytes(whole[:-4] + b"\0\0\0\0")
    assert victim.name in bytecache("verify", "mixed").output
    assert "1 units made" in run_mix(*pair)
    assert victim.read_bytes() == whole


def test_a_mixture_killed_in_the_middle_goes_on(pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    original, calls = mixing_stage.ShardBuilder.write, list[int]()

    def dying(builder: ShardBuilder, *arguments: object) -> object:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(builder, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(mixing_stage.ShardBuilder, "write", dying)
        assert bytecache("mix", *pair, "--run-dir", "mixed", "--set", "convert.precision=precise").exit_code != 0
    assert "3 units made, 1 were already whole" in run_mix(*pair)
    run_mix(*pair, run="undisturbed")
    assert read_dataset("mixed/targets").content_sha256 == read_dataset("undisturbed/targets").content_sha256
    assert "nothing to do" in run_mix(*pair)


def test_routes_weigh_documents_by_name(pair: tuple[Path, Path]) -> None:
    run_mix(*pair, "--route", "doc1*=1,0", "--route", "doc2=0,1")
    sources, mixed = [documents(folder) for folder in pair], documents(Path("mixed/targets"))
    for name, source in (("doc1", 0), ("doc11", 0), ("doc2", 1)):
        assert kl(spread(*sources[source][name]), mixed[name]) < 0.02
        assert kl(spread(*sources[1 - source][name]), mixed[name]) > 0.1
    assert kl((spread(*sources[0]["doc5"]) + spread(*sources[1]["doc5"])) / 2, mixed["doc5"]) < 0.02


def test_prompts_stay_prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    places = make_set(tmp_path / "a", 1, mask={"doc4": 7}), make_set(tmp_path / "b", 2, mask={"doc4": 7})
    run_mix(*places, "--posterior")
    shard, lo, hi = documents(Path("mixed/targets"))["doc4"]
    assert shard.mask[lo:hi].tolist() == [0] * 7 + [1] * (hi - lo - 7)
    assert (shard.tails(lo, lo + 7) == 1).all()
    other = make_set(tmp_path / "c", 3, mask={"doc4": 5})
    line = run_mix(places[0], other, run="refused", code=3)
    assert "'doc4': the data sets do not supervise the same positions (the first at 5)" in line


def test_other_texts_are_refused_with_what_differs(pair: tuple[Path, Path], tmp_path: Path) -> None:
    changed = {**TEXTS, "doc7": b"something else"}
    other = make_set(tmp_path / "c", 3, texts={name: text for name, text in changed.items() if name != "doc9"})
    line = run_mix(pair[0], other, code=3)
    assert "'doc7' (other text in " in line and "'doc9' (not in " in line and "--common" in line
    assert not Path("mixed/targets").exists()
    moved = make_set(tmp_path / "d", 4, heldout=("doc5",))
    assert "of split train here, of heldout in" in run_mix(pair[0], moved, code=3)
    assert "2 documents that not all have" in run_mix(pair[0], other, "--common")
    assert documents(Path("mixed/targets")).keys() == TEXTS.keys() - {"doc7", "doc9"}
    assert len(read_dataset("mixed/targets").info["creation"]["left_out"]) == 2
    strange = make_set(tmp_path / "e", 5, texts={"x": b"x", "y": b"y"}, heldout=("y",))
    assert "no document is in all data sets" in run_mix(pair[0], strange, "--common", run="none", code=3)


def test_arguments_that_say_nothing_are_refused(pair: tuple[Path, Path]) -> None:
    assert "one data set is no mixture" in run_mix(pair[0], code=2)
    assert "choose one" in run_mix(*pair, "--log-pool", "--posterior", code=2)
    assert "sum to 1" in run_mix(*pair, "--weights", "0.7,0.7", code=2)
    assert "1 weights for 2 data sets" in run_mix(*pair, "--weights", "1", code=2)
    for weights in ("1,0,0", "nan,1,0"):
        assert "3 weights for 2 data sets" in run_mix(*pair, "--weights", weights, code=2)
    assert "--route nosuch/*: weighs no document" in run_mix(*pair, "--route", "nosuch/*=1,0", code=2)
    assert "--route doc*: weighs no document" in run_mix(*pair, "--route", "*=1,0", "--route", "doc*=0,1", code=2)
    assert "no numbers" in run_mix(*pair, "--weights", "a,b", code=2)
    assert "pattern" in run_mix(*pair, "--route", "0.5,0.5", code=2)
    run_mix(*pair)
    assert "holds another data set" in run_mix(*pair, "--log-pool", code=2)


@pytest.mark.parametrize("again", ["", "/", "/../a", "copy"])
def test_a_data_set_is_not_mixed_with_itself(pair: tuple[Path, Path], tmp_path: Path, again: str) -> None:
    one, other = pair
    second = str(shutil.copytree(one, tmp_path / "copied")) if again == "copy" else f"{one}{again}"
    message = refusal(bytecache("mix", one, other, second, "--run-dir", "mixed"), 2)
    assert "is the same data set as" in message and "--weights" in message
    assert not Path("mixed").exists()


def test_a_damaged_source_is_refused_by_name(pair: tuple[Path, Path]) -> None:
    victim = next(pair[1].glob("train-*.zarr.zip"))
    victim.write_bytes(victim.read_bytes()[:-1])
    assert victim.name in run_mix(*pair, code=4)


def test_the_posterior_is_within_a_constant_of_the_better_teacher(pair: tuple[Path, Path]) -> None:
    run_mix(*pair, "--posterior")
    mixed = read_dataset("mixed/targets").info["mix"]
    size = sum(len(text) for text in TEXTS.values())
    assert mixed["bits_per_byte_mixed"] <= min(mixed["bits_per_byte"]) + math.log2(2) * len(TEXTS) / size + 1e-6

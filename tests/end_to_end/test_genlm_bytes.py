"""Beside genlm-bytes, where it is installed (benchmarks/genlm_bytes.py says how): an unlimited beam agrees."""

import asyncio

import numpy as np
import pytest

pytest.importorskip("genlm.bytes", reason="genlm-bytes is not installed")
pytestmark = pytest.mark.slow


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("text", ["the cache", "notes né", "the the"])
def test_an_unlimited_beam_agrees_with_every_cover_evaluated(tiny_checkpoint, text):
    from genlm.backend import load_model_by_name
    from genlm.backend.tokenization import Token
    from genlm.bytes import BeamParams, ByteBeamState

    from bytecache.schemas import settings as st
    from bytecache.stages.teacher.probe import probe_with
    from bytecache.stages.teacher.teacher import open_teacher

    folder = tiny_checkpoint("bytelevel")
    teacher = open_teacher(
        st.Teacher(model=str(folder), backend="hf", context=128, overlap=16, floor=0.0, top_k=0, tau=0.0, depth=64)
    )
    probs, _, data = probe_with(teacher, text)
    llm = load_model_by_name(str(folder), backend="hf")
    # It takes no head wider than its tokenizer: give the padding bytes, in a place that is not compared.
    padding = range(len(llm.byte_vocab), teacher.vocabulary.size)
    llm.byte_vocab += [Token(token_id=i, byte_string=b"<pad%d>" % i) for i in padding]

    async def walk() -> np.ndarray:
        beam = await ByteBeamState.initial(llm, BeamParams(K=10**9, prune_threshold=0.0, eos_byte_strings=[b"<|end|>"]))
        rows = []
        for byte in [*data.tolist(), None]:
            logp = np.exp((await beam.prune().logp_next()).ps)
            rows.append(np.append(logp[:256], logp[257]))
            if byte is not None:
                beam = await (beam.prune() << byte)
        await beam.cleanup()
        return np.array(rows)

    theirs = asyncio.run(walk())
    # There the start token and the padding are text that begins with "<", here they are nobody's mass.
    mine, theirs = (np.delete(rows.astype(np.float64), ord("<"), axis=1) for rows in (probs, theirs))
    np.testing.assert_allclose(mine / mine.sum(1)[:, None], theirs / theirs.sum(1)[:, None], atol=2e-6)
    assert mine.max() > 0.1

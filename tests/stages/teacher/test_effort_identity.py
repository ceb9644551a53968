"""What a teacher is, by its identity, wherever it runs."""

import pytest

from bytecache.schemas import settings as st
from bytecache.stages.engines.server_client import Served
from bytecache.stages.lattice.effort import RULE
from bytecache.stages.teacher.identity import identity_of
from bytecache.stages.tokens.vocab import load_vocabulary

TOLD = {
    "revision": "", "weights": {}, "dtype": "float32", "device": "cpu", "static_contexts": [], "head_dtype": "float32",
    "versions": {}, "quantization": "",
}  # fmt: skip


@pytest.mark.parametrize("backend", ["hf", "vllm", "server", "vllm-server"])
def test_the_rule_of_effort_is_part_of_every_identity(tiny_checkpoint, backend):
    """Rows are asked for here, by the rule of this code, whoever computes them."""
    folder = tiny_checkpoint("bytelevel")
    address = "http://127.0.0.1:9/v1" if "server" in backend else ""
    settings = st.Teacher(model=str(folder), backend=backend, server=address)
    served = Served(model="tiny", version="", max_tokens=0) if address else None
    made = identity_of(settings, folder, load_vocabulary(folder), (128, 32), served, TOLD)
    assert RULE > 1 and made["effort"] == RULE

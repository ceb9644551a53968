"""What `transfer_study` measures a student by: bits of held-out passages, and the probes made of them."""

import math
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from benchmarks.probes import make_probes, measure, texts_of
from benchmarks.transfer_gain import wanted
from bytecache.stages.student import student
from bytecache.stages.train.batches import stream


@torch.inference_mode()
def bits_of(
    opened: student.Student, reader: stream.ShardReader, use: str, most: int, dtype: str = "float32"
) -> dict[str, dict[str, float]]:
    """Bytes and bits of the `wanted` passages of a use; a passage's end, which is arbitrary, left out.

    dtype: as `train.dtype`.
    """
    opened.model.eval()
    found = {}
    for number in range(len(reader.positions)):
        source = reader[number]
        names = {}
        for row, name in enumerate(source.shard.doc_id):
            if wanted(name, [use], most):
                first, last = (int(x) for x in source.row.searchsorted([row, row + 1]))
                names[first] = (name, stream.Row(source, first, last - 1))
        for members in stream.group([row for _, row in names.values()]):
            micro = stream.collate(members, with_targets=False, byte_reduction="sum")
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
                logits = opened.forward(micro.input_ids)[0]
            each = functional.cross_entropy(logits.flatten(0, 1).float(), micro.labels.flatten(), reduction="none")
            nats = each.view_as(micro.labels).sum(1)
            for member, value in zip(members, nats.tolist(), strict=True):
                size = int(source.end[member.last - 1]) - int(source.start[member.first])
                found[names[member.first][0]] = {"bytes": size, "bits": round(value / math.log(2), 3)}
    return found


def probed(texts: Path, opened: student.Student, dtype: str) -> dict[str, Any]:
    """What a student makes of the probes of the test texts (folder of `transfer_texts`)."""
    return measure(opened, make_probes(texts_of(texts / "corpus.jsonl"), seed=0), dtype)

"""ByteLoss under FSDP2: two processes that divide a model's weights have the loss and the gradient of one."""

import os
import socket
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest
import torch

from bytecache.schemas.settings import Student
from bytecache.stages.loop.batches import collate_rows, step_counts
from bytecache.stages.loop.loss import ByteLoss
from bytecache.stages.loop.rows import StudentRows
from bytecache.stages.student import student
from tests.support.places import ROOT
from tests.support.student_data import make_dataset

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
ROWS = 6
PROCESS = """
import sys
from itertools import islice

import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from transformers import AutoModelForCausalLM

from bytecache import ByteLoss, StudentRows, collate_rows, step_counts
from bytecache.schemas.errors import ConfigError

targets, folder, out, rows_in_all = *sys.argv[1:4], int(sys.argv[4])
distributed.init_process_group("gloo")
rank, size = distributed.get_rank(), distributed.get_world_size()
model = AutoModelForCausalLM.from_pretrained(folder)
rows = StudentRows(targets, folder, model.get_output_embeddings().weight.shape[0], window=256, rank=0, ranks=1)
some = list(islice(rows, rows_in_all))[rank::size]
mesh = init_device_mesh("cpu", (size,))
for layer in model.model.layers:
    fully_shard(layer, mesh=mesh)
fully_shard(model, mesh=mesh)
batch = collate_rows(some)
counts = step_counts([batch])
distributed.all_reduce(counts)
value = ByteLoss(rows).of_model(model, batch, counts)
(value * size).backward()  # gradients are averaged over processes: these are shares of one sum
refused = ""
try:
    ByteLoss(rows, chunk=16).of_model(model, batch)
except ConfigError as error:
    refused = str(error)
gradients = {name: p.grad.full_tensor() for name, p in model.named_parameters() if p.grad is not None}
total = value.detach().clone()
distributed.all_reduce(total)
sharded = sum(p.grad.to_local().numel() for p in model.parameters() if p.grad is not None)
if rank == 0:
    torch.save({"loss": total, "gradients": gradients, "refused": refused, "sharded": sharded}, out)
distributed.destroy_process_group()
"""


def test_two_processes_that_divide_a_model_are_one(tmp_path: Path) -> None:
    targets = make_dataset(tmp_path / "targets")
    student.prepare(
        Student(tokenizer="bpe:300", hidden_size=32, layers=2, heads=2), targets, tmp_path / "student", seed=0
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    here = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    here["PYTHONPATH"] = str(ROOT)
    arguments = [str(targets), str(tmp_path / "student"), str(tmp_path / "out.pt"), str(ROWS)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, *arguments], env={**here, "RANK": str(rank)}, stderr=subprocess.PIPE
        )
        for rank in range(2)
    ]
    model = student.load(tmp_path / "student").model
    rows = StudentRows(targets, tmp_path / "student", model.get_output_embeddings().weight.shape[0], window=256)
    batch = collate_rows(list(islice(rows, ROWS)))
    whole = ByteLoss(rows).of_model(model, batch, step_counts([batch]))
    whole.backward()
    try:
        for process in processes:
            _, said = process.communicate(timeout=240)
            assert process.returncode == 0, said.decode()[-3000:]
    finally:
        for process in processes:  # one that waits for the other for ever
            process.kill()
            process.wait()
    found = torch.load(tmp_path / "out.pt")
    assert float(found["loss"]) == pytest.approx(float(whole), rel=1e-5)
    wanted = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert found["gradients"].keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found["gradients"][name], gradient, rtol=1e-3, atol=1e-6, msg=name)
    assert found["sharded"] < 0.6 * sum(gradient.numel() for gradient in wanted.values())
    assert "divided among processes" in found["refused"]

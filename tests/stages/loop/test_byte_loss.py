"""ByteLoss in loops of others: equal to our trainer's objective, under accumulation, and in transformers.Trainer."""

from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from bytecache.schemas.errors import ConfigError
from bytecache.schemas.settings import Student, Train
from bytecache.stages.loop.loss import ByteLoss
from bytecache.stages.loop.rows import ByteLabels, StudentRows, collate_rows, join_rows
from bytecache.stages.student import student
from bytecache.stages.train.objective.objective import Objective
from tests.support.student_data import make_dataset

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, student.Student]:
    """A data set and a small student."""
    place = tmp_path_factory.mktemp("loss")
    targets = make_dataset(place / "targets")
    student.prepare(Student(tokenizer="bpe:300", hidden_size=32, layers=1, heads=2), targets, place / "student", seed=0)
    return targets, student.load(place / "student")


@pytest.fixture
def rows(world: tuple[Path, student.Student]) -> StudentRows:
    targets, opened = world
    width = opened.model.get_output_embeddings().weight.shape[0]
    return StudentRows(targets, opened.folder, width, window=256)


@pytest.mark.parametrize("options", [{}, {"divergence": "js", "lambda_token": 0.0}, {"temperature": 2.0}])
def test_the_loss_is_the_trainers(world: Any, rows: StudentRows, options: dict[str, Any]) -> None:
    _, opened = world
    objective = Objective(Train(**options), opened, 0)
    objective.observe(rows.reader)
    loss = ByteLoss(rows, **options)
    some = list(islice(rows, 6))
    micro = join_rows(some)
    logits, hidden = opened.forward(micro.input_ids)
    want = objective.total(objective(logits, hidden, micro), micro.n_tokens, micro.n_byte_tokens)
    for side in ("right", "left"):
        batch = collate_rows(some, padding_side=side)
        labels = batch.pop("labels")
        assert loss(opened.model(**batch), labels).item() == pytest.approx(want.item(), rel=2e-5), side


def test_accumulated_batches_are_one(world: Any, rows: StudentRows) -> None:
    _, opened = world
    loss, some = ByteLoss(rows), list(islice(rows, 6))

    def gradient(groups: list[list[Any]]) -> torch.Tensor:
        opened.model.zero_grad()
        batches = [collate_rows(group) for group in groups]
        count = sum(batch["labels"].ne(-100).sum() for batch in batches)
        for batch in batches:
            labels = batch.pop("labels")
            loss(opened.model(**batch), labels, num_items_in_batch=count).backward()
        return opened.model.get_input_embeddings().weight.grad.clone()

    whole, apart = gradient([some]), gradient([some[:1], some[1:3], some[3:]])
    torch.testing.assert_close(apart, whole, rtol=1e-4, atol=1e-7)


def test_logits_of_another_width_are_refused(world: Any, rows: StudentRows) -> None:
    batch = collate_rows(list(islice(rows, 1)))
    with pytest.raises(ConfigError, match="pass rows=7 there"):
        ByteLoss(rows)(torch.zeros(1, batch["input_ids"].shape[1], 7), batch["labels"])


def test_batches_that_were_sliced_are_refused(world: Any, rows: StudentRows) -> None:
    """accelerate cuts every tensor of a batch to the number of rows where it deals batches out itself."""
    _, opened = world
    batch = collate_rows(list(islice(rows, 4)))
    labels = batch.pop("labels")
    sliced = ByteLabels({name: value[:4] for name, value in labels.items()})
    with pytest.raises(ConfigError, match="dispatch_batches"):
        ByteLoss(rows)(opened.model(**batch), sliced)


def test_in_transformers_trainer_and_in_plain_pytorch(world: Any, rows: StudentRows, tmp_path: Path) -> None:
    """The same data, rate and steps: equal losses at every step, and the model learns."""
    from transformers import Trainer, TrainingArguments

    _, opened = world
    start = {name: value.clone() for name, value in opened.model.state_dict().items()}
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=6, per_device_train_batch_size=4, learning_rate=1e-3, logging_steps=1,
        lr_scheduler_type="constant", weight_decay=0.0, report_to=[], remove_unused_columns=False, use_cpu=True,
        dataloader_pin_memory=False, save_strategy="no", gradient_accumulation_steps=2, max_grad_norm=1e9,
        disable_tqdm=True, optim="adamw_torch", accelerator_config={"dispatch_batches": False},
    )  # fmt: skip
    trainer = Trainer(
        opened.model, arguments, train_dataset=rows, data_collator=collate_rows, compute_loss_func=ByteLoss(rows)
    )
    trainer.train()
    theirs = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    opened.model.load_state_dict(start)
    opened.model.train()
    optimizer = torch.optim.AdamW(opened.model.parameters(), lr=1e-3, weight_decay=0.0)
    loss, ours = ByteLoss(rows), []
    batches = iter(DataLoader(rows, batch_size=4, collate_fn=collate_rows))
    for _ in range(6):
        pair = list(islice(batches, 2))
        count = sum(batch["labels"].ne(-100).sum() for batch in pair)
        total = 0.0
        for batch in pair:
            labels = batch.pop("labels")
            value = loss(opened.model(**batch), labels, num_items_in_batch=count)
            value.backward()
            total += value.item()
        optimizer.step()
        optimizer.zero_grad()
        ours.append(total)
    assert theirs == pytest.approx(ours, rel=2e-3)
    assert ours[-1] < ours[0]

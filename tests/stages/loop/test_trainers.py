"""The byte loss in the trainers of others, each against our own: transformers, TRL, accelerate, plain PyTorch."""

import json
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from bytecache.schemas.errors import ConfigError
from bytecache.schemas.settings import Student, Train
from bytecache.stages.loop.batches import collate_rows, step_counts
from bytecache.stages.loop.loss import ByteLoss
from bytecache.stages.loop.rows import MixedRows, StudentRows
from bytecache.stages.loop.trainers import ByteLossMixin
from bytecache.stages.student import student
from bytecache.stages.train.train import train
from tests.support.student_data import make_dataset

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
STEPS, BATCH = 5, 3
RATE = {"learning_rate": 1e-3, "weight_decay": 0.0}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a data set and a small student."""
    place = tmp_path_factory.mktemp("trainers")
    targets = make_dataset(place / "targets")
    student.prepare(Student(tokenizer="bpe:300", hidden_size=32, layers=1, heads=2), targets, place / "student", seed=0)
    return place


def opened(place: Path) -> Any:
    return student.load(place / "student").model.train()


def rows_of(place: Path, **options: Any) -> StudentRows:
    return StudentRows(
        place / "targets", place / "student", opened(place).lm_head.weight.shape[0], window=256, **options
    )


def arguments(folder: Path, kind: Any = None, **options: Any) -> Any:
    from transformers import TrainingArguments

    usual = {
        "max_steps": STEPS, "per_device_train_batch_size": 4, "logging_steps": 1, "lr_scheduler_type": "constant",
        "report_to": [], "use_cpu": True, "dataloader_pin_memory": False, "save_strategy": "no", "disable_tqdm": True,
        "optim": "adamw_torch", "adam_beta1": 0.9, "adam_beta2": 0.95, **RATE,
    }  # fmt: skip
    return (kind or TrainingArguments)(output_dir=str(folder), **{**usual, **options})


def losses(trainer: Any) -> list[float]:
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


class Steps(IterableDataset[list[Any]]):
    """The windows of our trainer's steps, as StudentRows cuts them: one item a step, all its rows."""

    def __init__(self, rows: StudentRows) -> None:
        self.rows = rows

    def __iter__(self) -> Any:
        windows = self.rows.windows(0)
        while True:
            yield [row for window in islice(windows, BATCH) for row in self.rows.rows_of(window)]


def test_our_trainer_and_transformers_end_at_the_same_loss(place: Path, tmp_path: Path) -> None:
    from transformers import Trainer

    settings = Train(
        steps=STEPS,
        batch=BATCH,
        window_bytes=256,
        warmup=0,
        schedule="constant",
        tensorboard=False,
        control=False,
        **RATE,
    )
    ours = train(settings, place / "student", place / "targets", tmp_path / "ours", name="ours", device="cpu")
    lines = (tmp_path / "ours/metrics.jsonl").read_text().splitlines()
    rows = rows_of(place)
    trainer = Trainer(
        opened(place), arguments(tmp_path, per_device_train_batch_size=1), train_dataset=Steps(rows),
        data_collator=lambda items: collate_rows(items[0]), compute_loss_func=ByteLoss(rows),
    )  # fmt: skip
    theirs = losses(trainer)
    assert [json.loads(line)["loss"] for line in lines] == pytest.approx(theirs, rel=1e-3)
    assert ours["terms"]["loss"] == pytest.approx(theirs[-1], rel=1e-3)
    assert theirs[-1] < theirs[0] - 0.1


def by_hand(place: Path, accumulate: int = 2, size: int = 4) -> list[float]:
    """The same in plain PyTorch."""
    rows, model = rows_of(place), opened(place)
    loss = ByteLoss(rows)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0, betas=(0.9, 0.95))
    batches, totals = iter(DataLoader(rows, batch_size=size, collate_fn=collate_rows)), []
    for _ in range(STEPS):
        step = list(islice(batches, accumulate))
        counts = step_counts(step)
        totals.append(0.0)
        for batch in step:
            value = loss.of_model(model, batch, counts)
            value.backward()
            totals[-1] += value.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return totals


def test_as_a_loss_function_of_transformers_without_a_setting(place: Path, tmp_path: Path) -> None:
    """`remove_unused_columns` and `dispatch_batches` are as they come."""
    from transformers import Trainer

    rows = rows_of(place)
    settings = arguments(tmp_path, gradient_accumulation_steps=2)
    assert settings.remove_unused_columns
    trainer = Trainer(
        opened(place), settings, train_dataset=rows, data_collator=collate_rows, compute_loss_func=ByteLoss(rows)
    )
    assert losses(trainer) == pytest.approx(by_hand(place), rel=1e-3)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("chunk", [0, 32])
def test_the_mixin_in_transformers(place: Path, tmp_path: Path, packed: bool, chunk: int) -> None:
    from transformers import Trainer

    class ByteTrainer(ByteLossMixin, Trainer):
        pass

    rows = rows_of(place)
    settings = arguments(tmp_path, gradient_accumulation_steps=2)
    trainer = ByteTrainer(
        opened(place), settings, train_dataset=rows, byte_loss=ByteLoss(rows, chunk=chunk),
        data_collator=partial(collate_rows, packed=packed), eval_dataset=rows_of(place, split="heldout", epochs=1),
    )  # fmt: skip
    assert losses(trainer) == pytest.approx(by_hand(place), rel=1e-3)
    assert not settings.remove_unused_columns
    logged = [entry for entry in trainer.state.log_history if "token_nll" in entry]
    assert len(logged) == STEPS
    for entry in logged:
        assert entry["token_nll"] + entry["byte_kl"] == pytest.approx(entry["loss"], rel=1e-2)
    assert 0 < trainer.evaluate()["eval_loss"] < 20


def test_the_mixin_in_trl(place: Path, tmp_path: Path) -> None:
    pytest.importorskip("trl", reason="lock/hub.txt is not installed (make hub): TRL's trainer was not tried")
    from peft import LoraConfig
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    class ByteSFT(ByteLossMixin, SFTTrainer):
        pass

    def trainer(**options: Any) -> Any:
        settings = arguments(tmp_path, SFTConfig, gradient_accumulation_steps=2, bf16=False)
        more = {"data_collator": options.pop("data_collator")} if "data_collator" in options else {}
        for name in [name for name in options if hasattr(settings, name)]:
            setattr(settings, name, options.pop(name))
        tokenizer = AutoTokenizer.from_pretrained(place / "student")
        rows = rows_of(place)
        more["byte_loss"] = ByteLoss(rows, chunk=options.pop("chunk", 0))
        return ByteSFT(opened(place), settings, train_dataset=rows, processing_class=tokenizer, **more, **options)

    want = by_hand(place)
    assert losses(trainer()) == pytest.approx(want, rel=1e-3)
    packed = trainer(data_collator=partial(collate_rows, packed=True), chunk=32)
    assert losses(packed) == pytest.approx(want, rel=1e-3)
    adapters = losses(trainer(peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")))
    assert adapters[0] == pytest.approx(want[0], rel=1e-3) and len(adapters) == STEPS
    for options, why in (({"packing": True}, "packed=True"), ({"loss_type": "dft"}, "loss_type")):
        with pytest.raises(ConfigError, match=why):
            trainer(**options)


def test_in_a_loop_of_accelerate(place: Path) -> None:
    from accelerate import Accelerator

    rows, accelerator = rows_of(place), Accelerator(gradient_accumulation_steps=2, cpu=True)
    model = opened(place)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0, betas=(0.9, 0.95))
    loader = DataLoader(rows, batch_size=4, collate_fn=collate_rows)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    loss, totals, batches = ByteLoss(rows), [], iter(loader)
    for _ in range(STEPS):
        step = list(islice(batches, 2))
        counts = accelerator.gather(step_counts(step)[None]).sum(0)
        totals.append(0.0)
        for batch in step:
            with accelerator.accumulate(model):
                value = loss.of_model(model, batch, counts)
                totals[-1] += value.item()
                # accelerate divides by the number of batches, and averages over processes; these are shares of one sum.
                accelerator.backward(value * accelerator.gradient_accumulation_steps * accelerator.num_processes)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
    assert totals == pytest.approx(by_hand(place), rel=1e-3)


def test_a_mixture_trains(place: Path, tmp_path: Path) -> None:
    from transformers import Trainer

    class ByteTrainer(ByteLossMixin, Trainer):
        pass

    rows = MixedRows([rows_of(place), rows_of(place, split="heldout")], [0.8, 0.2])
    found = losses(ByteTrainer(opened(place), arguments(tmp_path), train_dataset=rows))
    assert len(found) == STEPS and found[-1] < found[0]


def test_what_the_mixin_refuses(place: Path, tmp_path: Path) -> None:
    from transformers import Trainer

    class ByteTrainer(ByteLossMixin, Trainer):
        pass

    with pytest.raises(ConfigError, match="max_steps"):
        ByteTrainer(opened(place), train_dataset=rows_of(place))
    with pytest.raises(ConfigError, match="train_dataset is list"):
        ByteTrainer(opened(place), arguments(tmp_path), train_dataset=[])  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="train_dataset is missing"):
        ByteTrainer(opened(place), arguments(tmp_path))

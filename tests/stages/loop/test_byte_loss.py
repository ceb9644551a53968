"""ByteLoss is our trainer's objective: whole or in pieces, padded or packed, accumulated, beside torch.compile."""

from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from bytecache.schemas.errors import ConfigError
from bytecache.schemas.settings import Student, Train
from bytecache.stages.loop.batches import ByteLabels, collate_rows, join_rows, step_counts
from bytecache.stages.loop.loss import ByteLoss
from bytecache.stages.loop.rows import StudentRows
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


def test_batches_that_were_cut_apart_are_refused(world: Any, rows: StudentRows) -> None:
    _, opened = world
    batch = collate_rows(list(islice(rows, 4)))
    labels = batch.pop("labels")
    cut = ByteLabels({**labels, "slot_token": labels["slot_token"][:, :4]})
    with pytest.raises(ConfigError, match="dispatch_batches"):
        ByteLoss(rows)(opened.model(**batch), cut)
    with pytest.raises(ConfigError, match="dispatch_batches"):
        ByteLoss(rows)(opened.model(input_ids=batch["input_ids"][:2]), labels)


def test_options_are_those_of_the_trainer(rows: StudentRows) -> None:
    for options, why in (
        ({"lambda_kl": -1}, "lambda_kl = -1"), ({"divergence": "kl"}, "divergence = 'kl'"), ({"alpha": 1}, "'alpha'"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=why):
            ByteLoss(rows, **options)


def gradients(model: torch.nn.Module, value: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    value.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_packed_rows_have_the_loss_and_the_gradients_of_padded_ones(world: Any, rows: StudentRows) -> None:
    _, opened = world
    loss, some = ByteLoss(rows), list(islice(rows, 6))
    assert len({row.lengths[0] for row in some}) > 1
    values = [loss.of_model(opened.model, collate_rows(some, packed=packed)) for packed in (False, True)]
    assert values[0].item() == pytest.approx(values[1].item(), rel=1e-5)
    padded, packed = (gradients(opened.model, value) for value in values)
    for name, gradient in padded.items():
        torch.testing.assert_close(packed[name], gradient, rtol=1e-3, atol=1e-6, msg=name)


def test_logits_in_pieces_have_the_same_gradients(world: Any, rows: StudentRows) -> None:
    _, opened = world
    some = list(islice(rows, 6))
    whole = gradients(opened.model, ByteLoss(rows).of_model(opened.model, collate_rows(some)))
    sizes = []
    handle = opened.model.get_output_embeddings().register_forward_hook(
        lambda _, args, out: sizes.append(out.numel() // out.shape[-1])
    )
    loss = ByteLoss(rows, chunk=16)
    for side in ("left", "right"):
        pieces = gradients(opened.model, loss.of_model(opened.model, collate_rows(some, padding_side=side)))
        assert pieces.keys() == whole.keys()
        for name, gradient in whole.items():
            torch.testing.assert_close(pieces[name], gradient, rtol=1e-3, atol=1e-6, msg=name)
    handle.remove()
    assert max(sizes) == 16


def test_a_model_that_cannot_be_taken_apart_is_refused(rows: StudentRows) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel, GraniteConfig, GraniteForCausalLM

    size = {"vocab_size": rows.vocabulary.size, "num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2}
    scaled = GraniteForCausalLM(GraniteConfig(**size, intermediate_size=16, num_key_value_heads=2, logits_scaling=4.0))
    some = collate_rows(list(islice(rows, 2)))
    whole, pieces = (ByteLoss(rows, chunk=chunk).of_model(scaled, some).item() for chunk in (0, 16))
    assert pieces == pytest.approx(whole, rel=1e-5)  # what the configuration says of logits is done

    class Tripled(GPT2LMHeadModel):
        def forward(self, input_ids=None, logits_to_keep=0, **rest):  # type: ignore[no-untyped-def]
            found = super().forward(input_ids=input_ids, logits_to_keep=logits_to_keep, **rest)
            return type(found)(logits=found.logits * 3, hidden_states=found.hidden_states)

    class Whole(GPT2LMHeadModel):
        def forward(self, input_ids=None, **rest):  # type: ignore[no-untyped-def]
            return super().forward(input_ids=input_ids, **rest)

    shape = GPT2Config(vocab_size=rows.vocabulary.size, n_layer=1, n_embd=16, n_head=2)
    for kind, why in ((Tripled, "alters the logits"), (Whole, "no logits_to_keep")):
        with pytest.raises(ConfigError, match=f"{why}.*leave out `chunk`"):
            ByteLoss(rows, chunk=16).of_model(kind(shape), some)


def test_counts_of_a_step_are_exact(world: Any, rows: StudentRows) -> None:
    """Tokens, and tokens with bytes, differ from batch to batch; their sums are what the parts are divided by."""
    _, opened = world
    loss, some = ByteLoss(rows), list(islice(rows, 6))
    batches = [collate_rows(group) for group in (some[:1], some[1:3], some[3:])]
    counts = step_counts(batches)
    parts = [loss.parts_of_model(opened.model, batch) for batch in batches]
    want = sum(part.token for part in parts) / counts[0] + sum(part.kl + part.open for part in parts) / counts[1]
    got = sum(loss.of_model(opened.model, batch, counts).item() for batch in batches)
    assert got == pytest.approx(float(want), rel=1e-5)
    lopsided = torch.tensor([int(counts[0]), int(counts[1]) * 2])
    less = sum(loss.of_model(opened.model, batch, lopsided).item() for batch in batches)
    assert less == pytest.approx(float(sum(part.token for part in parts) / counts[0]) / 2 + got / 2, rel=1e-5)


@pytest.mark.timeout(400)
@pytest.mark.parametrize(("chunk", "packed"), [(0, False), (16, True)])
def test_beside_a_compiled_model(world: Any, rows: StudentRows, chunk: int, packed: bool) -> None:
    _, opened = world
    torch._dynamo.reset()
    compiled = torch.compile(opened.model, backend="aot_eager", dynamic=True)
    loss, batch = ByteLoss(rows, chunk=chunk), collate_rows(list(islice(rows, 4)), packed=packed)
    want = gradients(opened.model, loss.of_model(opened.model, batch))
    got = gradients(opened.model, loss.of_model(compiled, batch))
    for name, gradient in want.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-3, atol=1e-6, msg=name)

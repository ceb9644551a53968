"""Distil with transformers.Trainer; rows packed behind one another where asked.

python docs/howto/loops/with_transformers.py TARGETS MODEL --steps 20 --packed
torchrun --nproc-per-node 4 docs/howto/loops/with_transformers.py TARGETS MODEL --steps 20
"""

import argparse
from functools import partial

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from bytecache import ByteLoss, ByteLossMixin, StudentRows, collate_rows


class ByteTrainer(ByteLossMixin, Trainer):
    """Trainer with the byte loss."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("targets")
    parser.add_argument("model")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--accumulate", type=int, default=2, help="batches of a process to a step")
    parser.add_argument("--chunk", type=int, default=0, help="positions whose logits exist at once; 0 = all")
    parser.add_argument("--out", default="trained")
    parser.add_argument("--packed", action="store_true")
    options = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(options.model)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    width = model.get_output_embeddings().weight.shape[0]
    rows = StudentRows(options.targets, tokenizer, width, window=1024)
    heldout = StudentRows(options.targets, tokenizer, width, window=1024, split="heldout", epochs=1)
    arguments = TrainingArguments(
        options.out, max_steps=options.steps, per_device_train_batch_size=4,
        gradient_accumulation_steps=options.accumulate, learning_rate=1e-3, logging_steps=1, report_to=[],
        save_strategy="no",
        use_cpu=not torch.cuda.is_available(),
    )  # fmt: skip
    trainer = ByteTrainer(
        model, arguments, train_dataset=rows, eval_dataset=heldout, byte_loss=ByteLoss(rows, chunk=options.chunk),
        data_collator=partial(collate_rows, packed=options.packed), processing_class=tokenizer,
    )  # fmt: skip
    trainer.train()
    print(trainer.evaluate(), flush=True)


if __name__ == "__main__":
    main()

"""Distil in a loop of accelerate, on one process or many.

accelerate launch docs/howto/loops/with_accelerate.py TARGETS MODEL --steps 20
"""

import argparse
from itertools import islice

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

from bytecache import ByteLoss, StudentRows, collate_rows, step_counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("targets")
    parser.add_argument("model")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--accumulate", type=int, default=2, help="batches of a process to a step")
    options = parser.parse_args()
    # Every process reads all rows and takes its batches, so the rows are rank 0 of 1 and nothing is dispatched.
    accelerator = Accelerator(
        gradient_accumulation_steps=options.accumulate,
        dataloader_config=DataLoaderConfiguration(dispatch_batches=False),
        cpu=not torch.cuda.is_available(),  # else processes without a GPU know nothing of each other
    )
    model = AutoModelForCausalLM.from_pretrained(options.model)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    width = model.get_output_embeddings().weight.shape[0]
    rows = StudentRows(options.targets, tokenizer, width, window=1024, rank=0, ranks=1)
    loss = ByteLoss(rows)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loader = DataLoader(rows, batch_size=4, collate_fn=collate_rows)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    batches = iter(loader)
    for number in range(options.steps):
        step = list(islice(batches, accelerator.gradient_accumulation_steps))
        mine = step_counts(step).to(accelerator.device)
        counts = accelerator.gather(mine[None]).sum(0)  # of all processes
        total = torch.zeros((), device=accelerator.device)
        for batch in step:
            with accelerator.accumulate(model):
                value = loss.of_model(model, batch, counts)
                total += value.detach()
                # accelerate divides by the batches of a step and averages over processes: these are shares of one sum.
                accelerator.backward(value * accelerator.gradient_accumulation_steps * accelerator.num_processes)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
        total = accelerator.reduce(total)
        accelerator.print(f"step {number + 1}: loss {float(total):.4f}", flush=True)


if __name__ == "__main__":
    main()

"""Distil in a loop of plain PyTorch, several batches to an optimiser step.

python docs/howto/loops/plain.py TARGETS MODEL --steps 20

TARGETS: a folder, or hf://datasets/owner/name. MODEL: a causal language model of transformers with its tokenizer.
"""

import argparse
from itertools import islice

import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

from bytecache import ByteLoss, StudentRows, collate_rows, step_counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("targets")
    parser.add_argument("model")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", default="")
    options = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(options.model)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    width = model.get_output_embeddings().weight.shape[0]
    rows = StudentRows(options.targets, tokenizer, width, window=1024)
    # With 150,000 tokens and more, `chunk` keeps the logits of so many positions in memory and no more.
    loss = ByteLoss(rows, chunk=512 if width > 100_000 else 0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    batches = iter(DataLoader(rows, batch_size=4, collate_fn=collate_rows))
    for number in range(options.steps):
        step = list(islice(batches, 2))
        counts = step_counts(step)  # of the whole step, so that its batches add up to one mean
        total = 0.0
        for batch in step:
            value = loss.of_model(model, batch, counts)
            value.backward()
            total += value.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {number + 1}: loss {total:.4f}", flush=True)
    if options.out:
        model.save_pretrained(options.out)
        tokenizer.save_pretrained(options.out)


if __name__ == "__main__":
    main()

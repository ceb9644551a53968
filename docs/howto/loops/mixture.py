"""Distil from several data sets by weight, stop, and go on with the very next row.

python docs/howto/loops/mixture.py TARGETS OTHER_TARGETS MODEL --weights 0.7 0.3 --steps 20
"""

import argparse
import json
from itertools import islice
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from bytecache import ByteLoss, MixedRows, StudentRows, collate_rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("targets", nargs=2)
    parser.add_argument("model")
    parser.add_argument("--weights", nargs=2, type=float, default=[0.5, 0.5])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--state", default="")
    options = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(options.model)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    width = model.get_output_embeddings().weight.shape[0]
    rows = MixedRows([StudentRows(place, tokenizer, width, window=1024) for place in options.targets], options.weights)
    state = Path(options.state) if options.state else None
    if state and state.exists():
        rows.load_state_dict(json.loads(state.read_text()))
    loss = ByteLoss(rows)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    reading = iter(rows)
    for number in range(options.steps):
        value = loss.of_model(model, collate_rows(list(islice(reading, 4))))
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {number + 1}: loss {value.item():.4f}", flush=True)
    if state:
        state.write_text(json.dumps(rows.state_dict()))


if __name__ == "__main__":
    main()

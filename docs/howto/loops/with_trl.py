"""Distil with TRL's SFTTrainer, through adapters; `pip install 'bytecache[trl]'`.

python docs/howto/loops/with_trl.py TARGETS MODEL --steps 20
"""

import argparse

from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from bytecache import ByteLossMixin, StudentRows


class ByteSFTTrainer(ByteLossMixin, SFTTrainer):
    """SFTTrainer with the byte loss."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("targets")
    parser.add_argument("model")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", default="trained")
    options = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(options.model)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    rows = StudentRows(options.targets, tokenizer, model.get_output_embeddings().weight.shape[0], window=1024)
    arguments = SFTConfig(
        options.out, max_steps=options.steps, per_device_train_batch_size=4, gradient_accumulation_steps=2,
        learning_rate=1e-3, logging_steps=1, report_to=[], save_strategy="no", bf16=False,
    )  # fmt: skip
    ByteSFTTrainer(
        model, arguments, train_dataset=rows, processing_class=tokenizer,
        peft_config=LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"),
    ).train()  # fmt: skip


if __name__ == "__main__":
    main()

"""Export: drop the byte head and leave an ordinary `transformers` checkpoint that loads with none of our code.

Algorithm: weights of the checkpoint go into the student's own architecture, adapters are merged into them,
`save_pretrained` (safetensors) and the tokenizer's files, to the byte, go into a scratch folder, then the folder is
reopened with `AutoModelForCausalLM` alone and its token logits are compared with the trained model's on a fixed batch.
Only a folder that agrees is renamed into place. transformers 4 opens it as well.
Price: one copy of the weights and two forward passes of 2 x 64 tokens.
"""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from bytecache.schemas import strict_json
from bytecache.schemas.errors import ConfigError, IntegrityError
from bytecache.schemas.files import scratch_folder
from bytecache.stages.evaluate.evaluate import load_trained
from bytecache.stages.student import student
from bytecache.stages.student.tokenizer_files import check_kept
from bytecache.stages.train import checkpoint

TOLERANCE = 1e-6
"""Largest difference of a logit before and after; 0 is expected, since the same float32 weights come back."""
MERGED = 1e-4
"""The same for merging adapters, in units of the largest logit: a sum of two products becomes one."""


def export(student_dir: Path, checkpoint_path: Path, out_dir: Path) -> dict[str, Any]:
    """Write the trained student as a plain checkpoint folder.

    Args:
        student_dir: the folder the training began from. checkpoint_path: what `train` returned. out_dir: to create.

    Returns:
        {"checkpoint_sha256", "files": {name: sha256}, "max_abs_difference", "parameters"}; also `export.json` there.
        Where adapters were merged, "merge_difference" as well (see MERGED). "notes": see `tokenizer_files.check_kept`.

    Raises:
        IntegrityError: a torn checkpoint, or the reloaded model differs from the trained one.
        ConfigError: `out_dir` exists with other content.
    """
    source = checkpoint.verify(checkpoint_path)
    record = out_dir / "export.json"
    if out_dir.exists():
        recorded = strict_json.loads(record.read_text()) if record.is_file() else {}
        if recorded.get("checkpoint_sha256") == source and recorded.get("files") == _hashes(out_dir):
            return dict(recorded)
        raise ConfigError(f"{out_dir} holds something else; delete it or export elsewhere")
    opened = load_trained(student_dir, checkpoint_path).student
    merged = _merge(opened)
    with scratch_folder(out_dir.parent) as scratch:
        student.save_plain(opened.model, student_dir, scratch)
        difference = compare(opened, scratch)
        if not difference <= TOLERANCE:
            raise IntegrityError(
                f"{out_dir}: reloaded logits differ by {difference:.3g} (limit {TOLERANCE:g}); nothing was exported, "
                "report the architecture of student.model"
            )
        result = {
            "checkpoint_sha256": source,
            "files": _hashes(scratch),
            "max_abs_difference": difference,
            **merged,
            "notes": check_kept(scratch, "export"),
            "parameters": sum(p.numel() for p in opened.model.parameters()),
        }
        (scratch / record.name).write_text(json.dumps(result, indent=1, sort_keys=True))
        scratch.chmod(0o755)
        scratch.rename(out_dir)
    return result


def _hashes(folder: Path) -> dict[str, str]:
    return {k: v for k, v in student.folder_hashes(folder).items() if k != "export.json"}


def _merge(opened: student.Student) -> dict[str, float]:
    """Merge the adapters of a student that has some; refuses a merge that changes its logits (IntegrityError)."""
    from peft import PeftModel

    if not isinstance(opened.model, PeftModel):
        return {}
    ids = _sample(opened)
    with torch.inference_mode():
        before = opened.model(input_ids=ids).logits
    opened.model = opened.model.merge_and_unload()
    with torch.inference_mode():
        after = opened.model(input_ids=ids).logits
    difference = float((after - before).abs().max() / before.abs().max())
    if not difference <= MERGED:
        raise IntegrityError(
            f"merging the adapters changes logits by {difference:.3g} of the largest (limit {MERGED:g}); nothing was "
            "exported, report the architecture of student.model"
        )
    return {"merge_difference": difference}


def _sample(opened: student.Student) -> torch.Tensor:
    rows = int(opened.model.get_input_embeddings().weight.shape[0])
    return torch.randint(0, min(rows, len(opened.tokenizer)), (2, 64), generator=torch.Generator().manual_seed(0))


def compare(opened: student.Student, folder: Path) -> float:
    """Largest absolute difference of token logits between a model in memory and the one in `folder`."""
    ids = _sample(opened)
    again = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32, trust_remote_code=False).eval()
    with torch.inference_mode():
        return float((opened.model(input_ids=ids).logits - again(input_ids=ids).logits).abs().max())

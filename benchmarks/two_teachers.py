"""Whether two teachers know more of a text than the better one: bits per byte of each, and of their mixtures.

    python -m benchmarks.two_teachers FOLDER [--max-bytes 6000]

Teachers are SmolLM2-135M-Instruct (49k tokens, byte-level) and Gemma-3-270m (262k, SentencePiece); the text is Python's
manual. Each reads it once (canonical tokens and static rows: a mixture needs no more to be judged by), then
`bytecache mix` pools the two data sets in every way. What the targets say of the text is what a student can learn from
them; a student is not trained here. Every step is resumed where it was, so the program can be killed and started again.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from bytecache.pipeline.commands.convert import convert
from bytecache.pipeline.commands.mix import mix
from bytecache.pipeline.commands.plan import plan
from bytecache.pipeline.commands.teacher import teacher
from bytecache.pipeline.context import open_context
from bytecache.schemas.dataset.index import read_dataset
from bytecache.schemas.settings import Settings
from bytecache.stages.mix.mix import Mixing

RESULT = Path(__file__).parent / "results" / "two_teachers.json"
TEACHERS = {"smollm2": "builtin:smollm2-135m-instruct", "gemma": "builtin:gemma-3-270m"}
MIXTURES = {
    "linear 0.5, 0.5": Mixing("linear", (0.5, 0.5)),
    "linear 0.2, 0.8": Mixing("linear", (0.2, 0.8)),
    "log 0.5, 0.5": Mixing("log", (0.5, 0.5)),
    "posterior": Mixing("posterior", (0.5, 0.5)),
}


def settings_of(folder: Path, model: str, max_bytes: int) -> Settings:
    """A run of one teacher: the cheapest effort that still has a tail for what it leaves out."""
    return Settings.model_validate({
        "run": {"dir": str(folder)},
        "corpus": {"max_bytes": max_bytes, "unit_bytes": 2000},
        "teacher": {
            "model": model, "backend": "hf", "context": 256, "depth": 0, "static": 0.002, "sample_tokens": 0,
            "top_k": 0,
        },
        "convert": {"precision": "precise"},
    })  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--max-bytes", type=int, default=6000)
    arguments = parser.parse_args()
    for name, model in TEACHERS.items():
        context = open_context(settings_of(arguments.folder / name, model, arguments.max_bytes))
        plan(context)
        teacher(context)
        convert(context)
    places = [str(arguments.folder / name / "targets") for name in TEACHERS]
    found: dict[str, Any] = {}
    for number, (name, mixing) in enumerate(MIXTURES.items()):
        context = open_context(settings_of(arguments.folder / f"mix-{number}", "none", arguments.max_bytes))
        mix(context, places, mixing, partial=True)
        told = read_dataset(arguments.folder / f"mix-{number}" / "targets").info["mix"]
        found[name] = {key: told[key] for key in ("bits_per_byte_mixed", "bits_per_byte", "weight_mean", "jsd_mean")}
    report = {"teachers": list(TEACHERS), "max_bytes": arguments.max_bytes, "mixtures": found}
    RESULT.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()

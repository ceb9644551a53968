"""A checkpoint folder as other tools leave it: file modes by the umask, a configuration that transformers 4 reads too.

transformers 5 writes `dtype` and `rope_parameters`; version 4 reads `torch_dtype`, `rope_theta` and `rope_scaling`, and
takes its own default (a theta of 10000) where it does not find them: another model, without a word. Both spellings say
the same, and version 5 reads either.
"""

import json
from pathlib import Path
from typing import Any


def make_ordinary(folder: Path) -> None:
    """Give the files of a folder ordinary modes, and its config.json the older spellings beside the present ones."""
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(with_older_names(config), indent=2, sort_keys=True) + "\n", encoding="utf-8")
    mode = file.stat().st_mode & 0o777
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)


def with_older_names(config: dict[str, Any]) -> dict[str, Any]:
    """`config` with what transformers 4 calls `rope_parameters` and `dtype`, in nested text models too."""
    out = dict(config)
    if isinstance(config.get("dtype"), str):
        out.setdefault("torch_dtype", config["dtype"])
    rope = config.get("rope_parameters")
    if isinstance(rope, dict):
        out.update(_older_rope(rope))
        if config.get("model_type") == "gpt_neox":  # by names of its own
            named = {"rotary_pct": "partial_rotary_factor", "rotary_emb_base": "rope_theta"}
            out.update({older: rope[name] for older, name in named.items() if name in rope})
    if isinstance(config.get("text_config"), dict):
        out["text_config"] = with_older_names(config["text_config"])
    return out


def _older_rope(rope: dict[str, Any]) -> dict[str, Any]:
    if not rope:
        return {}
    if all(isinstance(value, dict) for value in rope.values()):  # by kind of layer: Gemma 3
        whole, local = rope.get("full_attention"), rope.get("sliding_attention")
        older = _older_rope(whole) if whole else {}
        return older | ({"rope_local_base_freq": local["rope_theta"]} if local and "rope_theta" in local else {})
    older = {name: rope[name] for name in ("rope_theta", "partial_rotary_factor") if name in rope}
    if rope.get("rope_type", "default") != "default":
        older["rope_scaling"] = {name: value for name, value in rope.items() if name not in older}
    return older

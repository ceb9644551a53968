"""A LoRA adapter on a teacher: the merged checkpoint is the adapter beside its base; what does not fit is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from bytecache.pipeline.commands.teacher import identity_changes
from bytecache.schemas import settings as st
from bytecache.schemas.errors import ConfigError, InputError
from bytecache.schemas.identity import TeacherIdentity
from bytecache.stages.fidelity.noise import described
from bytecache.stages.models import adapter as adapters
from bytecache.stages.models.locate import resolve_model
from bytecache.stages.teacher.float32 import exact_settings
from bytecache.stages.teacher.identity import teacher_identity
from tests.support.tiny_models import make_checkpoint


def make_adapter(base: Path, out: Path, **changes: Any) -> Path:
    """An adapter with weights that matter, as peft saves it."""
    torch.manual_seed(1)
    config = LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "v_proj", "down_proj"], **changes)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(out, safe_serialization=True)
    return out


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("merged")
    base = make_checkpoint(folder / "base")
    return base, make_adapter(base, folder / "lora")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BYTECACHE_CACHE", str(tmp_path / "cache"))


def settings(base: Path, adapter: Path | str, **changes: Any) -> st.Teacher:
    asked = {"model": str(base), "backend": "hf", "context": 64, "adapter": str(adapter), **changes}
    return st.Teacher.model_validate(asked)


def logits(folder: Path, adapter: Path | None = None) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter))
    with torch.inference_mode():
        return model.eval()(input_ids=torch.arange(3, 40)[None]).logits


def test_the_merged_checkpoint_is_the_adapter_beside_its_base(places: tuple[Path, Path]) -> None:
    base, adapter = places
    folder = resolve_model(settings(base, adapter))
    wanted = logits(base, adapter)
    torch.testing.assert_close(logits(folder), wanted, atol=1e-4, rtol=1e-4)
    assert (wanted - logits(base)).abs().max() > 0.05, "the adapter does something"
    stamp = (folder / adapters.MARKER).stat().st_mtime_ns
    assert resolve_model(settings(base, adapter)) == folder
    assert (folder / adapters.MARKER).stat().st_mtime_ns == stamp, "made once"


@pytest.mark.parametrize("noise", ["self", "base"])
def test_the_noise_of_an_adapted_teacher_is_against_the_adapter_in_float32(
    places: tuple[Path, Path], noise: str
) -> None:
    base, adapter = places
    asked = settings(base, adapter, dtype="bfloat16", noise=noise if noise == "self" else str(base))
    assert resolve_model(exact_settings(asked)) != resolve_model(asked), "the teacher itself is in half precision"
    torch.testing.assert_close(
        logits(resolve_model(exact_settings(asked))), logits(base, adapter), atol=1e-4, rtol=1e-4
    )
    assert described(teacher_identity(exact_settings(asked)))["adapter"] == "lora"


def test_a_damaged_merge_is_made_again(places: tuple[Path, Path]) -> None:
    folder = resolve_model(settings(*places))
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert resolve_model(settings(*places)) == folder
    assert weights.read_bytes() == whole


def test_the_identity_names_the_adapter(places: tuple[Path, Path]) -> None:
    base, adapter = places
    plain, with_adapter = teacher_identity(settings(base, "")), teacher_identity(settings(base, adapter))
    assert with_adapter["adapter"] == "lora" and "adapter" not in plain
    assert plain["weights"] != with_adapter["weights"] and plain["vocabulary"] == with_adapter["vocabulary"]
    assert str(adapter.parent) not in json.dumps(with_adapter)
    made = TeacherIdentity.of(plain, "test")
    assert any(change.startswith("adapter") for change in identity_changes(made, settings(base, adapter)))
    assert not any(change.startswith("adapter") for change in identity_changes(made, settings(base, "")))
    made = TeacherIdentity.of(with_adapter, "test")
    assert not any(change.startswith("adapter") for change in identity_changes(made, settings(base, adapter)))
    assert any(change.startswith("adapter") for change in identity_changes(made, settings(base, "")))


def test_an_adapter_of_another_model_is_refused(places: tuple[Path, Path], tmp_path: Path) -> None:
    narrow = shutil.copytree(places[1], tmp_path / "narrow")
    weights = load_file(narrow / adapters.WEIGHTS)
    save_file({name: value[:, :-1].contiguous() for name, value in weights.items()}, narrow / adapters.WEIGHTS)
    with pytest.raises(InputError, match=r"does not fit its base .*name the weights that it was trained on: .*base"):
        resolve_model(settings(places[0], narrow))


def test_weights_without_a_place_are_refused(places: tuple[Path, Path], tmp_path: Path) -> None:
    broken = shutil.copytree(places[1], tmp_path / "broken")
    weights = load_file(broken / adapters.WEIGHTS)
    name = next(iter(weights))
    weights[name.replace("layers.0", "layers.7")] = weights.pop(name)
    save_file(weights, broken / adapters.WEIGHTS)
    with pytest.raises(InputError, match=r"1 of its \d+ weights have no place .*layers\.7"):
        resolve_model(settings(places[0], broken))
    del weights[name.replace("layers.0", "layers.7")]
    save_file(weights, broken / adapters.WEIGHTS)
    with pytest.raises(InputError, match=r"1 weights that its configuration asks for are not in its file"):
        resolve_model(settings(places[0], broken))


def test_pickled_adapters_and_quantised_bases_are_refused(places: tuple[Path, Path], tmp_path: Path) -> None:
    pickled = shutil.copytree(places[1], tmp_path / "pickled")
    (pickled / adapters.WEIGHTS).rename(pickled / "adapter_model.bin")
    with pytest.raises(InputError, match=r"adapter_model.safetensors is missing \(it has adapter_model.bin\)"):
        resolve_model(settings(places[0], pickled))
    quantised = shutil.copytree(places[0], tmp_path / "quantised")
    config = json.loads((quantised / "config.json").read_text())
    (quantised / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "awq"}}))
    with pytest.raises(ConfigError, match=r"quantised \(awq\), an adapter cannot be merged"):
        resolve_model(settings(quantised, places[1]))
    with pytest.raises(InputError, match=r"teacher\.adapter = .*no such folder"):
        resolve_model(settings(places[0], "./nowhere"))

"""All that can be known of a teacher before a weight is read or an engine starts; each refusal names its setting.

Price: the small files of the checkpoints that `teacher.model` and `teacher.noise` name, and the latter's tokenizer.
"""

from pathlib import Path

from bytecache.schemas import settings as st
from bytecache.schemas.errors import ConfigError, InputError
from bytecache.stages.engines.server_client import refuse_address
from bytecache.stages.models.device import device_kind
from bytecache.stages.models.fitness import quantisation, refuse_quantised_teacher
from bytecache.stages.models.kernels import refuse_without_kernels
from bytecache.stages.models.locate import locate, resolve_model
from bytecache.stages.teacher.float32 import SAME, exact_settings, refuse_other_vocabulary
from bytecache.stages.teacher.identity import fit_context, vocabulary_of


def check_teacher(settings: st.Teacher) -> Path:
    """The teacher's checkpoint folder. Raises ConfigError or InputError for what no engine could make anything of."""
    settings = settings.resolved()
    if settings.is_remote:
        refuse_address(settings.server, settings.backend)
    _refuse_idle(settings)
    folder = resolve_model(settings)
    refuse_quantised_teacher(folder, settings.model, settings.backend)
    if settings.backend == "vllm" and device_kind() == "cpu":
        refuse_without_kernels(folder, settings)
    if not settings.is_remote and not any(folder.glob("*.safetensors")):
        raise InputError(
            f"{folder}: no *.safetensors weights; save the model with save_pretrained(safe_serialization=True)"
        )
    if settings.noise:
        _check_noise(folder, settings)
    return folder


def _refuse_idle(settings: st.Teacher) -> None:
    """Settings that nothing would come of."""
    if settings.adapter and settings.is_remote:
        raise ConfigError(
            f"teacher.adapter = {settings.adapter!r} with teacher.backend = {settings.backend!r}: the server holds the "
            "weights, an adapter here would be left out; merge it into what is served, and leave teacher.adapter empty"
        )
    if settings.noise and settings.backend == "server":
        raise ConfigError(
            f"teacher.noise = {settings.noise!r} with teacher.backend = 'server': a server's lists have no sample to "
            "measure noise on; leave teacher.noise empty, or ask exactly (teacher.backend = 'vllm-server')"
        )
    if settings.noise and not settings.sample_tokens:
        raise ConfigError(
            f"teacher.noise = {settings.noise!r} is measured on the sample of every unit, and "
            "teacher.sample_tokens = 0; set it to 128, or leave teacher.noise empty"
        )


def _check_noise(folder: Path, settings: st.Teacher) -> None:
    exact = exact_settings(settings)
    if settings.noise == SAME:
        where, other = f"teacher.noise = {SAME!r}: the weights of teacher.model", folder
        if not any(folder.glob("*.safetensors")):
            raise InputError(
                f"teacher.noise = {SAME!r} needs the weights of teacher.model = {settings.model!r} here as well; "
                "name a folder or hub id that has them, or leave teacher.noise empty"
            )
    else:
        where, other = f"teacher.noise = {settings.noise!r}: its weights", locate(settings.noise, "teacher.noise")
    if method := quantisation(other):
        raise ConfigError(
            f"{where} are quantised ({method}), which cannot be computed in float32; set teacher.noise to the weights "
            "that they were made of, or leave it empty"
        )
    resolved = resolve_model(exact)
    context, overlap = fit_context(settings, folder)
    try:
        fit_context(exact.model_copy(update={"context": context, "overlap": overlap}), resolved)
    except ConfigError as error:
        raise ConfigError(f"teacher.noise = {settings.noise!r}: {error}") from error
    if settings.noise != SAME:
        refuse_other_vocabulary(vocabulary_of(settings, folder), vocabulary_of(exact, resolved), settings)

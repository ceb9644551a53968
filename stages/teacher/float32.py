"""The float32 model that a teacher's noise is measured against (stages.fidelity.noise has the words)."""

from bytecache.schemas import settings as st
from bytecache.schemas.errors import InputError
from bytecache.stages.lattice.effort import REFERENCE
from bytecache.stages.tokens.vocab import Vocabulary

SAME = "self"
"""Of `teacher.noise`: the same weights, in float32."""


def exact_settings(settings: st.Teacher) -> st.Teacher:
    """The settings of the float32 model that a teacher with these settings is compared with."""
    other = {} if settings.noise == SAME else {"model": settings.noise, "revision": ""}
    exact = {"backend": "hf", "dtype": "float32", "top_k": 0, "static": 0.0, "sample_tokens": 0, "noise": ""}
    return settings.model_copy(update={**exact, **other, **REFERENCE})


def refuse_other_vocabulary(teacher: Vocabulary, exact: Vocabulary, settings: st.Teacher) -> None:
    """Raise InputError unless the two vocabularies are one: the noise is one model's at two precisions."""
    if teacher.fingerprint == exact.fingerprint:
        return
    named = f"teacher.noise = {settings.noise!r}"
    if teacher.token_bytes == exact.token_bytes:
        raise InputError(
            f"{named} has another start or end token than teacher.model = {settings.model!r} (start "
            f"{exact.start_name!r} and {teacher.start_name!r}, {len(exact.end_ids)} and {len(teacher.end_ids)} end "
            "tokens); set teacher.start and teacher.end, which count for both"
        )
    raise InputError(
        f"{named} has another vocabulary than teacher.model = {settings.model!r}; name the weights that it was made of"
    )

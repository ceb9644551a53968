"""The teacher through transformers: the reference engine. The same rows as vLLM's.

Canonical rows come from forward passes over windows, short ones several together (stages.engines.packed), whose keys
and values are kept until the next group of windows, as many as fit `KEPT_BYTES`. Branches are packed too: a pass over
the kept keys of some windows with a tree attention mask. Their own keys are kept as well, so a branch costs one token
of compute however far it is off the canonical ones.
`benchmarks/genlm_bytes.py` measures one stream, and many documents.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError

from bytecache.schemas import settings as st
from bytecache.schemas.errors import ConfigError, EngineError, InputError
from bytecache.stages.engines import packed
from bytecache.stages.engines.engine import Branch, Engine, Prompt
from bytecache.stages.engines.paths import PathReducer, plan_paths
from bytecache.stages.engines.rows import LateRows, RowMasses, concatenate
from bytecache.stages.engines.static import (
    StaticJob,
    StaticStates,
    batches,
    context_tokens,
    linear_logits,
    together,
    tokens_of,
)
from bytecache.stages.models.device import head_is_quantised, trunk_dtype
from bytecache.stages.models.fitness import refuse_quantised_teacher
from bytecache.stages.models.weights import refuse_missing

KEPT_BYTES = 1 << 31
"""Bytes of keys and values of a group kept at once; a window beyond it is run again for every pass of branches."""


class HfEngine(Engine):
    """Rows from `AutoModelForCausalLM` on whatever device torch offers."""

    def __init__(self, folder: Path, reducer: PathReducer, settings: st.Teacher) -> None:
        self.reducer = reducer
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        refuse_quantised_teacher(folder, settings.model, "hf")
        self.model = _load(folder, settings)
        _check_rope(self.model, settings.context)
        self.model.to(self.device).eval()
        # Two adjacent float16 logits of a large vocabulary tie; the head is float32 in every engine here.
        head = self.model.get_output_embeddings()
        if head.weight.dtype != torch.float32:
            self.model.set_output_embeddings(_Float32Head(head))
        trial = np.resize(reducer.vocabulary.order[:: max(1, len(reducer.vocabulary.order) // 7)], 7)
        if not packed.packs(self.model, trial):
            if not _has_numbers(self.model, trial):
                raise EngineError(
                    f"teacher.model = {settings.model!r} returns NaN logits; "
                    'try teacher.dtype = "float32", or fetch the checkpoint again'
                )
            raise ConfigError(
                f"teacher.model = {settings.model!r}: {type(self.model).__name__} mixes the windows of one pass "
                '(recurrent layers, or attention of a kind not known here); set teacher.backend = "vllm"'
            )
        self._contexts = context_tokens(reducer.vocabulary)
        self._static = StaticStates(
            reducer,
            len(self._contexts),
            linear=linear_logits(self.model.config.get_text_config()),
            device=self.device,
        )
        self._kept: dict[int, packed.KeptWindow] = {}
        self._kept_bytes = 0

    @torch.inference_mode()
    def score(self, prompts: Sequence[Prompt]) -> Iterator[RowMasses]:
        self.forget()
        for some in packed.runs([(len(prompt.tokens), 0) for prompt in prompts]):
            logits, _ = self._whole(prompts[some])
            for prompt, prompt_logits in zip(prompts[some], logits, strict=True):
                plan = plan_paths(self.reducer.vocabulary, prompt.text, prompt.starts)
                following = np.append(prompt.tokens[prompt.first_row + 1 :], -1).astype(np.int64)
                yield LateRows(self.reducer.begin(prompt_logits, plan, following, where=prompt.name))

    @torch.inference_mode()
    def score_branches(self, jobs: Sequence[tuple[Prompt, Sequence[Branch]]]) -> Iterator[RowMasses]:
        pieces = [
            (number, prompt, branches[a : a + packed.NEW_TOKENS])
            for number, (prompt, branches) in enumerate(jobs)
            for a in range(0, len(branches), packed.NEW_TOKENS)
        ]
        parts: list[RowMasses] = []
        yet = 0
        windows: list[packed.KeptWindow] = []
        for some in packed.runs([(len(branches), len(prompt.tokens)) for _, prompt, branches in pieces]):
            prompts = [prompt for _, prompt, _ in pieces[some]]
            if [id(prompt) for prompt in prompts] != [id(window.prompt) for window in windows]:
                windows = self._windows(prompts)
            logits = self._evaluate([branches for _, _, branches in pieces[some]], windows)
            for (number, prompt, branches), branch_logits in zip(pieces[some], logits, strict=True):
                if number != yet:
                    yield LateRows(partial(concatenate, parts))
                    parts, yet = [], number
                plan = plan_paths(
                    self.reducer.vocabulary, prompt.text, np.array([branch.start for branch in branches], np.int64)
                )
                none = np.full(len(branches), -1, np.int64)
                parts.append(LateRows(self.reducer.begin(branch_logits, plan, none, where=f"{prompt.name}, branches")))
        if parts:
            yield LateRows(partial(concatenate, parts))

    def _whole(self, prompts: Sequence[Prompt]) -> tuple[list[torch.Tensor], list[packed.KeptWindow]]:
        """Logits of all wanted rows of some windows, in one pass; their keys are remembered while there is room."""
        logits, keys = packed.run(self.model, [packed.whole(prompt) for prompt in prompts])
        windows = [packed.KeptWindow(prompt, prompt_keys) for prompt, prompt_keys in zip(prompts, keys, strict=True)]
        size = sum(window.nbytes for window in windows)
        if self._kept_bytes + size <= KEPT_BYTES:
            self._kept_bytes += size
            self._kept |= {id(window.prompt): window for window in windows}
        return logits, windows

    def _evaluate(
        self, branches: Sequence[Sequence[Branch]], windows: Sequence[packed.KeptWindow]
    ) -> list[torch.Tensor]:
        """Logits of some windows' branches, in one pass; their keys are remembered while there is room."""
        places = [packed.new_places(branch_keys, window) for branch_keys, window in zip(branches, windows, strict=True)]
        segments = [packed.tree(branch_keys, window) for branch_keys, window in zip(branches, windows, strict=True)]
        logits, keys = packed.run(self.model, segments)
        for window, new, branch_keys in zip(windows, places, keys, strict=True):
            size = packed.size_of(branch_keys)
            if self._kept.get(id(window.prompt)) is window and self._kept_bytes + size <= KEPT_BYTES:
                self._kept_bytes -= window.nbytes
                window.grow(new, branch_keys)
                self._kept_bytes += window.nbytes
        return logits

    def _windows(self, prompts: Sequence[Prompt]) -> list[packed.KeptWindow]:
        """Keys of windows that share a pass: those kept, or made again."""
        by_prompt = {id(prompt): self._kept.get(id(prompt)) for prompt in prompts}
        lost = [
            prompt for prompt in prompts if (window := by_prompt[id(prompt)]) is None or window.prompt is not prompt
        ]
        if lost:
            shortest = [prompt._replace(first_row=len(prompt.tokens) - 1) for prompt in lost]
            _, keys = packed.run(self.model, [packed.whole(prompt) for prompt in shortest])
            by_prompt |= {
                id(prompt): packed.KeptWindow(prompt, prompt_keys)
                for prompt, prompt_keys in zip(lost, keys, strict=True)
            }
        return [window for prompt in prompts if (window := by_prompt[id(prompt)]) is not None]

    def forget(self) -> None:
        self._kept, self._kept_bytes = {}, 0

    @torch.inference_mode()
    def score_static(self, jobs: Sequence[StaticJob]) -> Iterator[RowMasses]:
        for some in together(jobs):
            for run in batches(self._static.missing(tokens_of(some))):
                for number, context in enumerate(self._contexts):
                    for token, state in zip(run, self._states(context, run), strict=True):
                        self._static.put(token, number, state)
            rows = self._static.rows(some, self._head)
            assert rows is not None
            yield from rows

    def load_static(self, folder: Path) -> None:
        self._static.load(folder)

    def save_static(self, folder: Path) -> None:
        self._static.save(folder)

    def _states(self, context: np.ndarray, tokens: Sequence[int]) -> torch.Tensor:
        """What the output embedding is given after (context, token), [tokens, width]."""
        seen: list[torch.Tensor] = []
        hook = self.model.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        prompts = np.stack([np.append(context, token) for token in tokens]).astype(np.int64)
        try:
            logits = self.model(
                input_ids=torch.from_numpy(prompts).to(self.device), use_cache=False, logits_to_keep=1
            ).logits[:, -1]
        finally:
            hook.remove()
        states = seen[0][:, -1]
        if not torch.allclose(self._head(states[:1]), logits[:1].float(), atol=1e-3):
            raise ConfigError(
                f"teacher.static = rows after a lone token: {type(self.model).__name__} changes its logits after the "
                'output embedding in a way not known here; set teacher.static = 0 or teacher.backend = "vllm"'
            )
        return states

    def _head(self, states: torch.Tensor) -> torch.Tensor:
        """Logits of hidden states, with what Gemma, Cohere and Granite do to them afterwards."""
        config = self.model.config.get_text_config()
        logits: torch.Tensor = self.model.get_output_embeddings()(states).float()
        if getattr(config, "logit_scale", None):
            logits = logits * config.logit_scale
        if getattr(config, "logits_scaling", None):
            logits = logits / config.logits_scaling
        if cap := getattr(config, "final_logit_softcapping", None):
            logits = torch.tanh(logits / cap) * cap
        return logits


def _load(folder: Path, settings: st.Teacher) -> Any:
    """The model with all of its weights; transformers would draw at random what a checkpoint lacks."""
    from transformers import AutoModelForCausalLM

    name = f"teacher.model = {settings.model!r}"
    if head_is_quantised(folder):
        raise ConfigError(
            f'{name} has a quantised output embedding, which needs its kernels; set teacher.backend = "vllm"'
        )
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=trunk_dtype(settings, on_cpu=not torch.cuda.is_available()),
            trust_remote_code=settings.trust_remote_code,
            use_safetensors=True,
            attn_implementation="sdpa",
            output_loading_info=True,
        )
    except (OSError, ValueError) as error:
        if "scaled_dot_product_attention" in str(error):
            raise ConfigError(
                f"{name} has attention of its own, which transformers cannot mask for branches; "
                'set teacher.backend = "vllm"'
            ) from error
        raise InputError(f"{name} cannot be loaded: {str(error).splitlines()[0]}") from error
    except (KeyError, TypeError, AttributeError, AssertionError, ZeroDivisionError) as error:
        # What transformers makes of a configuration that names things it does not have.
        why = " ".join(str(error).split())[:200]
        raise InputError(f"{name}: its config.json describes no model ({type(error).__name__}: {why})") from error
    except (SafetensorError, RuntimeError) as error:  # a damaged file; shapes that config.json does not have
        raise InputError(
            f"{name}: the weights in {folder} are damaged or not those of its config.json "
            f"({str(error).splitlines()[0]}); fetch the checkpoint again"
        ) from error
    refuse_missing(f"{name} in {folder}", report, "fetch the checkpoint again")
    return model


@torch.inference_mode()
def _has_numbers(model: Any, tokens: np.ndarray) -> bool:
    """Whether the logits of some tokens are free of NaN."""
    return not bool(
        model(input_ids=torch.from_numpy(tokens.astype(np.int64))[None].to(model.device)).logits.isnan().any()
    )


def _check_rope(model: Any, context: int) -> None:
    """Refuse windows in which the length of a pass would decide how its positions turn: of Phi-3's kind, "longrope"."""
    config = model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    limit = rope.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)
    if rope.get("rope_type") == "longrope" and limit and context > limit:
        raise ConfigError(
            f"teacher.context = {context} exceeds the {limit} tokens beyond which {type(model).__name__} reads all "
            f"of a text in another way, so that a branch would depend on its company; lower it to {limit}, or set "
            'teacher.backend = "vllm"'
        )


class _Float32Head(torch.nn.Module):
    """The output embedding computed in float32."""

    def __init__(self, head: torch.nn.Module) -> None:
        super().__init__()
        self.weight = head.weight.detach().float()  # type: ignore[operator]
        bias = getattr(head, "bias", None)
        self.bias = None if bias is None else bias.detach().float()

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(hidden.float(), self.weight, self.bias)

"""The teacher through transformers: the reference engine. The same rows as vLLM's, one window at a time.

Canonical rows come from one forward pass over a window, whose keys and values are kept until the next group of
windows, as many as fit `KEPT_BYTES`. Branches are packed: one forward pass over the cached window with a tree
attention mask, so a branch costs one token of compute.
"""

import copy
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from schemas import settings as st
from schemas.errors import ConfigError, InputError
from stages.engines.engine import Branch, Engine, Prompt
from stages.engines.paths import PathReducer, RowMasses, concatenate, plan_paths
from stages.engines.static import StaticJob, StaticStates, batches, context_tokens, tokens_of

KEPT_BYTES = 1 << 31
"""Bytes of keys and values of a group kept at once; a window beyond it is run again for every pass of branches."""


class HfEngine(Engine):
    """Rows from `AutoModelForCausalLM` on whatever device torch offers."""

    batch_tokens = 256
    """Tokens of short prompts evaluated together."""
    branch_chunk = 256
    """Branches in one packed pass: bounds the mask (chunk x context) and the logits (chunk x vocabulary)."""

    def __init__(self, folder: Path, reducer: PathReducer, settings: st.Teacher):
        from transformers import AutoModelForCausalLM

        self.reducer = reducer
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        try:
            self.model: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=getattr(torch, settings.dtype),
                trust_remote_code=settings.trust_remote_code,
                use_safetensors=True,
                attn_implementation="sdpa",
            )
        except (OSError, ValueError) as error:
            raise InputError(
                f"teacher.model = {settings.model!r} cannot be loaded: {str(error).splitlines()[0]}"
            ) from error
        self.model.to(self.device).eval()
        # Two adjacent float16 logits of a large vocabulary tie; the head is float32 in every engine here.
        head = self.model.get_output_embeddings()
        if head.weight.dtype != torch.float32:
            self.model.set_output_embeddings(_Float32Head(head))
        self._contexts = context_tokens(reducer.vocabulary)
        self._static = StaticStates(reducer, len(self._contexts))
        self._kept: dict[int, tuple[Prompt, Any]] = {}
        self._kept_bytes = 0

    @torch.inference_mode()
    def score(self, prompts: Sequence[Prompt]) -> Iterator[RowMasses]:
        self.forget()
        for (length, _), same in itertools.groupby(prompts, key=lambda p: (len(p.tokens), p.first_row)):
            # Windows go one by one; short prompts of one length together.
            group, size = list(same), max(1, self.batch_tokens // length)
            for a in range(0, len(group), size):
                yield from self._canonical(group[a : a + size])

    def _canonical(self, prompts: Sequence[Prompt]) -> Iterator[RowMasses]:
        """Prompts of one length and one first row, as one batch."""
        tokens = torch.from_numpy(np.stack([p.tokens for p in prompts]).astype(np.int64)).to(self.device)
        first = prompts[0].first_row
        cache = _full_cache()
        out = self.model(
            input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=tokens.shape[1] - first
        )
        self._keep(prompts, cache)
        for prompt, logits in zip(prompts, out.logits, strict=True):
            plan = plan_paths(self.reducer.vocabulary, prompt.text, prompt.starts)
            following = np.append(prompt.tokens[first + 1 :], -1).astype(np.int64)
            yield self.reducer.reduce(logits, plan, following, where=prompt.name)

    @torch.inference_mode()
    def score_branches(self, jobs: Sequence[tuple[Prompt, Sequence[Branch]]]) -> Iterator[RowMasses]:
        for prompt, branches in jobs:
            kept, cache = self._kept.get(id(prompt), (prompt, None))
            if cache is None or kept is not prompt:
                tokens = torch.from_numpy(prompt.tokens.astype(np.int64))[None].to(self.device)
                cache = _full_cache()
                self.model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
            parts = []
            for a in range(0, len(branches), self.branch_chunk):
                parts.append(self._packed(prompt, branches[a : a + self.branch_chunk], cache))
                cache.crop(len(prompt.tokens) - cache.get_seq_length())
            yield concatenate(parts)

    def _keep(self, prompts: Sequence[Prompt], cache: Any) -> None:
        """Remember the keys and values of the prompts of a batch while there is room; in order, so that it repeats."""
        size = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        if self._kept_bytes + size > KEPT_BYTES:
            return
        self._kept_bytes += size
        for index, prompt in enumerate(prompts):
            own = cache
            if len(prompts) > 1:
                own = copy.deepcopy(cache)
                own.batch_select_indices(torch.tensor([index]))
            self._kept[id(prompt)] = (prompt, own)

    def forget(self) -> None:
        self._kept, self._kept_bytes = {}, 0

    @torch.inference_mode()
    def score_static(self, jobs: Sequence[StaticJob]) -> Iterator[RowMasses]:
        for run in batches(self._static.missing(tokens_of(jobs))):
            for number, context in enumerate(self._contexts):
                for token, state in zip(run, self._states(context, run), strict=True):
                    self._static.put(token, number, state)
        for job in jobs:
            rows = self._static.rows(job, self._head)
            assert rows is not None
            yield rows

    def load_static(self, file: Path) -> None:
        self._static.load(file)

    def save_static(self, file: Path) -> None:
        self._static.save(file)

    def _states(self, context: np.ndarray, tokens: Sequence[int]) -> torch.Tensor:
        """What the output embedding is given after (context, token), [tokens, width]."""
        seen: list[torch.Tensor] = []
        hook = self.model.get_output_embeddings().register_forward_pre_hook(lambda _, given: seen.append(given[0]))
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
        logits: torch.Tensor = self.model.get_output_embeddings()(states.to(self.device)).float()
        if getattr(config, "logit_scale", None):
            logits = logits * config.logit_scale
        if getattr(config, "logits_scaling", None):
            logits = logits / config.logits_scaling
        if cap := getattr(config, "final_logit_softcapping", None):
            logits = torch.tanh(logits / cap) * cap
        return logits

    def _packed(self, prompt: Prompt, branches: Sequence[Branch], cache: Any) -> RowMasses:
        """One pass over the branches of one window; a branch sees its canonical prefix and its own chain."""
        slot: dict[tuple[int, tuple[int, ...]], int] = {}
        for branch in branches:
            for length in range(1, len(branch.chain) + 1):
                slot.setdefault((branch.anchor, branch.chain[:length]), len(slot))
        past, width = len(prompt.tokens), len(slot)
        visible = torch.zeros(width, past + width, dtype=torch.bool)
        tokens = torch.zeros(width, dtype=torch.int64)
        position = torch.zeros(width, dtype=torch.int64)
        for (anchor, chain), index in slot.items():
            visible[index, : anchor + 1] = True
            for length in range(1, len(chain) + 1):
                visible[index, past + slot[anchor, chain[:length]]] = True
            tokens[index] = chain[-1]
            position[index] = anchor + len(chain)
        # Masked entries take the lowest finite value: -inf would turn fully masked padding into NaN.
        dtype = self.model.dtype
        mask = torch.where(visible, torch.zeros((), dtype=dtype), torch.finfo(dtype).min)[None, None]
        logits = self.model(
            input_ids=tokens[None].to(self.device),
            position_ids=position[None].to(self.device),
            past_key_values=cache,
            attention_mask=self._masks(mask.to(self.device), position, past),
            use_cache=True,
        ).logits[0]
        wanted = [slot[branch.anchor, branch.chain] for branch in branches]
        starts = np.array([branch.start for branch in branches], np.int64)
        plan = plan_paths(self.reducer.vocabulary, prompt.text, starts)
        none = np.full(len(branches), -1, np.int64)
        return self.reducer.reduce(logits[wanted], plan, none, where=f"{prompt.name}, branches")

    def _masks(self, mask: torch.Tensor, position: torch.Tensor, past: int) -> Any:
        """The mask per attention type, for models that mix full and sliding-window layers."""
        config = self.model.config.get_text_config()
        kinds = set(getattr(config, "layer_types", None) or [])
        if kinds <= {"full_attention"}:
            return mask
        window = config.sliding_window
        width = len(position)
        key_position = torch.cat([torch.arange(past), position])
        far = (position[:, None] - key_position[None, :]) >= window
        sliding = mask.masked_fill(far.view(1, 1, width, past + width).to(mask.device), torch.finfo(mask.dtype).min)
        return {"full_attention": mask, "sliding_attention": sliding}


def _full_cache() -> Any:
    """An empty cache that keeps all keys: one made for a model's sliding window would drop some, and a branch may
    leave the window anywhere."""
    from transformers import DynamicCache

    return DynamicCache()


class _Float32Head(torch.nn.Module):
    """The output embedding computed in float32."""

    def __init__(self, head: torch.nn.Module):
        super().__init__()
        self.weight = head.weight.detach().float()  # type: ignore[operator]
        bias = getattr(head, "bias", None)
        self.bias = None if bias is None else bias.detach().float()

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(hidden.float(), self.weight, self.bias)

"""A student under training: its trained parameters, optimiser, rate, and what a checkpoint holds of them.

With `lora_rank` the student's own weights are frozen and peft's adapters (Hu et al., arXiv 2106.09685) are trained
beside them; checkpoints then hold adapters, objective and moments alone, and `export` merges. Autocast computes in
`train.dtype` while weights, gradients and moments stay float32. Randomness (dropout) is drawn anew at every step from
(seed, step, rank), so no generator state has to survive a resume.
"""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bytecache.schemas import settings as st
from bytecache.schemas.errors import ConfigError
from bytecache.stages.student.check import refuse_tied_targets
from bytecache.stages.student.student import Student, split_model
from bytecache.stages.train.batches import stream
from bytecache.stages.train.batches.types import MicroBatch, Step
from bytecache.stages.train.compiled import compile_trunk
from bytecache.stages.train.objective.loss import LossParts
from bytecache.stages.train.objective.objective import Objective
from bytecache.stages.train.parallel import World, like, whole

BETAS = (0.9, 0.95)


class Scored(nn.Module):
    """Student and objective in one module: what DDP and FSDP wrap, since collectives follow one forward call."""

    def __init__(self, student: Student, objective: Objective, dtype: str) -> None:
        super().__init__()
        self.model, self.objective = student.model, objective
        self._student, self._dtype = student, getattr(torch, dtype)
        self._pieces = split_model(student) if objective.chunk else None

    def forward(self, micro: MicroBatch, *, measure: bool = False) -> LossParts:
        """Sums of one micro-batch on its own device; `measure` asks for terms whose weights are 0."""
        device = micro.input_ids.device.type
        with torch.autocast(device, dtype=self._dtype, enabled=self._dtype is not torch.float32):
            if self._pieces is not None:
                trunk, to_logits = self._pieces
                parts: LossParts = self.objective(
                    to_logits, trunk(micro.input_ids, micro.position_ids), micro, measure=measure
                )
            else:
                logits, hidden = self._student.forward(micro.input_ids, micro.position_ids)
                parts = self.objective(logits, hidden, micro, measure=measure)
        if micro.slot_token.numel() == 0:
            # Every rank must give every parameter a gradient, or the collectives of FSDP no longer pair up.
            owned = (p for p in self.objective.parameters() if p.requires_grad)
            nothing = sum((p.sum() * 0 for p in owned), parts.token.new_zeros(()))
            parts = parts._replace(token=parts.token + nothing)
        return parts


@dataclass
class Run:
    """A student, its objective and optimiser: everything a checkpoint holds."""

    student: Student
    objective: Objective
    optimizer: torch.optim.AdamW
    scored: nn.Module
    """`Scored`, wrapped for the world it runs in."""
    world: World

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Every trained parameter once (tied weights have one name), model first."""
        for name, parameter in self.student.model.named_parameters(prefix="model"):
            if parameter.requires_grad:
                yield name, parameter
        yield from self.objective.named_parameters()

    def tensors(self) -> dict[str, Tensor]:
        """Names: `model.*`, `head.*`, `adam.<parameter>/<moment>`; full tensors, on every rank (a collective call)."""
        named: dict[str, Tensor] = {}
        for name, parameter in self.parameters():
            named[name] = whole(parameter)
            for moment, value in self.optimizer.state.get(parameter, {}).items():
                named[f"adam.{name}/{moment}"] = whole(value)
        return named

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Load what `tensors` returned, whatever the number of ranks it came from."""
        with torch.no_grad():
            for name, parameter in self.parameters():
                parameter.copy_(like(tensors[name], parameter))
                prefix = f"adam.{name}/"
                moments = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
                if moments:
                    # The step count is one number, never sharded; fused AdamW wants it beside the parameter.
                    self.optimizer.state[parameter] = {
                        k: v.to(parameter.device) if k == "step" else like(v, parameter) for k, v in moments.items()
                    }

    def seed_step(self, seed: int, step: int) -> None:
        """Seed what is random in step number `step` on this rank."""
        text = f"{seed}:{step}:{self.world.rank}"
        torch.manual_seed(int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "little"))


def learning_rate(step: int, settings: st.Train) -> float:
    """Rate of step number `step` (from 0): linear warm-up, then `train.schedule` down to `train.final_rate`."""
    if step < settings.warmup:
        return settings.learning_rate * (step + 1) / settings.warmup
    progress = min((step - settings.warmup) / max(settings.steps - settings.warmup, 1), 1.0)
    left = {"cosine": 0.5 * (1 + math.cos(math.pi * progress)), "linear": 1 - progress, "constant": 1.0}
    floor = settings.final_rate
    return settings.learning_rate * (floor + (1 - floor) * left[settings.schedule])


def kl_share(step: int, settings: st.Train) -> float:
    """Share of `train.lambda_kl` at step number `step` (from 0), by `train.kl_schedule`."""
    progress = step / max(settings.steps - 1, 1)
    return {"constant": 1.0, "decay": 1 - progress, "rise": progress}[settings.kl_schedule]


def can_be_extended(settings: st.Train) -> bool:
    """Whether the first steps of a run are the same however many follow: no schedule looks at `train.steps`."""
    return settings.schedule == settings.kl_schedule == "constant"


def add_adapters(opened: Student, settings: st.Train) -> None:
    """Freeze the student and put low-rank adapters beside its linear maps (all but the lm_head by default).

    Raises:
        ConfigError: no module of that name, or a head that is the embedding as well.
    """
    from peft import LoraConfig, get_peft_model

    refuse_tied_targets(opened.model, settings.lora_targets)
    named = settings.lora_targets.split()
    targets = "all-linear" if named == ["all-linear"] else named
    config = LoraConfig(
        r=settings.lora_rank, lora_alpha=settings.lora_alpha, target_modules=targets, task_type="CAUSAL_LM"
    )
    try:
        opened.model = get_peft_model(opened.model, config)
    except ValueError as error:
        raise ConfigError(
            f"train.lora_targets = {settings.lora_targets!r}: {str(error).splitlines()[0][:160]}; "
            "name ends of module names such as q_proj, or all-linear"
        ) from error
    opened.model.get_input_embeddings().weight.requires_grad_(settings.lora_embeddings)


def start_run(
    opened: Student,
    settings: st.Train,
    seed: int,
    device: torch.device,
    *,
    lambda_kl: float | None = None,
    world: World | None = None,
    reader: stream.ShardReader | None = None,
) -> Run:
    """A run at step 0; the global random state is seeded.

    Args:
        lambda_kl: replaces the setting (0: the control). reader: training text that the objective may count on.
    """
    world = world or World(device=device)
    torch.manual_seed(seed)
    if settings.lora_rank:
        add_adapters(opened, settings)
    objective = Objective(settings, opened, seed, lambda_kl=lambda_kl)
    if reader is not None:
        objective.observe(reader)
    objective.to(device)
    opened.model.to(device).train()
    if settings.activation_checkpointing:
        opened.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if settings.compile and world.strategy == "ddp":
        compile_trunk(opened)
    scored = world.wrap(Scored(opened, objective, settings.dtype))
    groups = _groups(opened, objective, settings)
    optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate, betas=BETAS, fused=True)
    return Run(opened, objective, optimizer, scored, world)


def _groups(opened: Student, objective: Objective, settings: st.Train) -> list[dict[str, Any]]:
    """Trained parameters by their weight decay and `share`, the part of the rate at hand that they learn at."""
    embeddings = opened.model.get_input_embeddings().weight
    groups: dict[tuple[bool, float], list[nn.Parameter]] = {(True, 1.0): [], (False, 1.0): []}
    for parameter in opened.model.parameters():
        if parameter.requires_grad:
            share = settings.embedding_rate if parameter is embeddings else 1.0
            groups.setdefault((parameter.ndim > 1, share), []).append(parameter)
    for name, parameter in objective.named_parameters():
        if parameter.requires_grad:
            groups[parameter.ndim > 1 and objective.decays(name), 1.0].append(parameter)
    return [
        {"params": members, "weight_decay": settings.weight_decay if decays else 0.0, "share": share}
        for (decays, share), members in groups.items()
    ]


def set_rate(run: Run, rate: float) -> None:
    """Let the optimiser take its next step at this rate, the embeddings at their share of it."""
    for group in run.optimizer.param_groups:
        group["lr"] = rate * group["share"]


def micro_loss(run: Run, micro: MicroBatch, *, measure: bool = False) -> LossParts:
    """Forward one micro-batch; `measure` asks for the byte terms even where their weights are 0."""
    parts: LossParts = run.scored(micro, measure=measure)
    return parts


def backward_step(run: Run, step: Step, n_tokens: int, n_byte_tokens: int, n_micro: int) -> dict[str, float]:
    """Accumulate the gradients of one step; returns its loss terms in nats per token (`Objective.terms`).

    Args:
        step: this rank's share. n_tokens, n_byte_tokens: counts of the whole step, over all ranks.
        n_micro: micro-batches of the rank that has most of them.
    """
    world = run.world
    sums = [torch.zeros((), dtype=torch.float64)] * len(LossParts._fields)
    # DDP exchanges gradients once, so one micro-batch will do for it; FSDP gathers weights in every one.
    passes = n_micro if world.strategy == "fsdp" else max(len(step.micro), 1)
    for number in range(passes):
        micro = step.micro[number] if number < len(step.micro) else stream.blank()
        with world.accumulating(run.scored, last=number == passes - 1):
            parts = micro_loss(run, micro.to(world.device))
            # Both strategies average gradients over ranks; ours are shares of one sum.
            loss = run.objective.total(parts, n_tokens, n_byte_tokens) * world.size
            loss.backward()  # type: ignore[no-untyped-call]
        sums = [total + part.detach().double().cpu() for total, part in zip(sums, parts, strict=True)]
    everyone = world.sum([float(value) for value in sums])
    return run.objective.terms(
        LossParts(*(torch.tensor(value, dtype=torch.float64) for value in everyone)), n_tokens, n_byte_tokens
    )

"""torch.compile for the student's layers, where it works; where it does not, the same run without it.

Only the trunk is compiled: the objective reads the lm_head's input and few of its rows, and its sums over the
vocabulary are compiled already (`choices.py`). Shapes are dynamic, so batches of every size share one graph. Forward
and backward are tried once before the run; whatever fails there (no C++ compiler, an operator without a lowering) is
reported in one line and the trunk is put back as it was. Results differ from the plain ones by rounding.
Price: half a minute to some minutes at the start of a run; the gain is a GPU's, or none.
"""

import warnings

import torch
from torch import nn

from bytecache.stages.student.student import Student


def compile_trunk(opened: Student) -> bool:
    """Compile the layers of a student in place, on the device it is on; whether it worked.

    Warns where it did not. Random state and gradients are left as they were.
    """
    model = opened.model
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    trunk: nn.Module = inner.base_model
    with torch.random.fork_rng():
        try:
            trunk.compile(dynamic=True)
            for shape in ((2, 7), (3, 12)):
                _try(trunk, torch.ones(shape, dtype=torch.int64, device=model.device))
        except Exception as error:  # a compiler fails in many ways, and none of them is the student's
            trunk._compiled_call_impl = None
            torch._dynamo.reset()
            reason = " ".join(str(error).split())[:200]
            warnings.warn(
                f"train.compile: {type(error).__name__}: {reason}; training goes on without",
                RuntimeWarning,
                stacklevel=2,
            )
            return False
    return True


def _try(trunk: nn.Module, ids: torch.Tensor) -> None:
    gradients = {name: parameter.grad for name, parameter in trunk.named_parameters()}
    states = trunk(input_ids=ids, use_cache=False).last_hidden_state
    states.sum().backward()
    for name, parameter in trunk.named_parameters():
        parameter.grad = gradients[name]

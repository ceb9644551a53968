"""For tests: lets the index's torchvision, a CUDA build, be imported beside a CPU build of torch.

Its library of operators does not load there, and torchvision fails at the first operator that it describes to torch.
Two declarations are all that it wants; nothing here calls them. Python imports this file at its start where the folder
is on PYTHONPATH, so that processes of processes have it too.
"""

import importlib.abc
import sys
from typing import Any


class _Declare(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, path: Any, target: Any = None) -> None:
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            library = torch.library.Library("torchvision", "FRAGMENT")
            for operator in ("nms", "qnms"):
                library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            _KEPT.append(library)


_KEPT: list[Any] = []
sys.meta_path.insert(0, _Declare())

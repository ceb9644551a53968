"""A pretend GPU: tensors that are on no CPU as far as torch can tell, computed on the CPU, with CUDA's rules enforced.

    with PretendDevice() as gpu:
        weights = gpu.put(torch.randn(8, 16))
        ...                     # raises where an operation mixes a device tensor with one of the host
    gpu.synchronisations        # Counter of what made the host wait
    gpu.kernels, gpu.bytes      # launches, and bytes that they read and wrote, by operation

A CPU build of torch has no guard for cuda tensors, so the pretend ones say `meta`. What it cannot see is time, and what
kernels of other makers (Triton) do. A copy to the host waits unless it is `non_blocking`, which on a real GPU needs
pinned memory; an index tensor of the host is taken, as CUDA does, and counted as a copy that waits.
"""

import collections
from collections.abc import Callable
from typing import Any, Self

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

DEVICE = torch.device("meta")
_VIEWS = frozenset({
    "view", "_unsafe_view", "expand", "slice", "select", "unsqueeze", "squeeze", "t", "transpose", "detach", "alias",
    "as_strided", "reshape", "permute", "narrow", "split", "unbind", "lift_fresh",
})  # fmt: skip
_INDEXING = frozenset({"index", "index_put_", "_index_put_impl_", "index_put"})
_WAITS = {
    "_local_scalar_dense.default": 1, "nonzero.default": 1, "repeat_interleave.Tensor": 1, "masked_select.default": 1,
    "segment_reduce.default": 2,
}  # fmt: skip
"""How often CUDA's implementation of an operation waits for the device."""


class _DeviceTensor(torch.Tensor):
    """A tensor of the pretend device; `content` on the CPU."""

    content: torch.Tensor
    gpu: "PretendDevice"

    @staticmethod
    def __new__(cls: Any, content: torch.Tensor, gpu: "PretendDevice") -> "_DeviceTensor":
        tensor = torch.Tensor._make_wrapper_subclass(
            cls, content.shape, strides=content.stride(), storage_offset=content.storage_offset(),
            dtype=content.dtype, device=DEVICE,
        )  # fmt: skip
        tensor.content, tensor.gpu = content, gpu
        return tensor

    @classmethod
    def __torch_dispatch__(cls: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        (first, *_) = [part for part in tree_flatten((args, kwargs))[0] if isinstance(part, _DeviceTensor)]
        return first.gpu.run(func, args, kwargs or {})


class PretendDevice(TorchDispatchMode):
    """The device, and the book of what it did. A context manager: inside, new tensors may be made on `DEVICE`."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: collections.Counter[str] = collections.Counter()
        self.bytes: collections.Counter[str] = collections.Counter()
        self.synchronisations: collections.Counter[str] = collections.Counter()

    def __enter__(self) -> Self:
        super().__enter__()
        return self

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.run(func, args, kwargs or {})

    def put(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor on the device, without a note in the book."""
        return _DeviceTensor(tensor.clone(), self)

    def forget(self) -> None:
        """Begin a new book."""
        for book in (self.kernels, self.bytes, self.synchronisations):
            book.clear()

    def run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """One operation, on whichever side its tensors are."""
        name = str(func).removeprefix("aten.")
        tensors = [part for part in tree_flatten((args, kwargs))[0] if isinstance(part, torch.Tensor)]
        ours = [tensor for tensor in tensors if isinstance(tensor, _DeviceTensor)]
        if name == "copy_.default":
            return self._copy(*args[:2], waits=not (args[2] if len(args) > 2 else kwargs.get("non_blocking", False)))
        if name in ("_to_copy.default", "to.dtype_layout"):  # the latter in inference mode
            return self._move(func, args[0], kwargs)
        made_here = kwargs.get("device") is not None and torch.device(kwargs["device"]) == DEVICE
        if not ours and not made_here:
            return func(*args, **kwargs)
        for tensor in tensors:
            if not isinstance(tensor, _DeviceTensor) and tensor.dim():
                self._meet(name, tensor)
        kwargs = kwargs | ({"device": "cpu"} if made_here else {})
        kwargs.pop("pin_memory", None)
        out = func(*tree_map(_content, args), **tree_map(_content, kwargs))
        self._note(name, ours, out)
        # Told how much there will be, or not to look, these need not ask the device.
        if name in _WAITS and kwargs.get("output_size") is None and not kwargs.get("unsafe"):
            self.synchronisations[name] += _WAITS[name]
        return tree_map(lambda part: _DeviceTensor(part, self) if isinstance(part, torch.Tensor) else part, out)

    def _meet(self, name: str, tensor: torch.Tensor) -> None:
        """A tensor of the host among those of the device: an index is copied, anything else is an error."""
        if name.split(".")[0] in _INDEXING and not tensor.is_floating_point():
            self.synchronisations["index of the host"] += 1
            return
        raise RuntimeError(f"Expected all tensors to be on the same device, but found cuda:0 and cpu (in {name})")

    def _copy(self, target: torch.Tensor, source: torch.Tensor, *, waits: bool) -> torch.Tensor:
        if isinstance(target, _DeviceTensor) != isinstance(source, _DeviceTensor) and waits:
            self.synchronisations["copy_"] += 1
        _content(target).copy_(_content(source))
        return target

    def _move(self, func: Callable[..., torch.Tensor], source: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
        """`.to(...)`: between the sides, or a cast where it is."""
        out = func(_content(source), **{name: value for name, value in kwargs.items() if name != "device"})
        here = isinstance(source, _DeviceTensor)
        device = kwargs.get("device")
        to_device = here if device is None else torch.device(device) == DEVICE
        if here != to_device and not kwargs.get("non_blocking"):
            self.synchronisations["to the device" if to_device else "to the host"] += 1
        if here and source.dtype != out.dtype:
            self._note("cast", [source], out)
        return _DeviceTensor(out.clone() if out is source else out, self) if to_device else out

    def _note(self, name: str, ours: list[Any], out: Any) -> None:
        """Write down a launch and its traffic; views are free, a gather reads what it gives."""
        base = name.split(".")[0]
        if base in _VIEWS:
            return
        results = [part for part in tree_flatten(out)[0] if isinstance(part, torch.Tensor)]
        wrote = sum(part.nbytes for part in results)
        read = wrote if base in ("index", "gather", "index_select") else sum(part.content.nbytes for part in ours)
        self.kernels[name] += 1
        self.bytes[name] += read + wrote


def _content(part: Any) -> Any:
    return part.content if isinstance(part, _DeviceTensor) else part

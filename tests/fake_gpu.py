"""A fake GPU with shapes and devices but no arithmetic, beside a real host: for machines without a GPU.

Tensors on "cuda" are torch's fake ones; operators among tensors of the host run for real.
"""

import itertools
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import solq_lab

aten = torch.ops.aten
LIBRARY = os.path.join(os.path.dirname(os.path.abspath(solq_lab.__file__)), "")  # ends with a separator
SIZED_BY_NUMBERS = (aten.nonzero, aten.masked_select, aten._unique2, aten.unique_dim, aten.unique_consecutive)
WHOLE_IN_INFERENCE = (aten.to, aten.item, aten.is_nonzero)  # elsewhere torch takes them apart itself
INDEXING = (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_)


class Traffic(TorchDispatchMode):
    """Runs operators of the host for real, and records where the host waits for the GPU.

    Attributes:
        waits: the function of this library behind every wait, in their order.
        copies: the same for tensors of the host that are copied without a wait.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.copies: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = _tensors((args, kwargs))
        target = kwargs.get("device")
        if all(map(_is_on_host, given)) and (target is None or torch.device(target).type == "cpu"):
            with unset_fake_temporarily():
                return func(*args, **kwargs)

        operator = func.overloadpacket
        if operator in WHOLE_IN_INFERENCE:
            with self:
                return func.decompose(*args, **kwargs)
        if operator is aten._local_scalar_dense:
            self.waits.append(_caller())
            return _number_of(given[0].dtype)
        if operator is aten._to_copy and target is not None and torch.device(target).type == "cpu":
            assert not kwargs.get("non_blocking"), "the host would read what has not arrived yet"
            self.waits.append(_caller())
            with unset_fake_temporarily():
                dtype = kwargs.get("dtype") or given[0].dtype
                return torch.full(given[0].shape, _number_of(given[0].dtype), dtype=dtype)

        crosses = any(map(_is_on_host, given))
        if operator in (aten._to_copy, aten.copy_):
            waits = crosses and not (kwargs.get("non_blocking") or True in args[2:])
        elif operator in INDEXING:  # indices and values of the host are copied, indices of bits are counted
            waits = crosses or any(index.dtype == torch.bool for index in _tensors(args[1]))
        else:  # a single number of the host is copied with the launch; fake tensors reject longer ones
            waits = operator in SIZED_BY_NUMBERS
        if waits or crosses:
            (self.waits if waits else self.copies).append(_caller())
        return func(*args, **kwargs)


@contextmanager
def fake_gpu(device: str = "cuda") -> Iterator[Traffic]:
    """Within, tensors and modules can be moved to "cuda".

    Args:
        device: "meta" stands for the GPU where gradients flow, which torch cannot do on "cuda" without a driver; it has
            no autocast.
    """
    autocast = torch.autocast

    def to(module: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        where, _, _, memory_format = torch._C._nn._parse_to(*args, **kwargs)
        return _place(module, where, memory_format or torch.preserve_format)

    class Autocast(autocast):
        def __init__(self, device_type: str, *args: Any, **kwargs: Any) -> None:
            super().__init__("cpu" if device_type == "meta" else device_type, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Module, "to", to)  # real parameters and fake ones cannot change places
        patch.setattr(torch, "autocast", Autocast)
        patch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
        patch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)
        patch.setattr(torch.cuda, "get_rng_state", lambda *_: torch.zeros(16, dtype=torch.uint8))
        addresses = itertools.count(1)
        patch.setattr(FakeTensor, "data_ptr", lambda tensor: next(addresses))
        patch.setattr(FakeTensor, "tolist", lambda tensor: tensor.cpu().tolist())
        with FakeTensorMode(allow_non_fake_inputs=True), Traffic() as traffic:
            yield traffic


def _place(module: nn.Module, device: torch.device | None, memory_format: torch.memory_format) -> nn.Module:
    """Give a module other parameters and buffers; one that has several names stays one."""
    moved: dict[int, Tensor] = {}
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and id(tensor) not in moved:
                    form = memory_format if tensor.ndim == 4 else torch.preserve_format
                    there = torch.empty_like(tensor, device=device, memory_format=form, requires_grad=False)
                    is_parameter = isinstance(tensor, nn.Parameter)
                    moved[id(tensor)] = nn.Parameter(there, tensor.requires_grad) if is_parameter else there
                tensors[name] = None if tensor is None else moved[id(tensor)]
    return module


def _number_of(dtype: torch.dtype) -> bool | int:
    """The numbers of fake tensors: whole numbers are one, because they often are sizes, all others zero."""
    return False if dtype == torch.bool else int(not dtype.is_floating_point)


def _caller() -> str:
    """The function of this library that called the operator; "" where none did."""
    frame = sys._getframe()
    while frame is not None and not frame.f_code.co_filename.startswith(LIBRARY):
        frame = frame.f_back
    return "" if frame is None else frame.f_code.co_qualname


def _is_on_host(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu"


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]

"""convert_ and revert_: a model's own convolutions on the kernels of this package, and back.

A module is converted by giving it another class, not by putting another module in its place: `nn.Conv2d` becomes
`sepconv_ext.nn.Conv2d`, and so it is with `nn.Conv1d`, `nn.Conv3d`, `nn.ConvTranspose1d` and `nn.ConvTranspose2d`. Both
classes have the same attributes and differ in one method. So the Parameter objects, buffers, hooks, training and
requires_grad flags, device and names stay exactly what they were. So does every reference that anyone holds to the
module: an optimiser's, a second name that it is registered under, the model itself where it is a single Conv2d.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from types import CellType, FunctionType
from typing import Any

import torch
from torch import nn

from .nn import Conv1d, Conv2d, Conv3d, ConvTranspose1d, ConvTranspose2d
from .report import Entry, Report

__all__ = ["Entry", "Report", "convert_", "revert_"]

_OURS: dict[type, type] = {
    nn.Conv1d: Conv1d,
    nn.Conv2d: Conv2d,
    nn.Conv3d: Conv3d,
    nn.ConvTranspose1d: ConvTranspose1d,
    nn.ConvTranspose2d: ConvTranspose2d,
}
_NAMES = tuple(cls.__name__ for cls in _OURS)
_TORCHS: dict[type, type] = {ours: torchs for torchs, ours in _OURS.items()}

# The class that a converted module had, kept on the module so that a copy or an unpickled model can be reverted too.
_ORIGINAL = "_sepconv_original_class"
_DENSE = "dense: torch's own kernel is the one for it"
_VOLUME = "a volume, not depthwise: torch's own kernel is the one for it"


def convert_(model: nn.Module, filter_fn: Callable[[str, nn.Module], bool] | None = None) -> Report:
    """Moves a model's grouped, depthwise and pointwise convolutions to this package's kernels, in place.

    Args:
        model: any module. It may itself be a convolution: then it is converted in place like any other.
        filter_fn: called with (name, module) for each convolution that could be replaced; False keeps it as it is. A
            module that is registered under several names is asked about once, under its first name. Default: all.

    Returns:
        A Report: which convolutions were replaced, and which were skipped and why. Skipped are dense convolutions
        (groups = 1 with a kernel of several taps, with padding, or transposed), volumes that are not depthwise, and
        subclasses of torch's layers. So are lazy, quantised and scripted modules, and modules whose forward was
        replaced on the instance. So are weights that are tensor subclasses, integer or complex.

    Modules are changed, not exchanged: parameters, buffers, hooks, flags and references to the modules stay as they
    are. Copies and pickles of a converted model work; reading a pickle needs sepconv_ext installed. A state_dict does
    not change.

    Each layer works by itself, in training and in inference. `freeze` makes one network for inference of them.
    """
    report = Report()
    for name, module in model.named_modules():
        if not _is_convolution(module):
            continue
        family = _family(module)
        reason = _refusal(module, family)
        if reason is None and filter_fn is not None and not filter_fn(name, module):
            reason = "filter_fn said no"
        if reason is None:
            module.__dict__[_ORIGINAL] = type(module)
            module.__class__ = _rebased(type(module), _OURS)
            report.replaced.append(Entry(name, family, module.extra_repr()))
        else:
            report.skipped.append(Entry(name, family, module.extra_repr(), reason))
    return report


def revert_(model: nn.Module) -> int:
    """Undoes convert_: every module that convert_ replaced is what it was, and nothing else changes.

    Modules that were built as sepconv_ext.nn layers stay what they are.

    Returns:
        The number of convolutions that have their former class again.
    """
    converted = [module for module in model.modules() if _ORIGINAL in module.__dict__]
    for module in converted:
        original = module.__dict__.pop(_ORIGINAL)
        reverted = _rebased(type(module), _TORCHS)
        # Another one where parametrizations or fully_shard came to the class, or went, since.
        module.__class__ = original if _is_alike(original, reverted) else reverted
    return len(converted)


def _is_convolution(module: nn.Module) -> bool:
    if isinstance(module, torch.jit.ScriptModule):
        return getattr(module, "original_name", "") in _NAMES
    named = _is_quantised(module) and type(module).__name__.startswith(_NAMES)
    return isinstance(module, tuple(_OURS)) or named


def _is_quantised(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.ao.")


def _is_transposed(module: Any) -> bool:
    return isinstance(module, (nn.ConvTranspose1d, nn.ConvTranspose2d))


def _family(module: Any) -> str:
    groups = getattr(module, "groups", None)
    if groups is None:
        return "unknown"
    if groups == module.in_channels and (groups > 1 or not _is_transposed(module) or module.out_channels == 1):
        return "depthwise"
    if groups > 1:
        return "grouped"
    if _is_transposed(module):
        return "dense"
    unpadded = isinstance(module.padding, str) or not any(module.padding)
    return "pointwise" if set(module.kernel_size) == {1} and unpadded else "dense"


def _refusal(module: nn.Module, family: str) -> str | None:
    """Why a convolution cannot or need not be replaced; None if it can."""
    if isinstance(module, torch.jit.ScriptModule):
        return "a TorchScript module"
    if isinstance(module, nn.modules.lazy.LazyModuleMixin):
        return "lazy: its shape is known after the first forward"
    if isinstance(module, tuple(_OURS.values())):
        return "converted before" if _ORIGINAL in module.__dict__ else "already a sepconv_ext layer"
    if _is_quantised(module):
        return "quantised"
    if not _is_plain(type(module)):
        return f"a class of its own: {type(module).__module__}.{type(module).__qualname__}"
    if getattr(module, "qconfig", None) is not None:
        return "prepared for quantisation, which goes by the class"
    if "forward" in module.__dict__ or "_conv_forward" in module.__dict__:
        return "its forward was replaced on the instance"
    for tensor in (*module.parameters(), *module.buffers()):
        if type(tensor) not in (nn.Parameter, torch.Tensor) and not _is_dtensor(tensor):
            return f"its weight is a tensor subclass: {type(tensor).__name__}"
        if not tensor.is_floating_point():
            return f"no kernel for {tensor.dtype}"
    if isinstance(module, nn.Conv3d) and (family != "depthwise" or module.groups == 1):
        return _VOLUME
    return _DENSE if family == "dense" else None


def _is_dtensor(tensor: torch.Tensor) -> bool:
    tensors = sys.modules.get("torch.distributed.tensor")
    return tensors is not None and type(tensor) is tensors.DTensor


def _is_plain(cls: type) -> bool:
    """One of torch's own classes, or what torch itself puts over it, as parametrize, fully_shard and replicate do."""
    if cls in _OURS:
        return True
    overrides = not {"forward", "_conv_forward"}.isdisjoint(vars(cls))
    return cls.__module__.startswith("torch.") and not overrides and _is_plain(cls.__bases__[-1])


def _rebased(cls: type, exchanged: Mapping[type, type]) -> type:
    """The class with others in the place of some that it is derived from.

    A copy where it is not one of them itself: deep copies of a module share the class and must not change with it.
    """
    if cls in exchanged or exchanged.keys().isdisjoint(cls.__mro__):
        return exchanged.get(cls, cls)
    attributes = {name: value for name, value in vars(cls).items() if name not in ("__dict__", "__weakref__")}
    copy = type(cls)(cls.__name__, tuple(_rebased(base, exchanged) for base in cls.__bases__), attributes)
    for name, value in attributes.items():  # a method that calls super() knows its class
        if isinstance(value, FunctionType) and "__class__" in value.__code__.co_freevars:
            setattr(copy, name, _of_class(value, copy))
    return copy


def _of_class(method: FunctionType, cls: type) -> FunctionType:
    """The method as if it had been written in another class's body."""
    cells = zip(method.__code__.co_freevars, method.__closure__ or (), strict=True)
    closure = tuple(CellType(cls) if name == "__class__" else cell for name, cell in cells)
    copy = FunctionType(method.__code__, method.__globals__, method.__name__, method.__defaults__, closure)
    copy.__kwdefaults__ = method.__kwdefaults__
    copy.__dict__.update(method.__dict__)
    return copy


def _is_alike(cls: type, other: type) -> bool:
    """Whether one class is the other, or a copy of it by _rebased."""
    if cls is other:
        return True
    if len(cls.__bases__) != len(other.__bases__) or vars(cls).keys() != vars(other).keys():
        return False
    return cls.__name__ == other.__name__ and all(map(_is_alike, cls.__bases__, other.__bases__))

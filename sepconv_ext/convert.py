"""convert_ and revert_: a model's own convolutions on the kernels of this package, and back.

A module is converted by giving it another class, not by putting another module in its place: `nn.Conv2d` becomes
`sepconv_ext.nn.Conv2d` and `nn.Conv1d` becomes `sepconv_ext.nn.Conv1d`, which have the same attributes and differ in
one method. So the Parameter objects, buffers, hooks, training and requires_grad flags, device, names, and every
reference that anyone holds to the module (optimisers, a module registered under two names, the model itself where it
is a single Conv2d) stay exactly what they were.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from types import CellType, FunctionType
from typing import Any

import torch
from torch import nn

from . import fuse as chains
from .cost import Cost, cost
from .fold import Chain
from .nn import Conv1d, Conv2d, SeparableConv2d
from .report import Entry, Report

__all__ = ["Entry", "Report", "convert_", "revert_"]

_OURS: dict[type, type] = {nn.Conv1d: Conv1d, nn.Conv2d: Conv2d}
_TORCHS: dict[type, type] = {ours: torchs for torchs, ours in _OURS.items()}

# The class that a converted module had, kept on the module so that a copy or an unpickled model can be reverted too.
_ORIGINAL = "_sepconv_original_class"
_DENSE = "dense: torch's own kernel is the one for it"


def convert_(
    model: nn.Module,
    filter_fn: Callable[[str, nn.Module], bool] | None = None,
    fuse: bool = False,
    input_size: Sequence | None = None,
) -> Report:
    """Moves a model's grouped, depthwise and pointwise convolutions to this package's kernels, in place.

    Args:
        model: any module. It may itself be an nn.Conv2d or nn.Conv1d: then it is converted in place like any other.
        filter_fn: called with (name, module) for each convolution that could be replaced or fused; False keeps it as it
            is. A module that is registered under several names is asked about once, under its first name. Default: all.
        fuse: also let depthwise -> [batch norm] -> [activation] -> pointwise -> [batch norm] -> [activation] run as one
            separable_conv2d, and any other convolution -> [batch norm] -> [activation] as one convolution. Default:
            False.
        input_size: of one input (N, C, H, W), as for sepconv_ext.cost: with it the report of a fused model has
            multiply-accumulates and bytes besides parameters. Default: None.

    Returns:
        A Report: which convolutions were replaced, and which were skipped and why. Skipped are dense convolutions
        (groups = 1 with a kernel of several taps, or with padding), subclasses of nn.Conv2d and nn.Conv1d, lazy,
        quantised and scripted modules, modules whose forward was replaced on the instance, and weights that are tensor
        subclasses, integer or complex. With `fuse`, also what was fused and folded, and which depthwise convolution was
        not and why.

    Modules are changed, not exchanged: parameters, buffers, hooks, flags and references to the modules stay as they
    are. Copies and pickles of a converted model work; reading a pickle needs sepconv_ext installed. A state_dict does
    not change.

    A fused model: batch norms are folded in eval(), into weights that are held apart, made again whenever a parameter
    or a statistic changes, and part of the graph where somebody differentiates by the parameters. In train() a chain
    with a batch norm runs module by module, so that training is what it always was; back in eval() it is fused again.
    So does a chain while one of its modules, or a block that holds some of them, has a hook; and from when on one of
    these is exchanged, has a layer inserted, or does something else than before (another eps or stride, a forward of
    its own). The modules of a chain work together: to call one of them alone, to put some of them into another
    container (as what rewrites models by torch.fx does), to script the model or to export it to ONNX, revert_ it first.
    Not fused is what is used in several places (a convolution, a norm, an activation, or the output between two of
    them), has hooks or is parametrized. A value that is written through `.data`, by another process, by a collective of
    torch.distributed or by the replay of a CUDA graph is seen after the next forward pass in train(). A forward that an
    attribute of the model makes use the middle of a chain is not seen through.
    """
    before = cost(model, input_size) if fuse and input_size is not None else None  # fails before anything is changed
    report = Report()
    answers: dict[nn.Module, bool] = {}

    def wanted(name: str, module: nn.Module) -> bool:
        if module not in answers:
            answers[module] = filter_fn is None or bool(filter_fn(name, module))
        return answers[module]

    reasons: dict[nn.Module, str] = {}
    for name, module in model.named_modules():
        if not _is_convolution(module):
            continue
        family = _family(module)
        reason = _refusal(module, family)
        if reason is None and not wanted(name, module):
            reason = "filter_fn said no"
        if reason is None:
            module.__dict__[_ORIGINAL] = type(module)
            module.__class__ = _rebased(type(module), _OURS)
            report.replaced.append(Entry(name, family, module.extra_repr()))
        else:
            report.skipped.append(Entry(name, family, module.extra_repr(), reason))
            reasons[module] = reason
    if fuse:
        plain = {m for m in model.modules() if isinstance(m, Conv2d) or reasons.get(m) == _DENSE}
        _fuse(model, report, lambda name, module: module in plain and wanted(name, module), before)
    return report


def revert_(model: nn.Module) -> int:
    """Undoes convert_: every module that convert_ replaced or fused is what it was, and nothing else changes.

    Modules that were built as sepconv_ext.nn layers stay what they are.

    Returns:
        The number of convolutions that have their former class again.
    """
    chains.unfuse_(model)
    converted = [module for module in model.modules() if _ORIGINAL in module.__dict__]
    for module in converted:
        original = module.__dict__.pop(_ORIGINAL)
        reverted = _rebased(type(module), _TORCHS)
        # Another one where parametrizations or fully_shard came to the class, or went, since.
        module.__class__ = original if _is_alike(original, reverted) else reverted
    return len(converted)


def _fuse(
    model: nn.Module,
    report: Report,
    may_use: Callable[[str, nn.Module], bool],
    before: Cost | None,
) -> None:
    module = model.get_submodule
    found = chains.find_chains(model)
    fused: list[Chain] = []
    lonely = {}  # depthwise convolutions without a pointwise one, and why
    paired = {layer.depthwise for layer in model.modules() if isinstance(layer, SeparableConv2d)}
    for name, conv in model.named_modules():
        if isinstance(conv, Conv2d) and _family(conv) == "depthwise" and not (chains.chain_of(conv) or conv in paired):
            lonely[name] = found.refused.get(name, found.problem)
    for whole in found.chains:
        for part in whole.only(lambda name: may_use(name, module(name))):
            first = part.stages[0].conv
            if len(part.stages) == 2:
                lonely.pop(first, None)
            elif first in lonely:
                lonely[first] = part.end
            if not part.is_trivial:
                fused.append(part.bind(model))
                _report_chain(report, part, fused[-1], module)
    for name, reason in lonely.items():
        report.unpaired.append(Entry(name, "depthwise", module(name).extra_repr(), reason))
    for chain in fused:
        chains.fuse_(chain)
    report.costs = _costs(model, fused, before)


def _report_chain(report: Report, found: chains.Found, chain: Chain, module: Callable[[str], nn.Module]) -> None:
    waits = any(norm.training for norm in chain.norms)
    reason = "from eval() on: in train() its batch norms take batch statistics" if waits else ""
    parts = []
    for stage in found.stages:
        words = [_family(module(stage.conv))]
        if stage.norm:
            words.append("batch norm")
            report.folded.append(Entry(stage.norm, "batch norm", module(stage.norm).extra_repr(), reason))
        if stage.activation != "identity":
            words.append(stage.activation)
        parts.append(", ".join(words))
    family = "separable" if len(parts) == 2 else _family(chain.stages[0].conv)
    report.fused.append(Entry(" -> ".join(s.conv for s in found.stages), family, " -> ".join(parts), reason))


def _costs(model: nn.Module, fused: Sequence[Chain], before: Cost | None) -> dict[str, tuple[int, int]]:
    """Before and after: a chain reads its input once and writes its output once; a folded norm leaves a bias."""
    names = {module: name for name, module in model.named_modules()}
    layers = {layer.name: layer for layer in before.layers} if before else {}
    parameters = bytes = 0  # what is saved
    for chain in fused:
        modules = [m for stage in chain.stages for m in (stage.conv, stage.norm) if m is not None]
        held = sum(p.numel() for m in modules for p in m.parameters())
        folded = sum(
            stage.conv.weight.numel() + (stage.conv.out_channels if stage.norm or stage.conv.bias is not None else 0)
            for stage in chain.stages
        )
        parameters += held - folded
        if before:
            rows = [layers[names[m]] for m in modules if names[m] in layers]  # a frozen norm is no layer
            ends = math.prod(rows[0].input_size) + math.prod(rows[-1].output_size)
            bytes += sum(row.bytes for row in rows) - (ends + folded) * before.dtype.itemsize
    total = sum(p.numel() for p in model.parameters())
    costs = {"parameters": (total, total - parameters)}
    if before:
        costs |= {"MACs": (before.macs, before.macs), "bytes": (before.bytes, before.bytes - bytes)}
    return costs


def _is_convolution(module: nn.Module) -> bool:
    if isinstance(module, torch.jit.ScriptModule):
        return getattr(module, "original_name", "") in ("Conv1d", "Conv2d")
    named = _is_quantised(module) and type(module).__name__.startswith(("Conv1d", "Conv2d"))
    return isinstance(module, tuple(_OURS)) or named


def _is_quantised(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.ao.")


def _family(module: Any) -> str:
    groups = getattr(module, "groups", None)
    if groups is None:
        return "unknown"
    if groups == module.in_channels:
        return "depthwise"
    if groups > 1:
        return "grouped"
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
    if chains.chain_of(module) is not None:
        return "fused before"
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

"""The stages of a separable layer or of a block as one op, with batch norms folded into their weights.

A stage is convolution -> [batch norm] -> [activation]. While its batch norm uses its running statistics it is linear,
and is folded into the convolution's weight and bias (Jacob et al., "Quantization and Training of Neural Networks for
Efficient Integer-Arithmetic-Only Inference", 2018, section 3.2):

    scale = gamma / sqrt(running_var + eps);  weight' = weight * scale;  bias' = beta + (bias - running_mean) * scale

The folded weights are held apart from the modules' own: no Parameter changes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.nn.modules import module as _module
from torch.optim.optimizer import register_optimizer_step_post_hook

from . import functional

__all__ = ["Block", "Chain", "Stage", "fold", "is_depthwise", "is_pointwise"]

Weights = tuple[Tensor, Tensor | None]
_SETTINGS = ("stride", "padding", "dilation", "groups", "padding_mode", "eps")  # what modules compute besides tensors
_STATISTICS = ("running_mean", "running_var")


@dataclass
class Stage:
    """A convolution, the batch norm behind it if any, and the activation behind that."""

    conv: nn.Conv2d
    norm: nn.Module | None = None
    activation: str = "identity"

    def sources(self) -> Iterator[tuple[dict[str, Tensor | None], str]]:
        """Every tensor that the folded weight and bias are made from: the dict where it is registered, and its name."""
        for module, names in ((self.conv, ("weight", "bias")), (self.norm, ("weight", "bias", *_STATISTICS))):
            for name in names if module is not None else ():
                yield module._parameters if name in module._parameters else module._buffers, name

    def weights(self) -> Weights:
        return (self.conv.weight, self.conv.bias) if self.norm is None else fold(self.conv, self.norm)


def fold(conv: nn.Conv2d, norm: nn.Module) -> Weights:
    """The weight and bias of the one convolution that `norm(conv(x))` equals while the norm is in eval().

    Differentiable in the parameters of both. Computed in float32 at least, returned in the convolution's dtype.
    """
    wide = torch.promote_types(conv.weight.dtype, torch.float32)
    scale = torch.rsqrt(norm.running_var.to(wide) + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight
    mean = norm.running_mean.to(wide)
    if conv.bias is not None:
        mean = mean - conv.bias
    shift = -mean * scale
    if norm.bias is not None:
        shift = shift + norm.bias
    weight = conv.weight * scale.reshape(-1, 1, 1, 1)
    return weight.to(conv.weight.dtype), shift.to(conv.weight.dtype)


def is_depthwise(conv: nn.Conv2d) -> bool:
    return conv.groups == conv.in_channels


def is_pointwise(conv: nn.Conv2d) -> bool:
    """A matrix product over the channels of each pixel: what the second stage may be."""
    unpadded = isinstance(conv.padding, str) or not any(conv.padding)
    return conv.groups == 1 and conv.kernel_size == (1, 1) and conv.stride == (1, 1) and unpadded


# Steps that any optimiser of the process took: torch's fused ones write to parameters and leave their versions alone.
_steps = 0


def _count_step(*_: object) -> None:
    global _steps
    _steps += 1


register_optimizer_step_post_hook(_count_step)


class _Kept:
    """Folded weights, kept until one of the tensors that they were made from changes.

    A change shows in the tensor's identity, its version or its address, or an optimiser took a step. A write through
    `.data`, by another process, by a collective of torch.distributed or by the replay of a CUDA graph shows in none.

    Weights that are made anew from the same tensors go into the old ones' memory, so that a CUDA graph that was
    captured with them goes on with the new values. What autograd saved of them is changed, and known to be, just as
    the tensors themselves are.
    """

    def __init__(self) -> None:
        self.seen: list[tuple[dict, str, Tensor | None, int, int]] = []  # dict and name, tensor, version, address
        self.aliases: list[Tensor] = []  # hold the storages, so that no address is given to another
        self.folded: list[Weights] = []
        self.steps = -1  # the steps up to which the weights are current; -1: they are not

    def is_current(self) -> bool:
        if self.steps != _steps:
            return False
        for registered, name, tensor, version, address in self.seen:
            now = registered.get(name)
            if now is not tensor or (now is not None and (now._version != version or now.data_ptr() != address)):
                return False
        return True

    def renew(self, stages: Sequence[Stage]) -> None:
        """RuntimeError where the sources, or what is made of them, are no tensors that can be kept."""
        with torch.inference_mode(False), torch.no_grad():
            seen, aliases = [], []
            for registered, name in (source for stage in stages for source in stage.sources()):
                tensor = registered[name]
                if tensor is None:
                    seen.append((registered, name, None, 0, 0))
                    continue
                seen.append((registered, name, tensor, tensor._version, tensor.data_ptr()))
                aliases.append(tensor.detach())
            made = [stage.weights() for stage in stages]
            if not all(type(t) is Tensor and t.data_ptr() for pair in made for t in pair):
                raise RuntimeError("made under a mode or a transform")
            if _memory(seen) == _memory(self.seen) and _layouts(made) == _layouts(self.folded):
                # A step that wrote to other tensors only must not look like a change to what autograd saved.
                written = [version for *_, version, _ in seen] != [version for *_, version, _ in self.seen]
                for old, new in zip(self.folded, made, strict=True):
                    for mine, theirs in zip(old, new, strict=True):
                        (mine if written else mine.data).copy_(theirs)
            else:
                self.folded = made
        self.seen, self.aliases, self.steps = seen, aliases, _steps

    # Copies and pickles start empty.
    def __deepcopy__(self, memo: dict) -> _Kept:
        return _Kept()

    def __reduce__(self) -> tuple:
        return (_Kept, ())


def _memory(seen: list[tuple]) -> list[tuple]:
    return [(id(tensor), address) for _, _, tensor, _, address in seen]


def _layouts(weights: Sequence[Weights]) -> list[tuple]:
    return [(t.shape, t.stride(), t.dtype, t.device) for pair in weights for t in pair]


class _Stages:
    """Stages that one op runs. It keeps nothing of a call but folded weights."""

    def __init__(self, *stages: Stage) -> None:
        self.stages = stages
        self._normed = tuple(stage for stage in self.stages if stage.norm is not None)
        modules = (module for stage in self.stages for module in (stage.conv, stage.norm) if module is not None)
        self._known = tuple(map(_what_it_does, modules))
        self._kept = _Kept()

    @property
    def is_fused(self) -> bool:
        """Whether the stages may run as one op now: no norm takes batch statistics, nobody watches one of the modules,
        and all of them do what they did."""
        for stage in self._normed:
            if stage.norm.training or stage.norm.running_mean is None:
                return False
        return not _hooks_on_all() and not any(
            _what_it_does(known[0]) != known or own_hooks(known[0]) for known in self._known
        )

    def weights(self, input: Tensor | None = None) -> list[Weights]:
        """The weight and bias of each stage, norms folded in: kept from the last call where nothing changed.

        Made anew, as part of the graph, where somebody differentiates by them, and where the call is being traced.
        """
        if not self._normed or _is_traced(input):
            return self._made_anew()
        if torch.is_grad_enabled():
            sources = (registered.get(name) for stage in self._normed for registered, name in stage.sources())
            if any(tensor is not None and tensor.requires_grad for tensor in sources):
                return self._made_anew()
        try:
            if not self._kept.is_current():
                if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
                    return self._made_anew()  # what a graph computes has no value before its first replay
                self._kept.renew(self._normed)
        except (RuntimeError, KeyError):  # no storage, no version (torch.func, fake, inference mode), not registered
            return self._made_anew()
        folded = iter(self._kept.folded)
        return [stage.weights() if stage.norm is None else next(folded) for stage in self.stages]

    def _made_anew(self) -> list[Weights]:
        return [stage.weights() for stage in self.stages]

    def forget(self) -> None:
        """The next call folds anew."""
        self._kept.steps = -1


class Chain(_Stages):
    """A depthwise and a pointwise stage, run as one op.

    Args:
        depthwise, pointwise: the stages.
        save_intermediate: separable_conv2d's. Default: False.
    """

    def __init__(self, depthwise: Stage, pointwise: Stage, save_intermediate: bool = False) -> None:
        super().__init__(depthwise, pointwise)
        self.save_intermediate = save_intermediate

    def __call__(self, input: Tensor) -> Tensor:
        first, second = self.stages
        conv = first.conv
        (weight, bias), (pointwise_weight, pointwise_bias) = self.weights(input)
        padding = conv.padding
        if conv.padding_mode != "zeros":
            input, padding = F.pad(input, conv._reversed_padding_repeated_twice, mode=conv.padding_mode), 0
        return functional.separable_conv2d(
            *(input, weight, pointwise_weight, bias, pointwise_bias, conv.stride, padding, conv.dilation),
            *(first.activation, second.activation, self.save_intermediate),
        )


class Block(_Stages):
    """The stages of an inverted residual block, run as one op.

    Args:
        expand: the first stage, or None.
        depthwise, project: the others.
        squeeze, excite: those between the two, or None.
        gate, residual: inverted_residual's.
    """

    def __init__(
        self,
        expand: Stage | None,
        depthwise: Stage,
        project: Stage,
        squeeze: Stage | None,
        excite: Stage | None,
        gate: str,
        residual: bool,
    ) -> None:
        self._named = (expand, depthwise, project, squeeze, excite)
        super().__init__(*(stage for stage in self._named if stage is not None))
        self.gate, self.residual = gate, residual

    def __call__(self, input: Tensor) -> Tensor:
        made = iter(self.weights(input))
        expand, depthwise, project, squeeze, excite = (
            (None, None) if stage is None else next(made) for stage in self._named
        )
        names = ("identity" if stage is None else stage.activation for stage in self._named[:4])
        expand_activation, depthwise_activation, project_activation, squeeze_activation = names
        conv = self._named[1].conv
        return functional.inverted_residual(
            *(input, *expand, *depthwise, *project, conv.stride, conv.padding, conv.dilation),
            *(expand_activation, depthwise_activation, project_activation, self.residual, *squeeze, *excite),
            *(squeeze_activation, self.gate),
        )


def _is_traced(input: Tensor | torch.fx.Proxy | None) -> bool:
    """By torch.compile and torch.export, torch.jit.trace, torch.fx or make_fx."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or isinstance(input, torch.fx.Proxy):
        return True
    return get_proxy_mode() is not None


def _what_it_does(module: nn.Module) -> tuple:
    """(module, type, forward of its own, number of parts, settings)."""
    own = module.__dict__
    settings = tuple((name, own[name]) for name in _SETTINGS if name in own)
    return module, type(module), own.get("forward"), len(module._modules), settings


def own_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def _hooks_on_all() -> bool:
    return bool(
        _module._global_forward_hooks
        or _module._global_forward_pre_hooks
        or _module._global_backward_hooks
        or _module._global_backward_pre_hooks
    )

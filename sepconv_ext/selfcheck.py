"""One call of each kernel family against its reference, for `python -m sepconv_ext info`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from . import _C, functional, reference
from .decompositions import TABLE

__all__ = ["Outcome", "run"]

ops = torch.ops.sepconv_ext

# Of the largest value that is expected. float32 is summed here over at most 100 terms; a GPU may round factors to TF32.
_TOLERANCE = {"cpu": 1e-5, "cuda": 3e-3}

# A network of one block, as freeze writes it: 1x1, depthwise 3x3, 1x1 with a residual.
_PROGRAM = """%0 = input image
%1 = product %0 weight=0 bias=256 K=16 act=relu6
%2 = depthwise %1 weight=272 bias=416 kernel=3x3 padding=1x1x1x1 act=hardswish
%3 = product %2 weight=0 bias=432 K=16 residual=%0
return %3 image"""


@dataclass(frozen=True)
class Outcome:
    """What a check found.

    Attributes:
        name: the family, and the device.
        passed: whether the result is the reference's up to rounding.
        text: the kernels that ran and the largest error; or what was raised.
    """

    name: str
    passed: bool
    text: str


def _random(*size: int, seed: int = 0) -> Tensor:
    return torch.rand(size, generator=torch.Generator().manual_seed(seed)) - 0.5


def _depthwise(device: str) -> tuple[object, object]:
    x, w, b = _random(2, 16, 20, 23), _random(16, 1, 3, 3), _random(16)
    actual = functional.depthwise_conv2d(x.to(device), w.to(device), b.to(device), 1, 1, activation="silu")
    return actual, reference.forward(x, w, b, 1, 1, 1, 16, "silu")


def _depthwise_gradients(device: str) -> tuple[object, object]:
    x, w, g = _random(2, 16, 20, 23), _random(16, 1, 3, 3), _random(2, 16, 10, 12, seed=1)
    inputs = [t.to(device, copy=True).requires_grad_() for t in (x, w)]
    y = functional.depthwise_conv2d(inputs[0], inputs[1], None, 2, 1)
    by_input = reference.grad_input(g, w, x.shape, 2, 1, 1, 16)
    return torch.autograd.grad(y, inputs, g.to(device)), [by_input, reference.grad_weight(g, x, w.shape, 2, 1, 1, 16)]


def _depthwise_nhwc(device: str) -> tuple[object, object]:
    x, w = _random(2, 16, 20, 23), _random(16, 1, 5, 5)
    laid_out = x.to(device).contiguous(memory_format=torch.channels_last)
    return functional.depthwise_conv2d(laid_out, w.to(device), None, 1, 2), reference.forward(x, w, None, 1, 2, 1, 16)


def _pointwise(device: str) -> tuple[object, object]:
    x, w, b = _random(2, 48, 9, 9), _random(32, 48, 1, 1), _random(32)
    actual = functional.pointwise_conv2d(x.to(device), w.to(device), b.to(device), activation="relu")
    return actual, reference.forward(x, w, b, activation="relu")


def _grouped(device: str) -> tuple[object, object]:
    x, w = _random(2, 16, 12, 11), _random(16, 4, 3, 3)
    return functional.conv2d(x.to(device), w.to(device), None, 1, 1, 1, 4), reference.forward(x, w, None, 1, 1, 1, 4)


def _borders(device: str) -> tuple[object, object]:
    x, w = _random(2, 8, 12, 11), _random(8, 1, 3, 3)
    padded = torch.nn.functional.pad(x, (1, 1, 1, 1), "reflect")
    actual = functional.padded_conv2d(x.to(device), w.to(device), None, 1, 1, 1, 8, padding_mode="reflect")
    return actual, reference.forward(padded, w, None, groups=8)


def _separable(device: str) -> tuple[object, object]:
    x, d, p = _random(2, 16, 12, 11), _random(16, 1, 3, 3), _random(24, 16, 1, 1)
    parts = (x.to(device), d.to(device), p.to(device))
    actual = functional.separable_conv2d(parts[0], parts[1], parts[2], padding=1, pointwise_activation="relu")
    return actual, reference.separable(x, d, p, padding=1, pointwise_activation="relu")


def _spatial(device: str) -> tuple[object, object]:
    x, column, row = _random(2, 8, 12, 11), _random(8, 5), _random(8, 5, seed=1)
    weight = (column[:, :, None] * row[:, None]).unsqueeze(1)
    actual = functional.spatial_separable_conv2d(x.to(device), column.to(device), row.to(device), 2)
    return actual, reference.forward(x, weight, None, 1, 2, 1, 8)


def _sequences(device: str) -> tuple[object, object]:
    x, w, states = _random(2, 16, 30), _random(16, 4), _random(2, 16, 3, seed=1)
    actual = functional.causal_conv1d(x.to(device), w.to(device), None, "silu", states.to(device))
    return actual, reference.causal(x, w, None, states, activation="silu")


def _decoding(device: str) -> tuple[object, object]:
    x, w, states = _random(2, 16), _random(16, 4), _random(2, 16, 3, seed=1)
    actual = functional.causal_conv1d_update(x.to(device), states.to(device, copy=True), w.to(device))
    return actual, reference.causal(x.unsqueeze(2), w, None, states).squeeze(2)


def _network(device: str) -> tuple[object, object]:
    x, constants = _random(2, 16, 12, 11), _random(448, seed=1)
    double = TABLE[ops.program.default]([x.double()], constants.double(), _PROGRAM)
    return ops.program([x], constants, _PROGRAM), double


_FAMILIES: dict[str, Callable[[str], tuple[object, object]]] = {
    "depthwise": _depthwise,
    "depthwise gradients": _depthwise_gradients,
    "depthwise channels_last": _depthwise_nhwc,
    "pointwise": _pointwise,
    "grouped": _grouped,
    "borders": _borders,
    "separable": _separable,
    "spatial": _spatial,
    "sequences": _sequences,
    "decoding": _decoding,
    "network": _network,
}
_ON_CPU_ALONE = ("network",)


def _tensors(result: object) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)  # type: ignore[call-overload]


def _check(name: str, family: Callable, device: str) -> Outcome:
    before = _C.kernel_counts()
    strict = _C.strict()
    _C.set_strict(True)  # a kernel of this package, also where torch's is faster
    try:
        results = [_tensors(result) for result in family(device)]
    except Exception as error:
        return Outcome(f"{name}, {device}", False, f"{type(error).__name__}: {str(error).splitlines()[0]}")
    finally:
        _C.set_strict(strict)
    ran = [kernel for kernel, count in _C.kernel_counts().items() if count > before.get(kernel, 0)]
    worst = 0.0
    for actual, expected in zip(*results, strict=True):
        difference = (actual.detach().double().cpu() - expected).abs().max() / expected.abs().max()
        worst = max(worst, float(difference.nan_to_num(nan=torch.inf)))
    passed = worst <= _TOLERANCE[device.partition(":")[0]]
    return Outcome(f"{name}, {device}", passed, f"{' + '.join(ran) or 'no kernel'}, largest error {worst:.0e}")


def run(cuda: bool) -> Iterator[Outcome]:
    """The checks on the CPU, and with `cuda` on each GPU."""
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())] if cuda else []
    for device in ("cpu", *gpus):
        for name, family in _FAMILIES.items():
            if device == "cpu" or name not in _ON_CPU_ALONE:
                yield _check(name, family, device)

"""What a layer or a model costs at an input size: parameters, multiply-accumulates, bytes, arithmetic intensity.

Multiply-accumulates of a convolution with K output channels, C input channels and an R x S kernel, for each of the
N * P * Q output pixels:

    dense                     K * C * R * S
    grouped (g groups)        K * C * R * S / g
    depthwise (multiplier T)  C * T * R * S                   (g = C, K = C * T)
    pointwise                 K * C
    separable                 C * R * S * T + C * T * K       (depthwise, then pointwise)
    spatially separable       C * (R * W / Q + S)             (a column pass W wide, then a row pass Q wide)

The weights are as many as the products of one pixel. A spatially separable layer has C * (R + S), or R + S where one
filter serves every channel. A bias adds one for each output channel. Linear layers cost in_features * out_features a
row. Norms, activations, pooling and additions count no multiply-accumulates, as in torch.utils.flop_counter.

Bytes are what memory must move at least: a layer's input once, its parameters once, its output once. Arithmetic
intensity is operations (two a multiply-accumulate) for each of these bytes. A machine computes so many operations in
the time that it moves a byte; where the intensity is lower, memory decides how fast the layer can be (S. Williams et
al., "Roofline", CACM 52, 2009).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from . import _table
from .nn import SeparableConv2d, SpatialSeparableConv2d

__all__ = ["Cost", "LayerCost", "cost"]

_COLUMNS = ("layer", "kind", "output", "parameters", "MACs", "bytes", "ops/byte")
_NUMBERS = ("calls", "layers", "parameters", "MACs", "bytes", "ops/byte")


@dataclass
class LayerCost:
    """One layer, all its calls together."""

    name: str  # as in model.named_modules(); "" is the model itself
    kind: str  # dense, grouped, depthwise, pointwise, separable, spatial, transposed, linear, norm, ... or other
    input_size: tuple[int, ...] = ()
    output_size: tuple[int, ...] = ()
    parameters: int = 0
    macs: int = 0
    bytes: int = 0

    @property
    def intensity(self) -> float:
        """Operations (two a multiply-accumulate) a byte."""
        return 2 * self.macs / self.bytes if self.bytes else 0.0


@dataclass(repr=False)
class Cost:
    """What `cost` counted; prints as a table: a line for each layer, or for each kind where there are many layers."""

    layers: list[LayerCost] = field(default_factory=list)
    dtype: torch.dtype = torch.float32

    @property
    def parameters(self) -> int:
        """Of the whole model, each counted once: sum(p.numel() for p in model.parameters())."""
        return sum(layer.parameters for layer in self.layers)

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one forward pass: half of what torch.utils.flop_counter counts."""
        return sum(layer.macs for layer in self.layers)

    @property
    def bytes(self) -> int:
        """What the layers with parameters must move: their inputs, parameters and outputs, once each."""
        return sum(layer.bytes for layer in self.layers)

    @property
    def intensity(self) -> float:
        """Operations (two a multiply-accumulate) a byte."""
        return 2 * self.macs / self.bytes if self.bytes else 0.0

    def by_kind(self) -> dict[str, Cost]:
        """The same layers, sorted by kind; the kinds in the order of their first layer."""
        kinds: dict[str, Cost] = {}
        for layer in self.layers:
            kinds.setdefault(layer.kind, Cost(dtype=self.dtype)).layers.append(layer)
        return kinds

    def table(self, by: str = "layer") -> str:
        """The table as text, a line for each layer (`by="layer"`) or for each kind (`by="kind"`), and the total."""
        return _table.text(*self._table(by))

    def plot(self, ax=None):
        """Every layer as a disc: multiply-accumulates over arithmetic intensity, the area as the bytes.

        Args:
            ax: a matplotlib Axes to draw on. Default: those of a new figure.

        Returns:
            The Axes; `.figure.savefig(path)` writes them. Needs matplotlib.
        """
        if ax is None:
            import matplotlib.pyplot as plt

            ax = plt.figure(figsize=(7, 5), layout="constrained").add_subplot()
        most = max((layer.bytes for layer in self.layers), default=1)
        for kind, part in self.by_kind().items():
            layers = [layer for layer in part.layers if layer.macs and layer.bytes]
            if layers:
                area = [10 + 390 * layer.bytes / most for layer in layers]
                at = [layer.intensity for layer in layers], [layer.macs for layer in layers]
                ax.scatter(*at, s=area, alpha=0.5, label=f"{kind}: {_short(part.macs)} MACs, {_short(part.bytes)}B")
        ax.set(xscale="log", yscale="log", ylabel="multiply-accumulates")
        ax.set_xlabel("operations a byte   (area: bytes moved)")
        ax.set_title(self._headline)
        ax.legend()
        return ax

    @property
    def _headline(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{_short(self.parameters)} parameters, {_short(self.macs)} MACs, {_short(self.bytes)}B ({dtype})"

    def _table(self, by: str) -> tuple[str, Sequence[str], list[tuple[str, ...]], Sequence[str]]:
        def numbers(part: LayerCost | Cost) -> tuple[str, ...]:
            return _short(part.parameters), _short(part.macs), _short(part.bytes), f"{part.intensity:.3g}"

        rows: list[tuple[str, ...]]
        columns: tuple[str, ...]
        total: tuple[str, ...]
        if by == "kind":
            rows = [(kind, str(len(part.layers)), *numbers(part)) for kind, part in self.by_kind().items()]
            columns = ("kind", "layers", *_COLUMNS[3:])
            total = ("total", str(len(self.layers)))
        else:
            rows = [
                (layer.name or "(the model itself)", layer.kind, "x".join(map(str, layer.output_size)), *numbers(layer))
                for layer in self.layers
            ]
            columns, total = _COLUMNS, ("total", "", "")
        return self._headline, columns, [*rows, (*total, *numbers(self))], _NUMBERS

    @property
    def _shown_by(self) -> str:
        return "layer" if len(self.layers) <= 20 else "kind"

    def __rich__(self):
        return _table.rich_table(*self._table(self._shown_by))

    def __str__(self) -> str:
        return self.table(self._shown_by)

    __repr__ = __str__


def cost(model: nn.Module, input_size: Sequence, dtype: torch.dtype = torch.float32) -> Cost:
    """Counts one forward pass of a layer or a model, in eval mode, without computing anything.

    Args:
        model: any module that takes floating-point tensors. It is neither changed nor copied.
        input_size: the size of its input, `(N, C, H, W)` for an image; or a sequence of sizes where it takes several.
        dtype: in which every tensor is taken to be stored, for the bytes. Default: float32.

    Returns:
        A Cost: `parameters`, `macs`, `bytes` and `intensity` of the whole, and `by_kind()`, `table()`, `plot()`.
        `layers` has the same for each layer, in the order of their first call. A layer is a module that holds
        parameters and no other modules, or a separable layer. What belongs to no layer (parameters of the model's own,
        products of attention) stands in a last one, "other".

    The formulas stand at the top of this file. They are applied to the sizes that the model itself makes: it runs on
    tensors without data (torch's FakeTensorMode). Functional calls outside of layers count only where torch counts
    operations for them, and never count bytes.
    """
    if not input_size:
        raise ValueError("input_size must be the size of one input or a sequence of sizes, but is empty")
    sizes = [input_size] if isinstance(input_size[0], int) else input_size
    counted: dict[int, LayerCost] = {}  # by id of the module
    seen: set[int] = set()  # parameters
    inside: list[nn.Module] = []  # the layer that is being called, if any: what it calls is its own affair

    def first_tensor(value: object) -> Tensor:
        return next(leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor))

    def enter(module: nn.Module, _) -> None:
        inside.append(module)

    def leave(module: nn.Module, inputs: tuple, keywords: dict, output: object) -> None:
        inside.pop()
        if inside:
            return
        # What a layer takes and gives first: recurrent ones also give their state, and anyone may call by keyword.
        input, output = first_tensor((inputs, keywords)), first_tensor(output)
        layer = counted.get(id(module))
        if layer is None:
            new = {id(p): p.numel() for p in module.parameters() if id(p) not in seen}
            seen.update(new)
            layer = LayerCost(names[module], _kind(module), tuple(input.shape), tuple(output.shape), sum(new.values()))
            counted[id(module)] = layer
        weights = sum(p.numel() for p in module.parameters())
        layer.macs += _macs(module, input, output)
        layer.bytes += (input.numel() + weights + output.numel()) * dtype.itemsize

    names = {module: name for name, module in model.named_modules()}
    floating = (p.dtype for p in model.parameters() if p.is_floating_point())
    first = next(model.parameters(), torch.empty(0))
    stored = next(floating, torch.float32)
    with contextlib.ExitStack() as stack:
        for module in names:
            if _is_layer(module):
                stack.callback(module.register_forward_pre_hook(enter).remove)
                stack.callback(module.register_forward_hook(leave, with_kwargs=True).remove)
        stack.enter_context(_eval_mode(model))
        stack.enter_context(torch.no_grad())
        stack.enter_context(_plain_attention())
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        counter = stack.enter_context(FlopCounterMode(display=False))
        model(*(torch.empty(tuple(size), dtype=stored, device=first.device) for size in sizes))
    result = Cost(list(counted.values()), dtype)
    other = LayerCost("other", "other")
    other.parameters = sum(p.numel() for p in model.parameters() if id(p) not in seen)
    other.macs = counter.get_total_flops() // 2 - result.macs
    if other.parameters or other.macs:
        result.layers.append(other)
    return result


@contextlib.contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextlib.contextmanager
def _plain_attention() -> Iterator[None]:
    """Attention as the products that it is made of: for some of its fused kernels torch has no formula."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


_PRODUCTS = (nn.modules.conv._ConvNd, nn.Linear)
_LAYERS = (*_PRODUCTS, nn.modules.batchnorm._NormBase, SeparableConv2d, SpatialSeparableConv2d)


def _is_layer(module: nn.Module) -> bool:
    if isinstance(module, _LAYERS):
        return True
    return next(module.children(), None) is None and next(module.parameters(), None) is not None


def _kind(module: nn.Module) -> str:
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        return "transposed"
    if isinstance(module, nn.modules.conv._ConvNd):
        if module.groups > 1:
            return "depthwise" if module.groups == module.in_channels else "grouped"
        return "pointwise" if all(k == 1 for k in module.kernel_size) else "dense"
    for layer, kind in ((nn.Linear, "linear"), (SeparableConv2d, "separable"), (SpatialSeparableConv2d, "spatial")):
        if isinstance(module, layer):
            return kind
    name = type(module).__name__
    return "norm" if "Norm" in name else name


def _macs(module: nn.Module, input: Tensor, output: Tensor) -> int:
    """The formulas at the top of this file; each value written (or, transposed, read) takes a filter's products."""
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        return input.numel() * math.prod(module.weight.shape[1:])
    if isinstance(module, _PRODUCTS):
        return output.numel() * math.prod(module.weight.shape[1:])
    if isinstance(module, SeparableConv2d):
        weights = module.depthwise.weight.numel() + module.pointwise.weight.numel()
        return output.numel() // module.pointwise.out_channels * weights
    if isinstance(module, SpatialSeparableConv2d):
        (R, S), Q = module.kernel_size, output.shape[-1]
        W = input.shape[-1] if module.padding_mode == "zeros" else Q + S - 1
        return output.numel() // Q * (R * W + S * Q)
    return 0


def _short(count: float) -> str:
    """1234 as 1.23k: three digits and the magnitude."""
    for unit in ("", "k", "M", "G", "T"):
        if count < 999.5 or unit == "T":
            return f"{count:.3g}{unit}"
        count /= 1000
    raise AssertionError

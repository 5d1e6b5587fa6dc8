"""convert_ and revert_: a model's own convolutions on the kernels of this package, and back.

A module is converted by giving it another class, not by putting another module in its place: `nn.Conv2d` becomes
`sepconv_ext.nn.Conv2d`, which has the same attributes and differs in one method. So the Parameter objects, buffers,
hooks, training and requires_grad flags, device, names, and every reference that anyone holds to the module (optimisers,
a module registered under two names, the model itself where it is a single Conv2d) stay exactly what they were.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn.utils import parametrize

from .nn import Conv2d

__all__ = ["Entry", "Report", "convert_", "revert_"]

# The class that a converted module had, kept on the module so that a copy or an unpickled model can be reverted too.
_ORIGINAL = "_sepconv_original_class"


@dataclass(frozen=True)
class Entry:
    """One convolution that convert_ looked at."""

    name: str  # as in model.named_modules(); "" is the model itself
    family: str  # depthwise, pointwise, grouped or dense
    summary: str  # the module's arguments, as it prints them
    reason: str = ""  # why it was skipped; empty where it was replaced

    def __str__(self) -> str:
        text = f"{self.name or '(the model itself)'}: {self.family} ({self.summary})"
        return f"{text}: {self.reason}" if self.reason else text


@dataclass(repr=False)
class Report:
    """What convert_ did; prints as a table.

    Iterates over the replaced entries and counts them, so it is false where nothing was replaced.
    """

    replaced: list[Entry] = field(default_factory=list)
    skipped: list[Entry] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.replaced)

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.replaced)

    @property
    def headline(self) -> str:
        total = len(self.replaced) + len(self.skipped)
        return f"sepconv_ext: {len(self.replaced)} of {total} convolutions replaced"

    def rows(self) -> list[tuple[str, str, str, str]]:
        """(outcome, family, count, which), one row for each outcome and family."""
        groups: dict[tuple[str, str], list[str]] = {}
        for entry in self.replaced + self.skipped:
            outcome = f"skipped: {entry.reason}" if entry.reason else "replaced"
            groups.setdefault((outcome, entry.family), []).append(entry.name or "(the model itself)")
        return [(outcome, family, str(len(names)), _abridged(names)) for (outcome, family), names in groups.items()]

    def __rich__(self):
        from rich.table import Table

        table = Table(title=self.headline, title_justify="left")
        for column in ("outcome", "family", "count", "modules"):
            table.add_column(column, justify="right" if column == "count" else "left", overflow="fold")
        for row in self.rows():
            table.add_row(*row)
        return table

    def __str__(self) -> str:
        try:
            from rich.console import Console
        except ImportError:
            rows = self.rows()
            widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
            lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
            return "\n".join([self.headline, *(f"  {line.rstrip()}" for line in lines)])
        console = Console(width=110, color_system=None)
        with console.capture() as capture:
            console.print(self)
        return capture.get().rstrip()

    __repr__ = __str__


def _abridged(names: Iterable[str], shown: int = 3) -> str:
    names = list(names)
    return ", ".join(names[:shown]) + (f", and {len(names) - shown} more" if len(names) > shown else "")


def convert_(model: nn.Module, filter_fn: Callable[[str, nn.Module], bool] | None = None) -> Report:
    """Moves a model's grouped, depthwise and pointwise convolutions to this package's kernels, in place.

    Args:
        model: any module. It may itself be an nn.Conv2d: then it is converted in place like any other.
        filter_fn: called with (name, module) for each convolution that could be replaced; False keeps it as it is. A
            module that is registered under several names is asked about once, under its first name. Default: all are
            replaced.

    Returns:
        A Report: which convolutions were replaced, and which were skipped and why. Skipped are dense convolutions
        (groups = 1 with a kernel larger than 1x1, or with padding), subclasses of nn.Conv2d, lazy, quantised and
        scripted modules, modules whose forward was replaced on the instance, and weights that are tensor subclasses,
        integer or complex.

    Modules are changed, not exchanged: parameters, buffers, hooks, flags and references to the modules stay as they
    are. Copies and pickles of a converted model work; reading a pickle needs sepconv_ext installed. A state_dict does
    not change.
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
            module.__class__ = Conv2d if type(module) is nn.Conv2d else _rebased(type(module), Conv2d)
            report.replaced.append(Entry(name, family, module.extra_repr()))
        else:
            report.skipped.append(Entry(name, family, module.extra_repr(), reason))
    return report


def revert_(model: nn.Module) -> int:
    """Undoes convert_: every module that convert_ replaced has its former class again, and nothing else changes.

    Modules that were built as sepconv_ext.nn layers stay what they are.

    Returns:
        The number of modules reverted.
    """
    converted = [module for module in model.modules() if _ORIGINAL in module.__dict__]
    for module in converted:
        original = module.__dict__.pop(_ORIGINAL)
        current = type(module)
        if current is Conv2d:
            module.__class__ = nn.Conv2d
        elif original.__dict__.keys() == current.__dict__.keys():
            module.__class__ = original
        else:  # parametrizations were added or removed since
            module.__class__ = _rebased(current, nn.Conv2d)
    return len(converted)


def _is_convolution(module: nn.Module) -> bool:
    if isinstance(module, torch.jit.ScriptModule):
        return getattr(module, "original_name", "") == "Conv2d"
    return isinstance(module, nn.Conv2d) or (_is_quantised(module) and type(module).__name__.startswith("Conv2d"))


def _is_quantised(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.ao.")


def _family(module: nn.Module) -> str:
    groups = getattr(module, "groups", None)
    if groups is None:
        return "unknown"
    if groups == module.in_channels:
        return "depthwise"
    if groups > 1:
        return "grouped"
    unpadded = isinstance(module.padding, str) or not any(module.padding)
    return "pointwise" if tuple(module.kernel_size) == (1, 1) and unpadded else "dense"


def _refusal(module: nn.Module, family: str) -> str | None:
    """Why a convolution cannot or need not be replaced; None if it can."""
    if isinstance(module, torch.jit.ScriptModule):
        return "a TorchScript module"
    if isinstance(module, nn.modules.lazy.LazyModuleMixin):
        return "lazy: its shape is known after the first forward"
    if isinstance(module, Conv2d):
        return "converted before" if _ORIGINAL in module.__dict__ else "already a sepconv_ext layer"
    if _is_quantised(module):
        return "quantised"
    if not _is_plain(module):
        return f"a class of its own: {type(module).__module__}.{type(module).__qualname__}"
    if getattr(module, "qconfig", None) is not None:
        return "prepared for quantisation, which goes by the class"
    if "forward" in module.__dict__ or "_conv_forward" in module.__dict__:
        return "its forward was replaced on the instance"
    for tensor in (*module.parameters(), *module.buffers()):
        if type(tensor) not in (nn.Parameter, torch.Tensor):
            return f"its weight is a tensor subclass: {type(tensor).__name__}"
        if not tensor.is_floating_point():
            return f"no kernel for {tensor.dtype}"
    return "dense: torch's own kernel is the one for it" if family == "dense" else None


def _is_plain(module: nn.Module) -> bool:
    """An nn.Conv2d itself, or the class that torch.nn.utils.parametrize puts in its place."""
    cls = type(module)
    return cls is nn.Conv2d or (cls.__bases__ == (nn.Conv2d,) and parametrize.is_parametrized(module))


def _rebased(cls: type, base: type) -> type:
    """A copy of the class that parametrize made for one module, with another base.

    A copy, because deep copies of the module share the class and must not change with it.
    """
    attributes = {name: value for name, value in vars(cls).items() if name not in ("__dict__", "__weakref__")}
    return type(cls.__name__, (base,), attributes)

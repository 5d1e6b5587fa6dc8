"""freeze: a network for inference alone, with everything in it that can be known before the first image comes."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from ..program import Lease, parse
from ..report import Entry, Report
from . import nodes
from .actions import Rewriter, is_depthwise, is_pointwise, path_of
from .capture import Program, Uncapturable, capture
from .direct import DirectCall
from .lower import Lowered, lower
from .match import arguments, match
from .patterns import BLOCKS
from .program import Part
from .rewrite import rewrite

__all__ = ["Frozen", "FrozenParts", "freeze"]


class FreezeReport(Report):
    """A Report without convert_'s note: there is nothing to revert."""

    note = ""


_MOST_KNOWN = 256  # sizes of inputs that a network remembers


class Frozen(nn.Module):
    """A frozen network: `network` is the fx.GraphModule that computes it, its buffers are the packed constants.

    It keeps no values between calls, so that any number of threads may call it at once. The memory that values lie in
    is kept, for each thread that calls it at the same time, until the last copy of the network is gone.

    Attributes:
        report: what freeze did. `code` and `graph` are those of `network`.
    """

    def __init__(self, program: Program, lowered: Lowered, report: Report) -> None:
        super().__init__()
        self.network = lowered.module
        self.report = report
        self._known: set[tuple] = set()
        self._leases = [Lease(code) for code, _ in lowered.programs]
        self._direct = DirectCall.of(lowered.module.graph)
        self._signature, self._out_spec = program.signature, program.out_spec
        self._takes_one_tensor = program.signature.in_spec == pytree.tree_structure(((0,), {}))
        self._gives_one_tensor = program.out_spec == pytree.tree_structure(0)
        self.eval()

    @property
    def graph(self) -> fx.Graph:
        return self.network.graph

    @property
    def code(self) -> str:
        return self.network.code

    def forward(self, *args: object, **kwargs: object) -> object:
        flat = args if self._takes_one_tensor and len(args) == 1 and not kwargs else self._signature.flat(args, kwargs)
        if not torch.compiler.is_compiling():
            self._check(flat)
        if self._direct is not None and self._direct.can(flat):
            results = self._direct(self._modules["network"], flat)  # as an attribute it takes 0.7 us
        else:
            results = self.network.forward(*flat)  # not __call__, whose hooks nobody asked for: it takes 2 us
        return results[0] if self._gives_one_tensor else pytree.tree_unflatten(list(results), self._out_spec)

    def _check(self, flat: object) -> None:
        """Sizes that were right once are right again."""
        sizes = tuple(value.shape if isinstance(value, Tensor) else None for value in flat)
        if None in sizes or sizes not in self._known:
            self._signature.check(flat)
            if len(self._known) >= _MOST_KNOWN:
                self._known.clear()
            self._known.add(sizes)
        if not torch.is_grad_enabled():
            return
        for input, value in zip(self._signature.inputs, flat, strict=True):
            if isinstance(value, Tensor) and value.requires_grad:
                raise RuntimeError(
                    f"{input.name} requires gradients, but a frozen network has none: "
                    "use sepconv_ext.convert_ instead, or torch.no_grad()"
                )

    def extra_repr(self) -> str:
        return self.report.headline


class FrozenParts(nn.Module):
    """A model of which some parts are frozen, because the whole cannot be captured.

    Attributes:
        model: a copy of the model, in which frozen modules stand for those that could be captured.
        report: what freeze did; `report.left` says what stayed as it was, and why.
    """

    def __init__(self, model: nn.Module, report: Report) -> None:
        super().__init__()
        self.model = model
        self.report = report
        self.eval()

    def forward(self, *args: object, **kwargs: object) -> object:
        return self.model(*args, **kwargs)


def freeze(model: nn.Module, example_inputs: Tensor | tuple, dynamic_batch: bool = True) -> Frozen | FrozenParts:
    """Makes a network for inference of a model: norms folded, layers fused, one memory layout, weights packed.

    Args:
        model: any module in eval(). It is not changed, and shares no memory with what is returned.
        example_inputs: what the model is called with: a tensor, or a tuple of arguments. Their values have no
            influence; their sizes decide which kernels are worth it.
        dynamic_batch: the result takes any number of images. Default: True. Height and width may differ from the
            example's in any case, as far as the model's own forward allows it.

    Returns:
        A module with one attribute more, `report`: what was replaced, fused, folded and left, and why; parameters,
        multiply-accumulates and bytes before and after. It may be copied, pickled and saved, compiled, exported, and
        called by many threads; its state_dict holds the packed constants. Where torch.export cannot capture the model
        as a whole, its parts are frozen one by one, and the report says which were left.

    Raises:
        RuntimeError: the model is in training mode; what is frozen has no gradients: sepconv_ext.convert_ does that.
            Or the model itself fails on the example.
        TypeError: no tensor among the examples.

    Calls raise a RuntimeError with the argument's name for a size that the network cannot take.
    """
    arguments_ = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    if not any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(arguments_)):
        raise TypeError(f"example_inputs must be a tensor or a tuple with one, but is {type(example_inputs).__name__}")
    training = [name or "the model itself" for name, module in model.named_modules() if module.training]
    if training:
        raise RuntimeError(
            f"model must be in eval() to be frozen, but is in training mode: {training[0]}. "
            "A frozen network has no gradients; sepconv_ext.convert_ makes a model faster that is trained"
        )
    try:
        return _frozen(model, arguments_, dynamic_batch)
    except Uncapturable as error:
        return _frozen_parts(model, arguments_, dynamic_batch, str(error))


def _frozen(model: nn.Module, example: tuple, dynamic_batch: bool) -> Frozen:
    program = capture(model, example, dynamic_batch)
    bytes_before = sum(_bytes(program, node) for node in program.graph.nodes)
    rewriter = rewrite(program)
    lowered = lower(program)
    report = _report(program, rewriter, lowered)
    macs = sum(_macs(program, node) for node in program.graph.nodes)
    kept = {node.target for node in program.graph.nodes if node.op == "get_attr"}
    inside = sum(2 * _volume(program, node) for chain in lowered.chains for node in chain[:-1])  # not in memory
    report.costs = {
        "parameters": (sum(p.numel() for p in model.parameters()), sum(program.constants[n].numel() for n in kept)),
        "MACs": (macs, macs),
        "bytes": (bytes_before, sum(_bytes(program, node) for node in program.graph.nodes) - inside),
    }
    return Frozen(program, lowered, report)


# --- the report ---


def _report(program: Program, rewriter: Rewriter, lowered: Lowered) -> Report:
    report = FreezeReport()
    in_chains = {node for chain in lowered.chains for node in chain}
    for node in program.graph.nodes:
        if node.target in (nodes.convolution, nodes.linear):
            family = _family(program, node)
            entry = Entry(path_of(node), family, _summary(program, node))
            if node in lowered.ops:
                report.replaced.append(entry)
            else:
                report.skipped.append(Entry(*_fields(entry), "torch's own product"))
            if node.meta.get("parts") and node not in in_chains:
                report.fused.append(Entry(path_of(node), family, _chain(program, node)))
        elif node.op == "call_function" and "conv" in str(node.target):
            report.skipped.append(
                Entry(path_of(node), "convolution", str(node.target), "no convolution of images by constants")
            )
    for chain in lowered.chains:
        name, summary = (" -> ".join(map(of, chain)) for of in (path_of, partial(_chain, program)))
        report.fused.append(Entry(name, "separable" if len(chain) == 2 else "inverted residual", summary))
    report.folded += [Entry(name, what, "") for name, what in rewriter.folded]
    report.programs += [_program_entry(code, part) for code, part in lowered.programs]
    for node in program.graph.nodes:
        for what, pattern in BLOCKS:
            found = match(program, pattern, node)
            if found:
                name = " -> ".join(path_of(found[part]) for part in ("expand", "depthwise", "project"))
                report.blocks.append(Entry(name, what, _chain(program, node)))
    return report


def _program_entry(code: str, part: Part) -> Entry:
    steps = Counter(line.kind for line in parse(code)[0] if line.kind != "input")
    names = [path_of(node) for node in part.nodes if node.target in (nodes.convolution, nodes.linear)]
    ends = " -> ".join(dict.fromkeys((names[0], names[-1])))
    return Entry(ends, "program", ", ".join(f"{count} {kind}" for kind, count in steps.items()))


def _fields(entry: Entry) -> tuple[str, str, str]:
    return entry.name, entry.family, entry.summary


def _chain(program: Program, node: fx.Node) -> str:
    return ", ".join((_family(program, node), *node.meta.get("parts", ())))


def _family(program: Program, node: fx.Node) -> str:
    if node.target is nodes.linear:
        return "linear"
    if is_depthwise(program, node):
        return "depthwise"
    if arguments(node)["groups"] > 1:
        return "grouped"
    return "pointwise" if is_pointwise(program, node) else "dense"


def _summary(program: Program, node: fx.Node) -> str:
    K, C, *taps = program.constants[arguments(node)["weight"].target].shape
    if not taps:
        return f"{C}, {K}"
    a = arguments(node)
    return f"{C * a['groups']}, {K}, kernel_size={tuple(taps)}, stride={tuple(a['stride'])}"


def _volume(program: Program, node: fx.Node) -> int:
    """Bytes of a node's value, at the example's size; a tuple's tensors together."""
    values = node.meta.get("val")
    values = values if isinstance(values, (tuple, list)) else [values]
    return sum(math.prod(program.sizes(v)) * v.element_size() for v in values if isinstance(v, Tensor))


def _bytes(program: Program, node: fx.Node) -> int:
    """What a node reads and writes, if it is no view."""
    schema = getattr(node.target, "_schema", None)
    is_view = schema is not None and any(result.alias_info is not None for result in schema.returns)
    if node.op != "call_function" or is_view or not isinstance(node.meta.get("val"), Tensor):
        return 0
    return _volume(program, node) + sum(_volume(program, source) for source in node.all_input_nodes)


def _macs(program: Program, node: fx.Node) -> int:
    if node.target not in (nodes.convolution, nodes.linear):
        return 0
    weight = program.constants[arguments(node)["weight"].target]
    return math.prod(program.sizes(node.meta["val"])) * weight[0].numel()


# --- part by part ---


def _frozen_parts(model: nn.Module, example: tuple, dynamic_batch: bool, reason: str) -> FrozenParts:
    """Freezes the largest parts that can be captured, each with what it is called with on the example."""
    twin = copy.deepcopy(model).requires_grad_(False)
    report = FreezeReport()
    report.left.append(Entry("", type(model).__name__, "", reason))
    with torch.no_grad():
        calls = _calls(twin, example)
        for name, module, parent in list(_children(twin)):
            _freeze_part(name, module, parent, calls, dynamic_batch, report)
        twin(*example)  # what does not fit together fails here
    return FrozenParts(twin, report)


def _calls(model: nn.Module, example: tuple) -> dict[nn.Module, list[tuple[tuple, dict]]]:
    seen: dict[nn.Module, list[tuple[tuple, dict]]] = {}
    handles = [
        module.register_forward_pre_hook(
            lambda module, args, kwargs: seen.setdefault(module, []).append((args, kwargs)), with_kwargs=True
        )
        for module in model.modules()
    ]
    try:
        model(*example)
    except Exception as error:
        sizes = [list(leaf.shape) for leaf in pytree.tree_leaves(example) if isinstance(leaf, Tensor)]
        words = f"{type(error).__name__}: {error}".rstrip(": ")
        raise RuntimeError(f"the model itself fails on example_inputs of size {sizes}: {words}") from error
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _children(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module, nn.Module]]:
    for name, child in module.named_children():
        yield f"{prefix}{name}", child, module


def _freeze_part(
    name: str, module: nn.Module, parent: nn.Module, calls: dict, dynamic_batch: bool, report: Report
) -> None:
    if not any(isinstance(m, (nn.modules.conv._ConvNd, nn.Linear)) for m in module.modules()):
        return
    if not any(part in calls for part in module.modules()):
        report.left.append(Entry(name, type(module).__name__, "", "it is not called on the example"))
        return
    reason = ""
    if module in calls:
        (args, kwargs), *more = calls[module]
        reason = "it is called with keywords" if kwargs else ""
        if not reason:
            try:
                part = _frozen(module, args, dynamic_batch)
                for others, _ in more:
                    part._signature.check(part._signature.flat(others, {}))
                setattr(parent, name.rpartition(".")[2], part)
                _add(report, part.report, name)
                return
            except Exception as error:  # its own part by part
                reason = (str(error) or type(error).__name__).splitlines()[0]
    if reason:
        report.left.append(Entry(name, type(module).__name__, "", reason))
    for child_name, child, holder in _children(module, f"{name}."):
        _freeze_part(child_name, child, holder, calls, dynamic_batch, report)


def _add(report: Report, part: Report, prefix: str) -> None:
    for kind in ("replaced", "skipped", "fused", "folded", "blocks", "programs"):
        for entry in getattr(part, kind):
            names = " -> ".join(f"{prefix}.{name}" if name else prefix for name in entry.name.split(" -> "))
            getattr(report, kind).append(Entry(names, entry.family, entry.summary, entry.reason))
    for what, (before, after) in part.costs.items():
        so_far = report.costs.get(what, (0, 0))
        report.costs[what] = (so_far[0] + before, so_far[1] + after)

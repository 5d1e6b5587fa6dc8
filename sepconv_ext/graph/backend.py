"""``torch.compile(model, backend="sepconv_ext")``: Inductor, with the convolutions of this package where they win.

A pass over the forward and the backward graph hands each convolution, and each of its two gradients, to this package
if the plan has a kernel that is faster than torch's. The rest is Inductor's. Where Inductor would freeze (its option
``freezing``, and no gradients), the whole graph is frozen by the rewriter instead.
"""

from __future__ import annotations

import copy
import logging
import operator
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, fx, nn

from .. import _C
from .capture import Uncapturable
from .freeze import _frozen

__all__ = ["compile_graph"]

aten, ours = torch.ops.aten, torch.ops.sepconv_ext
log = logging.getLogger("sepconv_ext")


def compile_graph(
    graph: fx.GraphModule, inputs: Sequence[object], mode: str | None = None, options: dict | None = None
) -> Callable:
    """The backend: what torch.compile calls with each graph. `mode` and `options` are Inductor's own."""
    from torch._inductor import config, list_mode_options
    from torch._inductor.compile_fx import compile_fx

    patches = {**(list_mode_options(mode) if mode else {}), **(options or {})}
    known = config.get_config_copy()
    unknown = [name for name in patches if name.replace("-", "_") not in known]
    if unknown:
        raise RuntimeError(f"options of torch.compile must be Inductor's own, but {unknown[0]!r} is none")
    patches = {name.replace("-", "_"): value for name, value in patches.items()}
    if patches.get("freezing", config.freezing) and not torch.is_grad_enabled():
        try:
            return _freeze(graph, inputs)
        except (Uncapturable, RuntimeError, TypeError, ValueError, NotImplementedError) as error:
            log.info("Inductor freezes a graph that sepconv_ext cannot: %s", error)
        return compile_fx(graph, inputs, config_patches=patches)
    first = patches.get("post_grad_custom_pre_pass", config.post_grad_custom_pre_pass)
    return compile_fx(graph, inputs, config_patches=patches | {"post_grad_custom_pre_pass": _pass(first)})


# --- inference: frozen ---


def _freeze(graph: fx.GraphModule, inputs: Sequence[object]) -> Callable:
    """What the graph computes with its parameters and buffers as they are now; called with all of them all the same."""
    module = copy.copy(graph)
    module.graph = fx.Graph()
    module.graph.output(module.graph.graph_copy(graph.graph, {}))
    places: list[int] = []  # of the tensors that are no parameters
    symbols: dict[str, fx.Node] = {}
    for i, (node, value) in enumerate(
        zip([n for n in module.graph.nodes if n.op == "placeholder"], inputs, strict=True)
    ):
        if _is_static(value):
            name = f"_constant_{i}"
            module.register_buffer(name, value.detach())
            with module.graph.inserting_before(node):
                constant = module.graph.get_attr(name)
            node.replace_all_uses_with(constant)
            module.graph.erase_node(node)
        elif isinstance(value, Tensor):
            places.append(i)
        else:
            symbols[str(value)] = node
    _sizes_by_tensors(module.graph, symbols, [inputs[i] for i in places])
    module.graph.lint()
    module.recompile()
    example = tuple(_of_now(inputs[i]) for i in places)
    with torch._guards.tracing(None), torch.no_grad():
        network = _frozen(module.eval(), example, bool(symbols)).network

    def run(*all_inputs: object) -> tuple:
        return network(*(all_inputs[i] for i in places))

    return run


def _is_static(value: object) -> bool:
    """A parameter or a buffer of the model, which torch.compile marks."""
    return isinstance(value, nn.Parameter) or (
        isinstance(value, Tensor) and getattr(value, "_dynamo_static_input_type", None) is not None
    )


def _of_now(value: Tensor) -> Tensor:
    """A tensor of the input's sizes; symbols as they are this time."""
    sizes = [int(n) for n in value.shape]
    return torch.empty(sizes, dtype=value.dtype, device=value.device)


def _sizes_by_tensors(graph: fx.Graph, symbols: dict[str, fx.Node], tensors: list[Tensor]) -> None:
    """Sizes that come as inputs of their own are read off the tensors that have them."""
    places = [node for node in graph.nodes if node.op == "placeholder" and node not in symbols.values()]
    first = next(node for node in graph.nodes if node.op != "placeholder")
    for symbol, node in symbols.items():
        pairs = zip(places, tensors, strict=True)
        found = [(place, d) for place, t in pairs for d, n in enumerate(t.shape) if str(n) == symbol]
        if not found and node.users:
            raise Uncapturable(f"an input of the graph is a number, {symbol}")
        if found:
            with graph.inserting_before(first):
                size = graph.call_function(aten.sym_size.int, found[0])
            node.replace_all_uses_with(size)
        graph.erase_node(node)


# --- training, and inference by parameters that may change ---


def _pass(first: Callable | None) -> Callable:
    from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

    class Convolutions(CustomGraphPass):
        """aten's convolutions become this package's, where the plan takes a kernel of its own."""

        def __call__(self, graph: fx.Graph) -> None:
            if first is not None:
                first(graph)
            replace_convolutions(graph)

        def uuid(self) -> object:
            files = get_hash_for_files((__file__, _C.__file__))
            if first is None:
                return files
            return (files, first.uuid()) if isinstance(first, CustomGraphPass) else None

    return Convolutions()


def replace_convolutions(graph: fx.Graph) -> None:
    """Each map of each convolution of a functional graph by itself."""
    for node in list(graph.nodes):
        if node.target is aten.convolution.default:
            _replace_forward(graph, node)
        elif node.target is aten.convolution_backward.default:
            _replace_backward(graph, node)


def _is_ours(map: str, input: Tensor, weight: Tensor, bias: Tensor | None, grad: Tensor | None, *place: object) -> bool:
    """Whether the plan has a kernel for a call on such tensors. Inductor lays images channels_last on a CPU.

    Of a graph for all sizes the plan is asked for those of the call that it was traced with."""
    sizes = _of_the_call([*input.shape, *weight.shape])
    if input.dim() != 4 or None in sizes or 0 in sizes:
        return False

    def made(tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        options = dict(dtype=tensor.dtype, device=tensor.device)  # of a real tensor, which empty_like would not give
        if tensor is input and map == "forward" and input.device.type == "cpu":
            return torch.empty(_of_the_call(tensor.shape), memory_format=torch.channels_last, **options)
        return torch.empty_strided(_of_the_call(tensor.shape), _of_the_call(tensor.stride()), **options)

    from torch._subclasses.fake_tensor import unset_fake_temporarily

    with unset_fake_temporarily():
        stride, padding, dilation, groups = place
        said = _C.explain(
            *(map, made(input), made(weight), made(bias), list(stride), list(padding), list(dilation), groups),
            padding_mode="zeros",
            grad_output=made(grad),
        )
    return not said.aten


def _of_the_call(numbers: Sequence[int | torch.SymInt]) -> list[int | None]:
    """Symbols as the numbers that they stood for in the traced call; None for those that depend on data."""
    return [n if isinstance(n, int) else n.node.hint for n in numbers]


def _value(node: fx.Node | None) -> Tensor | None:
    return None if node is None else node.meta["val"]


def _call(graph: fx.Graph, at: fx.Node, target: Callable, *args: object) -> fx.Node:
    with graph.inserting_before(at):
        node = graph.call_function(target, args)
    node.meta = {key: value for key, value in at.meta.items() if key != "val"}
    node.meta["val"] = target(*fx.map_arg(args, _value))
    return node


def _numbers(graph: fx.Graph, at: fx.Node, of: fx.Node, read: Callable, values: Sequence) -> list[int | fx.Node]:
    """Sizes or strides of a tensor as arguments of a call: symbols are read off the tensor, by `read`."""
    numbers: list[int | fx.Node] = []
    for d, value in enumerate(values):
        if isinstance(value, int):
            numbers.append(value)
            continue
        with graph.inserting_before(at):
            numbers.append(graph.call_function(read, (of, d)))
        numbers[-1].meta["val"] = value
    return numbers


def _replace_forward(graph: fx.Graph, node: fx.Node) -> None:
    input, weight, bias, stride, padding, dilation, transposed, _, groups = node.args
    place = (stride, padding, dilation, groups)
    if transposed or not _is_ours("forward", _value(input), _value(weight), _value(bias), None, *place):
        return
    if input.op == "placeholder" and _value(input).device.type == "cpu":  # as Inductor does for its own
        with graph.inserting_before(node):
            image = graph.call_function(aten.clone.default, (input,), {"memory_format": torch.channels_last})
        image.meta = dict(input.meta)
        image.meta["val"] = _value(input).clone(memory_format=torch.channels_last)
        input = image
    made = _call(graph, node, ours.conv2d.default, input, weight, bias, *place, "identity", "zeros")
    node.replace_all_uses_with(made)
    graph.erase_node(node)


def _replace_backward(graph: fx.Graph, node: fx.Node) -> None:
    grad, input, weight, _, stride, padding, dilation, transposed, _, groups, mask = node.args
    if transposed:
        return
    place = (stride, padding, dilation, groups)
    tensors = (_value(input), _value(weight), None, _value(grad), *place)
    is_ours = [mask[i] and _is_ours(map, *tensors) for i, map in enumerate(("grad_input", "grad_weight"))]
    if groups == 1 and is_ours[0] and mask[1] and not is_ours[1]:
        is_ours[0] = False  # torch makes both in one call, and half of that is more than half of its time
    if not any(is_ours):
        return
    results: dict[int, fx.Node] = {}
    for i, like in ((0, input), (1, weight)):
        if is_ours[i]:
            op = (ours.conv2d_grad_input, ours.conv2d_grad_weight)[i].default
            other = (weight, input)[i]
            size = _numbers(graph, node, like, aten.sym_size.int, _value(like).shape)
            strides = _numbers(graph, node, like, aten.sym_stride.int, _value(like).stride())
            results[i] = _call(graph, node, op, grad, other, size, strides, *place)
    torchs = [mask[i] and not is_ours[i] for i in (0, 1)]
    if mask[2] and not any(torchs):  # else torch's call makes the bias's gradient along with its own
        results[2] = _call(graph, node, aten.sum.dim_IntList, grad, [0, 2, 3])
    rest = [wanted and i not in results for i, wanted in enumerate(mask)]
    for user in list(node.users):
        assert user.target is operator.getitem
        if user.args[1] in results:
            user.replace_all_uses_with(results[user.args[1]])
            graph.erase_node(user)
    if any(rest):
        node.args = (*node.args[:-1], rest)
        node.meta["val"] = tuple(v if kept else None for v, kept in zip(node.meta["val"], rest, strict=True))
    else:
        graph.erase_node(node)

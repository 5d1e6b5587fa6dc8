"""The fourth op against the float64 oracle: values, gradients of every order, memory, errors, and torch's machinery."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.flop_counter import FlopCounterMode

import sepconv_ext
from cases import SEPARABLE, SEPARABLE_BY_NAME, SeparableCase
from harness import (
    ACTIVATIONS,
    DTYPES,
    LAYOUTS,
    assert_as_accurate,
    dtype_name,
    only_our_kernels,
    random,
    strictness,
)
from sepconv_ext import functional, reference

ops = torch.ops.sepconv_ext
by_case = pytest.mark.parametrize("case", SEPARABLE, ids=str)
by_layout = pytest.mark.parametrize("layout", LAYOUTS)
by_dense_layout = pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)

SMALL = SeparableCase("small", 2, 3, 6, 5, 4, multiplier=2, stride=(2, 1))
# One activation of each kind of derivative: none, read off the output (with a kink or smooth), off the input.
KINDS = ("identity", "relu6", "tanh", "gelu", "silu", "hardswish")


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """Fresh memory is full of NaN, so that an output element that a kernel forgets is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def tensors(
    case: SeparableCase, dtype: torch.dtype, device: str, layout: str = "contiguous", requires_grad: bool = False
) -> list[Tensor | None]:
    """Input, depthwise weight, pointwise weight and the two biases; the pointwise sums are of the input's size."""
    weight_layout = "strided" if layout == "strided" else "contiguous"
    middle = case.C * case.multiplier
    made = [
        random(case.input_size, dtype, device, layout, seed=1),
        random(case.depthwise_size, dtype, device, weight_layout, seed=2),
        random(case.pointwise_size, dtype, device, weight_layout, seed=3).mul_(middle**-0.5),
        random((middle,), dtype, device, seed=4) if case.bias else None,
        random((case.K,), dtype, device, seed=5) if case.bias else None,
    ]
    return [t if t is None else t.requires_grad_(requires_grad) for t in made]


def torchs(x, wd, wp, bd, bp, case: SeparableCase, activations=None) -> Tensor:
    """The pair by torch's own layers."""
    act_d, act_p = (reference.ACTIVATIONS[name] for name in activations or case.activations)
    return act_p(F.conv2d(act_d(F.conv2d(x, wd, bd, *case.geometry, case.C)), wp, bp))


def ours(*arguments, case: SeparableCase, activations=None, save_intermediate: bool = False) -> Tensor:
    return functional.separable_conv2d(
        *arguments, *case.geometry, *(activations or case.activations), save_intermediate
    )


@contextlib.contextmanager
def fused(device: str, times: int = 1) -> Iterator[None]:
    """Strict inside; on the CPU the fused kernel has run so often afterwards, and nothing else."""
    with only_our_kernels(at_least=times):
        yield
        if device == "cpu":
            assert sepconv_ext.kernel_counts() == ({"cpu_separable": times} if times else {})


@functools.lru_cache(maxsize=64)
def judged(case: SeparableCase, dtype: torch.dtype, device: str, layout: str) -> tuple[Tensor, Tensor, Tensor]:
    """torch's result, the float64 one, and that before the last activation."""
    made = tensors(case, dtype, device, layout)
    on_cpu = [None if t is None else t.cpu() for t in made]
    summed = reference.separable(*on_cpu, *case.geometry, case.depthwise_activation)
    return torchs(*made, case).cpu(), reference.ACTIVATIONS[case.pointwise_activation](summed), summed


@by_layout
@by_dtype
@by_case
def test_forward(case: SeparableCase, dtype: torch.dtype, layout: str, device: str) -> None:
    made = tensors(case, dtype, device, layout)
    with fused(device, times=0 if case.N == 0 else 1):
        actual = ours(*made, case=case)
    peer, truth, summed = judged(case, dtype, device, layout)
    assert_as_accurate(actual.cpu(), peer, truth, str(case), summed)
    assert actual.shape == case.output_size
    assert actual.stride() == peer.stride() or actual.numel() == 0


@by_dtype
@by_case
def test_forward_on_every_instruction_set(case: SeparableCase, dtype: torch.dtype, isa: str) -> None:
    for layout in LAYOUTS:
        with fused("cpu", times=0 if case.N == 0 else 1):
            actual = ours(*tensors(case, dtype, "cpu", layout), case=case)
        peer, truth, summed = judged(case, dtype, "cpu", layout)
        assert_as_accurate(actual, peer, truth, f"{case}, {layout}, {isa}", summed)


@pytest.mark.parametrize("weights", ["contiguous", "channels_last", "strided"])
@by_layout
def test_layouts_of_the_weights(layout: str, weights: str, device: str) -> None:
    """The output has the strides that two calls of F.conv2d give it."""
    for case in (SEPARABLE_BY_NAME["plain"], SEPARABLE_BY_NAME["one_channel"], SEPARABLE_BY_NAME["multiplier2"]):
        x, wd, wp, bd, bp = tensors(case, torch.float32, device, layout)
        size = (case.depthwise_size, case.pointwise_size)
        wd, wp = (random(s, torch.float32, device, weights, seed=6 + i) for i, s in enumerate(size))
        with fused(device):
            actual = ours(x, wd, wp, bd, bp, case=case)
        expected = torchs(x, wd, wp, bd, bp, case)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
        assert actual.stride() == expected.stride()


@by_dense_layout
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
def test_same_bits_whatever_the_threads(dtype: torch.dtype, layout: str, device: str) -> None:
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        with strictness(True):
            results.append([ours(*tensors(c, dtype, device, layout), case=c) for c in SEPARABLE])
    for case, *each in zip(SEPARABLE, *results, strict=True):
        assert all(torch.equal(each[0], other) for other in each[1:]), str(case)


def test_special_values_pass_through(device: str) -> None:
    """A NaN or an infinity reaches the outputs that see it, and only those; padding is zero, not a product with it."""
    case = SeparableCase("specials", 1, 4, 9, 40, 6, depthwise_activation="identity")
    for layout in ("contiguous", "channels_last"):
        made = tensors(case, torch.float32, device, layout)
        made[0][0, 1, 4, 20] = float("inf")
        made[0][0, 2, 0, 0] = float("nan")
        with fused(device):
            actual = ours(*made, case=case)
        torch.testing.assert_close(actual.isfinite(), torchs(*made, case).isfinite())


def test_the_plan_explains_itself() -> None:
    """Two calls where they were measured faster, the kernel elsewhere, and in strict mode always."""
    wd, wp = torch.randn(144, 1, 3, 3), torch.randn(16, 144, 1, 1)
    x = torch.randn(2, 144, 12, 12)
    arguments = {"depthwise_weight": wd, "pointwise_weight": wp, "stride": 2, "padding": 1}
    for image, kernel in ((x, "composite"), (x.contiguous(memory_format=torch.channels_last), "cpu_separable")):
        explanation = functional.explain_separable(image, **arguments)
        assert explanation.kernel == kernel and explanation.reason and not explanation.aten
        sepconv_ext.reset_kernel_counts()
        functional.separable_conv2d(image, **arguments)
        assert ("cpu_separable" in sepconv_ext.kernel_counts()) == (kernel == "cpu_separable")
        with strictness(True):
            assert functional.explain_separable(image, **arguments).kernel == "cpu_separable"


# ---- gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("save_intermediate", [False, True])
@by_dense_layout
@pytest.mark.parametrize("activation", KINDS)
def test_gradients_to_second_order(activation: str, layout: str, save_intermediate: bool, device: str) -> None:
    inputs = tensors(SMALL, torch.float64, device, layout, requires_grad=True)
    for activations in ((activation, "identity"), ("tanh", activation)):
        call = functools.partial(ours, case=SMALL, activations=activations, save_intermediate=save_intermediate)
        with only_our_kernels(at_least=10):
            assert gradcheck(call, inputs, fast_mode=True)
            assert gradgradcheck(call, inputs, fast_mode=True)


@by_dense_layout
def test_gradcheck_in_full(layout: str, device: str) -> None:
    case = SeparableCase("tiny", 1, 2, 4, 3, 2)
    inputs = tensors(case, torch.float64, device, layout, requires_grad=True)
    call = functools.partial(ours, case=case, activations=("silu", "gelu"))
    assert gradcheck(call, inputs) and gradgradcheck(call, inputs)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@by_dtype
def test_gradients_in_every_dtype(dtype: torch.dtype, activation: str, device: str) -> None:
    case, names = SEPARABLE_BY_NAME["plain"], (activation, activation)
    g = random(case.output_size, dtype, device, seed=7)

    def gradients(call: Callable, inputs: list[Tensor]) -> tuple[Tensor, ...]:
        inputs = [t.detach().requires_grad_() for t in inputs]
        return torch.autograd.grad(call(*inputs, case=case, activations=names), inputs, g.to(inputs[0]))

    for layout in ("contiguous", "channels_last"):
        made = tensors(case, dtype, device, layout)
        truth = gradients(torchs, [t.cpu().double() for t in made])
        theirs = gradients(torchs, made)
        with only_our_kernels(at_least=4):
            actual = gradients(ours, made)
        for what, a, b, c in zip(("x", "wd", "wp", "bd", "bp"), actual, theirs, truth, strict=True):
            assert_as_accurate(a.cpu(), b.cpu(), c, f"gradient of {what} through {activation}, {layout}")


@pytest.mark.parametrize("names", [("relu6", "identity"), ("gelu", "relu"), ("identity", "silu")], ids="-".join)
@pytest.mark.parametrize("needed", [tuple(int(i == j) for j in range(5)) for i in range(5)], ids=str)
@pytest.mark.parametrize("biases", [(1, 1), (0, 1), (1, 0)])
def test_only_what_is_needed_is_computed(biases: tuple, needed: tuple, names: tuple[str, str], device: str) -> None:
    made = tensors(SEPARABLE_BY_NAME["plain"], torch.float32, device)
    made[3:] = [t if there else None for t, there in zip(made[3:], biases, strict=True)]
    inputs = [None if t is None else t.requires_grad_(bool(n)) for t, n in zip(made, needed, strict=True)]
    wanted = [t for t in inputs if t is not None and t.requires_grad]
    if not wanted:
        pytest.skip("the one gradient that would be wanted is of a bias that is not there")
    case = SEPARABLE_BY_NAME["plain"]
    expected = torch.autograd.grad(torchs(*inputs, case, names).square().sum(), wanted)
    with strictness(True):
        y = ours(*inputs, case=case, activations=names)
        sepconv_ext.reset_kernel_counts()
        actual = torch.autograd.grad(y.square().sum(), wanted)
        runs = sum(sepconv_ext.kernel_counts().values())
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-3)
    again = needed[2] or names[1] == "silu" or (names[0] != "identity" and any(needed[i] for i in (0, 1, 3)))
    before = names[1] == "silu"  # its derivative needs the pointwise sums
    maps = any(needed[i] for i in (0, 1, 3)) + sum(needed[:3])
    assert runs == bool(again) + before + maps


@by_dense_layout
@by_dtype
@pytest.mark.parametrize("names", [("relu6", "identity"), ("gelu", "relu"), ("silu", "hardswish")], ids="-".join)
@pytest.mark.parametrize("strict", [True, False])
def test_saving_the_intermediate_changes_no_bit(
    strict: bool, names: tuple[str, str], dtype: torch.dtype, layout: str, device: str
) -> None:
    for case in (SEPARABLE_BY_NAME[name] for name in ("awkward", "k5_stride2", "multiplier2", "many_small_images")):
        results = []
        for save in (False, True):
            inputs = tensors(case, dtype, device, layout, requires_grad=True)
            with strictness(strict):
                y = ours(*inputs, case=case, activations=names, save_intermediate=save)
                results.append([y, *torch.autograd.grad(y.square().sum(), inputs)])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True)), str(case)


def test_saving_the_intermediate_is_what_memory_is_spent_on(device: str) -> None:
    case = SEPARABLE_BY_NAME["multiplier2"]
    kept: list[tuple[int, ...]] = []
    for save in (False, True):
        for names in (("relu6", "identity"), ("gelu", "relu")):
            inputs = tensors(case, torch.float32, device, requires_grad=True)
            kept.clear()
            with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
                ours(*inputs, case=case, activations=names, save_intermediate=save)
            middle = (case.N, case.C * case.multiplier, *case.output_size[2:])
            assert kept.count(middle) == save
            assert case.input_size in kept and kept.count(case.output_size) == (names[1] == "relu")


def test_third_order(device: str) -> None:
    case = SeparableCase("tiny", 1, 2, 5, 4, 3)
    x, wd, wp, bd, bp = tensors(case, torch.float64, device, requires_grad=True)

    def third(call: Callable) -> Tensor:
        value = call(x, wd, wp, bd, bp, case=case, activations=("tanh", "silu")).pow(3).sum()
        for target in (x, wp, wd):
            (value,) = torch.autograd.grad(value, target, create_graph=True)
            value = value.square().sum()
        return value

    torch.testing.assert_close(third(ours), third(torchs))


def test_strides_of_the_gradients(device: str) -> None:
    for layout in ("contiguous", "channels_last"):
        inputs = tensors(SEPARABLE_BY_NAME["multiplier2"], torch.float32, device, layout, requires_grad=True)
        gradients = torch.autograd.grad(ours(*inputs, case=SEPARABLE_BY_NAME["multiplier2"]).sum(), inputs)
        for tensor, gradient in zip(inputs, gradients, strict=True):
            assert gradient.stride() == tensor.stride()


# ---- torch's machinery -----------------------------------------------------------------------------------------------


@by_dense_layout
@pytest.mark.parametrize("names", [("relu6", "identity"), ("gelu", "tanh")], ids="-".join)
def test_opcheck(names: tuple[str, str], layout: str, device: str) -> None:
    for case in (SEPARABLE_BY_NAME["one_channel"], SEPARABLE_BY_NAME["k4x2_same"], SEPARABLE_BY_NAME["empty_batch"]):
        x, wd, wp, bd, bp = tensors(case, torch.float32, device, layout, requires_grad=True)
        for save in (False, True):
            arguments = (x, wd, bd, wp, bp, *case.op_geometry, *names, save)
            torch.library.opcheck(ops.separable_conv2d.default, arguments)
    detached = [t.detach() for t in (x, wd, bd, wp, bp)]
    for wanted in ((True, False), (False, True), (True, True)):
        arguments = (*detached, *case.op_geometry, *names, *wanted)
        torch.library.opcheck(ops.separable_conv2d_training.default, arguments)


@by_dense_layout
def test_compile(layout: str, device: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(functional.separable_conv2d, backend="aot_eager", fullgraph=True)
    case = SEPARABLE_BY_NAME["k4x2_same"]
    results = []
    for call in (compiled, functional.separable_conv2d):
        inputs = tensors(case, torch.float32, device, layout, requires_grad=True)
        with strictness(True):
            y = call(*inputs, *case.geometry, *case.activations)
            results.append((y, *torch.autograd.grad(y.square().sum(), inputs)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
        assert a.stride() == b.stride()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_name)
def test_autocast(dtype: torch.dtype, device: str) -> None:
    case = SEPARABLE_BY_NAME["plain"]
    inputs = tensors(case, torch.float32, device, requires_grad=True)
    with torch.autocast(device, dtype=dtype):
        actual, expected = ours(*inputs, case=case), torchs(*inputs, case)
    assert actual.dtype == expected.dtype == dtype
    torch.testing.assert_close(actual, expected, rtol=4e-2, atol=4e-2)
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(actual.float().sum(), inputs))


def test_flop_counts(device: str) -> None:
    """Forward: both stages. Backward: two maps a stage, and the depthwise stage once more where it was not kept."""
    case = SEPARABLE_BY_NAME["plain"]
    depthwise = 2 * case.N * case.H * case.W * case.C * 9
    pointwise = 2 * case.N * case.H * case.W * case.C * case.K

    def count(save: bool) -> int:
        inputs = tensors(case, torch.float32, device, requires_grad=True)
        with FlopCounterMode(display=False) as counter:
            ours(*inputs, case=case, save_intermediate=save).sum().backward()
        return counter.get_total_flops()

    assert count(True) == 3 * (depthwise + pointwise)
    assert count(False) == count(True) + depthwise


def test_transforms_of_torch_func(device: str) -> None:
    made = tensors(SMALL, torch.float64, device)
    tangents = tuple(torch.ones_like(t) for t in made)
    results = []
    for call in (ours, torchs):
        f = functools.partial(call, case=SMALL)
        vmapped = torch.func.vmap(lambda x, f=f: f(x[None], *made[1:])[0])(made[0])
        results.append((torch.func.jvp(f, tuple(made), tangents), torch.func.jacrev(f, 2)(*made), vmapped))
    torch.testing.assert_close(*results)


def test_unbatched_and_inference(device: str) -> None:
    case = SEPARABLE_BY_NAME["plain"]
    x, wd, wp, bd, bp = tensors(case, torch.float32, device)
    with torch.inference_mode(), fused(device):
        y = ours(x[0], wd, wp, bd, bp, case=case)
    torch.testing.assert_close(y.clone(), torchs(x[0], wd, wp, bd, bp, case), rtol=1e-4, atol=1e-4)


def test_what_no_kernel_covers_goes_to_torch(device: str) -> None:
    case = SeparableCase("complex", 1, 2, 4, 4, 3, depthwise_activation="identity")
    made = [t.to(torch.complex64) for t in tensors(case, torch.float32, device)]
    torch.testing.assert_close(ours(*made, case=case), torchs(*made, case))


# ---- bad input -------------------------------------------------------------------------------------------------------


BAD: tuple[tuple[str, dict[str, Callable[[Tensor], Tensor]], dict[str, object], tuple[str, ...]], ...] = (
    ("input_2d", {"input": lambda t: t[0, 0]}, {}, ("input", "4", "2")),
    ("depthwise_3d", {"depthwise_weight": lambda t: t[0]}, {}, ("depthwise_weight", "4", "3")),
    ("pointwise_2d", {"pointwise_weight": lambda t: t[:, :, 0, 0]}, {}, ("pointwise_weight", "4", "2")),
    (
        "not_depthwise",
        {"depthwise_weight": lambda t: t.expand(8, 2, 3, 3)},
        {},
        ("depthwise_weight", "[8, 2, 3, 3]", "1"),
    ),
    ("no_multiple", {"depthwise_weight": lambda t: t[:6]}, {}, ("depthwise_weight", "4", "6")),
    ("too_few", {"depthwise_weight": lambda t: t[:2]}, {}, ("depthwise_weight", "4", "2")),
    ("not_pointwise", {"pointwise_weight": lambda t: t.expand(5, 8, 3, 3)}, {}, ("pointwise_weight", "[5, 8, 3, 3]")),
    ("other_channels", {"pointwise_weight": lambda t: t[:, :7]}, {}, ("pointwise_weight", "8", "7")),
    ("no_outputs", {"pointwise_weight": lambda t: t[:0]}, {}, ("pointwise_bias", "[0]", "[5]")),
    ("depthwise_bias_length", {"depthwise_bias": lambda t: t[:4]}, {}, ("depthwise_bias", "[8]", "[4]")),
    ("pointwise_bias_rank", {"pointwise_bias": lambda t: t[None]}, {}, ("pointwise_bias", "[5]", "[1, 5]")),
    ("depthwise_dtype", {"depthwise_weight": lambda t: t.double()}, {}, ("depthwise_weight", "Double", "Float")),
    ("pointwise_dtype", {"pointwise_weight": lambda t: t.half()}, {}, ("pointwise_weight", "Half", "Float")),
    ("bias_dtype", {"pointwise_bias": lambda t: t.double()}, {}, ("pointwise_bias", "Double", "Float")),
    ("kernel_too_tall", {"input": lambda t: t[:, :, :2]}, {"padding": 0}, ("depthwise_weight", "height", "3", "2")),
    ("zero_stride", {}, {"stride": 0}, ("stride", "1", "0")),
    ("negative_padding", {}, {"padding": (1, -1)}, ("padding", "-1")),
    ("zero_dilation", {}, {"dilation": 0}, ("dilation", "1", "0")),
    ("three_strides", {}, {"stride": (1, 1, 1)}, ("stride", "2", "1, 1, 1")),
    ("same_with_stride", {}, {"stride": 2, "padding": "same"}, ("same", "stride", "2")),
    ("unknown_padding", {}, {"padding": "bogus"}, ("padding", "bogus")),
)


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("name, changes, arguments, words", BAD, ids=[bad[0] for bad in BAD])
def test_bad_input(
    name: str, changes: dict, arguments: dict, words: tuple[str, ...], requires_grad: bool, device: str
) -> None:
    sizes = {
        "input": (2, 4, 5, 6),
        "depthwise_weight": (8, 1, 3, 3),
        "pointwise_weight": (5, 8, 1, 1),
        "depthwise_bias": (8,),
        "pointwise_bias": (5,),
    }
    made = {key: torch.ones(size, device=device, requires_grad=requires_grad) for key, size in sizes.items()}
    functional.separable_conv2d(**made, padding=1)  # good as it stands
    made |= {key: change(made[key]) for key, change in changes.items()}
    sepconv_ext.reset_kernel_counts()
    with pytest.raises(RuntimeError) as error:
        functional.separable_conv2d(**made, **{"padding": 1, **arguments})
    missing = [word for word in words if word.lower() not in str(error.value).lower()]
    assert not missing, f"{missing} not in: {error.value}"
    assert sepconv_ext.kernel_counts() == {}


@pytest.mark.parametrize("which", ["depthwise_activation", "pointwise_activation"])
def test_unknown_activation_is_a_value_error(which: str, device: str) -> None:
    x, wd, wp, *_ = tensors(SMALL, torch.float32, device)
    with pytest.raises(ValueError, match=r"activation must be one of .*relu6.*'swish'"):
        functional.separable_conv2d(x, wd, wp, **{which: "swish"})

"""Bad input: torch's exception type, a message that names the argument and both values, and no kernel run."""

from __future__ import annotations

import inspect
import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sepconv_ext
from sepconv_ext import functional

ops = torch.ops.sepconv_ext


class Bad(NamedTuple):
    name: str
    words: tuple[str, ...]  # what the message must hold: the argument, its value, and what it should have fitted
    input: Callable[[Tensor], object] = lambda t: t  # made from a good [2, 4, 5, 6] input
    weight: Callable[[Tensor], object] = lambda t: t  # made from a good [4, 1, 3, 3] weight
    bias: Callable[[Tensor], object] = lambda t: t  # made from a good [4] bias
    arguments: Mapping[str, object] = MappingProxyType({})

    def call(self, function: Callable, device: str, requires_grad: bool = False) -> Tensor:
        x, w, b = (
            torch.ones(*size, device=device, requires_grad=requires_grad) for size in ((2, 4, 5, 6), (4, 1, 3, 3), (4,))
        )
        return function(self.input(x), self.weight(w), self.bias(b), **{"groups": 4, **self.arguments})


BAD = (
    Bad("input_2d", ("input", "2"), input=lambda t: t[0, 0]),
    Bad("input_5d", ("input", "5"), input=lambda t: t[None]),
    Bad("weight_3d", ("weight", "3"), weight=lambda t: t[..., 0]),
    Bad("weight_5d", ("weight", "5"), weight=lambda t: t[..., None]),
    Bad("bias_2d", ("bias", "4", "[4, 1]"), bias=lambda t: t[:, None]),
    Bad("bias_length", ("bias", "4", "5"), bias=lambda t: t.new_zeros(5)),
    Bad("weight_dtype", ("weight", "input", "Double", "Float"), weight=lambda t: t.double()),
    Bad("input_dtype", ("weight", "input", "Half", "Float"), input=lambda t: t.half()),
    Bad("bias_dtype", ("bias", "Double", "Float"), bias=lambda t: t.double()),
    Bad("integer_input", ("Int", "Float"), input=lambda t: t.int()),
    Bad("channels", ("input", "4", "3"), input=lambda t: t[:, :3]),
    Bad("channels_unbatched", ("input", "4", "3"), input=lambda t: t[0, :3]),
    Bad("groups_beyond_outputs", ("groups", "4", "weight", "3"), weight=lambda t: t[:3]),
    Bad("groups_not_dividing_outputs", ("groups", "3", "4"), arguments={"groups": 3}),
    Bad("groups_zero", ("groups", "0"), arguments={"groups": 0}),
    Bad("groups_negative", ("groups", "-2"), arguments={"groups": -2}),
    Bad("kernel_too_tall", ("weight", "height", "3", "2"), input=lambda t: t[:, :, :2]),
    Bad("kernel_too_wide", ("weight", "width", "3", "2"), input=lambda t: t[..., :2]),
    Bad("dilated_kernel_too_large", ("dilation", "3", "7", "5"), arguments={"dilation": 3}),
    Bad("empty_plane", ("height", "3", "0"), input=lambda t: t[:, :, :0]),
    Bad("negative_padding", ("padding", "-1"), arguments={"padding": -1}),
    Bad("negative_padding_in_one_direction", ("padding", "-1"), arguments={"padding": (1, -1)}),
    Bad("zero_stride", ("stride", "0"), arguments={"stride": 0}),
    Bad("negative_stride", ("stride", "-1"), arguments={"stride": (1, -1)}),
    Bad("zero_dilation", ("dilation", "0"), arguments={"dilation": 0}),
    Bad("three_strides", ("stride", "3"), arguments={"stride": (1, 1, 1)}),
    Bad("three_paddings", ("padding", "3"), arguments={"padding": (1, 1, 1)}),
    Bad("four_paddings", ("padding", "4"), arguments={"padding": (1, 1, 1, 1)}),
    Bad("no_strides", ("stride", "0"), arguments={"stride": ()}),
    Bad("unknown_padding", ("padding", "bogus"), arguments={"padding": "bogus"}),
    Bad("same_with_stride", ("same", "stride", "2"), arguments={"padding": "same", "stride": 2}),
    Bad("same_negative_dilation", ("dilation", "-1"), arguments={"padding": "same", "dilation": -1}),
    Bad("same_weight_3d", ("weight", "3"), weight=lambda t: t[..., 0], arguments={"padding": "same"}),
    Bad("sparse_input", ("input", "Sparse"), input=lambda t: t.to_sparse()),
    Bad("sparse_weight", ("weight", "Sparse"), weight=lambda t: t.to_sparse()),
    Bad("list_input", ("input", "list"), input=lambda t: [1.0]),
    Bad("no_weight", ("weight", "None"), weight=lambda t: None),
    Bad("float_stride", ("stride", "float"), arguments={"stride": 1.5}),
    Bad("float_groups", ("groups", "float"), arguments={"groups": 4.0}),
    Bad("numpy_float_padding", ("padding", "float"), arguments={"padding": np.float32(1)}),
    Bad("none_stride", ("stride", "None"), arguments={"stride": None}),
    Bad("valid_float_stride", ("stride", "float"), arguments={"padding": "valid", "stride": 2.0}),
    Bad("same_float_dilation", ("dilation", "float"), arguments={"padding": "same", "dilation": 2.0}),
    Bad("same_none_stride", ("stride", "None"), arguments={"padding": "same", "stride": None}),
    Bad("same_three_dilations", ("dilation", "3"), arguments={"padding": "same", "dilation": (1, 1, 1)}),
    Bad("same_float_groups", ("groups", "float"), arguments={"padding": "same", "groups": 4.0}),
    Bad("string_stride", ("stride", "str"), arguments={"stride": "2"}),
    Bad("unknown_argument", ("activation",), arguments={"activation": "relu"}),
)


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("bad", BAD, ids=lambda bad: bad.name)
def test_bad_input(bad: Bad, requires_grad: bool, device: str) -> None:
    with pytest.raises(Exception) as theirs:
        bad.call(F.conv2d, device, requires_grad)
    sepconv_ext.reset_kernel_counts()
    with pytest.raises(Exception) as ours:
        bad.call(functional.conv2d, device, requires_grad)
    assert type(ours.value) is type(theirs.value), f"{ours.value!r} instead of {theirs.value!r}"
    message = str(ours.value)
    missing = [word for word in bad.words if word.lower() not in message.lower()]
    assert not missing, f"{missing} not in: {message}"
    assert not sepconv_ext.kernel_counts().keys() - {"aten"}, "a kernel ran"  # "aten": the error is torch's own


# What torch accepts, odd as it is, is accepted with the same shape, strides and values.
LEGAL = (
    Bad("one_element_lists", (), arguments={"stride": [2], "padding": [1], "dilation": [1]}),
    Bad("tensor_like_ints", (), arguments={"stride": torch.Size([2, 1]), "padding": (torch.tensor(1), 0)}),
    Bad("numpy_stride", (), arguments={"stride": np.int64(2)}),
    Bad("numpy_ints", (), arguments={"padding": (np.int64(1), np.int32(2)), "groups": np.int64(4)}),
    Bad("tensor_stride", (), arguments={"stride": torch.tensor(2)}),
    Bad("same_numpy_dilation", (), arguments={"padding": "same", "dilation": np.int64(2)}),
    Bad("same_tensor_dilation", (), arguments={"padding": "same", "dilation": torch.tensor(2)}),
    Bad("same_one_element_list", (), arguments={"padding": "same", "dilation": [2]}),
    Bad("valid_tensor_stride", (), arguments={"padding": "valid", "stride": torch.tensor(2)}),
    Bad("valid_size", (), arguments={"padding": "valid", "stride": torch.Size([2, 1])}),
    Bad("numpy_string", (), arguments={"padding": np.str_("same")}),
    Bad("bytes", (), arguments={"padding": b"same"}),
    Bad("stride_beyond_int32", (), arguments={"stride": (1 << 31, 1 << 40), "padding": 1}),
    Bad("same_far_taps", (), arguments={"padding": "same", "dilation": (1 << 31, 1 << 40)}),
    Bad("far_taps", (), arguments={"padding": (1 << 31, 1), "dilation": (1 << 31, 1)}),
    Bad("one_tap_far", (), weight=lambda t: t[..., :1, :1], arguments={"dilation": 1 << 62}),
    Bad("keyword_bias_none", (), bias=lambda t: None),
    Bad("unbatched", (), input=lambda t: t[0]),
    Bad("unbatched_same", (), input=lambda t: t[0], arguments={"padding": "same"}),
    Bad("empty_batch", (), input=lambda t: t[:0]),
    Bad("no_channels", (), input=lambda t: t[:, :0], weight=lambda t: t[:, :0], arguments={"groups": 1}),
    Bad("empty_batch_and_plane", (), input=lambda t: t[:0, :, :0], arguments={"padding": 2}),
    Bad("integers", (), input=lambda t: t.long(), weight=lambda t: t.long(), bias=lambda t: t.long()),
    Bad("complex", (), input=lambda t: t.cfloat(), weight=lambda t: t.cfloat(), bias=lambda t: t.cfloat()),
    Bad("meta", (), input=lambda t: t.to("meta"), weight=lambda t: t.to("meta"), bias=lambda t: t.to("meta")),
    Bad("expanded_input", (), input=lambda t: t[:1, :1].expand(3, 4, 5, 6)),
    Bad("expanded_weight", (), weight=lambda t: t[:1].expand(4, 1, 3, 3)),
    Bad("flipped_input", (), input=lambda t: t.flip(3).transpose(2, 3)),
    Bad("conjugate_view", (), input=lambda t: torch.complex(t, t).conj().imag),
)


@pytest.mark.parametrize("padding", ["same", "causal", "by number"])
@pytest.mark.parametrize("taps", [2, 3, 4])
def test_taps_far_away(padding, taps: int) -> None:
    """Taps 2^31 pixels apart do what taps do that are just too far apart, in all three maps."""
    x, w = torch.randn(2, 4, 19, requires_grad=True), torch.randn(4, 1, taps, requires_grad=True)

    def results(dilation: int) -> list[torch.Tensor]:
        if padding == "by number":  # left and right: the second tap is the near one
            sides = (0, 0, dilation, dilation * (taps - 2))
            image, weight = x[:, :, None], w[:, :, None]
            y = torch.ops.sepconv_ext.conv2d(image, weight, None, (1, 1), sides, (1, dilation), 4, "identity")
        else:
            y = functional.conv1d(x, w, None, 1, padding, dilation, 4)
        return [y, *torch.autograd.grad(y.square().sum(), (x, w))]

    for far in ((1 << 31) - 1, 1 << 33):
        for actual, expected in zip(results(far), results(40 + far % 2), strict=True):
            torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("legal", LEGAL, ids=lambda legal: legal.name)
def test_odd_but_legal_input(legal: Bad, device: str) -> None:
    expected = legal.call(F.conv2d, device)
    actual = legal.call(functional.conv2d, device)
    assert (actual.shape, actual.stride(), actual.dtype, actual.device) == (
        expected.shape,
        expected.stride(),
        expected.dtype,
        expected.device,
    )
    if not expected.is_meta:
        torch.testing.assert_close(actual, expected)


@pytest.mark.skipif(torch.version.cuda is None and torch.version.hip is None, reason="sparse CUDA needs CUDA")
@pytest.mark.cuda
@pytest.mark.parametrize("which", ["input", "weight", "bias"])
def test_mixed_devices(which: str) -> None:
    bad = Bad("mixed", (which, "cpu", "cuda:0"))._replace(**{which: lambda t: t.cpu()})
    with pytest.raises(RuntimeError):
        bad.call(F.conv2d, "cuda")
    with pytest.raises(RuntimeError) as ours:
        bad.call(functional.conv2d, "cuda")
    assert all(word in str(ours.value) for word in ("cpu", "cuda:0"))


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_mkldnn_tensors_are_left_to_torch(mode: Callable) -> None:
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    x, w = torch.randn(1, 4, 5, 5), torch.randn(4, 1, 3, 3)
    with mode():
        y = functional.conv2d(x.to_mkldnn(), w.to_mkldnn(), groups=4)
    torch.testing.assert_close(y.to_dense(), F.conv2d(x, w, groups=4))


@pytest.mark.parametrize("legal", LEGAL, ids=lambda legal: legal.name)
def test_inference_mode_takes_the_same(legal: Bad, device: str) -> None:
    with torch.inference_mode():
        test_odd_but_legal_input(legal, device)


# Every op, of its tensors alone.
STORED = {
    "conv2d": lambda x, w, b: ops.conv2d(x, w, b, [1, 1], [0, 0], [1, 1], w.shape[0], "identity"),
    "conv1d": lambda x, w, b: ops.conv2d(x[:, :, -1], w[:, :, -1], b, [1], [0], [1], w.shape[0], "identity"),
    "grad_input": lambda g, w: ops.conv2d_grad_input(
        g, w, [2, 4, 7, 7], [196, 49, 7, 1], [1, 1], [0, 0], [1, 1], w.shape[0]
    ),
    "grad_weight": lambda g, x: ops.conv2d_grad_weight(
        g, x, [4, 1, 3, 3], [9, 9, 3, 1], [1, 1], [0, 0], [1, 1], x.shape[1]
    ),
    "both_grads": lambda g, x, w: ops.conv2d_both_grads(g, x, w, [1, 1], [0, 0], [1, 1], w.shape[0]),
    "separable": lambda x, d, bd, p, bp: functional.separable_conv2d(x, d, p, bd, bp),
    "spatial": lambda x, c, r: functional.spatial_separable_conv2d(x, c, r),
    "transposed": lambda x, w, b: functional.conv_transpose2d(x, w, b, groups=4),
    "causal": lambda x, w, b, states: functional.causal_conv1d(x, w, b, None, states),
    "packed": lambda x, i: functional.causal_conv1d(x, x[0, :, :3], seq_idx=i.view(torch.int32)),
    "update": lambda x, state, w, b: functional.causal_conv1d_update(x, state, w, b),
    "update_rows": lambda lens, rows: functional.causal_conv1d_update(
        torch.ones(3, 4, device=rows.device),
        torch.ones(3, 4, 6, device=rows.device),
        torch.ones(4, 3, device=rows.device),
        None,
        None,
        lens.view(torch.int32),
        rows.view(torch.int32),
    ),
}
STORED_SIZES = {
    "conv2d": ((2, 4, 7, 7), (4, 1, 3, 3), (4,)),
    "conv1d": ((2, 4, 7, 7), (4, 1, 3, 3), (4,)),
    "grad_input": ((2, 4, 5, 5), (4, 1, 3, 3)),
    "grad_weight": ((2, 4, 5, 5), (2, 4, 7, 7)),
    "both_grads": ((2, 4, 5, 5), (2, 4, 7, 7), (4, 1, 3, 3)),
    "separable": ((2, 4, 7, 7), (4, 1, 3, 3), (4,), (6, 4, 1, 1), (6,)),
    "spatial": ((2, 4, 7, 7), (4, 3), (4, 3)),
    "transposed": ((2, 4, 7, 7), (4, 1, 3, 3), (4,)),
    "causal": ((2, 4, 7), (4, 3), (4,), (2, 4, 2)),
    "packed": ((2, 4, 7), (2, 7)),
    "update": ((2, 4, 1), (2, 4, 2), (4, 3), (4,)),
    "update_rows": ((3,), (3,)),
}


@pytest.mark.parametrize("left", [0, -4], ids=["freed", "too_small"])
@pytest.mark.parametrize("name, which", [(name, i) for name, sizes in STORED_SIZES.items() for i in range(len(sizes))])
def test_freed_storage_is_not_read(name: str, which: int, left: int, device: str) -> None:
    tensors = [torch.ones(size, device=device) for size in STORED_SIZES[name]]
    storage = tensors[which].untyped_storage()
    storage.resize_(left if left == 0 else storage.nbytes() + left)
    sepconv_ext.reset_kernel_counts()
    with pytest.raises(RuntimeError, match="storage"):
        STORED[name](*tensors)
    assert not sepconv_ext.kernel_counts(), "a kernel ran"


WRONG_TYPES = (1.5, (1, 1.5), "11", b"11", None, (True, True), True, np.array([1, 1]), {1})


@pytest.mark.parametrize("wrong", WRONG_TYPES, ids=repr)
@pytest.mark.parametrize("argument", ["stride", "padding", "dilation"])
def test_wrong_types_are_type_errors_everywhere(argument: str, wrong: object) -> None:
    """As for torch's functions; what is no type but a string is an unknown padding."""
    x, w, p = torch.ones(1, 4, 7, 7), torch.ones(4, 1, 3, 3), torch.ones(4, 4, 1, 1)
    calls = [
        lambda **k: functional.separable_conv2d(x, w, p, **k),
        lambda **k: functional.inverted_residual(x, p, None, w, None, p, None, **k),
        lambda **k: functional.explain(x, w, groups=4, **k),
        lambda **k: functional.conv_transpose2d(x, w, groups=4, **k),
        lambda **k: functional.conv_transpose1d(x[0], w[..., 0], groups=4, **k),
    ]
    if argument == "padding":
        calls.append(lambda **k: functional.spatial_separable_conv2d(x, w[:, 0, 0], w[:, 0, 0], **k))
    for i, call in enumerate(calls):
        kind = RuntimeError if isinstance(wrong, str) and argument == "padding" and i not in (3, 4) else TypeError
        kind = RuntimeError if i == 4 and isinstance(wrong, tuple) else kind  # two values for one dimension
        with pytest.raises(kind, match=argument):
            call(**{argument: wrong})


IMAGE, ROW, FILTER, TAPS, PRODUCT = ((1, 4, 7, 7), (1, 4, 9), (4, 1, 3, 3), (4, 3), (4, 4, 1, 1))
# The functions that torch has no counterpart of, and the sizes of the tensors that they need.
OWN = {
    "depthwise_conv2d": (IMAGE, FILTER),
    "pointwise_conv2d": (IMAGE, PRODUCT),
    "padded_conv2d": (IMAGE, FILTER, None, 1, 0, 1, 4),
    "padded_conv1d": (ROW, (4, 1, 3), None, 1, 0, 1, 4),
    "separable_conv2d": (IMAGE, FILTER, PRODUCT),
    "spatial_separable_conv2d": (IMAGE, TAPS, TAPS),
    "inverted_residual": (IMAGE, PRODUCT, None, FILTER, None, PRODUCT, None),
    "causal_conv1d": (ROW, TAPS),
    "causal_conv1d_update": ((1, 4), (1, 4, 2), TAPS),
    "explain": (IMAGE, FILTER, None, 1, 0, 1, 4),
    "explain_separable": (IMAGE, FILTER, PRODUCT),
    "explain_inverted_residual": (IMAGE, PRODUCT, None, FILTER, None, PRODUCT, None),
}
WRONG_KINDS = {"Tensor": (None, 1.5, "x", [1.0]), "Tensor | None": (1.5, "x", np.ones(4)), "bool": ("x",),
               "int": (1.5, None, "1"), "str": (5, None, ["relu"]), "str | None": (5, ["relu"])}  # fmt: skip


@pytest.mark.parametrize("name", OWN)
def test_own_functions_raise_torchs_type_errors(name: str) -> None:
    """Every argument of a wrong type is named, as torch's functions name theirs."""
    function = getattr(functional, name)
    good = [torch.ones(a) if isinstance(a, tuple) else a for a in OWN[name]]
    function(*good)
    bound = inspect.signature(function).bind(*good).arguments
    tried = 0
    for argument, parameter in inspect.signature(function).parameters.items():
        if (name, argument) in (("causal_conv1d", "return_final_states"), ("explain", "activation")):
            continue  # any object is true or false; a name that is only passed on
        for wrong in WRONG_KINDS.get(parameter.annotation, ()):
            with pytest.raises(TypeError, match=argument):
                function(**{**bound, argument: wrong})
            tried += 1
    assert tried >= 7


def test_types_that_are_right_are_not_blamed() -> None:
    """A call that fails for another reason says that one, whatever kinds of numbers it was given."""
    x, two = torch.ones(1, 4, 8), np.int64(2)
    with pytest.raises(RuntimeError, match="weight must have") as wrong_size:
        functional.causal_conv1d(x, torch.ones(4, 1, 1, 3), dilation=two)
    assert "dilation must be" not in str(wrong_size.value)
    with pytest.raises(TypeError, match=r"causal_conv1d\(\) missing 1 required positional argument: 'weight'"):
        functional.causal_conv1d(x)


@pytest.mark.parametrize("right", [np.int64(1), torch.tensor(1), (np.int32(1),), [torch.tensor(1), 1]], ids=repr)
def test_whole_numbers_of_other_kinds_are_taken(right: object) -> None:
    x, w, p = torch.randn(1, 4, 7, 7), torch.randn(4, 1, 3, 3), torch.randn(4, 4, 1, 1)
    for argument in ("stride", "padding", "dilation"):
        for call in (
            lambda n, argument=argument: functional.separable_conv2d(x, w, p, **{argument: n}),
            lambda n, argument=argument: functional.conv_transpose2d(x, w, groups=4, **{argument: n}),
        ):
            torch.testing.assert_close(call(right), call(1), rtol=0, atol=0)


@pytest.mark.parametrize("reduced", [False, True])
@pytest.mark.parametrize("places", list(itertools.product(("cpu", "meta"), repeat=3)), ids="-".join)
def test_tensors_without_data_have_the_dtypes_that_torch_wants(places: tuple[str, ...], reduced: bool) -> None:
    """A bias of another dtype, which autocast leaves alone on the meta device."""

    def outcome(function: Callable, dtype: torch.dtype) -> type | torch.dtype:
        x, w = (torch.ones(size, device=place) for size, place in zip((IMAGE, FILTER), places, strict=False))
        try:
            with torch.autocast("cpu", enabled=reduced):
                return function(x, w, torch.ones(4, dtype=dtype, device=places[2]), groups=4).dtype
        except RuntimeError as error:
            return type(error)

    for dtype in (torch.float32, torch.bfloat16):
        assert outcome(functional.conv2d, dtype) == outcome(F.conv2d, dtype), dtype


@pytest.mark.parametrize("mode", ["bogus", "constant", None, 5, "circular"])
@pytest.mark.parametrize("kind, size", [(nn.Conv2d, IMAGE), (nn.Conv1d, ROW), (nn.Conv3d, (1, 4, 5, 5, 5))])
def test_a_padding_mode_set_later_is_what_torch_makes_of_it(kind: type, size: tuple[int, ...], mode: object) -> None:
    def outcome(converted: bool) -> type | Tensor:
        torch.manual_seed(0)
        layer = kind(4, 4, 3, padding=1, groups=4)
        assert len(sepconv_ext.convert_(layer)) == 1 if converted else True
        layer.padding_mode = mode
        try:
            return layer(torch.ones(size))
        except Exception as error:
            return type(error)

    ours, theirs = outcome(True), outcome(False)
    if isinstance(theirs, Tensor) and isinstance(ours, Tensor):
        torch.testing.assert_close(ours, theirs)
    else:
        assert ours is theirs


def test_an_inference_tensor_goes_where_torch_pads_by_a_copy(device: str) -> None:
    with torch.inference_mode():
        x = torch.randn(1, 4, 7, 7, device=device)
    grads = []
    for layer in (nn.Conv2d, sepconv_ext.nn.Conv2d):
        torch.manual_seed(0)
        made = layer(4, 4, 3, padding=1, groups=4, padding_mode="reflect", device=device)
        made(x).sum().backward()
        grads.append(made.weight.grad)
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda x, w: functional.depthwise_conv2d(x, w, activation="swish"), ("activation", "swish", "relu6")),
        (lambda x, w: functional.pointwise_conv2d(x, w[:, :1].expand(4, 4, 1, 1), activation="x"), ("activation",)),
    ],
)
def test_unknown_activation_is_a_value_error(call: Callable, words: tuple[str, ...]) -> None:
    with pytest.raises(ValueError) as error:
        call(torch.ones(1, 4, 5, 5), torch.ones(4, 1, 1, 1))
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda x, w: functional.pointwise_conv2d(x, w), ("weight", "3")),
        (lambda x, w: functional.depthwise_conv2d(x, w[:3]), ("groups", "4", "3")),
        (lambda x, w: functional.depthwise_conv2d(x, w.expand(4, 2, 3, 3)), ("input", "8", "4")),
    ],
)
def test_named_forms_check_their_weight(call: Callable, words: tuple[str, ...]) -> None:
    with pytest.raises(RuntimeError) as error:
        call(torch.ones(1, 4, 5, 5), torch.ones(4, 1, 3, 3))
    assert all(word in str(error.value) for word in words), str(error.value)


GEOMETRY = ((1, 1), (1, 1), (1, 1), 4)


@pytest.mark.parametrize(
    "call, words",
    [
        (
            lambda g, x, w: ops.conv2d_grad_input(g[..., :4], w, x.shape, x.stride(), *GEOMETRY),
            ("grad_output", "[2, 4, 5, 6]", "[2, 4, 5, 4]"),
        ),
        (
            lambda g, x, w: ops.conv2d_grad_weight(g[:1], x, w.shape, w.stride(), *GEOMETRY),
            ("grad_output", "[2, 4, 5, 6]", "[1, 4, 5, 6]"),
        ),
        (
            lambda g, x, w: ops.conv2d_grad_input(g, w.double(), x.shape, x.stride(), *GEOMETRY),
            ("weight", "grad_output", "Double", "Float"),
        ),
        (
            lambda g, x, w: ops.conv2d_grad_weight(g, x.double(), w.shape, w.stride(), *GEOMETRY),
            ("input", "grad_output", "Double", "Float"),
        ),
        (lambda g, x, w: ops.conv2d_grad_input(g, w, x.shape[2:], x.stride(), *GEOMETRY), ("input", "4", "2")),
        (lambda g, x, w: ops.conv2d_grad_input(g, w, x.shape, x.stride()[1:], *GEOMETRY), ("input_stride", "4", "3")),
        (lambda g, x, w: ops.conv2d_grad_weight(g, x, w.shape, (1,), *GEOMETRY), ("weight_stride", "4", "1")),
        (
            lambda g, x, w: ops.conv2d(x, w, None, (1, 1), (1, 1, 1), (1, 1), 4, "identity"),
            ("padding", "2", "4", "3"),
        ),
        (lambda g, x, w: ops.conv2d(x[0, 0], w, None, *GEOMETRY, "identity"), ("input", "4", "2")),
        (
            lambda g, x, w: ops.conv2d(x, w, None, (1, 1), (1, 1, -1, 1), (1, 1), 4, "identity"),
            ("padding", "-1"),
        ),
    ],
)
def test_the_ops_check_what_they_are_given(call: Callable, words: tuple[str, ...], device: str) -> None:
    x, w = torch.ones(2, 4, 5, 6, device=device), torch.ones(4, 1, 3, 3, device=device)
    sepconv_ext.reset_kernel_counts()
    with pytest.raises(RuntimeError) as error:
        call(torch.ones_like(x), x, w)
    assert all(word in str(error.value) for word in words), str(error.value)
    assert sepconv_ext.kernel_counts() == {}


def test_strict_mode_comes_from_the_environment() -> None:
    program = (
        "import torch, sepconv_ext.functional as f\n"
        "x, w = torch.zeros(1, 2, 4, 4, dtype=torch.cfloat), torch.zeros(2, 1, 3, 3, dtype=torch.cfloat)\n"
        "f.conv2d(x, w, groups=2)\n"
    )
    for value, fails in (("1", True), ("0", False), ("", False)):
        environment = {**os.environ, "SEPCONV_STRICT": value}
        result = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
        assert (result.returncode != 0) == fails, result.stderr
        assert ("SEPCONV_STRICT" in result.stderr) == fails


def test_unknown_instruction_set_is_an_error() -> None:
    environment = {**os.environ, "SEPCONV_CPU_ISA": "sse9"}
    program = "import sepconv_ext; sepconv_ext._C.build_info()"
    result = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert result.returncode != 0 and "sse9" in result.stderr and "avx2" in result.stderr

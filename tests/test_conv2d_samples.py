"""The conv2d samples and error inputs that ship inside torch, run against functional.conv2d."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import sepconv_ext
from harness import DTYPES, assert_as_accurate, dtype_name, only_our_kernels, strictness
from sepconv_ext import functional

pytest.importorskip("expecttest", reason="torch's own test machinery imports it")

from torch.testing._internal.common_methods_invocations import op_db

(OPINFO,) = (op for op in op_db if op.name == "nn.functional.conv2d" and not op.variant_test_name)
SUPPORTED = sorted(OPINFO.dtypes | OPINFO.dtypesIfCUDA, key=str)


def samples(device: str, dtype: torch.dtype, requires_grad: bool = False) -> list:
    supported = OPINFO.supported_dtypes(torch.device(device).type)
    if dtype not in supported:
        pytest.skip(f"torch has no conv2d in {dtype_name(dtype)} on {device}")
    made = list(OPINFO.sample_inputs(device, dtype, requires_grad=requires_grad))
    assert len(made) >= 30, "torch's samples have moved"
    return made


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", SUPPORTED, ids=dtype_name)
def test_samples(dtype: torch.dtype, channels_last: bool, device: str) -> None:
    """Same values and same output strides in every dtype of torch's; our kernels alone where they have the dtype."""
    made = samples(device, dtype)
    ours = dtype in DTYPES
    for sample in made:
        x = sample.input
        if channels_last and x.dim() == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        expected = F.conv2d(x, *sample.args, **sample.kwargs)
        if ours:
            with only_our_kernels(at_least=1):
                y = functional.conv2d(x, *sample.args, **sample.kwargs)
        else:
            sepconv_ext.reset_kernel_counts()
            y = functional.conv2d(x, *sample.args, **sample.kwargs)
            assert sepconv_ext.kernel_counts() == {"aten": 1}
        torch.testing.assert_close(y, expected)
        assert y.stride() == expected.stride(), f"{tuple(x.shape)} {sample.kwargs}"


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_sample_gradients(dtype: torch.dtype, device: str) -> None:
    """No further from the float64 gradients than torch's own, with torch's strides."""
    for sample in samples(device, dtype, requires_grad=True):
        inputs = [sample.input, *(t for t in sample.args if t is not None)]
        exact_inputs = [t.detach().double().requires_grad_() for t in inputs]
        expected = F.conv2d(*inputs, **sample.kwargs)
        g = torch.randn_like(expected)
        theirs = torch.autograd.grad(expected, inputs, g)
        exact = torch.autograd.grad(F.conv2d(*exact_inputs, **sample.kwargs), exact_inputs, g.double())
        with only_our_kernels(at_least=3):  # each of the three maps
            ours = torch.autograd.grad(functional.conv2d(*inputs, **sample.kwargs), inputs, g)
        for actual, peer, truth in zip(ours, theirs, exact, strict=True):
            assert_as_accurate(actual, peer, truth, f"{tuple(sample.input.shape)} {sample.kwargs}")
            assert actual.stride() == peer.stride() or not peer.is_contiguous()


def test_types_without_a_kernel_are_an_error_in_strict_mode() -> None:
    x = torch.zeros(1, 2, 4, 4, dtype=torch.complex64)
    with strictness(True), pytest.raises(RuntimeError, match="SEPCONV_STRICT"):
        functional.conv2d(x, x.new_zeros(2, 1, 3, 3), groups=2)


def test_error_inputs(device: str) -> None:
    """Where torch raises, we raise the same type; before any kernel runs."""
    errors = list(OPINFO.error_inputs(device))
    assert len(errors) >= 8, "torch's error inputs have moved"
    for error in errors:
        sample = error.sample_input
        with pytest.raises(error.error_type) as theirs:
            F.conv2d(sample.input, *sample.args, **sample.kwargs)
        sepconv_ext.reset_kernel_counts()
        with pytest.raises(error.error_type) as ours:
            functional.conv2d(sample.input, *sample.args, **sample.kwargs)
        assert type(ours.value) is type(theirs.value)
        assert not {k: n for k, n in sepconv_ext.kernel_counts().items() if k != "aten"}

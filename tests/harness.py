"""What the tests share besides the shapes: making tensors, judging errors, and proof of which kernels ran."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

import sepconv_ext
from cases import Case
from sepconv_ext import reference

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
LAYOUTS = ("contiguous", "channels_last", "strided")
ACTIVATIONS = tuple(reference.ACTIVATIONS)

# What rounding alone may cost, in units of eps times the largest value: half types accumulate in float32, so that the
# last rounding is nearly all of their error; float32 differs from torch in the order of additions; and in float64 the
# oracle itself rounds, and torch may happen to share its order.
_ROUNDING_FLOOR = {torch.float32: 4.0, torch.float64: 64.0, torch.bfloat16: 0.25, torch.float16: 0.25}


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def with_layout(tensor: Tensor, layout: str) -> Tensor:
    """The same values in another memory layout; 'strided' has gaps in every dimension and its columns are not dense."""
    if layout == "contiguous":
        return tensor.contiguous()
    if layout == "channels_last":
        return tensor.contiguous(memory_format=torch.channels_last)
    roomy = tensor.new_full([2 * n + 1 for n in tensor.shape], float("nan"))
    view = roomy[tuple(slice(1, None, 2) for _ in tensor.shape)]
    return view.copy_(tensor)


def random(size: Sequence[int], dtype: torch.dtype, device: str, layout: str = "contiguous", seed: int = 0) -> Tensor:
    """Normal values that `dtype` holds exactly, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(*size, generator=generator, dtype=torch.float64)
    return with_layout(values.to(device, dtype), layout) if len(size) == 4 else values.to(device, dtype)


def tensors(
    case: Case, dtype: torch.dtype, device: str, layout: str = "contiguous", requires_grad: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Input, weight and bias (None where the case has none). The weight is contiguous unless `layout` is strided."""
    weight_layout = "strided" if layout == "strided" else "contiguous"
    made = (
        random(case.input_size, dtype, device, layout, seed=1),
        random(case.weight_size, dtype, device, weight_layout, seed=2),
        random((case.K,), dtype, device, seed=3) if case.bias else None,
    )
    for tensor in made:
        if tensor is not None:
            tensor.requires_grad_(requires_grad)
    return made


def grad_like_output(case: Case, dtype: torch.dtype, device: str, layout: str = "contiguous") -> Tensor:
    return random(case.output_size, dtype, device, layout, seed=4)


def assert_as_accurate(
    actual: Tensor, peer: Tensor, expected: Tensor, what: str = "", summed: Tensor | None = None
) -> None:
    """The error against the float64 `expected` is at most 1.1 times the peer's (torch's own result), plus rounding.

    `summed`, where given, are the values whose rounding counts: what stood before a bounded activation.
    """
    assert actual.shape == expected.shape, f"{what}: {tuple(actual.shape)} instead of {tuple(expected.shape)}"
    assert actual.dtype == peer.dtype, f"{what}: {actual.dtype} instead of {peer.dtype}"
    if expected.numel() == 0:
        return
    eps = torch.finfo(actual.dtype).eps
    error = (actual.double() - expected).abs().max().item()
    peer_error = (peer.double() - expected).abs().max().item()
    largest = (expected if summed is None else summed).abs().max().item()
    floor = _ROUNDING_FLOOR[actual.dtype] * eps * largest
    assert error <= 1.1 * peer_error + floor, f"{what}: error {error:.3g}, torch's {peer_error:.3g}, floor {floor:.3g}"


@contextlib.contextmanager
def strictness(on: bool) -> Iterator[None]:
    """SEPCONV_STRICT for a while."""
    before = sepconv_ext._C.strict()
    sepconv_ext._C.set_strict(on)
    try:
        yield
    finally:
        sepconv_ext._C.set_strict(before)


@contextlib.contextmanager
def half_kernels(bfloat16: bool, float16: bool) -> Iterator[None]:
    """Plans for a processor on which oneDNN has kernels of these half types or not, whatever this one is."""
    before = sepconv_ext._C.set_half_kernels(bfloat16, float16)
    try:
        yield
    finally:
        sepconv_ext._C.set_half_kernels(*before)


@contextlib.contextmanager
def only_our_kernels(at_least: int = 1) -> Iterator[None]:
    """Strict inside; afterwards at least so many runs of our kernels are on the counter, and none of ATen's."""
    with strictness(True):
        sepconv_ext.reset_kernel_counts()
        yield
        counts = sepconv_ext.kernel_counts()
    assert counts.get("aten", 0) == 0, f"ATen ran: {counts}"
    assert sum(counts.values()) >= at_least, f"expected {at_least} runs of our kernels, but counted {counts}"


@contextlib.contextmanager
def untouched_memory() -> Iterator[None]:
    """Fresh memory is not filled, whatever the determinism settings: huge tensors cost nothing until written."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = before

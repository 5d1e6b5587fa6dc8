"""A small case list for compute-sanitizer: every family, layout, dtype and map, by our kernels alone.

    compute-sanitizer --tool memcheck python3 tests/sanitize_cases.py     (`make gpu-sanitize`)

Shapes are small and odd, so that every kernel meets its edges. Results are compared with the CPU's, so that
a run that computes nothing cannot pass; torch's own kernels are kept out. A kernel that none of the cases ran is named,
and the run fails; test_gpu_record.py asks the plan for the same without a GPU.
"""

from __future__ import annotations

import itertools
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import sepconv_ext
from sepconv_ext.functional import (
    causal_conv1d,
    causal_conv1d_update,
    conv2d,
    depthwise_conv2d,
    inverted_residual,
    padded_conv2d,
    pointwise_conv2d,
    separable_conv2d,
    spatial_separable_conv2d,
)

ROOT = Path(__file__).resolve().parent.parent

# input, weight, keywords
CASES = [
    ((2, 5, 9, 11), (5, 1, 3, 3), {"padding": 1, "groups": 5}),  # depthwise, channels no vector divides
    ((2, 16, 13, 9), (16, 1, 5, 5), {"stride": 2, "padding": 2, "groups": 16}),
    ((1, 8, 17, 15), (8, 1, 7, 7), {"padding": 3, "groups": 8}),
    ((3, 2, 19, 20), (2, 1, 13, 31), {"padding": (6, 15), "groups": 2}),
    ((2, 8, 10, 12), (16, 1, 3, 5), {"padding": (1, 4), "dilation": (1, 2), "groups": 8}),  # multiplier 2
    ((2, 3, 29, 28), (3, 1, 5, 5), {"padding": 2, "groups": 3}),  # planes on tensor cores
    ((3, 24, 7, 5), (40, 24, 1, 1), {}),  # pointwise
    ((2, 33, 5, 5), (17, 33, 1, 1), {"stride": 2}),
    ((2, 12, 9, 8), (18, 4, 3, 3), {"padding": 1, "groups": 3}),  # grouped
    ((1, 64, 7, 7), (64, 32, 3, 3), {"stride": 2, "padding": 1, "groups": 2}),
    ((2, 64, 11, 13), (64, 8, 3, 3), {"padding": 1, "groups": 8}),  # groups on tensor cores
    ((2, 64, 11, 13), (64, 16, 3, 3), {"stride": 2, "padding": 1, "groups": 4}),
    ((5, 3, 9, 12), (3, 1, 9, 9), {"padding": 4, "groups": 3}),  # large kernels in plain arithmetic
    ((2, 4, 1, 70), (4, 1, 1, 31), {"padding": (0, 30), "groups": 4}),
    # what fills a large GPU has other tiles: GPU_LAYERS of cases.py
    ((16, 144, 29, 30), (144, 1, 3, 3), {"padding": 1, "groups": 144}),
    ((16, 144, 29, 30), (144, 1, 5, 5), {"stride": 2, "padding": 2, "groups": 144}),
    ((64, 96, 14, 14), (96, 1, 13, 13), {"padding": 6, "groups": 96}),
]
# Kernels that the plan takes for large problems, by hand: kernel, cut, and a case of channels_last in float32.
BY_HAND = [
    ("depthwise_nhwc_tma", {"pairs": 32, "rows": 4}, ((2, 72, 13, 15), (72, 1, 5, 5), {"padding": 2, "groups": 72})),
    ("depthwise_nhwc_tma", {"pairs": 16, "rows": 3}, ((3, 40, 9, 14), (40, 1, 7, 7), {"padding": 3, "groups": 40})),
]
# Input and E, K, kernel, stride, residual.
BLOCKS = [
    ((2, 24, 13, 11), 72, 24, 3, 1, True),
    ((1, 16, 20, 17), 48, 24, 5, 2, False),
    ((2, 40, 9, 10), 40, 136, 3, 1, False),  # nothing is expanded
]
SEQUENCES = [(40, 70, 4), (35, 33, 3), (9, 40, 7)]  # channels, steps, taps
DTYPES = {torch.float32: 1e-4, torch.float64: 1e-10, torch.float16: 2e-2, torch.bfloat16: 1e-1}
LAYOUTS = [torch.contiguous_format, torch.channels_last]


def run(device: str, x: torch.Tensor, w: torch.Tensor, b: torch.Tensor, keywords: dict) -> list[torch.Tensor]:
    """Output, grad_input, grad_weight, grad_bias on the device, brought to the CPU in float64."""
    x, w, b = (t.detach().to(device).requires_grad_() for t in (x, w, b))
    y = padded_conv2d(x, w, b, **keywords)
    y.backward(y.detach())
    return [t.detach().cpu().double() for t in (y, x.grad, w.grad, b.grad)]


def kernels() -> set[str]:
    """The names under which kernels are counted, but of torch's own product, from the sources."""
    sources = [path for ending in ("cpp", "h", "cu") for path in (ROOT / "csrc/cuda").rglob(f"*.{ending}")]
    found = {name for path in sources for name in re.findall(r'"(cuda_\w+)"', path.read_text())}
    return found - {"cuda_pointwise_matmul", "cuda_"}


def by_hand() -> int:
    """Boxes are for 9.0 and newer."""
    if torch.cuda.get_device_capability() < (9, 0):
        return 0
    for kernel, cut, (x_size, w_size, keywords) in BY_HAND:
        x, w = torch.randn(x_size).contiguous(memory_format=torch.channels_last), torch.randn(w_size)
        x_, w_ = x.cuda(), w.cuda()
        y = sepconv_ext._C.run_plan(kernel, cut, lambda: conv2d(x_, w_, None, **keywords))  # noqa: B023 (called at once)
        torch.testing.assert_close(y.cpu(), conv2d(x, w, None, **keywords), rtol=1e-4, atol=1e-4)
    return len(BY_HAND)


def blocks() -> int:
    """Inverted residual blocks in one kernel, of half types."""
    halves = (torch.float16, torch.bfloat16)
    for (size, E, K, kernel, stride, residual), dtype in itertools.product(BLOCKS, halves):
        C = size[1]
        given = [torch.randn(size).to(dtype).contiguous(memory_format=torch.channels_last)]
        for shape in ((E, C, 1, 1), (E, 1, kernel, kernel), (K, E, 1, 1)):
            fan_in = shape[1] * shape[2] * shape[3]
            given += [(torch.randn(shape) * fan_in**-0.5).to(dtype), torch.randn(shape[0]).to(dtype)]
        if C == E:
            given[1] = given[2] = None
        rest = (stride, kernel // 2, 1, "relu6", "relu6", "identity", residual)
        want = inverted_residual(*(t if t is None else t.double() for t in given), *rest)
        got = inverted_residual(*(t if t is None else t.cuda() for t in given), *rest).cpu().double()
        close = DTYPES[dtype] * want.abs().max().item()
        torch.testing.assert_close(got, want, rtol=DTYPES[dtype], atol=close)
    return len(BLOCKS) * len(halves)


def sequences() -> int:
    """States, packed rows and decoding, in both memory orders and off their alignment."""
    checked = 0
    for dtype, nlc, (C, L, S) in itertools.product(DTYPES, (False, True), SEQUENCES):
        x = torch.randn(2, L, C).transpose(1, 2) if nlc else torch.randn(2, C, L)
        sequence = (torch.arange(L) // 11).to(torch.int32).expand(2, L).contiguous()
        w, b, states = torch.randn(C, S), torch.randn(C), torch.randn(2, C, S - 1)
        for seq_idx in (None, sequence):
            halves = [t.to(dtype) for t in (x, w, b, states)]
            want = causal_conv1d(*(t.double() for t in halves[:3]), "silu", halves[3].double(), True, seq_idx)
            x_, w_, b_, s_ = (t.cuda() for t in halves)
            got = causal_conv1d(x_, w_, b_, "silu", s_, True, seq_idx if seq_idx is None else seq_idx.cuda())
            for ours, theirs in zip(got, want, strict=True):
                close = DTYPES[dtype] * max(theirs.abs().max().item(), 1)
                torch.testing.assert_close(ours.cpu().double(), theirs, rtol=DTYPES[dtype], atol=close)
            checked += 1
        state, double = states.to(dtype).cuda(), states.to(dtype).double()
        y = causal_conv1d_update(x_[..., :1], state, w_, b_, "silu")
        theirs = causal_conv1d_update(
            halves[0][..., :1].double(), double, halves[1].double(), halves[2].double(), "silu"
        )
        torch.testing.assert_close(y.cpu().double(), theirs, rtol=DTYPES[dtype], atol=10 * DTYPES[dtype])
        assert torch.equal(state.cpu().double(), double)
        checked += 1
    return checked


def main() -> int:
    if not (sepconv_ext.has_cuda() and torch.cuda.is_available()):
        print("sanitize_cases: this needs a GPU and a build with CUDA kernels", file=sys.stderr)
        return 2
    sepconv_ext._C.set_strict(True)
    torch.manual_seed(0)
    checked = 0
    for case, (dtype, tolerance), layout in itertools.product(CASES, DTYPES.items(), LAYOUTS):
        x_size, w_size, keywords = case
        x = torch.randn(x_size).to(dtype).contiguous(memory_format=layout)
        w = torch.randn(w_size).to(dtype).contiguous(memory_format=layout)
        b = torch.randn(w_size[0]).to(dtype)
        expected = run("cpu", x.double(), w.double(), b.double(), keywords)
        for got, want in zip(run("cuda", x, w, b, keywords), expected, strict=True):
            torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance * want.abs().max().item())
        checked += 1
    for (x_size, w_size, keywords), mode, layout in itertools.product(
        [CASES[0], CASES[1], CASES[3], CASES[6]], ("reflect", "replicate", "circular"), LAYOUTS
    ):
        x, w = (torch.randn(size).contiguous(memory_format=layout) for size in (x_size, w_size))
        b = torch.randn(w_size[0])
        padded = {**keywords, "padding_mode": mode}
        expected = run("cpu", x.double(), w.double(), b.double(), padded)
        for got, want in zip(run("cuda", x, w, b, padded), expected, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * want.abs().max().item())
        checked += 1
    for activation in ("relu", "gelu", "silu"):
        x = torch.randn(2, 16, 9, 9, device="cuda")
        depthwise_conv2d(x, torch.randn(16, 1, 3, 3, device="cuda"), padding=1, activation=activation)
        pointwise_conv2d(x, torch.randn(8, 16, 1, 1, device="cuda"), activation=activation)
        checked += 2
    for dtype, layout in itertools.product(DTYPES, LAYOUTS):
        x, w, v = (torch.randn(s, device="cuda", dtype=dtype) for s in ((2, 24, 9, 7), (24, 1, 3, 3), (70, 24, 1, 1)))
        x = x.contiguous(memory_format=layout)
        got = separable_conv2d(x, w, v, padding=1, depthwise_activation="relu")
        want = separable_conv2d(*(t.cpu().double() for t in (x, w, v)), padding=1, depthwise_activation="relu")
        tolerance = DTYPES[dtype] * want.abs().max().item()
        torch.testing.assert_close(got.cpu().double(), want, rtol=DTYPES[dtype], atol=tolerance)
        checked += 1
    for layout in LAYOUTS:  # a column and a row filter for each channel: two tiles of columns, of rows and of channels
        x = torch.randn(2, 37, 9, 30).contiguous(memory_format=layout)
        column, row = torch.randn(37, 5), torch.randn(37, 4)
        y = spatial_separable_conv2d(x.cuda(), column.cuda(), row.cuda(), padding="same").cpu()
        torch.testing.assert_close(y, spatial_separable_conv2d(x, column, row, padding="same"), rtol=1e-4, atol=1e-4)
        checked += 1
    checked += sequences() + by_hand() + blocks()
    torch.cuda.synchronize()
    counts = sepconv_ext.kernel_counts()
    print(f"{checked} passed, 0 failed; kernels: {counts}")
    missing = sorted(kernels() - set(counts))
    print(f"not run: {', '.join(missing) or 'none'}")
    return 1 if missing and torch.cuda.get_device_capability() >= (9, 0) else 0


if __name__ == "__main__":
    sys.exit(main())

"""``python -m benchmarks.fused FILE``: kernels that take the place of several calls, beside those calls.

Inverted residual blocks in one kernel, in calls of ours and in torch's; causal sequences and decoding, and what models
do without them. A row of the file is one of them, written as it comes: microseconds by contender, the kernels that ours
ran, and what its result differs by. On a GPU calls are replayed from a graph (timing.py); a CPU serves for rehearsal.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import sepconv_ext
from sepconv_ext import functional

from .blocks import NETWORKS, Block
from .peers import difference
from .timing import Clock, clock_for

__all__ = ["run"]

Call = Callable[[], object]
SEQUENCES = ((1, 1536, 2048), (8, 1536, 512), (64, 4096, 1))  # N, C, L; of one step: decoding
TAPS = 4


def of_block(block: Block, N: int, dtype: torch.dtype, device: torch.device) -> tuple[str, dict[str, Call]]:
    pad = block.side // 2

    def normal(*size: int) -> Tensor:
        scale = 1.0 if len(size) == 1 else (size[1] * size[2] * size[3]) ** -0.5
        return (torch.randn(size, device=device) * scale).to(dtype)

    x = torch.randn(N, block.C, block.size, block.size, device=device).to(dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    expands = block.C != block.E
    we, be = (normal(block.E, block.C, 1, 1), normal(block.E)) if expands else (None, None)
    wd, bd = normal(block.E, 1, block.side, block.side), normal(block.E)
    wp, bp = normal(block.K, block.E, 1, 1), normal(block.K)

    def one() -> Tensor:
        activations = ("relu6", "relu6", "identity")
        before = sepconv_ext._C.strict()
        sepconv_ext._C.set_strict(True)  # one kernel also where the plan takes calls
        try:
            return functional.inverted_residual(
                x, we, be, wd, bd, wp, bp, block.stride, pad, 1, *activations, block.residual
            )
        finally:
            sepconv_ext._C.set_strict(before)

    def calls() -> Tensor:
        e = functional.pointwise_conv2d(x, we, be, "relu6") if expands else x
        d = functional.depthwise_conv2d(e, wd, bd, block.stride, pad, activation="relu6")
        y = functional.pointwise_conv2d(d, wp, bp)
        return y + x if block.residual else y

    def torchs() -> Tensor:
        e = F.relu6(F.conv2d(x, we, be)) if expands else x
        d = F.relu6(F.conv2d(e, wd, bd, block.stride, pad, 1, block.E))
        y = F.conv2d(d, wp, bp)
        return y + x if block.residual else y

    return f"block {block}", {"one kernel": one, "calls": calls, "torch": torchs}


def of_sequence(N: int, C: int, L: int, dtype: torch.dtype, device: torch.device) -> tuple[str, dict[str, Call]]:
    x = torch.randn(N, L, C, device=device).to(dtype).transpose(1, 2)
    w, b = torch.randn(C, TAPS, device=device).to(dtype), torch.randn(C, device=device).to(dtype)
    state = torch.randn(N, C, TAPS, device=device).to(dtype)

    def rolled() -> Tensor:
        state.copy_(torch.cat([state[..., 1:], x], 2))
        return F.silu((state * w).sum(2, keepdim=True) + b[:, None])

    def padded() -> Tensor:
        return F.silu(F.conv1d(x, w[:, None], b, 1, TAPS - 1, 1, C)[..., :L])

    if L == 1:
        # The state stays what it is in value, so that all contenders see the same.
        state.copy_(x.expand_as(state))
        one = lambda: functional.causal_conv1d_update(x, state, w, b, "silu")  # noqa: E731
        return f"decoding {N}x{C}, {TAPS} taps", {"one kernel": one, "torch": rolled}
    one = lambda: functional.causal_conv1d(x, w, b, "silu")  # noqa: E731
    return f"causal {N}x{C}x{L}, {TAPS} taps", {"one kernel": one, "torch": padded}


def row(what: str, calls: Mapping[str, Call], dtype: torch.dtype, clock: Clock, budget: float) -> dict[str, object]:
    made: dict[str, object] = {"what": what, "dtype": str(dtype).removeprefix("torch.")}
    try:
        sepconv_ext.reset_kernel_counts()
        apart = difference(calls["one kernel"](), calls["torch"]())
        made |= {"kernels": sorted(sepconv_ext.kernel_counts()), "difference": apart}
    except RuntimeError as error:
        made["failed"] = str(error).splitlines()[0]
    timing = clock.measure({name: lambda index, call=call: call() for name, call in calls.items()}, 1, budget, rounds=3)
    microseconds = {name: round(1e6 * timing.seconds(name), 3) for name in timing.samples}
    return made | {"microseconds": microseconds, "errors": timing.errors}


def run(device: torch.device, batch: int, budget: float, most: int | None = None) -> Iterator[dict[str, object]]:
    """Yields the rows; `most`: only so many blocks."""
    clock = clock_for(device)
    with torch.no_grad():
        for sequence in SEQUENCES:
            yield row(*of_sequence(*sequence, torch.bfloat16, device), torch.bfloat16, clock, budget)
        for block in NETWORKS["mobilenet_v2"][:most]:
            yield row(*of_block(block, batch, torch.float16, device), torch.float16, clock, budget)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fused", description=__doc__.split("\n")[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--budget", type=float, default=0.05, help="seconds a row")
    parser.add_argument("--most", type=int, help="only so many blocks")
    options = parser.parse_args(arguments)
    options.file.parent.mkdir(parents=True, exist_ok=True)
    with options.file.open("w", buffering=1) as file:
        for made in run(options.device, options.batch, options.budget, options.most):
            file.write(json.dumps(made) + "\n")
            print(made, flush=True)


if __name__ == "__main__":
    main()

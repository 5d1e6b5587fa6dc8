"""Random calls of the package's functions and layers, all three maps, against torch in float64.

    python tests/fuzz/calls.py SECONDS [FIRST]    calls number FIRST, FIRST + 1, ... for so many seconds
    python tests/fuzz/calls.py call=NUMBER        that one call: what a failure prints

A call is made of its number alone. It runs in a child process, so that a crash and a hang are failures like others.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time

import torch
import torch.nn.functional as F
from torch import Tensor

from sepconv_ext import functional

HANG_SECONDS = 30  # of a child's own processor time, in which no call takes place
CALLS_A_CHILD = 200
FAIL = "FAIL: PYTHONPATH=. python tests/fuzz/calls.py"
VIEWS = ("plain", "channels_last") * 3 + ("slice", "slice_last", "crop_last", "step", "permuted", "odd")


def view(t: Tensor, how: str) -> Tensor:
    """The same values in other memory, NaN in between."""
    N, C, H, W = t.shape
    if how == "channels_last":
        return t.contiguous(memory_format=torch.channels_last)
    if how == "permuted":
        return t.permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0)
    if how == "odd":  # one element off the alignment
        room = t.new_full((t.numel() + 1,), float("nan"))
        room[1:] = t.reshape(-1)
        return room[1:].view(t.shape)
    places = {
        "slice": ((N, C + 2, H + 1, W + 3), (slice(None), slice(1, -1), slice(1, None), slice(2, -1))),
        "step": ((N, C, H, 2 * W), (slice(None), slice(None), slice(None), slice(None, None, 2))),
        "slice_last": ((N, C + 3, H, W), (slice(None), slice(1, -2))),
        "crop_last": ((N, C, H + 2, W + 1), (slice(None), slice(None), slice(1, -1), slice(1, None))),
    }
    if how not in places:
        return t
    size, where = places[how]
    room = t.new_full(size, float("nan"))
    if how.endswith("last"):
        room = room.contiguous(memory_format=torch.channels_last)
    room[where] = t
    return room[where]


def draw(R: random.Random) -> dict:
    """The arguments of a call that float64 computes in a moment."""
    while True:
        kind = R.choice(("depthwise", "depthwise", "depthwise", "multiplier", "groups", "1x1", "1x1", "dense"))
        C = R.choice((1, 2, 3, 4, 7, 8, 12, 15, 16, 17, 23, 24, 31, 32, 33, 48, 58, 64, 65, 96))
        groups, K = C, C
        if kind == "multiplier":
            K = C * R.randint(1, 3)
        elif kind in ("1x1", "dense"):
            groups, K = 1, R.choice((1, 3, 8, 17, 64))
        elif kind == "groups":
            groups = R.choice([d for d in range(1, C + 1) if C % d == 0])
            K = groups * R.randint(1, 4)
        taps = (R.choice((1, 2, 3, 3, 3, 4, 5, 5, 7, 7, 9, 11, 13, 31)),) * 2
        if R.random() < 0.3:
            taps = (R.randint(1, 12), R.randint(1, 12))
        if kind == "1x1":
            taps = (1, 1)
        N = R.choice((1, 1, 2, 3, 5, 17))
        H, W = (R.choice((1, 2, 3, 5, 7, 8, 10, 14, 15, 16, 19, 28, 33, 37, 56, 61)) for _ in "HW")
        stride = (R.choice((1, 1, 1, 2, 2, 3)),) * 2 if R.random() < 0.8 else (R.randint(1, 4), R.randint(1, 4))
        dilation = (1, 1) if R.random() < 0.75 else (R.randint(1, 4), R.randint(1, 4))
        any_padding = (R.randint(0, taps[0] + 2), R.randint(0, taps[1] + 2))
        padding = R.choice(((taps[0] // 2, taps[1] // 2), (0, 0), any_padding))
        sequence = R.random() < 0.15
        if sequence:
            H, taps, stride, dilation, padding = 1, (1, taps[1]), (1, stride[1]), (1, dilation[1]), (0, padding[1])
        sizes = [
            (size + 2 * p - d * (k - 1) - 1) // s + 1
            for size, p, d, k, s in zip((H, W), padding, dilation, taps, stride, strict=True)
        ]
        work = N * K * max(sizes[0], 0) * max(sizes[1], 0) * (C // groups) * taps[0] * taps[1]
        dtype = R.choice((torch.float32, torch.float32, torch.float64, torch.float16, torch.bfloat16))
        if min(sizes) >= 1 and N * C * H * W < 600_000 and work < (4e7 if dtype.itemsize > 2 else 4e6):
            return {
                "kind": kind, "dtype": dtype, "size": (N, C, H, W), "weight": (K, C // groups, *taps),
                "geometry": (stride, padding, dilation, groups), "bias": R.random() < 0.5, "sequence": sequence,
                "views": tuple(R.choice(VIEWS) for _ in "xwg"), "threads": R.choice((1, 1, 2, 5)),
            }  # fmt: skip


def tolerance(dtype: torch.dtype, terms: int, largest: float) -> float:
    accumulator = dtype if dtype.itemsize > 2 else torch.float32
    return 4 * (2 * torch.finfo(dtype).eps + 8 * torch.finfo(accumulator).eps * terms**0.5) * (1 + largest)


def run(call: dict) -> str | None:
    """What is wrong with the call's results, or None."""
    torch.set_num_threads(call["threads"])
    dtype, geometry = call["dtype"], call["geometry"]
    x0, w0 = torch.randn(call["size"]).to(dtype), torch.randn(call["weight"]).to(dtype)
    bias = torch.randn(call["weight"][0]).to(dtype) if call["bias"] else None
    x, w = view(x0, call["views"][0]).detach().requires_grad_(), view(w0, call["views"][1]).detach().requires_grad_()
    if call["sequence"]:
        stride, padding, dilation, groups = geometry
        y = functional.conv1d(x[:, :, 0], w[:, :, 0], bias, stride[1], padding[1], dilation[1], groups)[:, :, None]
    else:
        y = functional.conv2d(x, w, bias, *geometry)
    X, W = x0.double().requires_grad_(), w0.double().requires_grad_()
    Y = F.conv2d(X, W, None if bias is None else bias.double(), *geometry)
    g0 = torch.randn(Y.shape).to(dtype)
    got = (y, *torch.autograd.grad(y, (x, w), view(g0, call["views"][2])))
    want = (Y, *torch.autograd.grad(Y, (X, W), g0.double()))
    inside, taps, outside = w0[0].numel(), w0[0, 0].numel(), w0.shape[0] // geometry[3]
    terms = (inside, outside * taps, Y.numel() // Y.shape[1])
    for name, a, b, count in zip(("output", "grad_input", "grad_weight"), got, want, terms, strict=True):
        if a.shape != b.shape or a.dtype != dtype:
            return f"{name} is {a.dtype} {tuple(a.shape)}"
        error, most = (a.double() - b).abs().max().item(), tolerance(dtype, count, b.abs().max().item())
        if not error <= most:  # NaN is not
            return f"{name} is off by {error:.2e}, more than {most:.2e}"
    return None


def attempt(number: int) -> str | None:
    torch.manual_seed(number)
    call = draw(random.Random(number))
    try:
        wrong = run(call)
    except Exception as error:
        wrong = f"{type(error).__name__}: {error}".split("\n")[0][:200]
    return wrong and f"{FAIL} call={number}  # {wrong}; {call}"


def processor_seconds(pid: int) -> float:
    with open(f"/proc/{pid}/stat") as stat:
        fields = stat.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def run_child(first: int, end: float) -> tuple[int, list[str]]:
    """(calls made, failures) of a child that begins with call `first`."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        number = first
        while number < first + CALLS_A_CHILD and (number == first or time.time() < end):
            os.write(writer, b"begin\n")
            if wrong := attempt(number):
                os.write(writer, (wrong.replace("\n", " ") + "\n").encode())
            number += 1
        os._exit(0)
    os.close(writer)
    os.set_blocking(reader, False)
    said, status, heard = b"", None, 0.0
    while status is None:
        try:
            if piece := os.read(reader, 1 << 16):
                said, heard = said + piece, processor_seconds(pid)
        except BlockingIOError:
            pass
        if processor_seconds(pid) - heard > HANG_SECONDS:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            status = "no end"
        elif (ended := os.waitpid(pid, os.WNOHANG)) != (0, 0):
            status = ended[1]
        time.sleep(0.02)
    os.set_blocking(reader, True)
    while piece := os.read(reader, 1 << 16):
        said += piece
    os.close(reader)
    lines = said.decode().splitlines()
    failures, calls = [line for line in lines if line != "begin"], lines.count("begin")
    if status != 0:
        last = first + max(calls - 1, 0)
        how = status if isinstance(status, str) else f"signal {os.WTERMSIG(status)}"
        failures.append(f"{FAIL} call={last}  # {how}; {draw(random.Random(last))}")
    return calls, failures


def main() -> int:
    if sys.argv[1].startswith("call="):
        number = int(sys.argv[1].removeprefix("call="))
        print(draw(random.Random(number)), flush=True)
        wrong = attempt(number)
        print(wrong or "right")
        return wrong is not None
    end = time.time() + float(sys.argv[1])
    first = int(sys.argv[2]) if len(sys.argv) > 2 else random.SystemRandom().randrange(1 << 32)
    number, failed = first, 0
    while number == first or time.time() < end:
        calls, failures = run_child(number, end)
        number, failed = number + max(calls, 1), failed + len(failures)
        print(*failures, sep="\n", end="\n" if failures else "", flush=True)
    print(f"fuzz, calls: {number - first} of three maps each from {first} on, {failed} failed")
    return failed != 0


if __name__ == "__main__":
    sys.exit(main())

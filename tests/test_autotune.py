"""The choice between an op and aten's convolution by measurement, under torch.compile: on a CPU, by the same lowering.

Inductor's own setting for tests says which of the two wins, so that nothing here depends on the time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from harness import random
from sepconv_ext import autotune, convert_

pytest.importorskip("torch._inductor.kernel.custom_op", reason="this torch has no register_custom_op_autotuning")

import torch._inductor.config as config
from torch._inductor.lowering import user_lowerings
from torch._inductor.utils import run_and_get_code

ops = torch.ops.sepconv_ext
GEOMETRY = ((1, 1), (1, 1), (1, 1), 8)
SIZES = ((2, 8, 9, 9), (8, 1, 3, 3), (2, 8, 9, 9))
X, W, G = (random(size, torch.float32, "cpu", seed=i) for i, size in enumerate(SIZES))
CALLS = {
    "conv2d": (lambda x, w, g: ops.conv2d(x, w, None, *GEOMETRY, "identity"), "convolution"),
    "conv2d_grad_input": (
        lambda x, w, g: ops.conv2d_grad_input(g, w, [2, 8, 9, 9], [648, 81, 9, 1], *GEOMETRY),
        "convolution",
    ),
    "conv2d_grad_weight": (
        lambda x, w, g: ops.conv2d_grad_weight(g, x, [8, 1, 3, 3], [9, 9, 3, 1], *GEOMETRY),
        "convolution_backward",
    ),
}


@pytest.fixture(autouse=True)
def _afterwards_as_before() -> Iterator[None]:
    torch._dynamo.reset()
    with config.patch(force_disable_caches=True):
        yield
    autotune(False)
    torch._dynamo.reset()


def code_of(call: Callable, *inputs: Tensor, wins: bool | None = None, **settings: object) -> str:
    """What Inductor wrote at last: while it measures, it compiles each choice. `wins`: whether aten is made to."""
    with config.patch({"test_configs.force_custom_op_decomposition": wins}):
        y, codes = run_and_get_code(torch.compile(call, **settings), *inputs)
    torch.testing.assert_close(y, call(*inputs), rtol=1e-4, atol=1e-4)
    return codes[-1]


@pytest.mark.slow
@pytest.mark.parametrize("name", CALLS)
def test_each_map_is_the_one_or_the_other(name: str) -> None:
    call, atens = CALLS[name]
    ours = f"torch.ops.sepconv_ext.{name}.default"
    autotune(devices=("cpu",))
    kept = code_of(call, X, W, G, wins=False)
    assert ours in kept and atens not in kept
    torch._dynamo.reset()
    taken = code_of(call, X, W, G, wins=True)
    assert f"{ours}(" not in taken and atens in taken


def test_other_devices_symbolic_sizes_and_off_keep_the_ops() -> None:
    call, _ = CALLS["conv2d"]
    autotune()  # of GPUs
    assert "torch.ops.sepconv_ext.conv2d.default" in code_of(call, X, W, G, wins=True)
    torch._dynamo.reset()
    autotune(devices=("cpu",))
    assert "torch.ops.sepconv_ext.conv2d.default" in code_of(call, X, W, G, wins=True, dynamic=True)
    autotune(False)
    assert not {ops.conv2d.default, ops.conv2d_grad_input.default, ops.conv2d_grad_weight.default} & set(user_lowerings)


def test_a_training_step_with_what_is_measured_faster() -> None:
    """Both directions of a converted layer, the choices left to Inductor's measurement."""
    layer = nn.Conv2d(8, 8, 3, padding=1, groups=8)
    expected = torch.autograd.grad(layer(X).square().sum(), [layer.weight, layer.bias])
    convert_(layer)
    autotune(devices=("cpu",))
    compiled = torch.compile(layer, mode="reduce-overhead")  # CUDA graphs, of which a CPU has none
    actual = torch.autograd.grad(compiled(X).square().sum(), [layer.weight, layer.bias])
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)

"""Tensors and layers that are spread over processes: DTensor's placements, and what fully_shard does to a class.

Run as a program, this file is one process of the test.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harness import only_our_kernels, random
from sepconv_ext import convert_, functional, revert_

WORLD = 2
N = 2 * WORLD - 1  # images of a batch: the shards differ in size


def filters(*size: int) -> Tensor:
    return random(size, torch.float32, "cpu", seed=2)


def separable(save: bool) -> Callable:
    return lambda x, d, p, b: functional.separable_conv2d(x, d, p, b, None, 2, 1, 1, "silu", "relu", save)


def torch_separable(x: Tensor, d: Tensor, p: Tensor, b: Tensor) -> Tensor:
    return F.relu(F.conv2d(F.silu(F.conv2d(x, d, b, 2, 1, 1, x.shape[1])), p))


def torch_spatial(x: Tensor, column: Tensor, row: Tensor) -> Tensor:
    return F.conv2d(x, (column[:, :, None] * row[:, None]).unsqueeze(1), None, 1, 1, 1, x.shape[1])


IMAGES, SEQUENCES = (N, 4, 7, 6), (N, 4, 9)
# name -> ours, torch's, the images' size, the filters and biases
CALLS = {
    **{
        f"depthwise, stride {stride}": (
            lambda x, w, b, stride=stride: functional.conv2d(x, w, b, stride, 1, 1, 4),
            lambda x, w, b, stride=stride: F.conv2d(x, w, b, stride, 1, 1, 4),
            IMAGES,
            (filters(8, 1, 3, 3), filters(8)),
        )
        for stride in (1, 2)  # the same tensors, and results of other sizes
    },
    "pointwise": (functional.conv2d, F.conv2d, IMAGES, (filters(6, 4, 1, 1),)),
    "grouped, reflect": (
        lambda x, w: functional.padded_conv2d(x, w, None, 1, 1, 1, 2, padding_mode="reflect"),
        lambda x, w: F.conv2d(F.pad(x, (1, 1, 1, 1), "reflect"), w, None, 1, 0, 1, 2),
        IMAGES,
        (filters(4, 2, 3, 3),),
    ),
    "sequence": (
        lambda x, w, b: functional.conv1d(x, w, b, 1, 1, 1, 4),
        lambda x, w, b: F.conv1d(x, w, b, 1, 1, 1, 4),
        SEQUENCES,
        (filters(4, 1, 3), filters(4)),
    ),
    "transposed": (
        lambda x, w, b: functional.conv_transpose2d(x, w, b, 2, 1, 1, 2),
        lambda x, w, b: F.conv_transpose2d(x, w, b, 2, 1, 1, 2),
        IMAGES,
        (filters(4, 3, 3, 3), filters(6)),
    ),
    "unbatched sequence": (
        lambda x, w: functional.conv1d(x, w, None, 1, 1, 1, 4),
        lambda x, w: F.conv1d(x, w, None, 1, 1, 1, 4),
        SEQUENCES[1:],
        (filters(4, 1, 3),),
    ),
    **{
        f"separable, save_intermediate={save}": (
            separable(save),
            torch_separable,
            IMAGES,
            (filters(4, 1, 3, 3), filters(5, 4, 1, 1), filters(4)),
        )
        for save in (False, True)
    },
    "spatial": (functional.spatial_separable_conv2d, torch_spatial, IMAGES, (filters(4, 3), filters(4, 3))),
}
CALLS["spatial"] = (lambda x, c, r: functional.spatial_separable_conv2d(x, c, r, 1), *CALLS["spatial"][1:])


def gradients(compute: Callable, tensors: list[Tensor], wanted: list[int]) -> list[Tensor]:
    """The result and the gradients of the tensors whose places are given."""
    tensors = [t.detach().requires_grad_(i in wanted) for i, t in enumerate(tensors)]
    y = compute(*tensors)
    grads = torch.autograd.grad(y.square().sum(), [tensors[i] for i in wanted]) if wanted else ()
    return [y.detach(), *grads]


def check_placements(mesh: object) -> None:
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    for name, (ours, torchs, size, parts) in CALLS.items():
        whole = [random(size, torch.float32, "cpu", seed=1), *parts]
        for placement in (Replicate(), *map(Shard, range(min(3, len(size))))):
            for wanted in ([], [0], [1], list(range(len(whole)))):
                spread = [
                    distribute_tensor(t, mesh, [placement if i == 0 else Replicate()]) for i, t in enumerate(whole)
                ]
                with only_our_kernels():
                    got = gradients(ours, spread, wanted)
                for a, b in zip(got, gradients(torchs, whole, wanted), strict=True):
                    assert a.shape == b.shape, f"{name} {placement} {wanted}: {a.shape} instead of {b.shape}"
                    what = f"{name} {placement} {wanted}"
                    torch.testing.assert_close(a.full_tensor(), b, rtol=1e-4, atol=1e-4, msg=what)
                with torch.inference_mode(), only_our_kernels():
                    assert torch.equal(ours(*spread).full_tensor(), got[0].full_tensor())
                if placement in (Replicate(), Shard(0)) and not name.startswith("unbatched"):
                    assert got[0].placements == (placement,), f"{name}: {got[0].placements}"


def check_filters_that_are_sharded(mesh: object) -> None:
    """Whoever shards a layer's weight gets the right result, as of torch's layer."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    x, w = random(IMAGES, torch.float32, "cpu"), filters(4, 1, 3, 3)
    y = functional.conv2d(distribute_tensor(x, mesh, [Replicate()]), distribute_tensor(w, mesh, [Shard(0)]), groups=4)
    torch.testing.assert_close(y.full_tensor(), F.conv2d(x, w, groups=4))


def check_states_changed_in_place(mesh: object) -> None:
    """A step of decoding: each shard moves its own states on, and no copy of them is changed in their stead."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    token, states, w, b = (random(size, torch.float32, "cpu") for size in ((N, 4), (N, 4, 3), (4, 3), (4,)))
    rows = torch.arange(N).flip(0)
    whole, whole_by_rows = states.clone(), states.clone()
    y = functional.causal_conv1d_update(token, whole, w, b, "silu")
    y_by_rows = functional.causal_conv1d_update(token, whole_by_rows, w, b, "silu", None, rows)
    filters = [distribute_tensor(t, mesh, [Replicate()]) for t in (w, b)]
    for of_token in (Replicate(), Shard(0), Shard(1)):
        x = distribute_tensor(token, mesh, [of_token])
        for placement in (Replicate(), Shard(0)):
            state = distribute_tensor(states.clone(), mesh, [placement])
            got = functional.causal_conv1d_update(x, state, *filters, "silu")
            torch.testing.assert_close((got.full_tensor(), state.full_tensor()), (y, whole))
            assert got.placements == state.placements == (placement,)
        by_rows = distribute_tensor(rows, mesh, [Replicate()])
        state = distribute_tensor(states.clone(), mesh, [Replicate()])
        got = functional.causal_conv1d_update(x, state, *filters, "silu", None, by_rows)
        torch.testing.assert_close((got.full_tensor(), state.full_tensor()), (y_by_rows, whole_by_rows))
        for refused, indices in ((Shard(1), None), (Shard(0), by_rows)):
            state = distribute_tensor(states.clone(), mesh, [refused])
            with pytest.raises(RuntimeError, match="state is changed in place"):
                functional.causal_conv1d_update(x, state, *filters, "silu", None, indices)


def check_distributed_modules(mesh: object) -> None:
    from torch.distributed.tensor import Shard, distribute_module, distribute_tensor

    layer, x = nn.Conv2d(4, 4, 3, padding=1, groups=4), random(IMAGES, torch.float32, "cpu")
    torch.manual_seed(0)
    layer.reset_parameters()
    for first in (False, True):
        module = copy.deepcopy(layer)
        if first:
            convert_(module)
        module = distribute_module(module, mesh)
        assert len(convert_(module)) == (not first)
        with only_our_kernels():
            y = module(distribute_tensor(x, mesh, [Shard(0)]))
        torch.testing.assert_close(y.full_tensor(), layer(x))


def check_fully_sharded_layers(mesh: object) -> None:
    """Converted before or after, and reverted: the class keeps what fully_shard put there, and training goes on."""
    from torch.distributed.fsdp import FSDPModule, fully_shard

    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv1d(4, 4, 3, padding=1, groups=4), nn.ReLU(inplace=True), nn.Conv1d(4, 6, 1))
    x = random(SEQUENCES, torch.float32, "cpu")

    def trained(convert_first: bool, convert_last: bool, revert: bool) -> list[Tensor]:
        model = copy.deepcopy(plain)
        if convert_first:
            assert len(convert_(model)) == 2
        for layer in (model[0], model[2]):
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        sharded = type(model[0])
        if convert_last:
            assert len(convert_(model)) == 2
        if revert:
            assert revert_(model) == 2
            assert type(model[0]) is sharded or convert_first
            assert not type(model[0]).__mro__[-3].__module__.startswith("sepconv_ext")
        assert isinstance(model[0], FSDPModule) and type(model[0]).__name__ == "FSDPConv1d"
        model[0].unshard()
        model[0].reshard()
        optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(2):
            model(x).square().mean().backward()
            optimiser.step()
            optimiser.zero_grad()
        return [parameter.full_tensor().detach() for parameter in model.parameters()]

    expected = trained(False, False, False)
    for first, last in ((True, False), (False, True)):
        for revert in (False, True):
            torch.testing.assert_close(trained(first, last, revert), expected, rtol=1e-4, atol=1e-5)
    with only_our_kernels():
        trained(False, True, False)


def worker(rank: int, folder: Path) -> None:
    assert "torch.distributed.tensor" not in sys.modules, "sepconv_ext imports what costs a second"
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder / 'meeting'}", rank=rank, world_size=WORLD)
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (WORLD,))
    check_placements(mesh)
    check_filters_that_are_sharded(mesh)
    check_states_changed_in_place(mesh)
    check_distributed_modules(mesh)
    check_fully_sharded_layers(mesh)
    torch.distributed.destroy_process_group()


def test_shards_of_two_processes(tmp_path: Path) -> None:
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("this torch has no gloo")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    workers = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(tmp_path)], env=environment, stderr=subprocess.PIPE, text=True
        )
        for rank in range(WORLD)
    ]
    try:
        said = [worker.communicate(timeout=300)[1] for worker in workers]
    finally:
        for process in workers:
            process.kill()
    assert [process.returncode for process in workers] == [0] * WORLD, "\n".join(said)


def test_registered_where_dtensor_came_first() -> None:
    """The other order of imports."""
    code = (
        "import torch.distributed.tensor as t, sepconv_ext, torch; "
        "known = t.DTensor._op_dispatcher.sharding_propagator.op_strategy_funcs; "
        "assert torch.ops.sepconv_ext.conv2d.default in known"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


if __name__ == "__main__":
    worker(int(sys.argv[1]), Path(sys.argv[2]))

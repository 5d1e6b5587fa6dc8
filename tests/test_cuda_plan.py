"""The CUDA plan, which is a pure function: which kernel, which tile and why, for GPUs that need not be there.

tests/emulator/planner.cpp is the plan*.cpp of csrc/cuda compiled by g++.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "emulator"))
import emulate

from cases import GPU_LAYERS

pytestmark = [
    pytest.mark.emulated,
    pytest.mark.skipif(emulate.why_not() is not None, reason=str(emulate.why_not())),
]

H100 = 132  # multiprocessors


@functools.cache
def planned(**case: object) -> emulate.Planned:
    return emulate.plans([[f"{key}={value}" for key, value in case.items()]])[0]


def depthwise(
    N: int, C: int, size: int, kernel: int, stride: int = 1, dilation: int = 1, **rest: object
) -> emulate.Planned:
    """A channels_last layer with "same" padding, in float16 and forward unless `rest` says otherwise."""
    pad = dilation * (kernel - 1) // 2
    case = {"map": "forward", "dtype": "float16", "layout": "channels_last", "N": N, "C": C, "H": size, "W": size}
    case |= {"K": C, "R": kernel, "S": kernel, "groups": C, "stride": f"{stride},{stride}"}
    case |= {"padding": f"{pad},{pad},{pad},{pad}", "dilation": f"{dilation},{dilation}"}
    return planned(**case | rest)


@pytest.mark.parametrize("map", ["forward", "grad_input", "grad_weight"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_an_empty_batch_has_the_plan_of_one_image(map: str, layout: str) -> None:
    for kernel, stride in ((3, 1), (5, 2), (7, 1), (9, 1), (9, 2), (31, 1)):
        for dtype in ("float32", "float64", "float16"):
            none, one = (depthwise(N, 24, 14, kernel, stride, map=map, layout=layout, dtype=dtype) for N in (0, 1))
            assert none == one


@pytest.mark.parametrize("map", ["forward", "grad_input", "grad_weight"])
def test_padding_alone_needs_no_tile(map: str) -> None:
    for size in ({"H": 0}, {"W": 0}):
        layer = depthwise(1, 8, 14, 9, map=map, layout="contiguous", dtype="float32", padding="9,9,9,9", **size)
        assert layer.kernel != "cuda_depthwise_large"


@pytest.mark.parametrize("map", ["forward", "grad_input", "grad_weight"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_layers_of_the_gpu_tests_have_the_tiles_of_large_problems(map: str, dtype: str) -> None:
    """What small cases get on a large GPU are other instantiations of the kernels."""
    plans = {
        f"{case.name}, {layout}": depthwise(
            case.N, case.C, case.H, case.R, case.stride[0], map=map, dtype=dtype, layout=layout, W=case.W
        )
        for case in GPU_LAYERS
        for layout in ("contiguous", "channels_last")
    }
    for name, plan in plans.items():
        if plan.kernel == "cuda_depthwise_nhwc":
            assert plan.tile["vec"] == 2, name
        if plan.kernel.startswith("cuda_depthwise_grad_weight"):
            vec = None if plan.kernel.endswith("_mma") else 4 if dtype == "float32" else 8
            assert plan.tile.get("vec") == vec and plan.tile["splits"] > 1, name
        large = name.startswith(("depthwise_fill_k13", "depthwise_fill_k31"))
        assert large == (plan.kernel in ("cuda_depthwise_large", "cuda_depthwise_toeplitz")) or "k7" in name, name
    if map != "grad_weight" and dtype == "float32":
        assert sum(plan.kernel == "cuda_depthwise_nhwc_tma" for plan in plans.values()) == 2
    keeps = {plan.tile["keep"] for plan in plans.values() if plan.kernel == "cuda_depthwise_large"}
    assert keeps == {4, 7}
    assert map == "grad_weight" or any(
        plan.kernel == "cuda_depthwise_nchw" and plan.tile.get("planes", 1) > 1 for plan in plans.values()
    )


@pytest.mark.parametrize(
    "archs, sm, runs",
    [
        ("8.0+PTX,8.6,8.9,9.0a,10.0,12.0+PTX", 75, False),
        ("8.0+PTX,8.6,8.9,9.0a,10.0,12.0+PTX", 110, True),  # by the PTX of 8.0
        ("8.0+PTX,8.6,8.9,9.0a,10.0,12.0+PTX", 121, True),
        ("8.0,9.0a,12.0+PTX", 110, False),
        ("8.0", 89, True),
        ("8.6", 80, False),
        ("9.0a", 100, False),
        ("10.0f", 103, True),
        ("native", 90, False),
    ],
)
def test_a_gpu_that_the_build_has_no_code_for_gets_torchs_call(archs: str, sm: int, runs: bool) -> None:
    for map in ("forward", "grad_input", "grad_weight"):
        for strict in (0, 1):
            plan = depthwise(8, 96, 14, 3, map=map, sm=sm, archs=archs, strict=strict)
            assert plan.kernel.startswith("cuda_") == runs
            assert runs or "no code for the GPU" in plan.reason
    pair = depthwise(64, 96, 56, 3, sm=sm, archs=archs, op="separable", outputs=64)
    assert (pair.kernel == "composite") != runs


# --- depthwise, channels_last ---


@pytest.mark.parametrize("map", ["forward", "grad_input"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("kernel", [3, 5, 7])
def test_dense_channels_take_the_register_window(map: str, dtype: str, kernel: int) -> None:
    for stride in (1, 2):
        others = kernel > 3 and stride == 1  # tensor cores, the copy engine
        plan = depthwise(64, 144, 56, kernel, stride, map=map, dtype=dtype, sm=75 if others else 90)
        assert plan.kernel == "cuda_depthwise_nhwc" and plan.tile["vec"] == 2
        assert "every row read once" in plan.reason
    for dilation in (2, 3, 6):
        assert depthwise(8, 144, 56, kernel, 1, dilation, map=map, dtype=dtype).kernel == "cuda_depthwise_nhwc"


@pytest.mark.parametrize("map", ["forward", "grad_input"])
def test_what_the_register_window_leaves_to_others(map: str) -> None:
    for layer in (
        {"kernel": 3, "dtype": "float64"},
        {"kernel": 3, "stride": 3},
        {"kernel": 3, "stride": 2, "dilation": 2},
    ):
        assert depthwise(8, 144, 56, **layer, map=map).kernel == "cuda_depthwise_direct"


@pytest.mark.parametrize("channels", [12, 20, 24, 28, 36, 58, 116, 144, 232])
def test_channels_go_in_pairs_wherever_they_can(channels: int) -> None:
    for dtype in ("float32", "float16"):
        assert depthwise(512, channels, 28, 3, dtype=dtype).tile["vec"] == 2
        for more, rest in ((0, {"offset": 1}), (1, {})):
            plan = depthwise(512, channels + more, 28, 3, dtype=dtype, **rest)
            assert "vec" not in plan.tile and "odd or not aligned in pairs" in plan.reason
        # A view of two elements further on is as good as the whole.
        assert depthwise(512, channels, 28, 3, dtype=dtype, offset=2).tile["vec"] == 2


@pytest.mark.parametrize("layer", [(1, 960, 7, 3), (1, 384, 14, 3), (1, 768, 7, 7), (1, 96, 56, 7), (1, 24, 112, 3)])
def test_small_problems_are_cut_until_the_gpu_is_full(layer: tuple[int, int, int, int]) -> None:
    """Into single channels and rows, or until each multiprocessor has what keeps it busy: more would repeat rows."""
    plan = depthwise(*layer, sm=75)
    assert "vec" not in plan.tile and "too few for pairs" in plan.reason
    N, C, size, kernel = layer
    threads = N * -(-size // plan.tile.get("rows", 1)) * -(-size // 7) * C
    busy = {3: 3, 5: 2, 7: 1}[kernel] * 128 * H100
    assert plan.tile.get("rows", 1) == 1 or threads >= busy / 2
    assert threads <= 2 * busy
    # A small GPU is full sooner.
    small = depthwise(*layer, sm=75, multiprocessors=2)
    assert small.tile["vec"] == 2 and small.tile["rows"] > plan.tile.get("rows", 1)


@pytest.mark.parametrize("layer", [(128, 144, 56, 3), (128, 96, 56, 7), (128, 672, 28, 5), (128, 384, 14, 3)])
def test_large_problems_keep_strips_tall(layer: tuple[int, int, int, int]) -> None:
    plan = depthwise(*layer)
    assert plan.tile["rows"] >= min(layer[2] // 2, 14)


@pytest.mark.parametrize("map", ["forward", "grad_input"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_many_taps_in_half_types_take_tensor_cores(map: str, dtype: str) -> None:
    def kernel(**layer: object) -> str:
        case = {"N": 8, "C": 144, "size": 28, "kernel": 5, "map": map, "dtype": dtype} | layer
        return depthwise(**case).kernel

    for size in (4, 5, 6, 7):
        assert kernel(kernel=size) == "cuda_depthwise_nhwc_mma"
    for R, S in ((1, 7), (7, 1), (3, 5), (2, 2)):
        assert kernel(R=R, S=S) == "cuda_depthwise_nhwc_mma"
    for layer in (
        {"kernel": 3},
        {"kernel": 9},
        {"stride": 2},
        {"dilation": 2},
        {"sm": 75},
        {"C": 148},  # no whole vectors of channels
        {"offset": 4},
        {"K": 288},
        {"layout": "contiguous"},
        {"dtype": "float32"},
    ):
        assert kernel(**layer) != "cuda_depthwise_nhwc_mma"
    assert kernel(layout="sliced_last") == "cuda_depthwise_nhwc_mma"


def stream(plan: emulate.Planned, layer: tuple[int, int, int, int]) -> tuple[int, float]:
    """Blocks of depthwise_nhwc_mma, and the rows that the longest stream has of those that there are on average."""
    N, C, size, _ = layer
    tile = {"rows": 1, "splits": 1} | plan.tile
    pairs, groups = -(-size // 2), C // 8
    column_tiles = -(-pairs // 16)
    images = 1 if column_tiles > 1 else max(1, min(16 // pairs, 64 // (2 * pairs + 6), N))
    slices = -(-groups // 4)
    places = -(-N // images) * column_tiles * -(-size // tile["rows"])
    assert 1 <= tile["splits"] <= places
    return slices * tile["splits"], -(-places // tile["splits"]) * tile["splits"] / places


@pytest.mark.parametrize("layer", [(1, 960, 7, 5), (1, 384, 14, 7), (1, 768, 7, 7), (1, 96, 56, 7), (1, 32, 112, 5)])
def test_small_problems_are_cut_into_strips_on_tensor_cores(layer: tuple[int, int, int, int]) -> None:
    plan = depthwise(*layer)
    assert plan.kernel == "cuda_depthwise_nhwc_mma"
    assert stream(plan, layer)[0] >= H100 / 2 or plan.tile.get("rows", 1) <= 4
    assert depthwise(*layer, multiprocessors=2).tile["rows"] > plan.tile.get("rows", 1)


@pytest.mark.parametrize("layer", [(128, 144, 56, 5), (128, 96, 56, 7), (128, 672, 28, 5), (128, 384, 14, 7)])
def test_large_problems_share_out_whole_images_on_tensor_cores(layer: tuple[int, int, int, int]) -> None:
    blocks, uneven = stream(depthwise(*layer), layer)
    assert 2 * H100 <= blocks <= 3 * H100 and uneven <= 1.15
    assert depthwise(*layer).tile["rows"] >= min(layer[2] // 2, 14)


def test_grad_input_of_stride_2_walks_in_pairs_of_rows() -> None:
    for N in (1, 8, 64):
        for size in (7, 15, 28):
            assert depthwise(N, 96, size, 3, 2, map="grad_input").tile["rows"] % 2 == 0


def test_more_dilation_than_rows() -> None:
    plan = depthwise(2, 24, 7, 3, dilation=9)
    assert plan.kernel == "cuda_depthwise_nhwc" and "rows" not in plan.tile


# --- depthwise, channels_last, by the copy engine ---


BOXES = {  # layer -> pairs of channels that leave the fewest lanes idle
    (64, 144, 56, 5): 16,
    (128, 96, 56, 7): 16,
    (128, 384, 14, 7): 32,
    (128, 672, 28, 5): 16,
    (128, 960, 7, 5): 32,
}


@pytest.mark.parametrize("map", ["forward", "grad_input"])
def test_large_5x5_and_7x7_layers_have_their_rows_brought_by_the_copy_engine(map: str) -> None:
    for layer, lanes in BOXES.items():
        plan = depthwise(*layer, map=map, dtype="float32")
        assert plan.kernel == "cuda_depthwise_nhwc_tma" and "copy engine" in plan.reason
        assert plan.tile["pairs"] == lanes
        N, C, size, kernel = layer
        assert plan.tile["rows"] >= min(size, 2 * kernel)
        tiles = -(-size // (7 * 32 // lanes))
        blocks = -(-C // (2 * lanes)) * -(-N * -(-size // plan.tile["rows"]) * tiles // 4)
        assert blocks > H100 * ({5: 4, 7: 3}[kernel] - 1)
        assert depthwise(*layer, map=map, dtype="float32", sm=100).kernel == plan.kernel
    small = depthwise(5, 64, 5, 7, W=14, map=map, dtype="float32", multiprocessors=1)  # test_emulated.py's
    assert small.kernel == "cuda_depthwise_nhwc_tma"


@pytest.mark.parametrize("map", ["forward", "grad_input"])
def test_what_the_copy_engine_leaves_to_the_register_window(map: str) -> None:
    for rest in (
        {"sm": 80},
        {"sm": 89},
        {"sm": 120},  # 100 KB of shared memory
        {"copies_boxes": 0},  # an old driver, or a build without code for 9.0
        {"offset": 1},
        {"N": 2},  # too few blocks
        {"W": 15},  # tiles of columns without work
        {"C": 94},  # pixels of 376 bytes
        {"C": 72},  # 36 pairs, in 48 or 64 lanes
        {"kernel": 3},
        {"stride": 2},
        {"dilation": 2},
        {"multiprocessors": 10_000},
    ):
        layer = {"N": 128, "C": 96, "size": 56, "kernel": 7, "dtype": "float32"} | rest
        assert depthwise(**layer, map=map).kernel == "cuda_depthwise_nhwc", rest
    assert depthwise(128, 96, 56, 7, map=map, dtype="float32", layout="sliced_last").kernel == "cuda_depthwise_nhwc_tma"


# --- depthwise, contiguous ---


def planes(N: int, C: int, size: int, kernel: int, stride: int = 1, **rest: object) -> emulate.Planned:
    return depthwise(N, C, size, kernel, stride, **{"layout": "contiguous", "dtype": "float32"} | rest)


@pytest.mark.parametrize("map", ["forward", "grad_input"])
def test_rows_without_gaps_go_through_shared_memory(map: str) -> None:
    for kernel in (3, 5, 7):
        for stride in (1, 2):
            for dtype in ("float32", "float16", "bfloat16"):
                cores = dtype != "float32" and stride == 1
                for size in (7, 14, 19, 27, 37, 55, 75, 112):
                    # Rows of whole 4-byte pieces (3x3: of 8), and of 7x7 others that wide tiles cover.
                    if cores and size % (4 if kernel == 3 else 2) == 0:
                        name = "cuda_depthwise_nchw_mma"
                    else:
                        wide = cores and kernel == 7 and size in (27, 55)
                        name = "cuda_depthwise_toeplitz" if wide else "cuda_depthwise_nchw"
                    assert planes(64, 24, size, kernel, stride, map=map, dtype=dtype).kernel == name
    assert planes(8, 24, 19, 7, map=map, dtype="float16", sm=75).kernel == "cuda_depthwise_nchw"
    for layout in ("sliced", "alternate"):  # gaps between images, between planes
        assert planes(8, 24, 19, 3, map=map, layout=layout).kernel == "cuda_depthwise_nchw"


@pytest.mark.parametrize("map", ["forward", "grad_input"])
def test_what_small_kernels_on_tensor_cores_need(map: str) -> None:
    half, name = {"dtype": "float16", "map": map}, "cuda_depthwise_nchw_mma"
    assert planes(8, 24, 28, 5, **half).kernel == name
    for layer in ({"sm": 80}, {"layout": "sliced"}, {"layout": "alternate"}, {"w_layout": "strided"}, {"offset": 2}):
        assert planes(8, 24, 28, 5, **half, **layer).kernel == name
    other = "cuda_depthwise_nchw"
    for layer in ({"sm": 75}, {"offset": 1}, {"W": 27}, {"W": 1200}):
        assert planes(8, 24, 28, 5, **half, **layer).kernel == other
    # A row is read in whole pieces, and a window has 16 columns.
    padding = {left: planes(8, 24, 28, 7, **half, padding=f"3,3,{left},{6 - left}") for left in range(7)}
    assert {plan.kernel for plan in padding.values()} == {name}
    assert planes(8, 24, 28, 3, **half, padding="1,1,9,9").kernel == (name if map == "forward" else other)
    # One image of 14x14 leaves a tile of 64 rows by 16 columns mostly empty.
    assert planes(1, 24, 14, 5, **half).kernel == other
    if map == "forward":
        assert planes(8, 24, 28, 5, **half, K=48).kernel == name


@pytest.mark.parametrize("map", ["forward", "grad_input", "grad_weight"])
@pytest.mark.parametrize("layer", [(128, 144, 56, 5), (128, 240, 28, 7), (128, 672, 14, 5), (128, 32, 112, 3)])
def test_places_on_tensor_cores_fill_the_gpu(map: str, layer: tuple[int, int, int, int]) -> None:
    N, C, size, _ = layer
    plan = planes(*layer, dtype="float16", map=map)
    assert plan.kernel == "cuda_depthwise_nchw_mma"
    tile = {"images": 1, "splits": 1} | plan.tile
    rows, images = tile["rows"], tile["images"]
    places = -(-N // images) * -(-size // rows)
    assert rows == size or rows % 4 == 0
    assert tile["vec"] == (8 if size * size % 8 == 0 or map == "grad_weight" else 4)
    assert C * tile["splits"] >= 3.5 * H100 and tile["splits"] <= places
    tiles = -(-images * -(-rows // 4) // 16) * -(-size // 16)  # of a warp: 64 rows, 16 columns
    assert images * rows * size >= 0.5 * 1024 * -(-tiles // 4) * 4
    other = {"sm": 86, "multiprocessors": 8}
    assert map != "grad_weight" or planes(*layer, dtype="float16", map=map, **other).tile == plan.tile


@pytest.mark.parametrize("map", ["forward", "grad_input"])
def test_what_shared_memory_leaves_to_others(map: str) -> None:
    for layer in (
        {"kernel": 3, "dtype": "float64"},
        {"kernel": 3, "layout": "cropped"},
        {"kernel": 3, "w_layout": "strided"},
        {"kernel": 3, "stride": 3},
        {"kernel": 3, "W": 9000},  # three rows of it and one of results are more than 96 KB
    ):
        other = "cuda_depthwise_direct" if layer.get("stride") == 3 else "cuda_depthwise_large"
        assert planes(1, 24, 30, **layer, map=map).kernel == other
    assert planes(1, 24, 30, 3, map=map, W=9000, dtype="float16").kernel == "cuda_depthwise_nchw"
    if map == "forward":
        assert planes(8, 24, 19, 3, K=48).kernel == "cuda_depthwise_nchw"
    else:
        assert planes(8, 24, 19, 3, K=48, map=map).kernel == "cuda_depthwise_direct"


def cut(plan: emulate.Planned, layer: tuple[int, int, int, int]) -> tuple[int, float]:
    """Blocks, and the share of their threads that has work (stride 1)."""
    N, C, size, kernel = layer
    tile = {"rows": 1, "planes": 1, "strips": 1} | plan.tile
    runs, band = -(-size // (4 if kernel == 7 else 7)), tile["rows"] * tile["strips"]
    assert tile["planes"] == 1 or band >= size, "several planes to a block, and not whole ones"
    assert tile["planes"] <= C
    blocks = N * -(-C // tile["planes"]) * -(-size // band)
    threads = blocks * -(-tile["planes"] * tile["strips"] * runs // 32) * 32
    return blocks, N * C * -(-size // tile["rows"]) * runs / threads


@pytest.mark.parametrize("layer", [(1, 960, 7, 3), (1, 384, 14, 3), (1, 768, 7, 7), (1, 96, 56, 7), (1, 32, 112, 5)])
def test_small_planes_are_cut_until_every_multiprocessor_has_a_block(layer: tuple[int, int, int, int]) -> None:
    for case in ({}, {"dtype": "float16", "sm": 75}):  # without tensor cores
        blocks, _ = cut(planes(*layer, **case), layer)
        assert blocks >= H100


@pytest.mark.parametrize(
    "layer",
    [(128, 960, 7, 3), (128, 384, 14, 5), (128, 728, 19, 3), (64, 58, 28, 3), (128, 144, 56, 3), (64, 480, 75, 5)],
)
def test_large_layers_leave_few_threads_without_work(layer: tuple[int, int, int, int]) -> None:
    for case in ({}, {"dtype": "float16", "sm": 75}):
        plan = planes(*layer, **case)
        blocks, working = cut(plan, layer)
        assert blocks >= 4 * H100 and working >= 0.85
        assert plan.tile["rows"] >= 7
        # Planes that lie apart stand alone.
        assert "planes" not in planes(*layer, **case, layout="alternate").tile


# --- depthwise, grad_weight ---


def grad_weight(N: int, C: int, size: int, kernel: int, stride: int = 1, **rest: object) -> emulate.Planned:
    return depthwise(N, C, size, kernel, stride, map="grad_weight", **rest)


@pytest.mark.parametrize("kernel", [3, 5, 7])
@pytest.mark.parametrize("stride", [1, 2])
def test_grad_weight_reads_both_images_once(kernel: int, stride: int) -> None:
    for dtype, vec in (("float32", 4), ("float16", 8), ("bfloat16", 8)):
        nhwc = grad_weight(8, 144, 56, kernel, stride, dtype=dtype)
        if kernel > 3 and stride == 1 and dtype != "float32":
            assert nhwc.kernel == "cuda_depthwise_grad_weight_nhwc_mma" and "vec" not in nhwc.tile
        else:
            assert nhwc.kernel == "cuda_depthwise_grad_weight_nhwc" and nhwc.tile["vec"] == vec
        nchw = grad_weight(8, 144, 56, kernel, stride, dtype=dtype, layout="contiguous")
        cores = stride == 1 and dtype != "float32"
        name = "cuda_depthwise_nchw_mma" if cores else "cuda_depthwise_grad_weight_nchw"
        assert nchw.kernel == name and nchw.tile["vec"] == vec
        assert "every tap in one pass" in nhwc.reason and "every tap in one pass" in nchw.reason


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_many_taps_of_grad_weight_in_half_types_take_tensor_cores(dtype: str) -> None:
    def kernel(**layer: object) -> str:
        return grad_weight(**{"N": 8, "C": 144, "size": 28, "kernel": 5, "dtype": dtype} | layer).kernel

    for layer in ({}, {"kernel": 7}, {"kernel": 4}, {"R": 1, "S": 7}, {"C": 148}, {"offset": 4}):
        assert kernel(**layer) == "cuda_depthwise_grad_weight_nhwc_mma"
    assert kernel(layout="sliced_last") == "cuda_depthwise_grad_weight_nhwc_mma"
    for layer in (
        {"kernel": 3},
        {"kernel": 9},
        {"stride": 2},
        {"dilation": 2},
        {"sm": 75},
        {"C": 146},
        {"offset": 2},
        {"K": 288},
        {"layout": "contiguous"},
        {"dtype": "float32"},
    ):
        assert kernel(**layer) != "cuda_depthwise_grad_weight_nhwc_mma"


def test_grad_weight_copies_elements_where_pieces_do_not_fit() -> None:
    for layout in ("channels_last", "contiguous"):
        assert "vec" not in grad_weight(8, 144, 28, 3, layout=layout, offset=1).tile
        assert "vec" not in grad_weight(8, 16, 27, 3, layout=layout, K=32).tile
    assert "vec" not in grad_weight(8, 58, 28, 3).tile
    assert grad_weight(8, 58, 27, 3, layout="contiguous").tile["vec"] == 8  # planes of any size, from any byte on
    assert grad_weight(8, 58, 28, 3, layout="cropped", sm=75).kernel == "cuda_depthwise_grad_weight_nchw"


def test_what_one_pass_of_grad_weight_leaves_to_the_general_kernel() -> None:
    for layer in (
        {"kernel": 3, "dtype": "float64"},
        {"kernel": 9, "dilation": 2},
        {"kernel": 3, "stride": 3},
        {"kernel": 3, "dilation": 2},
        {"kernel": 3, "layout": "contiguous", "W": 2000},
    ):
        assert grad_weight(2, 24, 56, **layer).kernel == "cuda_depthwise_grad_weight"


# Channels a block owns, at the most, and the blocks that an H100 holds at once.
@pytest.mark.parametrize(
    ("layout", "owned", "resident"), [("channels_last", 32, 2 * H100), ("contiguous", 128, 4 * H100)]
)
@pytest.mark.parametrize(
    "layer", [(128, 144, 56, 3), (128, 672, 28, 5), (128, 384, 14, 3), (8, 96, 112, 3), (8, 240, 28, 5)]
)
def test_grad_weight_fills_the_gpu_once(
    layout: str, owned: int, resident: int, layer: tuple[int, int, int, int]
) -> None:
    _, C, size, _ = layer
    plan = grad_weight(*layer, layout=layout, dtype="float32" if layout == "contiguous" else "float16")
    columns = -(-size // 7)  # a block's threads are columns, then channels, in NCHW
    chunks = -(-C // (owned if layout == "channels_last" else owned // columns))
    blocks = chunks * plan.tile["splits"]
    assert 0.7 * resident <= blocks <= resident or plan.tile["rows"] == 4


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_grad_weight_of_kernels_as_tall_as_the_image_takes_whole_images(dtype: str) -> None:
    plan = grad_weight(64, 768, 7, 7, layout="contiguous", dtype=dtype)
    assert plan.kernel == "cuda_depthwise_grad_weight_nchw"
    assert plan.tile["rows"] % 7 == 0 and plan.tile["rows"] * plan.tile["splits"] >= 64 * 7
    assert grad_weight(64, 960, 7, 3, layout="contiguous", dtype=dtype).tile["rows"] % 7  # fills the GPU instead


def test_grad_weight_needs_no_second_kernel_where_sums_are_short() -> None:
    for layout in ("channels_last", "contiguous"):
        for N, C, size in ((1, 960, 7), (1, 384, 14), (2, 960, 7)):
            assert "splits" not in grad_weight(N, C, size, 3, layout=layout).tile
        assert grad_weight(1, 144, 56, 3, layout=layout, sm=75).tile["splits"] > 8
    assert "splits" not in grad_weight(1, 144, 56, 3, layout="contiguous").tile


def test_the_order_of_a_grad_weight_sum_is_the_same_on_every_gpu() -> None:
    for layout in ("channels_last", "contiguous"):
        for layer in ((1, 144, 56, 3), (8, 384, 14, 3), (64, 144, 28, 5)):
            plans = [grad_weight(*layer, layout=layout, multiprocessors=n, sm=sm) for n, sm in ((132, 90), (8, 86))]
            assert plans[0].tile == plans[1].tile


# --- depthwise, large kernels ---


def large(R: int, S: int, N: int = 8, size: int = 56, **rest: object) -> emulate.Planned:
    """A contiguous float32 layer of 96 channels, unless `rest` says otherwise."""
    case = {"R": R, "S": S, "padding": f"{R // 2},{R // 2},{S // 2},{S // 2}"}
    return depthwise(N, 96, size, 3, **{"dtype": "float32", "layout": "contiguous"} | case | rest)


@pytest.mark.parametrize("map", ["forward", "grad_input", "grad_weight"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
def test_large_kernels_of_stride_1_stand_in_shared_memory(map: str, layout: str) -> None:
    for taps in ((4, 4), (9, 9), (31, 31), (1, 31), (31, 1), (5, 63), (64, 64), (2, 8)):
        for dtype in ("float32", "float64", "float16"):
            plan = large(*taps, map=map, layout=layout, dtype=dtype)
            few = taps == (4, 4) and layout == "channels_last"
            planes = layout != "channels_last"  # strided ones are copied
            tensor_cores = dtype == "float16" and (few or (planes and min(taps) >= 7))
            name = "cuda_depthwise_toeplitz"
            if few:
                name = f"cuda_depthwise{'_grad_weight' if map == 'grad_weight' else ''}_nhwc_mma"
            assert plan.kernel == (name if tensor_cores else "cuda_depthwise_large")
            assert tensor_cores or "8 taps and more" in plan.reason


NINE = {"dtype": "float32", "N": 8, "C": 96, "K": 96, "groups": 96, "H": 56, "W": 56, "R": 9, "S": 9}


@pytest.mark.parametrize("map", ["forward", "grad_input", "grad_weight"])
def test_what_large_kernels_leave_to_others(map: str) -> None:
    for layer in (
        large(7, 1, map=map),
        large(3, 5, map=map, layout="channels_last"),
        large(65, 9, map=map),
        planned(**{**NINE, "map": map, "stride": "2,1"}),
        planned(**{**NINE, "map": map, "dilation": "1,2"}),
        large(9, 9, map=map, sm=75),
    ):
        assert layer.kernel == ("cuda_depthwise_grad_weight" if map == "grad_weight" else "cuda_depthwise_direct")
    for layout in ("contiguous", "channels_last"):
        for kernel in (3, 5, 7):
            assert large(kernel, kernel, map=map, layout=layout).kernel != "cuda_depthwise_large"


def test_large_kernels_keep_tiles_that_fit_the_plane() -> None:
    for size in (14, 28, 56):
        plan = large(31, 31, N=128, size=size)
        assert plan.tile["keep"] == 7 and size % plan.tile["rows"] == 0
    assert "keep" not in large(1, 31, H=1, W=2048).tile  # one row
    # Small problems are cut further, until every multiprocessor has work.
    one, many = (large(31, 31, N=N).tile for N in (1, 128))
    assert one.get("keep", 1) * one.get("planes", 1) < many["keep"] * many["planes"]


def test_large_grad_weight_sums_in_one_order_on_every_gpu() -> None:
    for N in (1, 8, 128):
        for size in (7, 56):
            plans = [large(13, 13, map="grad_weight", N=N, size=size, multiprocessors=m) for m in (8, 80, H100)]
            assert plans[0].tile == plans[1].tile == plans[2].tile


# --- tensors that are not dense ---

MAPS = ("forward", "grad_input", "grad_weight")


@pytest.mark.parametrize("map", MAPS)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("kernel", [3, 5, 7, 13])
def test_dense_channels_and_columns_are_read_where_they_lie(map: str, dtype: str, kernel: int) -> None:
    views = {"contiguous": ("sliced", "alternate"), "channels_last": ("sliced_last", "cropped_last")}
    for layout, variants in views.items():
        dense = depthwise(8, 96, 28, kernel, map=map, dtype=dtype, layout=layout)
        for view in variants:
            plan = depthwise(8, 96, 28, kernel, map=map, dtype=dtype, layout=view)
            assert plan.kernel == dense.kernel and "copied" not in plan.reason, (layout, view)


@pytest.mark.parametrize("map", MAPS)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("kernel", [3, 5, 7])
@pytest.mark.parametrize("stride", [1, 2])
def test_operands_of_two_layouts_are_copied_into_one(map: str, dtype: str, kernel: int, stride: int) -> None:
    """Which is the result's; grad_weight has the input's."""
    x, y = ("layout", "y_layout") if map == "forward" else ("y_layout", "layout")
    for wanted, others in (
        ("channels_last", ("contiguous", "strided", "expanded")),
        ("contiguous", ("channels_last", "strided", "expanded", "expanded_pixel")),
    ):
        dense = depthwise(8, 96, 28, kernel, stride, map=map, dtype=dtype, layout=wanted)
        for other in others:
            plan = depthwise(8, 96, 28, kernel, stride, map=map, dtype=dtype, **{x: other, y: wanted})
            assert plan.kernel == dense.kernel and plan.tile == dense.tile, (wanted, other)
            name = "NCHW" if wanted == "contiguous" else "channels_last"
            operand = "input" if map == "forward" else "grad_output"
            assert plan.reason == f"{dense.reason}; {operand} is copied to {name}"


@pytest.mark.parametrize("map", ["forward", "grad_input"])
def test_gaps_between_rows_are_copied_away_where_a_kernel_of_its_own_is_won(map: str) -> None:
    for layer in ({"layout": "cropped"}, {"w_layout": "strided"}):
        plan = planes(8, 96, 56, 3, 2, map=map, **layer)
        assert plan.kernel == "cuda_depthwise_nchw"
        assert ("made contiguous" if "w_layout" in layer else "is copied") in plan.reason
        # No kernel is won here.
        plan = planes(8, 96, 56, 3, 2, map=map, **layer, dtype="float64")
        assert plan.kernel == "cuda_depthwise_direct" and "copied" not in plan.reason


@pytest.mark.parametrize("map", MAPS)
def test_products_and_groups_of_two_layouts(map: str) -> None:
    case = {"map": map, "dtype": "float32", "N": 4, "C": 64, "H": 28, "W": 28, "K": 64}
    for rest in ({}, {"R": 3, "S": 3, "groups": 16, "padding": "1,1,1,1"}):
        for layout, other in (("contiguous", "channels_last"), ("channels_last", "contiguous")):
            x, y = ("layout", "y_layout") if map == "forward" else ("y_layout", "layout")
            plan = planned(**case, **rest, **{x: other, y: layout})
            assert plan.kernel == planned(**case, **rest, layout=layout).kernel and "is copied to" in plan.reason


# --- what is handed to torch ---


def product(**rest: object) -> emulate.Planned:
    """A 1x1 layer as users run it: not strict, in channels_last and float16 unless `rest` says otherwise."""
    case = {"map": "forward", "dtype": "float16", "layout": "channels_last", "N": 128, "C": 96, "H": 14, "W": 14}
    return planned(**case | {"K": 24, "R": 1, "S": 1, "strict": 0} | rest)


@pytest.mark.parametrize("map", ["forward", "grad_input"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_products_that_wait_for_memory_keep_their_weights_in_shared_memory(map: str, dtype: str) -> None:
    case = {"map": map, "dtype": dtype}
    for layer in ({}, {"C": 24, "K": 144}, {"sm": 80}, {"sm": 120}, {"layout": "sliced_last"}):
        plan = product(**case, **layer)
        assert plan.kernel == "cuda_pointwise_nhwc_mma" and "kept in shared memory" in plan.reason, layer
    assert product(**case, stride="2,2").kernel == ("cuda_pointwise_nhwc_mma" if map == "forward" else "aten")
    assert product(**case, layout="contiguous").kernel == "aten"
    pixel = product(**case, H=1, W=1)  # of grad_input, three parts of the 96 channels that are written would read again
    assert pixel.kernel == ("cuda_pointwise_nhwc_mma" if map == "forward" else "aten")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_other_products_of_half_types_are_torchs_with_the_bias_in_the_product(dtype: str) -> None:
    for layer, why in (
        ({"C": 320, "K": 320}, "bound by arithmetic"),
        ({"C": 480, "K": 80}, "read again"),
        ({"C": 960, "K": 960}, "half type"),  # weights of more than shared memory
        ({"C": 100}, "half type"),
        ({"offset": 1}, "half type"),
        ({"sm": 75}, "half type"),
    ):
        plan = product(dtype=dtype, **layer)
        assert plan.kernel == "cuda_pointwise_matmul" and why in plan.reason, layer
        assert product(dtype=dtype, **layer, map="grad_input").kernel == "aten"
    few = product(dtype=dtype, N=1, C=672, K=8, H=1, W=1)
    assert few.kernel == "cuda_pointwise_matmul" and "too few tiles" in few.reason
    assert product(dtype=dtype, layout="sliced_last", C=100).kernel == "aten"  # no view of pixels
    for map in MAPS:
        assert product(dtype=dtype, map=map, strict=1).kernel == "cuda_pointwise_nhwc_mma"
        assert product(dtype=dtype, map=map, strict=1, layout="contiguous").kernel == "cuda_pointwise_mma"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_an_activation_that_would_be_a_pass_behind_torchs_product_stays_with_the_product(dtype: str) -> None:
    wide = {"dtype": dtype, "C": 192, "K": 768, "H": 28, "W": 28}
    again = {"dtype": dtype, "C": 96, "K": 384, "H": 56, "W": 56}
    for layer in (wide, again):
        for activation in ("identity", "relu"):  # ReLU is part of torch's product
            assert product(**layer, activation=activation).kernel == "cuda_pointwise_matmul"
        for activation in ("relu6", "gelu", "silu", "hardswish", "tanh"):
            plan = product(**layer, activation=activation)
            assert plan.kernel == "cuda_pointwise_nhwc_mma" and "would be a pass" in plan.reason, (layer, activation)
        assert product(**layer, activation="gelu", map="grad_input").kernel == "aten"
        assert "would be a pass" not in product(**layer, activation="gelu", strict=1).reason
    # Not where pixels come from L2 24 times, nor where one block would make one long sum.
    assert product(dtype=dtype, C=384, K=1536, activation="gelu").kernel == "cuda_pointwise_matmul"
    few = product(dtype=dtype, N=1, C=384, K=8, H=1, W=1, activation="gelu")
    assert few.kernel == "cuda_pointwise_matmul" and "too few tiles" in few.reason


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_residual_that_would_be_a_pass_behind_torchs_product_stays_with_the_product(dtype: str) -> None:
    case = {"dtype": dtype, "residual": 1}
    # The last products of blocks: of ConvNeXt and ResNeXt at 56x56 and 28x28, the latter with ReLU behind the sum.
    for C, K, size, activation in ((384, 96, 56, "identity"), (128, 256, 56, "relu"), (256, 512, 28, "relu")):
        layer = {**case, "C": C, "K": K, "H": size, "W": size, "activation": activation}
        plan = product(**layer)
        assert plan.kernel == "cuda_pointwise_nhwc_mma" and "residual would be a pass" in plan.reason, layer
        assert product(**layer | {"residual": 0}).kernel == "cuda_pointwise_matmul"
        assert product(**layer, strict=1).kernel == "cuda_pointwise_nhwc_mma"
        assert product(**layer, layout="contiguous").kernel == "aten"
    assert "kept in shared memory" in product(**case).reason
    # Not where pixels come from L2 many times, nor of sums that no shared memory holds the weights of.
    for layer in ({"C": 640, "K": 1024}, {"C": 1536, "K": 384}):
        assert product(**case, **layer).kernel == "cuda_pointwise_matmul"


def test_blocks_of_products_are_two_on_a_multiprocessor_unless_fewer_gain() -> None:
    case = {"sm": 90, "multiprocessors": H100}
    assert product(**case, C=96, K=384, H=56, W=56, activation="gelu").tile["blocks"] == 88  # of three chunks each
    assert product(**case, N=64, C=72, K=40, H=28, W=28).tile["blocks"] == 131


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_sums_of_products_read_both_images_once_in_one_order(dtype: str) -> None:
    case = {"map": "grad_weight", "dtype": dtype}
    for C, K, tiles in ((96, 24, 1), (24, 144, 2), (64, 128, 1), (384, 64, 3), (128, 128, 1)):
        plan = product(**case, C=C, K=K, H=56, W=56)
        assert plan.kernel == "cuda_pointwise_nhwc_mma" and "both images read once" in plan.reason
        assert plan.tile["splits"] == -(-264 // tiles)
        assert plan == product(**case, C=C, K=K, H=56, W=56, multiprocessors=8, sm=86)
    assert product(**case, N=1).tile.get("splits", 1) == 1
    assert product(**case, w_layout="strided", stride="2,2", layout="sliced_last").kernel == "cuda_pointwise_nhwc_mma"
    for layer, why in (({"C": 256, "K": 256}, "arithmetic"), ({"C": 960, "K": 80}, "read again"), ({"C": 100}, "half")):
        plan = product(**case, **layer)
        assert plan.kernel == "aten" and why in plan.reason
    assert product(**case, layout="contiguous").kernel == "aten"


@pytest.mark.parametrize("N", [1, 8, 128])
@pytest.mark.parametrize("channels", [(16, 96), (24, 144), (144, 24), (64, 384), (384, 64), (240, 80), (128, 128)])
def test_products_share_out_their_tiles_evenly(N: int, channels: tuple[int, int]) -> None:
    C, K = channels
    for size in (7, 14, 28, 56):
        tile = product(N=N, C=C, K=K, H=size, W=size, strict=1).tile
        outputs, blocks = tile["outputs"], tile.get("blocks", 1)
        tiles, parts = -(-N * size * size // 128), -(-K // outputs)
        assert (3 * 128 + -(-C // 64) * outputs) * 128 <= 96 << 10
        assert blocks <= tiles and (blocks * parts <= 2 * H100 or blocks == 1)
        assert -(-tiles // blocks) * blocks - tiles < blocks  # no block has two tiles more than another
        if tiles >= 2 * H100:
            assert parts == -(-K // 128) or C > 128
        else:
            assert tiles * parts >= H100 or outputs == 32


@pytest.mark.parametrize("map", MAPS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_float32_products_are_torchs_where_tf32_is_allowed_or_arithmetic_is_the_bound(map: str, layout: str) -> None:
    case = {"map": map, "layout": layout, "dtype": "float32"}
    assert product(**case).kernel == product(**case, C=40, K=40).kernel == "cuda_pointwise"
    tf32 = product(**case, tf32=1)
    assert tf32.kernel == "aten" and "TF32" in tf32.reason
    wide = product(**case, C=320, K=256)
    assert wide.kernel == "aten" and "bound by arithmetic" in wide.reason
    for layer in ({"tf32": 1}, {"C": 320, "K": 256}):
        assert product(**case, **layer, strict=1).kernel == "cuda_pointwise"
    # float64 has no such flag.
    assert product(**case | {"dtype": "float64"}, tf32=1).kernel == "cuda_pointwise"


def test_few_tiles_with_long_sums_are_torchs() -> None:
    few = {"dtype": "float32", "N": 1, "C": 1280, "K": 4, "H": 1, "W": 1}
    plan = product(**few)
    assert plan.kernel == "aten" and "too few tiles" in plan.reason
    assert product(**few, map="grad_weight").kernel == "cuda_pointwise"  # its sums are split
    assert product(**few | {"C": 64}).kernel == product(**few, multiprocessors=1).kernel == "cuda_pointwise"


@pytest.mark.parametrize("map", MAPS)
def test_groups_are_torchs_where_it_has_tensor_cores_and_these_have_none(map: str) -> None:
    case = {"map": map, "N": 32, "C": 128, "H": 28, "W": 28, "K": 128, "R": 3, "S": 3, "padding": "1,1,1,1"}

    def kernel(groups: int, **rest: object) -> str:
        return planned(**case | {"strict": 0, "groups": groups} | rest).kernel

    for dtype in ("float16", "bfloat16"):
        for groups, layout, name in (
            (64, "channels_last", "cuda_grouped"),
            (32, "channels_last", "cuda_grouped_nhwc_mma"),
            (32, "contiguous", "cuda_grouped"),
            (4, "contiguous", "aten"),
        ):
            assert kernel(groups, dtype=dtype, layout=layout) == name
            assert kernel(groups, dtype=dtype, layout=layout, strict=1) == name.replace("aten", "cuda_grouped")
        for rest in ({"R": 5}, {"K": 256}, {"dilation": "2,2"}, {"stride": "1,2"}, {"offset": 1}, {"sm": 75}):
            assert kernel(32, dtype=dtype, layout="channels_last", **rest) == "aten"
            assert kernel(32, dtype=dtype, layout="channels_last", **rest, strict=1) == "cuda_grouped"
    for layout in ("contiguous", "channels_last"):
        assert kernel(4, dtype="float32", layout=layout) == kernel(32, dtype="float32", layout=layout, tf32=1)
        assert kernel(4, dtype="float32", layout=layout, tf32=1) == "aten"
        assert kernel(4, dtype="float64", layout=layout, tf32=1) == "cuda_grouped"


@pytest.mark.parametrize("size, C, group", [(56, 128, 4), (112, 40, 8), (28, 256, 8), (14, 512, 16), (7, 72, 4)])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("N", [1, 8, 128])
def test_groups_on_tensor_cores_fit_and_share_their_strips_evenly(
    size: int, C: int, group: int, stride: int, N: int
) -> None:
    case = {
        "dtype": "bfloat16",
        "layout": "channels_last",
        "N": N,
        "C": C,
        "H": size,
        "W": size,
        "K": C,
        "R": 3,
        "S": 3,
    }
    case |= {"groups": C // group, "stride": f"{stride},{stride}", "padding": "1,1,1,1", "strict": 0}
    outputs, slabs = (size - 1) // stride + 1, -(-C // 64)
    for map in ("forward", "grad_input"):
        plan = planned(**case, map=map)
        assert plan.kernel == "cuda_grouped_nhwc_mma" and "rows read once" in plan.reason
        pairs, tiles, strips, blocks = (plan.tile.get(name, 1) for name in ("pairs", "tiles", "strips", "blocks"))
        spread = map == "grad_input" and stride == 2
        rows, across = (-(-size // 2),) * 2 if spread else (-(-outputs // (3 - stride)), outputs)
        if map == "grad_input" and not spread:
            rows, across = -(-size // 2), size
        step = stride if map == "forward" else 1
        pitch = -(-((tiles * 16 - 1) * step + (2 if spread else 3)) // (8 * step)) * 8 * step
        results = pairs * tiles * 16 * (4 if spread else 3 - step)
        assert (4 * pairs * (1 if spread else 2) * pitch + results) * 128 <= 96 << 10
        items = N * strips * -(-across // (16 * tiles))
        assert blocks * slabs <= 2 * H100 and -(-items // blocks) * blocks - items < blocks
        assert blocks * slabs > H100 // 2 or strips >= rows // pairs  # filled, or no strip is left to cut
    sums = planned(**case, map="grad_weight")
    assert sums == planned(**case, map="grad_weight", multiprocessors=8, sm=86)
    assert sums.tile.get("splits", 1) * slabs <= 264 + slabs


def test_a_separable_pair_is_two_calls_but_for_stride_2_in_channels_last() -> None:
    case = {"N": 128, "C": 96, "H": 56, "W": 56, "K": 96, "R": 3, "S": 3, "groups": 96, "padding": "1,1,1,1"}
    case |= {"op": "separable", "outputs": 96, "strict": 0, "layout": "channels_last", "stride": "2,2"}
    for dtype, fused in (("float16", "cuda_separable_mma"), ("float32", "cuda_separable")):
        assert planned(**case, dtype=dtype).kernel == fused
        for rest in ({"stride": "1,1"}, {"stride": "1,2"}, {"layout": "contiguous"}):
            assert planned(**case | {"dtype": dtype} | rest).kernel == "composite"
            assert planned(**case | {"dtype": dtype, "strict": 1} | rest).kernel == fused
    assert planned(**case, dtype="float32", tf32=1).kernel == "composite"
    assert planned(**case, dtype="float16", tf32=1).kernel == "cuda_separable_mma"


def block(N: int, C: int, E: int, K: int, size: int, stride: int = 1, R: int = 3, **rest: object) -> emulate.Planned:
    case = {"op": "inverted_residual", "inputs": C, "outputs": K, "N": N, "C": E, "H": size, "W": size, "K": E}
    pad = ",".join([str(R // 2)] * 4)
    case |= {"R": R, "S": R, "groups": E, "stride": f"{stride},{stride}", "padding": pad}
    return planned(**case | {"dtype": "bfloat16", "layout": "channels_last", "strict": 0} | rest)


@pytest.mark.parametrize(
    "call",
    [
        {"dtype": "float32"}, {"sm": 75}, {"layout": "contiguous"}, {"layout": "strided"}, {"offset": 1},
        {"inputs": 20}, {"outputs": 20}, {"outputs": 320},
        {"R": 7}, {"stride": "1,2"}, {"dilation": "2,2"}, {"archs": "9.0", "sm": 86},
        {"inputs": 0, "residual": 1}, {"gated": 1},
    ],
)  # fmt: skip
def test_blocks_that_stay_calls(call: dict[str, object]) -> None:
    plan = block(8, 24, 144, 24, 28, **call, strict=1)
    assert plan.kernel == "composite" and plan.reason
    assert block(8, 24, 144, 24, 28, strict=1).kernel == "cuda_inverted_residual"


@pytest.mark.parametrize("size", [1, 7, 14, 28, 56, 112, 150])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("R", [3, 5])
def test_tiles_of_blocks_fit(size: int, stride: int, R: int) -> None:
    """As every kernel is compiled for, with all outputs of a tile in it."""
    for C, E, K in ((16, 96, 24), (24, 144, 40), (96, 576, 96), (160, 960, 160)):
        for sm in (80, 86, 90, 120):
            plan = block(128, C, E, K, size, stride, R, strict=1, sm=sm)
            if plan.kernel == "composite":
                assert "no tile" in plan.reason and C >= 96
                continue
            tile = plan.tile
            assert tile.get("rows", 1) * tile.get("columns", 1) <= tile["most_pixels"]
            assert tile["most_outputs"] >= K
            assert (tile["most_pixels"], tile["most_outputs"]) in ((128, 32), (128, 96), (64, 64), (64, 160))


def causal(N: int, C: int, L: int, S: int = 4, layout: str = "channels_last", **rest: object) -> emulate.Planned:
    reach = (S - 1) * int(str(rest.get("dilation", "1,1")).split(",")[1])
    case = {"op": "causal", "dtype": "bfloat16", "layout": layout, "N": N, "C": C, "W": L, "K": C, "S": S, "groups": C}
    return planned(**case | {"padding": f"0,0,{reach},0", "states": 1} | rest)


def test_a_causal_call_takes_vectors_of_what_is_dense() -> None:
    assert causal(8, 5376, 2048).kernel == causal(8, 5376, 2047).kernel == "cuda_causal_nlc"
    assert causal(8, 5376, 2048, layout="sliced_last", y_layout="channels_last").kernel == "cuda_causal_nlc"
    assert causal(8, 5376, 2048, dilation="1,3").kernel == "cuda_causal_nlc"
    planes = causal(8, 5376, 2048, layout="contiguous")
    assert (planes.kernel, planes.tile) == ("cuda_causal_ncl", {"vec": 8})
    odd = causal(8, 5376, 2047, layout="contiguous")
    assert (odd.kernel, odd.tile) == ("cuda_causal_ncl", {})  # rows off 16 bytes: one by one
    assert causal(8, 5376, 2048, layout="contiguous", offset=1).tile == {}


@pytest.mark.parametrize(
    "call",
    [
        {"S": 5}, {"C": 5377}, {"offset": 1}, {"layout": "strided"}, {"layout": "contiguous", "dilation": "1,2"},
        {"layout": "contiguous", "dtype": "float64"},
    ],
)  # fmt: skip
def test_other_causal_calls_go_element_by_element(call: dict[str, object]) -> None:
    assert causal(**{"N": 2, "C": 5376, "L": 2048} | call).kernel == "cuda_causal_direct"


def test_causal_strips_are_as_long_as_leave_enough_threads() -> None:
    rows = [causal(N, 5376, 2048).tile["rows"] for N in (8, 2, 1)]
    assert rows == sorted(rows, reverse=True) and all((r + 3) % 4 == 0 for r in rows) and rows[0] > rows[-1]
    assert causal(1, 64, 16).tile["rows"] == 5
    assert causal(1, 5376, 2048, multiprocessors=1).tile["rows"] == rows[0]


def test_causal_calls_that_no_kernel_takes() -> None:
    assert causal(1 << 20, 5376, 2048).kernel == "composite"
    assert causal(1, 1 << 16, 1 << 16).kernel == "composite"
    assert causal(2, 64, 64, archs="8.0", sm=75).kernel == "composite"

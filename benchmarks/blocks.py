"""``python -m benchmarks.blocks GPU``: inverted residual blocks on a GPU, in one kernel and in three calls, predicted.

As `predict.py` predicts layers: from counts of the PTX on the machine of tests/ptx, over public rates. Nothing here is
measured. A block is executed for one image, with the cut that the plan has for all of them.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass

from . import predict
from .layers import Layer

__all__ = ["NETWORKS", "Block", "Predicted", "predict_block"]


@dataclass(frozen=True)
class Block:
    """C channels, expanded to E (the same: not at all), and K; an image of size x size; `times` in the network."""

    C: int
    E: int
    K: int
    size: int
    side: int = 3
    stride: int = 1
    times: int = 1

    @property
    def residual(self) -> bool:
        return self.C == self.K and self.stride == 1 and self.C != self.E

    @property
    def out(self) -> int:
        return (self.size - 1) // self.stride + 1

    def __str__(self) -> str:
        expanded = f"{self.C} > {self.E} > {self.K}" if self.C != self.E else f"{self.C} > {self.K}"
        return f"{expanded} @{self.size}" + (f", stride {self.stride}" if self.stride > 1 else "")

    def layers(self) -> list[Layer]:
        """What three calls compute, or two."""
        n, m, pad = self.size, self.out, self.side // 2
        deep = (self.E, self.E, n, n, self.side, self.side, self.stride, self.stride, pad, pad, 1, 1, self.E)
        found = [Layer("depthwise", *deep, bias=True), product(self.E, self.K, m)]
        return found if self.C == self.E else [product(self.C, self.E, n), *found]

    def floor_bytes(self, N: int) -> int:
        weights = (self.E * self.C if self.C != self.E else 0) + self.E * (self.side**2 + self.K)
        return 2 * (N * (self.size**2 * self.C + self.out**2 * self.K) + weights)

    def words(self, N: int, dtype: str = "bfloat16", **rest: object) -> dict[str, object]:
        """The block as the machine's runner takes it."""
        pad = self.side // 2
        return {
            "op": "inverted_residual", "map": "forward", "dtype": dtype, "layout": "channels_last", "N": N,
            "C": self.E, "H": self.size, "W": self.size, "K": self.E, "R": self.side, "S": self.side,
            "groups": self.E, "stride": f"{self.stride},{self.stride}", "padding": ",".join([str(pad)] * 4),
            "inputs": self.C if self.C != self.E else 0, "outputs": self.K, "residual": int(self.residual), "bias": 1,
            "activation": "relu6", "expand_activation": "relu6", **rest,
        }  # fmt: skip


def product(C: int, K: int, size: int) -> Layer:
    return Layer("pointwise", C, K, size, size, 1, 1, 1, 1, 0, 0, 1, 1, 1, bias=True)


NETWORKS = {
    "mobilenet_v2": (
        Block(32, 32, 16, 112),
        Block(16, 96, 24, 112, stride=2),
        Block(24, 144, 24, 56),
        Block(24, 144, 32, 56, stride=2),
        Block(32, 192, 32, 28, times=2),
        Block(32, 192, 64, 28, stride=2),
        Block(64, 384, 64, 14, times=3),
        Block(64, 384, 96, 14),
        Block(96, 576, 96, 14, times=2),
        Block(96, 576, 160, 14, stride=2),
        Block(160, 960, 160, 7, times=2),
        Block(160, 960, 320, 7),
    )
}
CUT = ("most_pixels", "most_outputs", "rows", "columns")


@dataclass(frozen=True)
class Predicted:
    """Microseconds of a block; `fused` is None where the kernel cannot run it."""

    plan: str  # what the plan takes
    tile: dict[str, int]
    fused: predict.Launch | None
    calls: list[float]  # each with its launch; torch's are at their floor
    floor: float


def predict_block(gpu: predict.Gpu, block: Block, N: int, cut: dict[str, int] | None = None) -> Predicted:
    ptx = predict.machine()
    case = block.words(N, sm=gpu.capability, multiprocessors=gpu.multiprocessors)
    free, strict = ptx.emulate.plans([predict.words(case | {"strict": strict}) for strict in (0, 1)])
    tile = cut or {name: strict.tile.get(name, 1) for name in CUT}
    fused = None
    if strict.kernel != "composite":
        used = predict.runner("inverted_residual", "forward", gpu.ptx)
        dry = used.run(predict.words(case | tile), gpu.ptx, timeout=300, dry=True).stdout
        done = used.run(predict.words(case | tile | {"N": 1}), gpu.ptx, counts=True, timeout=300)
        if done.returncode:
            raise RuntimeError(done.stdout)
        fused = predict.predict_launch(
            gpu, predict.read_counts(done.stdout)[0], predict.read_counts(dry)[0].blocks, float(N)
        )
    overhead = gpu.launch_us + gpu.latency_us
    calls = []
    for layer in block.layers():
        made = predict.predict(gpu, layer, "forward", "bfloat16", "channels_last", N)
        floor = layer.bytes_moved(N, 2, "forward") / (gpu.memory_gbs * 1e3 * gpu.copied_share)
        calls.append(floor + overhead if isinstance(made, str) else made.microseconds)
    floor_us = block.floor_bytes(N) / (gpu.memory_gbs * 1e3 * gpu.copied_share)
    return Predicted(free.kernel, tile, fused, calls, floor_us)


def table(gpu: predict.Gpu, network: str, batch: int) -> Iterator[str]:
    head = ("block", "tile", "blocks (a multiprocessor)", "longest bounds in us", "one kernel us", "calls us")
    yield "| " + " | ".join((*head, "floor us", "plan")) + " |"
    yield "| --- " * 8 + "|"
    sums = [0.0, 0.0, 0.0]
    for block in NETWORKS[network]:
        made = predict_block(gpu, block, batch)
        calls, one = sum(made.calls), made.fused
        longest = sorted(one.bounds.items(), key=lambda item: -item[1])[:4] if one else []
        best = one.microseconds if one and made.plan != "composite" else calls
        sums = [total + block.times * us for total, us in zip(sums, (best, calls, made.floor), strict=True)]
        said = ", ".join(f"{name} {us:.0f}" for name, us in longest)
        place = f"{one.blocks} ({one.resident})" if one else ""
        tile = "x".join(str(made.tile[name]) for name in ("rows", "columns"))
        times = f" (x{block.times})" if block.times > 1 else ""
        plan = "calls" if made.plan == "composite" else "one kernel"
        figures = f"{one.microseconds:.1f}" if one else "-"
        each = " + ".join(f"{us:.0f}" for us in made.calls)
        cells = (f"{block}{times}", tile, place, said, figures, f"{calls:.1f} ({each})", f"{made.floor:.1f}", plan)
        yield "| " + " | ".join(cells) + " |"
    yield ""
    yield f"All blocks as planned {sums[0]:.0f} us, by calls {sums[1]:.0f} us, floor {sums[2]:.0f} us."


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.blocks", description=__doc__.split("\n")[0])
    parser.add_argument("gpu", choices=predict.gpus())
    parser.add_argument("--network", choices=NETWORKS, default="mobilenet_v2")
    parser.add_argument("--batch", type=int, default=128)
    options = parser.parse_args()
    gpu = predict.gpus()[options.gpu]
    print(f"Predictions for {gpu.name}, N {options.batch}, bfloat16, channels_last. Nothing here is measured.\n")
    for line in table(gpu, options.network, options.batch):
        print(line, flush=True)


if __name__ == "__main__":
    main()

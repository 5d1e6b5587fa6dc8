"""benchmarks/predict.py: the arithmetic of a prediction. test_ptx.py makes one on the machine."""

from __future__ import annotations

import pytest

from benchmarks import __main__ as command
from benchmarks import layers, predict, tables

OUTPUT = """plan: cuda_depthwise_nhwc
entry: _Z1kv
launch: blocks=4 threads=128 shared=20480 least_blocks=3 most_threads=128
counts: kernel=_Z1kv instructions=1000
traffic: reads=640 writes=320 block_reads=1280 block_writes=320 in_flight=4096
executed: fma.rn.f32 600
executed: mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 40
executed: ld.global.nc.v4.f32 160
executed: add.s32 200
memory: requests=160 wavefronts=0 ideal=2560 sectors=2560 bytes=81920 ld.global.nc.v4.f32
memory: requests=100 wavefronts=800 ideal=400 sectors=0 bytes=51200 ldmatrix.sync.aligned.m8n8.x4.shared.b16
right: 1 launches
"""


def test_counts_are_read() -> None:
    (counted,) = predict.read_counts(OUTPUT)
    assert (counted.blocks, counted.threads, counted.shared_bytes, counted.least_blocks) == (4, 128, 20480, 3)
    assert predict.by_unit(counted.executed) == {
        "tensor": 40, "special": 0, "fp64": 0, "fp32": 600, "access": 160, "control": 0, "integer": 200,
    }  # fmt: skip
    assert (counted.wavefronts, counted.ideal_wavefronts, counted.l1_sectors) == (800, 400, 2560)
    assert (counted.l2_sectors, counted.memory_sectors, counted.in_flight) == (1600, 960, 4096)


def test_bounds_of_a_launch() -> None:
    """One block and a half for each multiprocessor: the busiest has two."""
    gpu = predict.gpus()["H100"]
    (counted,) = predict.read_counts(OUTPUT)
    made = predict.predict_launch(gpu, counted, blocks=198, more=49.5)
    assert made.resident == 3  # of shared memory there is enough for ten
    assert made.waves == pytest.approx(198 / (3 * 132)) and made.busiest == pytest.approx(2 / 1.5)
    of_two_blocks = {
        "issue": 1000 / 4, "fp32": 600 * 32 / 128, "integer": 200 * 32 / 64, "tensor cores": 40 * 2048 / 1024,
        "shared memory": 800, "L1": 2560 * 32 / 128, "L2 to a multiprocessor": 1600 * 32 / 64,
    }  # fmt: skip
    want = {name: clocks * 2 / 4 / (1.83 * 1e3) for name, clocks in of_two_blocks.items()}
    want["memory"] = 960 * 32 * 49.5 / (3350 * 1e3 * 0.9)
    want["latency"] = 1000 / (4 * 4) * 2 / (1.83 * 1e3)  # two blocks of a multiprocessor are there at once
    assert made.bounds == pytest.approx(want)
    assert made.bound == "memory" and made.microseconds == pytest.approx(want["memory"] + 2.8)
    assert made.bank_conflicts == 2 and made.in_flight_kb == 12


def test_multiprocessors_of_48_warps_and_100_kb() -> None:
    (counted,) = predict.read_counts(OUTPUT)
    counted.least_blocks, counted.threads = 0, 512
    assert predict.predict_launch(predict.gpus()["RTX 4090"], counted, 10, 1).resident == 3  # 48 warps of 16
    counted.shared_bytes = 40 << 10
    assert predict.predict_launch(predict.gpus()["RTX 4090"], counted, 10, 1).resident == 2


def test_blocks_that_take_more_images_take_longer() -> None:
    """Executed with an eighth of the images, by as many blocks as the whole has."""
    gpu = predict.gpus()["H100"]
    (counted,) = predict.read_counts(OUTPUT)
    few, all_of_them = (predict.predict_launch(gpu, counted, counted.blocks, more) for more in (1, 8))
    for bound in ("issue", "tensor cores", "shared memory", "memory", "latency"):
        assert all_of_them.bounds[bound] == pytest.approx(8 * few.bounds[bound])


def test_smaller_blocks_than_registers_are_cut_for() -> None:
    (counted,) = predict.read_counts(OUTPUT)
    counted.threads = 64
    assert predict.predict_launch(predict.gpus()["H100"], counted, 1000, 1).resident == 6


def test_blocks_that_have_no_room_begin_later() -> None:
    gpu = predict.gpus()["H100"]
    (counted,) = predict.read_counts(OUTPUT)
    once, thrice = (
        predict.predict_launch(gpu, counted, blocks, blocks / 4).bounds["latency"] for blocks in (3 * 132, 7 * 132)
    )
    assert thrice == pytest.approx(3 * once + 2 * gpu.latency_us)


def test_every_rate_has_a_source() -> None:
    assert set(predict.gpus()) == {"A100", "RTX 4090", "H100", "H200", "B200", "RTX 5090"}
    for gpu in predict.gpus().values():
        assert "NVIDIA" in gpu.source and gpu.multiprocessors > 100 and gpu.memory_gbs > 1000


def test_a_smaller_launch_keeps_the_cut() -> None:
    arguments = {"N": 64, "C": 576, "K": 576, "groups": 576}
    assert predict.smaller(arguments, {"rows": 7, "splits": 16}, 10**6) == {}
    assert predict.smaller(arguments, {"rows": 7, "splits": 16}, 10**9) == {
        "N": 8, "splits": 2, "C": 64, "K": 64, "groups": 64,
    }  # fmt: skip
    assert predict.smaller(arguments, {"images": 4}, 10**9)["N"] == 4
    product = {"N": 128, "C": 24, "K": 144, "groups": 1}
    assert predict.smaller(product, {"outputs": 128, "blocks": 132}, 10**9) == {"N": 2, "blocks": 2}
    assert predict.smaller(product, {"outputs": 32, "blocks": 3}, 10**9) == {"N": 86, "blocks": 2}
    assert predict.smaller({**arguments, "groups": 1}, {}, 10**9) == {"N": 1}
    planes = predict.smaller(arguments, {"rows": 7, "planes": 12}, 10**9, kernel="depthwise_nchw")
    assert planes == {"N": 1, "C": 24, "K": 24, "groups": 24}


TABLE = """Before.
<!-- predicted: H200; 64, 1; float16; channels_last; dw5x5 240
  @28x28; C=96 H=27 R=7 -->

| 19.6 |

<!-- end of what was predicted, {digest} -->
After.
"""


def test_tables_are_made_and_not_changed_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[object, ...]] = []

    def cell(gpu: predict.Gpu, layer: layers.Layer, *rest: object) -> str:
        asked.append((gpu.capability, layer.label, *rest))
        return f"{len(asked)}.0"

    monkeypatch.setattr(tables, "cell", cell)
    made = tables.rewrite(TABLE.format(digest="0"))
    assert made.startswith("Before.\n<!-- predicted: H200; 64") and made.endswith(" -->\nAfter.\n")
    assert "| dw5x5 240 @28x28 | 1, float16 | 4.0 | 5.0 | 6.0 |" in made and "19.6" not in made
    assert len(asked) == 12 and asked[0] == (90, "dw5x5 240 @28x28", "forward", "float16", "channels_last", 64)
    assert tables.changed_by_hand(TABLE.format(digest="0")) and not tables.changed_by_hand(made)
    for other in (made.replace("4.0", "3.9"), made.replace("64, 1", "64, 8")):
        assert tables.changed_by_hand(other)


def test_the_notes_tables_are_as_they_were_made() -> None:
    texts = [page.read_text() for page in sorted(tables.NOTES.glob("*.md"))]
    assert sum(len(tables.BLOCK.findall(text)) for text in texts) >= 5
    assert sum(text.count("<!-- predicted") for text in texts) == sum(len(tables.BLOCK.findall(t)) for t in texts)
    assert not [asked for text in texts for asked in tables.changed_by_hand(text)]


def test_a_layer_in_words() -> None:
    layer = predict.layer_of("C=96 H=56 R=7")
    assert layer.label == "dw7x7 96 @56x56" and layer.macs(1) > 0
    assert predict.layer_of("C=64 K=128 H=14 R=1 groups=1").kind == "pointwise"
    with pytest.raises(SystemExit, match="--layer"):
        predict.layer_of("C=96 H=56 dilation=2 R=3")
    with pytest.raises(SystemExit):
        command.parse(["--predict", "H300"])

"""Sweeps of the CUDA plan (benchmarks/sweep.py): other kernels and cuts, what they take, and the table made of that."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from harness import random

sys.path.insert(0, str(Path(__file__).parent / "emulator"))
import emulate

from benchmarks import __main__ as command
from benchmarks import layers, predict, sweep
from sepconv_ext import _C, functional

pytestmark = pytest.mark.skipif(emulate.why_not() is not None, reason=str(emulate.why_not()))

WITHIN, AT_MOST = 1.05, 1.25
COMMITTED = sorted(sweep.FOLDER.glob("*.jsonl"))
LAYERS = ("C=96 H=14 R=7", "C=144 H=28 R=5", "C=32 H=56 R=3", "C=96 H=56 R=3 stride=2", "C=64 H=28 R=13")


def case(text: str, **rest: object) -> dict[str, object]:
    cell = sweep.Cell(predict.layer_of(text), "forward", "float16", "channels_last", 8)
    return cell.case | {"sm": 90, "multiprocessors": 132} | rest


@pytest.mark.parametrize("text", LAYERS)
@pytest.mark.parametrize("map", ["forward", "grad_input", "grad_weight"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_alternatives(text: str, map: str, layout: str, dtype: str) -> None:
    """The plan's own choice first, each once, each as the plan says it where it is asked for by name."""
    asked = case(text, map=map, layout=layout, dtype=dtype)
    found = emulate.alternatives(predict.words(asked))
    (own,) = emulate.plans([predict.words(asked)])
    assert (found[0].kernel, found[0].tile) == (own.kernel, own.tile)
    assert len({(p.kernel, *sorted(p.tile.items())) for p in found}) == len(found) >= 4
    assert len({p.kernel for p in found}) >= 2
    named = [predict.words(asked | {"kernel": p.kernel.removeprefix("cuda_"), **p.tile}) for p in found]
    for plan, by_name in zip(found, emulate.plans(named), strict=True):
        assert (by_name.kernel, by_name.tile) == (plan.kernel, plan.tile)


PRODUCTS = ("C=24 K=144 H=28 R=1 groups=1", "C=144 K=24 H=14 R=1 groups=1")
GROUPS = ("C=64 H=28 R=3 groups=8", "C=64 H=28 R=3 groups=4 stride=2")


@pytest.mark.parametrize("text", [*PRODUCTS, *GROUPS])
@pytest.mark.parametrize("map", ["forward", "grad_input", "grad_weight"])
def test_alternatives_of_products(text: str, map: str) -> None:
    """1x1 and groups in half types: cuts of their kernel, and the general kernel of the family."""
    asked = case(text, map=map)
    found = emulate.alternatives(predict.words(asked))
    general = "cuda_pointwise_mma" if text in PRODUCTS else "cuda_grouped"
    assert {p.kernel for p in found} == {found[0].kernel, general} and found[-1].kernel == general
    assert len({(p.kernel, *sorted(p.tile.items())) for p in found}) == len(found) >= 3
    named = [predict.words(asked | {"kernel": p.kernel.removeprefix("cuda_"), **p.tile}) for p in found]
    for plan, by_name in zip(found, emulate.plans(named), strict=True):
        assert (by_name.kernel, by_name.tile) == (plan.kernel, plan.tile)


def test_a_row_for_each_architecture() -> None:
    table = emulate.tuning()
    assert list(table) == [0, 80, 86, 89, 90, 100, 120]
    assert table[90] == table[0] and table[89]["shared_kb"] == 100
    assert sweep.row_of(table, 103) == (100, table[100]) and sweep.row_of(table, 75)[0] == 80
    text = sweep.TABLE.read_text()
    for name in table[0]:
        assert text.count(f'field("{name}", t.{name})') == 1


def test_the_table_decides() -> None:
    """Each of these numbers, changed, changes a plan."""
    changes = {
        "nhwc_busy_3": (case("C=384 H=14 R=3"), 1),
        "nhwc_mma_busy": (case("C=96 H=56 R=7"), 4),
        "nchw_busy": (case("C=96 H=56 R=3", layout="contiguous", dtype="float32"), 3),
        "toeplitz_from": (case("C=96 H=27 R=7", layout="contiguous"), 9),
        "large_from": (case("C=96 H=27 R=9", layout="contiguous", dtype="float32"), 100),
        "grad_weight_nhwc": (case("C=96 H=56 R=3", map="grad_weight", dtype="float32"), 8),
        "bytes_a_clock": (case("C=96 H=14 R=5", layout="contiguous", N=64), 0.1),
        "shared_kb": (case("C=96 H=56 R=7"), 100),
    }
    for name, (asked, value) in changes.items():
        before, after = emulate.plans([predict.words(asked), predict.words(asked | {f"tuning.{name}": value})])
        assert (before.kernel, before.tile) != (after.kernel, after.tile), name


def test_the_table_is_written_as_it_is_read(tmp_path: Path) -> None:
    table = emulate.tuning()
    copy = tmp_path / "tuning.h"
    copy.write_text(sweep.TABLE.read_text())
    sweep.write_table(table, copy)
    assert copy.read_text() == sweep.TABLE.read_text()
    table[90]["nhwc_busy_3"] = 2.5
    sweep.write_table(table, copy)
    assert "{.capability = 90, .nhwc_busy_3 = 2.5}," in copy.read_text()


def cells() -> list[sweep.Cell]:
    layer = predict.layer_of("C=384 H=14 R=3")
    return [sweep.Cell(layer, "forward", "float16", "channels_last", batch) for batch in (8, 64)]


def by_rows(cell: sweep.Cell, plans):
    """A GPU on which strips of seven rows are best, and one cut fails."""
    for i, plan in enumerate(plans):
        if i == len(plans) - 1:
            yield f"{plan.kernel}: does not run"
        else:
            yield sweep.Tried(plan.kernel, plan.tile, 10.0 + abs(plan.tile.get("rows", 1) - 7))


def test_a_sweep_goes_on_where_it_ended(tmp_path: Path) -> None:
    file, work = tmp_path / "deep" / "sweep.jsonl", cells()
    said: list[str] = []
    head = ("a GPU", 90, 132, "predicted")
    sweep.run(file, *head, work[:1], by_rows, said.append)
    sweep.run(file, *head, work, by_rows, said.append)
    assert len(said) == 2 and len(file.read_text().splitlines()) == 3
    made = sweep.read(file)
    assert [row.label for row in made.rows] == [cell.label for cell in work]
    assert all(len(row.failed) == 1 and row.best.tile["rows"] == 7 for row in made.rows)
    with pytest.raises(SystemExit, match="a sweep of a GPU"):
        sweep.run(file, "another", 90, 132, "predicted", work, by_rows, said.append)


def test_what_was_not_tried_counts_as_the_worst(tmp_path: Path) -> None:
    file = tmp_path / "sweep.jsonl"
    sweep.run(file, "a GPU", 90, 132, "measured", cells()[:1], by_rows, lambda text: None)
    made = sweep.read(file)
    (planned,) = emulate.plans([sweep.words_of(made, made.rows[0])])
    assert sweep.losses(made)[0][2] == made.rows[0].of(planned.kernel, planned.tile).microseconds / 10
    made.rows[0].tried = [t for t in made.rows[0].tried if t.tile != planned.tile]
    assert sweep.losses(made)[0][2] == max(t.microseconds for t in made.rows[0].tried) / 10


def test_a_fit_makes_the_choices_faster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, copy = tmp_path / "sweep.jsonl", tmp_path / "tuning.h"
    copy.write_text(sweep.TABLE.read_text())
    sweep.run(file, "a GPU", 90, 132, "measured", cells(), by_rows, lambda text: None)
    made = sweep.read(file)
    changed = sweep.fit([made], lambda text: None)
    before = sum(ratio for _, _, ratio in sweep.losses(made))
    assert changed and sum(ratio for _, _, ratio in sweep.losses(made, changed)) < before
    monkeypatch.setattr(sweep.write_table, "__defaults__", (copy,))
    assert command.main(["--fit", str(file)]) == 0
    assert copy.read_text() != sweep.TABLE.read_text()


def test_run_plan_needs_a_gpu_part() -> None:
    if _C.build_info()["cuda"]:
        pytest.skip("this build has one: test_a_plan_by_hand")
    with pytest.raises(RuntimeError, match=r"no CUDA part.*depthwise_nhwc"):
        _C.run_plan("depthwise_nhwc", {"rows": 7}, lambda: None)


@pytest.mark.cuda
def test_a_plan_by_hand() -> None:
    """The kernel that is named runs instead of the plan's, and the result is the same convolution."""
    x = random((2, 64, 14, 14), torch.float16, "cuda", "channels_last", seed=1)
    w = random((64, 1, 7, 7), torch.float16, "cuda", seed=2)
    _C.reset_kernel_counts()
    y = _C.run_plan("depthwise_nhwc", {"rows": 3}, lambda: functional.conv2d(x, w, None, 1, 3, 1, 64))
    assert _C.kernel_counts() == {"cuda_depthwise_nhwc": 1}
    exact = F.conv2d(x.double(), w.double(), None, 1, 3, 1, 64)
    torch.testing.assert_close(y.double(), exact, rtol=2e-3, atol=1e-3 * exact.abs().max().item())
    with pytest.raises(RuntimeError, match="'warp'"):
        _C.run_plan("depthwise_nhwc", {"warp": 1}, lambda: functional.conv2d(x, w, None, 1, 3, 1, 64))


def test_the_committed_sweeps_are_read() -> None:
    assert COMMITTED
    known = {gpu.name: gpu for gpu in predict.gpus().values()}
    for path in COMMITTED:
        made = sweep.read(path)
        assert made.how in ("predicted", "measured") and made.how in path.stem
        assert made.how == "measured" or known[made.gpu].capability == made.capability
        assert len({row.label for row in made.rows}) == len(made.rows)
        for row, line in zip(made.rows, path.read_text().splitlines()[1:], strict=True):
            assert json.loads(sweep.line_of(row)) == json.loads(line)
            assert len(row.tried) >= 4 and row.best.microseconds > 0


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_the_plan_chooses_within_five_percent_of_the_best(path: Path) -> None:
    """What the plan takes now, not what it took when the sweep was made. A row that says why it does not is not far
    off either, and says it for as long as it is needed."""
    worse = [
        f"{ratio:.2f}x {row.label}: {plan.kernel} {plan.tile}, best {row.best.kernel} {row.best.tile} {row.why}"
        for row, plan, ratio in sweep.losses(sweep.read(path))
        if not (WITHIN < ratio <= AT_MOST if row.why else ratio <= WITHIN)
    ]
    assert not worse, "\n".join(sorted(worse, reverse=True))


def test_layers_of_the_command() -> None:
    options = command.parse(["--sweep", "--sample", "2"])
    assert options.sweep.name == "sweep.jsonl" and options.sweep_batches == [1, 64]
    assert options.dtype == ["float32", "float16"] and options.kinds == ["depthwise"]
    assert command.parse(["--sweep", "--kinds", "pointwise,grouped"]).kinds == ["pointwise", "grouped"]
    assert layers.select(layers.load(), ["depthwise"])

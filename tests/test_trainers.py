"""What people train with, on a converted model: ten steps on digits, equal to the same run of torch's own layers.

In float64, where rounding cannot hide a difference. Run as a program, this file is one process of the distributed runs.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harness import only_our_kernels
from sepconv_ext import convert_, revert_

WORLD = 2
STEPS, BATCH = 10, 32
SAME = dict(rtol=1e-8, atol=1e-10)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Such small calls only wait for a second one; the fixtures of conftest.py restore the number."""
    torch.set_num_threads(1)


def batches() -> Iterator[tuple[Tensor, Tensor]]:
    """Ten of digits, each image 8x8."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.from_numpy(digits.images).unsqueeze(1).double() / 16
    labels = torch.from_numpy(digits.target)
    for step in range(STEPS):
        rows = slice(step * BATCH, (step + 1) * BATCH)
        yield images[rows], labels[rows]


def loader() -> torch.utils.data.DataLoader:
    return torch.utils.data.DataLoader(list(batches()), batch_size=None)


def network() -> nn.Sequential:
    """A stem, two blocks (depthwise, 1x1; one strided, one grouped) with norms, and a head."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 24, 1),
        nn.SiLU(),
        nn.Conv2d(24, 24, 5, stride=2, padding=2, groups=24),
        nn.Conv2d(24, 24, 3, padding=1, groups=4),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(24, 10),
    ).double()


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)


def made(ours: bool) -> nn.Module:
    model = network()
    if ours:
        assert len(convert_(model)) == 5
    return model


def kernels(ours: bool) -> object:
    """Ours alone where the model is converted: nothing passes by falling back."""
    return only_our_kernels(at_least=2 * 5 * STEPS) if ours else nullcontext()


Run = Callable[[bool], dict]


def assert_equal_runs(run: Run) -> dict:
    """Of torch's layers and of ours. What is learned differs from what was there at first, so that steps were made."""
    expected = run(False)
    with kernels(True):
        actual = run(True)
    torch.testing.assert_close(actual, expected, **SAME)
    return actual


def trained(model: nn.Module, optimiser: torch.optim.Optimizer, steps: range = range(STEPS)) -> list[Tensor]:
    """The losses."""
    losses = []
    for step, (images, labels) in enumerate(batches()):
        if step in steps:
            optimiser.zero_grad()
            loss = F.cross_entropy(model(images), labels)
            loss.backward()
            optimiser.step()
            losses.append(loss.detach())
    return losses


def plain(ours: bool) -> dict:
    model = made(ours).train()
    losses = trained(model, sgd(model))
    return {**model.state_dict(), "losses": torch.stack(losses)}


def test_a_loop_of_ones_own() -> None:
    learned = assert_equal_runs(plain)
    assert learned["losses"][-1] < learned["losses"][0]


# --- two processes ---


def ddp(ours: bool, mesh: object) -> dict:
    model = made(ours).train()
    replica = nn.parallel.DistributedDataParallel(model)
    losses = trained_on_a_share(replica, sgd(replica))
    return {**model.state_dict(), "losses": torch.stack(losses)}


def fsdp2(ours: bool, mesh: object) -> dict:
    """Each convolution is a group of its own, and the rest is another."""
    from torch.distributed.fsdp import fully_shard

    model = made(ours).train()
    for layer in model:
        if isinstance(layer, nn.Conv2d):
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    losses = trained_on_a_share(model, sgd(model))
    state = {name: t.full_tensor() if hasattr(t, "full_tensor") else t for name, t in model.state_dict().items()}
    return {**state, "losses": torch.stack(losses)}


def dtensor(ours: bool, mesh: object) -> dict:
    """Parameters on both processes, a batch sharded over them; without norms, whose statistics DTensor leaves local."""
    from torch.distributed.tensor import Replicate, Shard, distribute_module, distribute_tensor

    model = made(ours).train()
    for i in (1, 4):
        model[i] = nn.Identity()
    model = distribute_module(model, mesh)
    optimiser = sgd(model)
    losses = []
    for images, labels in batches():
        optimiser.zero_grad()
        scores = model(distribute_tensor(images, mesh, [Shard(0)])).redistribute(mesh, [Replicate()]).to_local()
        loss = F.cross_entropy(scores, labels)
        loss.backward()
        optimiser.step()
        losses.append(loss.detach())
    state = {name: t.full_tensor() for name, t in model.state_dict().items()}
    return {**state, "losses": torch.stack(losses)}


def trained_on_a_share(model: nn.Module, optimiser: torch.optim.Optimizer) -> list[Tensor]:
    rank, share = torch.distributed.get_rank(), BATCH // WORLD
    losses = []
    for images, labels in batches():
        rows = slice(rank * share, (rank + 1) * share)
        optimiser.zero_grad()
        loss = F.cross_entropy(model(images[rows]), labels[rows])
        loss.backward()
        optimiser.step()
        losses.append(loss.detach())
    return losses


def worker(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder / 'meeting'}", rank=rank, world_size=WORLD)
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (WORLD,))
    for run in (ddp, fsdp2, dtensor):
        print(run.__name__, file=sys.stderr, flush=True)
        assert_equal_runs(lambda ours, run=run: run(ours, mesh))
    torch.distributed.destroy_process_group()


def test_ddp_fsdp2_and_dtensor(tmp_path: Path) -> None:
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


# --- packages ---


def test_safetensors_between_torchs_layers_and_ours(tmp_path: Path) -> None:
    """Five steps with one kind of layers, a file, five with the other: as ten of torch's."""
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    expected = network().train()
    trained(expected, sgd(expected))

    for first in (False, True):
        half = made(first).train()
        optimiser = sgd(half)
        trained(half, optimiser, range(5))
        safetensors.save_model(half, str(tmp_path / "half.safetensors"))
        rest = made(not first).train()
        assert safetensors.load_model(rest, str(tmp_path / "half.safetensors")) == (set(), [])
        continued = sgd(rest)
        continued.load_state_dict(copy.deepcopy(optimiser.state_dict()))
        trained(rest, continued, range(5, STEPS))
        torch.testing.assert_close(dict(rest.state_dict()), dict(expected.state_dict()), **SAME)


def test_accelerate(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")

    def run(ours: bool) -> dict:
        accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
        model = made(ours).train()
        model, optimiser, data = accelerator.prepare(model, sgd(model), loader())
        for images, labels in data:
            with accelerator.accumulate(model):
                accelerator.backward(F.cross_entropy(model(images), labels))
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimiser.step()
                optimiser.zero_grad()
        accelerator.save_model(model, tmp_path / str(ours))
        return dict(accelerator.unwrap_model(model).state_dict())

    assert_equal_runs(run)
    accelerate.load_checkpoint_in_model(network(), str(tmp_path / "True"))  # ours, read by torch's layers


def test_lightning(tmp_path: Path) -> None:
    lightning = pytest.importorskip(
        "lightning.pytorch", reason="lightning is not installed: it is not among the tests'"
    )

    class Classifier(lightning.LightningModule):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
            images, labels = batch
            return F.cross_entropy(self.model(images), labels)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return sgd(self)

    def run(ours: bool) -> dict:
        module = Classifier(made(ours).train())
        quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
        trainer = lightning.Trainer(max_epochs=1, accelerator="cpu", default_root_dir=tmp_path, **quiet)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of few workers and no validation
            trainer.fit(module, loader())
        assert trainer.global_step == STEPS
        trainer.save_checkpoint(tmp_path / f"{ours}.ckpt")
        return dict(module.model.state_dict())

    learned = assert_equal_runs(run)
    read = Classifier.load_from_checkpoint(tmp_path / "True.ckpt", model=network(), weights_only=True)
    torch.testing.assert_close(dict(read.model.state_dict()), learned, rtol=0, atol=0)


@pytest.mark.parametrize("when", ["before", "after"])
def test_the_moving_average_of_timm(when: str) -> None:
    """Converted before the average copies the model, or after: then the average keeps torch's layers."""
    utils = pytest.importorskip("timm.utils", reason="timm is not installed")

    def run(ours: bool) -> dict:
        model = made(ours and when == "before").train()
        average = utils.ModelEmaV3(model, decay=0.9, use_warmup=True)
        if ours and when == "after":
            convert_(model)
        optimiser = sgd(model)
        for step in range(STEPS):
            trained(model, optimiser, range(step, step + 1))
            average.update(model, step=step + 1)
        assert revert_(average.module) == (5 if ours and when == "before" else 0)
        with torch.no_grad():
            scores = average.module.eval()(next(batches())[0])
        return {**average.module.state_dict(), "scores": scores}

    assert_equal_runs(run)


def test_timms_training() -> None:
    """A network of timm's with its mixup, loss, optimiser, schedule, scaler with clipping, and moving average."""
    timm = pytest.importorskip("timm", reason="timm is not installed")
    from timm.data import Mixup
    from timm.loss import SoftTargetCrossEntropy
    from timm.optim import create_optimizer_v2
    from timm.scheduler import CosineLRScheduler
    from timm.utils import ModelEmaV3, dispatch_clip_grad

    def run(ours: bool) -> dict:
        import numpy

        torch.manual_seed(0)
        numpy.random.seed(0)  # noqa: NPY002  (mixup draws there)
        model = timm.create_model("mobilenetv3_small_050", in_chans=1, num_classes=10).double().train()
        if ours:
            assert len(convert_(model)) >= 30
        optimiser = create_optimizer_v2(model, opt="sgd", lr=0.02, weight_decay=1e-4)
        schedule = CosineLRScheduler(optimiser, t_initial=STEPS, warmup_t=2, warmup_lr_init=1e-3, t_in_epochs=False)
        mixup = Mixup(mixup_alpha=0.2, cutmix_alpha=1.0, num_classes=10)
        average, loss_of = ModelEmaV3(model, decay=0.9), SoftTargetCrossEntropy()
        losses = []
        for step, (images, labels) in enumerate(batches()):
            images, targets = mixup(images, labels)
            loss = loss_of(model(F.interpolate(images, scale_factor=2)), targets.double())
            optimiser.zero_grad()
            loss.backward()
            dispatch_clip_grad(model.parameters(), 1.0, mode="norm")
            optimiser.step()
            average.update(model)
            schedule.step_update(step + 1)
            losses.append(loss.detach())
        return {**average.module.state_dict(), "losses": torch.stack(losses)}

    assert_equal_runs(run)


if __name__ == "__main__":
    worker(int(sys.argv[1]), Path(sys.argv[2]))

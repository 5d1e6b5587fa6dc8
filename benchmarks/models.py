"""Times whole networks on photographs: as torch runs them, and converted by sepconv_ext.convert_.

With `compile`, training steps are those of torch.compile with this package's backend, and its own is a peer; inference
is that of the converted network compiled, and the network compiled is a peer, both with torch.compile's longest search.
Then what is compared is what was compiled, too.

No weights are downloaded: the networks start from seeded random weights, and their BatchNorm statistics are taken from
the photographs, so that activations have the sizes that they have in a trained network.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sepconv_ext

from .memory import memory_of
from .peers import LAYOUTS, OURS, tolerance
from .timing import Clock, threads

MODELS = (
    "mobilenet_v2",
    "mobilenet_v3_large",
    "efficientnet_b0",
    "convnext_tiny",
    "resnext50_32x4d",
    "legacy_xception",
    "shufflenet_v2_x1_0",
    "mnasnet1_0",
    "regnet_y_400mf",
    "mobilenetv1_100",
    "ghostnet_100",
    "mixnet_s",
)
DEFAULT = MODELS[:6]  # of a run of everything
QUICK = ("mobilenet_v2",)  # of a quick one
TIMM = ("legacy_xception", "mobilenetv1_100", "ghostnet_100", "mixnet_s")

# Logits of the two may differ by rounding, which grows through some fifty layers: as a share of the largest logit.
LOGITS_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 1e-1}
# And the whole gradient of a loss, as a share of its norm.
GRADIENT_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3, torch.float16: 2e-1, torch.bfloat16: 5e-1}


def build(name: str) -> nn.Module:
    """The network with seeded random weights. ImportError where torchvision, or timm for TIMM, is missing."""
    torch.manual_seed(0)
    if name in TIMM:
        import timm

        return timm.create_model(name, pretrained=False)
    import torchvision

    model = torchvision.models.get_model(name, weights=None)
    for key, parameter in model.named_parameters():
        if key.endswith("layer_scale"):  # ConvNeXt starts them at 1e-6, which would switch its blocks off
            nn.init.constant_(parameter, 0.2)
    return model


def name_of(network: str) -> str:
    """mobilenet_v2 of mobilenet_v2@32."""
    return network.partition("@")[0]


def image_size(network: str) -> int:
    size = network.partition("@")[2]
    return int(size) if size else 299 if "xception" in network else 224


def photographs(count: int, size: int) -> tuple[Tensor, list[str]]:
    """``count`` pictures [count, 3, size, size], normalised as ImageNet networks expect, and where they come from.

    The photographs that ship inside scikit-learn and scikit-image: centre crops, mirrored when more are asked for than
    there are. Where neither package is installed: smooth noise, and the name says so."""
    pictures: list[tuple[str, np.ndarray]] = []
    try:
        from sklearn.datasets import load_sample_images

        sample = load_sample_images()
        pictures += [
            (f"scikit-learn {Path(name).stem}", image)
            for name, image in zip(sample.filenames, sample.images, strict=True)
        ]
    except ImportError:
        pass
    try:
        from skimage import data

        for name in ("astronaut", "chelsea", "coffee", "rocket", "hubble_deep_field", "retina"):
            try:
                pictures.append((f"scikit-image {name}", getattr(data, name)()))
            except Exception:  # some releases fetch some pictures from the network; go on with those that are there
                continue
    except ImportError:
        pass
    if not pictures:
        noise = torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(0)).permute(0, 2, 3, 1) * 255
        pictures = [("noise: neither scikit-learn nor scikit-image is installed", image.numpy()) for image in noise]
    tensors = [_crop(image, size) for _, image in pictures]
    chosen = [
        tensors[i % len(tensors)].flip(-1) if i // len(tensors) % 2 else tensors[i % len(tensors)] for i in range(count)
    ]
    return torch.stack(chosen), [name for name, _ in pictures[:count]]


def _crop(image: np.ndarray, size: int) -> Tensor:
    t = torch.tensor(image).permute(2, 0, 1)[None].float() / 255
    side = min(t.shape[-2:])
    top, left = (t.shape[-2] - side) // 2, (t.shape[-1] - side) // 2
    t = t[..., top : top + side, left : left + side]
    t = F.interpolate(t, (size, size), mode="bilinear", antialias=True, align_corners=False)[0]
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return (t - mean[:, None, None]) / std[:, None, None]


def calibrate(model: nn.Module, images: Tensor) -> None:
    """Sets the running statistics of every BatchNorm to those of the images."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain average
    model.train()
    with torch.no_grad():
        model(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    model.eval()


@dataclass
class Plan:
    """What to time, and how long."""

    names: tuple[str, ...]
    device: torch.device
    batch: int
    dtypes: list[torch.dtype]
    clock: Clock
    thread_counts: list[int]
    modes: tuple[str, ...] = ("inference", "training")
    compile: bool = False
    layouts: tuple[str, ...] = tuple(LAYOUTS)
    budget: float = 4.0  # seconds a contest
    rounds: int = 3

    def __len__(self) -> int:
        contests = 1 if self.device.type == "cuda" else len(self.layouts)
        return len(self.names) * len(self.dtypes) * len(self.modes) * len(self.thread_counts) * contests


def run(plan: Plan, advance: Callable[[str], None], skipped: list[str]) -> Iterator[dict]:
    """Yields the record's model rows. Networks whose package is missing are named in ``skipped``."""
    for name in plan.names:
        advance_left = len(plan) // len(plan.names)
        try:
            torch_model = build(name_of(name))
        except ImportError as error:
            skipped.append(f"{name}: {error}")
            for _ in range(advance_left):
                advance(name)
            continue
        images, pictures = photographs(plan.batch, image_size(name))
        torch_model, images = torch_model.to(plan.device), images.to(plan.device)
        calibrate(torch_model, images)
        our_model = copy.deepcopy(torch_model)
        report = sepconv_ext.convert_(our_model)
        groups = [list(plan.layouts)] if plan.device.type == "cuda" else [[layout] for layout in plan.layouts]
        for layouts in groups:
            variants = {
                f"{who} {layout}": (copy.deepcopy(model).to(memory_format=LAYOUTS[layout]), layout)
                for layout in layouts
                for who, model in ((OURS, our_model), ("torch", torch_model))
            }
            for dtype in plan.dtypes:
                for thread_count in plan.thread_counts:
                    for mode in plan.modes:
                        advance(f"{name} {mode}")
                        with threads(thread_count):
                            facts = {
                                "model": name,
                                "mode": mode,
                                "batch": plan.batch,
                                "image_size": images.shape[-1],
                                "dtype": str(dtype).removeprefix("torch."),
                                "threads": thread_count,
                                "converted": len(report),
                                "pictures": pictures,
                            }
                            yield from _contest(plan, facts, variants, images, dtype)
                            if plan.compile:
                                torch.compiler.reset()
        if plan.device.type == "cuda":
            torch.cuda.empty_cache()


def _contest(plan: Plan, facts: dict, variants: dict, images: Tensor, dtype: torch.dtype) -> Iterator[dict]:
    training = facts["mode"] == "training"
    labels = torch.arange(len(images), device=images.device) * 37 % 1000
    layouts = list(dict.fromkeys(layout for _, layout in variants.values()))
    make = _training_step if training else _inference
    search = "max-autotune-no-cudagraphs"  # graphs are captured of all contenders, by the clock
    agree = steps_agree if training and plan.compile else gradients_agree if training else logits_agree
    entrants, agreement = {}, {}
    for layout in layouts:
        placed = images.contiguous(memory_format=LAYOUTS[layout])
        mine, theirs = variants[f"{OURS} {layout}"][0], variants[f"torch {layout}"][0]
        if not training:  # once, and not at every call as under autocast
            mine, theirs, placed = (copy.deepcopy(t).to(dtype) for t in (mine, theirs, placed))
        entrants[f"torch {layout}"] = make(theirs, placed, labels, dtype)
        if training and plan.compile:
            mine = copy.deepcopy(mine)
            sepconv_ext.revert_(mine)  # the backend finds the convolutions by itself
            mine, theirs = torch.compile(mine, backend="sepconv_ext"), torch.compile(copy.deepcopy(theirs))
            entrants[f"compile {layout}"] = make(theirs, placed, labels, dtype)
        elif plan.compile:
            mine, theirs = torch.compile(mine, mode=search), torch.compile(copy.deepcopy(theirs), mode=search)
            entrants[f"compile {layout}"] = make(theirs, placed, labels, dtype)
        entrants[f"{OURS} {layout}"] = make(mine, placed, labels, dtype)
        agreement[layout] = agree(mine, theirs, placed, labels, dtype)
    # Contenders change their own weights only, and every step of training costs the same whatever the weights are.
    timing = plan.clock.measure(entrants, 1, plan.budget, plan.rounds, graph=not training)
    memory = {name: memory_of(entrants[name], plan.device)[0] for name in timing.samples}
    seconds = {name: timing.seconds(name) for name in timing.samples}
    best = min((name for name in seconds if not name.startswith(OURS)), key=seconds.get, default=None)
    for layout in layouts:
        mine = seconds.get(f"{OURS} {layout}")
        yield {
            **facts,
            "layout": layout,
            "seconds": mine,
            "best_peer": best,
            "best_peer_seconds": seconds.get(best),
            "speedup": seconds[best] / mine if best and mine else None,
            **agreement[layout],
            "peak_bytes": memory,
            "samples_ms": {name: [round(1e3 * s, 4) for s in samples] for name, samples in timing.samples.items()},
            "errors": timing.errors,
        }


def _autocast(images: Tensor, dtype: torch.dtype):
    half = dtype in (torch.float16, torch.bfloat16)
    return torch.autocast(images.device.type, dtype=dtype if half else torch.bfloat16, enabled=half)


def _inference(model: nn.Module, images: Tensor, labels: Tensor, dtype: torch.dtype):
    def run(_: int) -> Tensor:
        model.eval()
        with torch.no_grad():
            return model(images)

    return run


def _training_step(model: nn.Module, images: Tensor, labels: Tensor, dtype: torch.dtype):
    optimiser = torch.optim.SGD(model.parameters(), lr=1e-4)

    def run(_: int) -> None:
        model.train()
        optimiser.zero_grad(set_to_none=True)
        with _autocast(images, dtype):
            loss = F.cross_entropy(model(images).float(), labels)
        loss.backward()
        optimiser.step()

    return run


def logits_agree(mine: nn.Module, theirs: nn.Module, images: Tensor, labels: Tensor, dtype: torch.dtype) -> dict:
    """Do both networks say the same of the photographs: logits within rounding, the same five best in the same order?

    Where two logits are closer than the rounding, their order means nothing: a swap of such neighbours is not counted
    against us."""
    with torch.no_grad():
        a, b = (model.eval()(images).float() for model in (mine, theirs))
    apart = ((a - b).abs().max() / b.abs().max()).item()
    top_a, top_b = a.topk(5).indices, b.topk(5).indices
    swapped = (b.gather(1, top_a) - b.gather(1, top_b)).abs() > 2 * (a - b).abs().max()
    return {
        "difference": apart,
        "same_top5": bool((top_a == top_b).all()),
        "agrees": apart <= tolerance(dtype, images.device, LOGITS_TOLERANCE) and not bool(swapped.any()),
    }


def gradients_agree(mine: nn.Module, theirs: nn.Module, images: Tensor, labels: Tensor, dtype: torch.dtype) -> dict:
    """Do the gradients of one loss by all parameters agree, as one long vector?

    With BatchNorm on its running statistics: batch statistics of few images amplify rounding so much that torch's own
    two layouts differ by a tenth in float32. The copies start from the same weights. Some networks amplify rounding all
    the same (an activation's kink that is just met or just missed): a difference of three times what torch's own
    gradient does when the images change by one rounding error is no disagreement."""

    def gradient(model: nn.Module, images: Tensor) -> Tensor:
        clone = copy.deepcopy(model).eval()
        clone.load_state_dict(theirs.state_dict())
        return _gradient(clone, images, labels, dtype)

    return _within_rounding(gradient, mine, theirs, images, dtype)


def steps_agree(mine: nn.Module, theirs: nn.Module, images: Tensor, labels: Tensor, dtype: torch.dtype) -> dict:
    """The same of two compiled networks as they are timed: in training mode, with batch statistics, and with random
    numbers (dropout, dropped paths) from one seed, of which the compiler makes the same in both."""

    def gradient(model: nn.Module, images: Tensor) -> Tensor:
        torch.manual_seed(0)
        return _gradient(model.train(), images, labels, dtype)

    return _within_rounding(gradient, mine, theirs, images, dtype)


def _gradient(model: nn.Module, images: Tensor, labels: Tensor, dtype: torch.dtype) -> Tensor:
    """By all parameters, as one long vector."""
    model.zero_grad(set_to_none=True)
    with _autocast(images, dtype):
        loss = F.cross_entropy(model(images).float(), labels)
    loss.backward()
    return torch.cat([p.grad.flatten().float() for p in model.parameters() if p.grad is not None])


def _within_rounding(
    gradient: Callable[[nn.Module, Tensor], Tensor], mine: nn.Module, theirs: nn.Module, images: Tensor, dtype
) -> dict:
    def apart(a: Tensor, b: Tensor) -> float:
        return ((a - b).norm() / b.norm()).item()

    expected = gradient(theirs, images)
    difference = apart(gradient(mine, images), expected)
    agrees = difference <= tolerance(dtype, images.device, GRADIENT_TOLERANCE)
    if not agrees:
        noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0)).to(images)
        changed = images * (1 + torch.finfo(dtype).eps * noise)
        agrees = difference <= 3 * apart(gradient(theirs, changed), expected)
    return {"difference": difference, "same_top5": None, "agrees": agrees}

"""Learns scikit-learn's handwritten digits with a small separable network: with torch's layers, then with ours.

Both start from the same weights and see the same batches. What must hold, or the exit code is 1: both name at least 97%
of the held-out digits, and their loss curves agree. Run it with ``make train-digits``.

When two loss curves agree. Both sides add up the same products, but in another order, so every gradient differs by
float32 rounding (relative 1e-7). At first that is all: over the first 10 steps the losses may differ by 1e-4 (measured:
below 1e-6), which a gradient that is wrong at a single border pixel exceeds. Later, training itself amplifies any
difference, as it does between any two correct libraries (measured: from 1e-6 at step 10 to 1e-2 at step 40), so single
steps say little; from there on the mean loss of every epoch may differ by 0.02 + 10%.
"""

from __future__ import annotations

import argparse
import sys
import time

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

import sepconv_ext

BATCH = 64
LEAST_ACCURACY = 0.97
FIRST_STEPS, FIRST_TOLERANCE = 10, 1e-4
EPOCH_TOLERANCE = (0.02, 0.10)  # absolute, and as a share of torch's loss


def separable(channels_in: int, channels_out: int, stride: int, ours: bool) -> list[nn.Module]:
    """Depthwise 3x3, pointwise, ReLU; each convolution followed by BatchNorm."""
    if ours:
        depthwise = sepconv_ext.nn.DepthwiseConv2d(channels_in, 3, stride, padding=1, bias=False)
        pointwise = sepconv_ext.nn.PointwiseConv2d(channels_in, channels_out, bias=False)
    else:
        depthwise = nn.Conv2d(channels_in, channels_in, 3, stride, padding=1, groups=channels_in, bias=False)
        pointwise = nn.Conv2d(channels_in, channels_out, 1, bias=False)
    return [depthwise, nn.BatchNorm2d(channels_in), pointwise, nn.BatchNorm2d(channels_out), nn.ReLU()]


def network(ours: bool) -> nn.Sequential:
    """[N, 1, 8, 8] -> [N, 10]: one dense 3x3 stem, then separable blocks."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.ReLU(),
        *separable(32, 64, 1, ours),
        *separable(64, 96, 2, ours),
        *separable(96, 128, 1, ours),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(128, 10),
    )


def digits(device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """1797 real 8x8 scans: images and labels to learn from (three quarters), and those held out."""
    data = load_digits()
    images = (data.images / 16.0).astype(np.float32)[:, None]
    parts = train_test_split(images, data.target, test_size=0.25, random_state=0, stratify=data.target)
    x, x_held, y, y_held = (torch.from_numpy(part).to(device) for part in parts)
    return x, y, x_held, y_held


def train(model: nn.Module, x: Tensor, y: Tensor, epochs: int) -> tuple[list[float], float]:
    """The loss of every step, and the seconds that all steps took."""
    steps = epochs * (len(x) // BATCH)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=0.1, total_steps=steps)
    shuffle = torch.Generator().manual_seed(0)
    losses = []
    model.train()
    start = time.perf_counter()
    for _ in range(epochs):
        order = torch.randperm(len(x), generator=shuffle).to(x.device)
        for batch in order[: len(x) // BATCH * BATCH].split(BATCH):
            loss = F.cross_entropy(model(x[batch]), y[batch])
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            schedule.step()
            losses.append(loss.detach())
    curve = torch.stack(losses).tolist()  # waits for a GPU to finish
    return curve, time.perf_counter() - start


def curves_agree(ours: list[float], theirs: list[float], epochs: int) -> bool:
    """Whether two loss curves are those of one computation; prints by how much they differ."""
    first = max(abs(a - b) for a, b in zip(ours[:FIRST_STEPS], theirs[:FIRST_STEPS], strict=True))
    by_epoch = [torch.tensor(curve).view(epochs, -1).mean(1) for curve in (ours, theirs)]
    apart = (by_epoch[0] - by_epoch[1]).abs()
    agree = first <= FIRST_TOLERANCE and bool((apart <= EPOCH_TOLERANCE[0] + EPOCH_TOLERANCE[1] * by_epoch[1]).all())
    print(
        f"loss curves {'agree' if agree else 'DISAGREE'}: at most {first:.1e} apart in the first {FIRST_STEPS} steps, "
        f"{apart.max():.1e} in the mean of any epoch"
    )
    return agree


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    return (model.eval()(x).argmax(1) == y).float().mean().item()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--epochs", type=int, default=12)
    options = parser.parse_args()
    torch.backends.cudnn.allow_tf32 = False  # the same arithmetic on both sides
    x, y, x_held, y_held = digits(options.device)

    results = {}
    for name in ("torch", "sepconv_ext"):
        model = network(ours=name == "sepconv_ext").to(options.device)
        if name == "torch":
            start = {key: value.clone() for key, value in model.state_dict().items()}
        else:
            model.load_state_dict(start)  # also shows that the state_dicts are interchangeable
        curve, seconds = train(model, x, y, options.epochs)
        results[name] = curve, accuracy(model, x_held, y_held)
        print(
            f"{name:<12} {seconds:6.2f} s for {len(curve)} steps, loss {curve[0]:.3f} -> {curve[-1]:.4f}, "
            f"{100 * results[name][1]:.2f}% of {len(y_held)} held-out digits"
        )

    (theirs, their_accuracy), (ours, our_accuracy) = results.values()
    agree = curves_agree(ours, theirs, options.epochs)
    both_learned = min(their_accuracy, our_accuracy) >= LEAST_ACCURACY
    print(f"at least {100 * LEAST_ACCURACY:.0f}% on held-out digits: {'both' if both_learned else 'NOT BOTH'}")
    return 0 if agree and both_learned else 1


if __name__ == "__main__":
    sys.exit(main())

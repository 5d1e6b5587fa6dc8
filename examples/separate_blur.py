"""Takes the blur of a photograph apart: which filters are a column times a row, and what the first few pairs miss.

    python examples/separate_blur.py [picture.png]

A Gaussian blur is one column and one row. The disc of a lens out of focus and the streak of a moving camera are not:
they are sums of pairs, found by SVD. The picture shows what one pair makes of each, and how the error falls with every
further pair: that of the filter, which the singular values foretell, and that of the photograph. Needs matplotlib and
scikit-image (its photograph of an astronaut).
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib
import torch
from skimage import data
from torch import Tensor

from sepconv_ext.factorize import separate
from sepconv_ext.functional import depthwise_conv2d, spatial_separable_conv2d

SIZE = 21  # of the filters


def blurs() -> dict[str, Tensor]:
    """Filters [SIZE, SIZE] with a sum of 1."""
    at = torch.arange(SIZE, dtype=torch.float32) - SIZE // 2
    down, along = at[:, None], at[None, :]
    made = {
        "Gaussian": torch.exp(-(down**2 + along**2) / (2 * 4.0**2)),
        "out of focus": ((down**2 + along**2).sqrt() - 9.5).neg().clamp(0, 1),
        "moving camera": torch.exp(-((down - 0.5 * along) ** 2)) * (along.abs() <= 9),
    }
    return {name: kernel / kernel.sum() for name, kernel in made.items()}


@dataclass
class Result:
    """A filter, the image that it makes, and what the sums of pairs miss of both, in the order of their rank."""

    kernel: Tensor
    blurred: Tensor
    one_pair: Tensor
    filter_errors: list[float] = field(default_factory=list)  # Frobenius norm, relative
    image_errors: list[float] = field(default_factory=list)  # root mean square, relative to the contrast


def take_apart(photo: Tensor, kernel: Tensor, ranks: int) -> Result:
    """photo [C, H, W]; only whole windows are filtered, so that no border shows."""
    weight = kernel.expand(photo.shape[0], 1, *kernel.shape).contiguous()
    blurred = depthwise_conv2d(photo, weight)
    column, row, _, errors = separate(kernel, ranks)
    pairs = [spatial_separable_conv2d(photo, column[i], row[i]) for i in range(ranks)]
    sums = torch.stack(pairs).cumsum(0)
    missed = (sums - blurred).square().mean((1, 2, 3)) / blurred.var()
    return Result(kernel, blurred, sums[0], errors[:ranks].tolist(), missed.sqrt().tolist())


def show(photo: Tensor, results: dict[str, Result], path: Path) -> None:
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(11, 7.5), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(1.5, 1))
    axes = top.subplots(2, len(results) + 1)
    axes[0, 0].imshow(photo.permute(1, 2, 0).numpy())
    axes[0, 0].set_title("photograph")
    axes[1, 0].axis("off")
    for i, (name, result) in enumerate(results.items(), start=1):
        for row, image, title in ((0, result.blurred, name), (1, result.one_pair, "one column, one row")):
            axes[row, i].imshow(image.permute(1, 2, 0).clamp(0, 1).numpy())
            axes[row, i].set_title(title)
        inset = axes[0, i].inset_axes((0.68, 0.0, 0.32, 0.32))
        inset.imshow(result.kernel.numpy(), cmap="gray")
        inset.set(xticks=[], yticks=[])
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[])
    panels = bottom.subplots(1, 2, sharey=True)
    for ax, errors in zip(panels, ("filter_errors", "image_errors"), strict=True):
        for name, result in results.items():
            values = [max(e, 1e-8) for e in getattr(result, errors)]
            ax.semilogy(range(1, len(values) + 1), values, marker="o", label=name)
        ax.set(xlabel="rank: pairs of a column and a row", title=f"relative error of the {errors.split('_')[0]}")
        ax.grid(alpha=0.3)
    panels[0].legend()
    figure.savefig(path, dpi=110)


def main(path: Path, ranks: int = 8) -> dict[str, Result]:
    photo = torch.from_numpy(data.astronaut()).permute(2, 0, 1).float()[:, :256, 90:346].contiguous() / 255
    results = {name: take_apart(photo, kernel, ranks) for name, kernel in blurs().items()}
    for name, result in results.items():
        enough = next((r for r, e in enumerate(result.image_errors, start=1) if e < 0.01), None)
        products = f"{enough} pair(s), {enough * 2 * SIZE} products a pixel" if enough else f"more than {ranks} pairs"
        print(f"{name:14} within 1% with {products} (dense: {SIZE * SIZE})")
    show(photo, results, path)
    print(f"wrote {path}")
    return results


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path("separate_blur.png"))

"""Writes layers.csv: ``python -m benchmarks.trace`` runs the networks below on tensors without data.

Rows of the first 17 networks, one for each network and shape, are kept: the plan was fitted to them. Of the others each
shape that is new has one row, with the networks that have it. A draw by seed marks half of those rows as held out.
"""

from __future__ import annotations

import csv
import random
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import nn

from . import layers, models

SEED = 14
TORCHVISION = """
    efficientnet_b3 efficientnet_v2_s mobilenet_v3_small mnasnet0_5 shufflenet_v2_x0_5 shufflenet_v2_x2_0
    regnet_x_800mf regnet_y_1_6gf regnet_y_3_2gf resnext101_32x8d resnet50 densenet121 googlenet squeezenet1_1
    convnext_small swin_t
""".split()
TIMM = """
    mobilenetv2_050 mobilenetv2_140 mobilenetv3_small_075 mobilenetv4_conv_small mobilenetv4_conv_medium
    mobilenetv4_hybrid_medium efficientnet_lite0 tf_efficientnetv2_b0 tinynet_e fbnetc_100 fbnetv3_b spnasnet_100
    hardcorenas_a mobileone_s1 repghostnet_100 ghostnetv2_100 mixnet_m mnasnet_small lcnet_100 semnasnet_100
    xception41 xception65 rexnet_150 regnetx_002 regnety_032 regnetz_b16 resnext26ts seresnext26t_32x4d
    gernet_s gcresnext26ts repvit_m1 edgenext_small mobilevit_s mobilevitv2_100 efficientformerv2_s1 fastvit_t8
    poolformer_s12 convnext_atto convnextv2_nano inception_next_tiny starnet_s2 ese_vovnet19b_dw hgnetv2_b1
    efficientvit_b1 caformer_s18 nfnet_f0 dla60x res2next50 skresnext50_32x4d cs3darknet_m
""".split()


def networks() -> Iterator[tuple[str, nn.Module, int]]:
    """Names, modules on the meta device, and the image size that each is used with."""
    import timm
    import torchvision

    for name in TORCHVISION:
        more = {"init_weights": False, "aux_logits": False} if name == "googlenet" else {}
        get = partial(torchvision.models.get_model, name, weights=None, **more)
        yield name, _without_data(get), models.image_size(name)
    for name in TIMM:
        model = _without_data(partial(timm.create_model, name, pretrained=False))
        yield name, model, model.pretrained_cfg["input_size"][-1]


def _without_data(build: Callable[[], nn.Module]) -> nn.Module:
    try:
        with torch.device("meta"):
            return build()
    except (NotImplementedError, RuntimeError):  # it computes its sizes by tensors
        return build().to("meta")


def shapes(model: nn.Module, size: int) -> Counter[tuple]:
    """How often each depthwise, pointwise or grouped convolution occurs, by the columns of layers.csv."""
    found: Counter[tuple] = Counter()

    def seen(conv: nn.Conv2d, inputs: tuple) -> None:
        kind = "depthwise" if conv.groups == conv.in_channels > 1 else "grouped" if conv.groups > 1 else "pointwise"
        usual = conv.padding_mode == "zeros" and not isinstance(conv.padding, str)
        if usual and (kind != "pointwise" or conv.kernel_size == (1, 1)):
            place = (*conv.kernel_size, *conv.stride, *conv.padding, *conv.dilation)
            sizes = (conv.in_channels, conv.out_channels, *map(int, inputs[0].shape[2:]))
            found[(kind, *sizes, *place, conv.groups, int(conv.bias is not None))] += 1

    handles = [m.register_forward_pre_hook(seen) for m in model.modules() if isinstance(m, nn.Conv2d)]
    with torch.no_grad():
        model.eval()(torch.empty(1, 3, size, size, device="meta"))
    for handle in handles:
        handle.remove()
    return found


def main() -> None:
    with open(layers.CSV, newline="") as file:
        rows = [row for row in csv.DictReader(file) if row.get("half", "bars") == "bars"]
    columns = [name for name in rows[0] if name not in ("model", "count", "half")]
    known = {tuple(row[name] for name in columns) for row in rows}
    found: dict[tuple, tuple[list[str], int]] = {}
    for name, model, size in networks():
        try:
            traced = shapes(model, size)
        except (RuntimeError, NotImplementedError) as error:
            print(f"{name}: {error}")
            continue
        for shape, count in traced.items():
            shape = tuple(map(str, shape))
            if shape not in known:
                names, total = found.get(shape, ([], 0))
                found[shape] = ([*names, name], total + count)
    held_out = set(random.Random(SEED).sample(sorted(found), len(found) // 2))
    with open(layers.CSV, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["model", *columns, "count", "half"])
        for row in rows:
            writer.writerow([row["model"], *(row[name] for name in columns), row["count"], "bars"])
        for shape, (names, count) in found.items():
            half = "held-out" if shape in held_out else "learnt"
            writer.writerow([" ".join(names), *shape, count, half])


if __name__ == "__main__":
    main()

"""The packed products as torch's own machinery sees them: shapes and strides without data, and operation counts.

``torch.ops.sepconv_ext.pack_pointwise`` and ``.packed_pointwise`` are for CPU, float32, inference
(csrc/ops/packed.h says what they compute). Frozen networks pack by the first; their programs (program.py) hold the
second as a step, and linear layers over tokens are calls of it. The schemas and the kernels are registered by ``_C``.
"""

from __future__ import annotations

import torch
from torch._prims_common import suggest_memory_format
from torch.utils.flop_counter import conv_flop_count, register_flop_formula

from . import _C  # noqa: F401  (registers the schemas)

PANEL_COLUMNS = 16  # output channels of a panel: kPanelColumns of csrc/cpu/pointwise/product.h


@torch.library.register_fake("sepconv_ext::pack_pointwise")
def _(weight):
    panels = (weight.shape[0] + PANEL_COLUMNS - 1) // PANEL_COLUMNS
    return weight.new_empty(panels, weight.shape[1], PANEL_COLUMNS)


@torch.library.register_fake("sepconv_ext::packed_pointwise")
def _(input, packed, bias, residual, out_channels, stride, activation):
    rows, columns = ((input.shape[2 + i] - 1) // stride[i] + 1 for i in (0, 1))
    return torch.empty(
        (input.shape[0], out_channels, rows, columns),
        dtype=input.dtype,
        device=input.device,
        memory_format=suggest_memory_format(input),
    )


@register_flop_formula(torch.ops.sepconv_ext.packed_pointwise)
def _(input, packed, *_, out_shape=None, **__) -> int:
    return conv_flop_count(input, [out_shape[1], input[1], 1, 1], out_shape)

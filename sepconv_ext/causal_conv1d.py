"""The functions of the package causal-conv1d (Dao-AILab) by their names, arguments and meaning.

A program that imports those works with ``from sepconv_ext.causal_conv1d import causal_conv1d_fn``, on a CPU too, and
after ``sepconv_ext.causal_conv1d.register()`` unchanged. What that package forbids is allowed here: any width, any
memory order, states together with seq_idx, and every activation of this package. `sepconv_ext.functional` has the same
functions with more arguments.
"""

from __future__ import annotations

import sys
import warnings

import torch
from torch import Tensor

from . import _C, functional
from .argument_types import naming_wrong_types

__all__ = ["causal_conv1d_fn", "causal_conv1d_update", "causal_conv1d_varlen_states", "register"]

# Where the package causal-conv1d 1.6 has these functions.
_MODULES = ("causal_conv1d", "causal_conv1d.causal_conv1d_interface", "causal_conv1d.causal_conv1d_varlen")


def register() -> None:
    """From here on, whatever imports the package causal-conv1d in this process is given this module.

    transformers' models ask for that package when their own module is imported, so this comes first. Calling it again
    changes nothing. Where that package is installed, this module takes its place.

    Warns:
        RuntimeWarning: modules that were imported before keep the functions that they have; it names them.
    """
    this = sys.modules[__name__]
    if sys.modules.get(_MODULES[0]) is this:
        return
    given = [
        name for name, module in list(sys.modules.items()) if "causal_conv1d_fn" in getattr(module, "__dict__", {})
    ]
    if others := [name for name in given if name != __name__ and name not in _MODULES]:
        message = f"register() comes too late for {', '.join(others)}, which keep the functions that they imported"
        warnings.warn(message, RuntimeWarning, stacklevel=2)
    sys.modules.update(dict.fromkeys(_MODULES, this))


def _alike(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Weight and bias in a type that holds their numbers and x's."""
    if weight.dtype == x.dtype:
        return weight, bias
    wide = torch.promote_types(x.dtype, weight.dtype)
    return weight.to(wide), bias.to(wide) if bias is not None and bias.dtype == weight.dtype else bias


def _activation(name: str | None) -> str | None:
    if name is None or name in _C.activations():
        return name
    if name != "swish":
        raise NotImplementedError(f"activation must be None, silu, swish or another of sepconv_ext's, but is {name!r}")
    return "silu"


@naming_wrong_types
def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`sepconv_ext.functional.causal_conv1d`, with causal-conv1d's order of arguments.

    Args:
        x: ``[N, C, L]``.
        weight: ``[C, S]``. Where its dtype is not x's, the convolution is made in one that holds both.
        bias: ``[C]`` or None, in the weight's dtype.
        seq_idx: ``[N, L]`` of whole numbers, or None.
        initial_states: ``[N, C, S - 1]`` in x's dtype, or None.
        return_final_states: return the last S - 1 inputs, too.
        final_states_out: ``[N, C, S - 1]``, which the final states are written to, or None.
        activation: None, ``silu``, ``swish``, or another name of this package's.

    Returns:
        ``[N, C, L]`` in x's dtype; with `return_final_states` also ``[N, C, S - 1]``.

    Raises:
        NotImplementedError: an unknown activation.
        RuntimeError: sizes that do not fit.
    """
    dtype, name, states = x.dtype, _activation(activation), initial_states
    weight, bias = _alike(x, weight, bias)
    if weight.dtype != dtype:
        x, states = x.to(weight.dtype), None if states is None else states.to(weight.dtype)
    result = functional.causal_conv1d(x, weight, bias, name, states, return_final_states, seq_idx)
    if not isinstance(result, tuple):
        return result.to(dtype)
    output, final_states = result[0].to(dtype), result[1].to(dtype)
    if final_states_out is not None:
        final_states = final_states_out.copy_(final_states)
    return output, final_states


@naming_wrong_types
def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: Tensor | None = None,
    conv_state_indices: Tensor | None = None,
) -> Tensor:
    """`sepconv_ext.functional.causal_conv1d_update`, with causal-conv1d's names.

    Args:
        x: ``[N, C]`` or ``[N, C, T]``.
        conv_state: ``[N, C, length]``, with length at least S - 1; it is changed in place.
        weight: ``[C, S]``.
        bias: ``[C]`` or None, in the weight's dtype.
        activation: as for `causal_conv1d_fn`.
        cache_seqlens: ``[N]`` of whole numbers, or None: the state is a ring.
        conv_state_indices: ``[N]`` of whole numbers, or None: rows of conv_state; negative ones are skipped.

    Returns:
        ``[N, C]`` or ``[N, C, T]``.

    Raises:
        NotImplementedError: an unknown activation.
        RuntimeError: sizes that do not fit.
    """
    name = _activation(activation)
    weight, bias = _alike(x, weight, bias)
    return functional.causal_conv1d_update(x, conv_state, weight, bias, name, cache_seqlens, conv_state_indices)


@naming_wrong_types
def causal_conv1d_varlen_states(x: Tensor, cu_seqlens: Tensor, state_len: int) -> Tensor:
    """The states with which decoding goes on, of sequences that lie one behind the other.

    Args:
        x: ``[tokens, C]``.
        cu_seqlens: ``[N + 1]`` of whole numbers, where each sequence begins and the last one ends: sums, from 0.
        state_len: how many positions a state has. Where a sequence is shorter, zeros stand before it.

    Returns:
        ``[N, C, state_len]``, with its channels next to each other.

    Raises:
        RuntimeError: sizes and dtypes that do not fit.
    """
    size, ends = list(x.shape), list(cu_seqlens.shape)
    torch._check(x.dim() == 2, lambda: f"x must be [tokens, C], but has size {size}")
    torch._check(len(ends) == 1 and ends[0] >= 1, lambda: f"cu_seqlens must be [N + 1], but has size {ends}")
    whole = not (cu_seqlens.is_floating_point() or cu_seqlens.is_complex() or cu_seqlens.dtype == torch.bool)
    torch._check(whole, lambda: f"cu_seqlens must be of whole numbers, but is {cu_seqlens.dtype}")
    torch._check(state_len >= 0, lambda: f"state_len must be at least 0, but is {state_len}")
    places = cu_seqlens[1:, None] + torch.arange(-state_len, 0, device=x.device)
    seen = places >= cu_seqlens[:-1, None]
    if x.shape[0] == 0:
        return x.new_zeros(*places.shape, x.shape[1]).transpose(1, 2)
    return x[places.clamp(min=0)].masked_fill(~seen.unsqueeze(2), 0).transpose(1, 2)

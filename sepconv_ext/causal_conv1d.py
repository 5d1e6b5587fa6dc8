"""The functions of the package causal-conv1d (Dao-AILab) by their names, arguments and meaning.

A program that imports those works with ``from sepconv_ext.causal_conv1d import causal_conv1d_fn``, on a CPU too. What
that package forbids is allowed here: any width, any memory order, states together with seq_idx, and every activation of
this package. `sepconv_ext.functional` has the same functions with more arguments.
"""

from __future__ import annotations

from torch import Tensor

from . import _C, functional
from .argument_types import naming_wrong_types

__all__ = ["causal_conv1d_fn", "causal_conv1d_update"]


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
        weight: ``[C, S]``. Where its dtype is not x's, the convolution is made in the weight's.
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
    dtype, name = x.dtype, _activation(activation)
    if weight.dtype != dtype:
        x, states = x.to(weight.dtype), None if initial_states is None else initial_states.to(weight.dtype)
    else:
        states = initial_states
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
        weight: ``[C, S]``, in x's dtype or float32.
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
    return functional.causal_conv1d_update(x, conv_state, weight, bias, name, cache_seqlens, conv_state_indices)

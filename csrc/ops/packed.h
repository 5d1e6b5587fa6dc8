// Pointwise convolution of float32 on the CPU with a weight that was packed once: frozen networks pack
// by these, and run the product as a step of their programs (cpu/network), or of tokens as the op. Not differentiable.
// The ops' schemas stand in cpu/packed_bindings.cpp; these functions pass the dispatcher by.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "core/epilogue.h"
#include "ops/checks.h"

namespace sepconv::packed {

// What checks.cpp says of the arguments: float32 alone. The weight's strides are not set; the output's are chosen
// there, or those of `output`.
void check_weight(const at::Tensor& weight);
Checked check_pointwise(const at::Tensor& input, const at::Tensor& packed, const std::optional<at::Tensor>& bias,
                        const std::optional<at::Tensor>& residual, int64_t out_channels, at::IntArrayRef stride,
                        const at::Tensor* output = nullptr);
// The op on another device: raises.
at::Tensor refuse_pointwise(const at::Tensor& input, const at::Tensor& packed, const std::optional<at::Tensor>& bias,
                            const std::optional<at::Tensor>& residual, int64_t out_channels, at::IntArrayRef stride,
                            std::string_view activation);

// A weight [K, C, 1, 1] as panels [ceil(K / 16), C, 16] of a plain tensor, zero beyond K; the same for every
// instruction set.
at::Tensor pack_pointwise(const at::Tensor& weight);

// activation(pointwise(input, weight) + bias + residual), with the weight of pack_pointwise() and its K as
// `out_channels`. The result is channels_last where the input is, else contiguous.
at::Tensor pointwise(const at::Tensor& input, const at::Tensor& packed, const std::optional<at::Tensor>& bias,
                     const std::optional<at::Tensor>& residual, int64_t out_channels, at::IntArrayRef stride,
                     Activation);

// The same into a tensor of the right size. Its strides are the caller's: dense planes of any distance, or dense
// channels whose pixels are at one distance (a slice of the channels of a channels_last tensor, for instance).
void pointwise_into(const at::Tensor& output, const at::Tensor& input, const at::Tensor& packed,
                    const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& residual,
                    int64_t out_channels, at::IntArrayRef stride, Activation);

}  // namespace sepconv::packed

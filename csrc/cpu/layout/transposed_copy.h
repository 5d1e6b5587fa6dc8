// Copies of images from channels_last memory to planes, and from planes to channels_last.
#pragma once

#include "core/conv_shape.h"
#include "core/operand_layout.h"

namespace sepconv::cpu {

// Channels are dense in one of the two and pixels of a row in the other, and neither repeats; else the copy is none of
// ours.
bool is_transposed_copy(const ImageShape& from, const Strides& to);

// Writes the image to memory of the strides `to`, for what is_transposed_copy() names. No two elements of the target
// share memory; those of the source may.
void transposed_copy(const ImageShape& from, DType, const void* source, const Strides& to, void* target);

}  // namespace sepconv::cpu

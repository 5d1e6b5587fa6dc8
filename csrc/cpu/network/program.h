// A network as a program of steps over dense NHWC images of float32: raw memory in, raw memory out.
//
// The text of a program is what is kept, copied and saved; everything here is made from it. One line a step:
//
//   %0 = input image                                                   image [N, C, H, W] or matrix [N, C]
//   %1 = conv %0 weight=0 bias=864 K=32 kernel=3x3 stride=2x2 padding=1x1x1x1 act=relu6
//   %2 = depthwise %1 weight=896 bias=1184 kernel=3x3 stride=1x1 padding=1x1x1x1 act=relu6
//   %3 = product %2 weight=1216 bias=1728 K=16 residual=%1
//   return %3 image
//
// `weight` and the like are offsets into one array of constants, in floats. steps.cpp has the table of steps, parse.cpp
// the text, plan.cpp the places of values in one arena, network.cpp the batch. Images are independent of each other.
//
// Some channels of an image are no copy of it, and a concatenation of images is written by those that make its parts,
// wherever the steps take images whose pixels lie apart: views.cpp.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "core/conv_shape.h"
#include "core/epilogue.h"

namespace sepconv::cpu::network {

// [N, H, W, C]; a matrix [N, C] is images of one pixel.
struct Size {
  int64_t N = 0, H = 1, W = 1, C = 0;
  int64_t pixels() const { return H * W; }
  int64_t per_image() const { return H * W * C; }
  int64_t elements() const { return N * per_image(); }
  bool operator==(const Size&) const = default;
};

// Strides of an image in elements whose pixels are `pixel` apart, and otherwise follow without gaps: those of a dense
// one, or of some channels of a wider one.
Strides strides_of(const Size&, int64_t pixel);
inline Strides dense(const Size& size) { return strides_of(size, size.C); }

inline constexpr int64_t kAbsent = -1;
inline constexpr int kMostReads = 8;

struct Kind;
struct Step;

// The steps of an inverted residual block, in their order (cpu/separable/inverted_residual.h): those that are absent
// are null.
struct Block {
  std::shared_ptr<const Step> expand, depthwise, squeeze, excite, project;
  bool hard_gate = false;
};

// The steps of two products after each other (cpu/pointwise/perceptron.h); the LayerNorm before them, or null.
struct Perceptron {
  std::shared_ptr<const Step> norm, hidden, project;
};

// One line. Which of the fields mean something, its kind says.
struct Step {
  const Kind* kind = nullptr;
  std::vector<int> reads;  // values; the second of a product is its residual
  int writes = 0;
  int64_t weight = kAbsent, bias = kAbsent;  // offsets into the constants
  int64_t K = 0, R = 1, S = 1, groups = 1;
  int64_t stride_h = 1, stride_w = 1, dilation_h = 1, dilation_w = 1;
  int64_t top = 0, bottom = 0, left = 0, right = 0;
  int64_t begin = 0;  // the first channel of a slice
  int64_t ceil = 0;   // 1: a pool's last window may begin inside the image and end beyond its padding
  Activation activation = kNoActivation;
  float eps = 0, factor = 1, shift = 0, low = 0, high = 0;
  Block block;  // of a step that is one
  Perceptron perceptron;
};

// What a step is run with. A pitch is the distance from one pixel to the next: C, where the image is dense.
struct Call {
  const Step& step;
  const Size* in;        // of the values read
  const int64_t* pitch;  // the same
  Size out;
  int64_t out_pitch;
  ConvShape shape;  // the same for a convolution; x and y as they lie in memory
  const float* read[kMostReads] = {};
  float* write = nullptr;
  const float* constants = nullptr;
  const float* constant(int64_t offset) const { return offset == kAbsent ? nullptr : constants + offset; }
};

struct Kind {
  const char* name;
  int least_reads, most_reads;
  Size (*size)(const Step&, const Size* in);          // of what it writes; throws std::invalid_argument in words
  int64_t (*constants)(const Step&, const Size* in);  // where those end that it reads
  void (*run)(const Call&);
  unsigned in_place = 0;        // bit i: it may write where the i-th value lies, if that has the size of what it writes
  bool any_strides = false;     // the first value may be an input that is not dense
  unsigned pitched = 0;         // bit i: the i-th value may be some channels of a wider image, and
  bool writes_pitched = false;  // so may what it writes
};
const Kind& kind_of(std::string_view name);  // throws std::invalid_argument
const Kind& block_kind();                    // of a Block, which no text names
const Kind& perceptron_kind();               // of a Perceptron, the same

struct Port {
  int value;
  bool is_matrix;
};

struct Program {
  std::vector<Step> steps;
  std::vector<Port> inputs, outputs;
  int values = 0;
};
Program parse(std::string_view code);  // throws std::invalid_argument with the line

// The same steps, with inverted residual blocks and perceptrons in one step each. `returned`: by value.
std::vector<Step> fuse(std::vector<Step>, const std::vector<bool>& returned);

// Where a value lies: in the memory of `root` (its own number, where it has memory), from channel `offset` on.
struct View {
  int root;
  int64_t offset = 0, pitch = 0;
};
// By value. Takes away steps that are nothing but views, and adds copies where steps need dense values (with their
// sizes). `fixed`: the values whose memory is the caller's.
std::vector<View> make_views(std::vector<Step>&, std::vector<Size>& sizes, const std::vector<bool>& fixed);

// How an input lies in memory; images may be at any distance, which is no part of it.
struct InputSize {
  Size size;
  Strides strides;
  bool is_dense() const;
};

// Where a value is.
enum class Memory : int { input, output, arena };
struct Place {
  Memory memory = Memory::arena;
  int64_t at = 0;      // which input or output; or the offset in the arena, in floats
  int64_t offset = 0;  // in an input or output: of the first channel
};

struct PlannedStep {
  Step step;
  Size in[kMostReads], out;
  int64_t pitch[kMostReads] = {}, out_pitch = 0;
  ConvShape shape;
  Place read[kMostReads], write;
};

// A program for inputs of certain sizes, for some images at a time.
struct Plan {
  std::vector<PlannedStep> steps;
  std::vector<Size> outputs;
  int64_t arena = 0;  // floats
};
// Throws std::invalid_argument where the sizes do not fit, or `constants` floats are too few.
Plan make_plan(const Program&, const std::vector<InputSize>& inputs, int64_t constants);

}  // namespace sepconv::cpu::network

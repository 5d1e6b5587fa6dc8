// How separable.cu, separable_mma.cu and inverted_residual.cu cut their work.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/arithmetic.h"
#include "core/block_shape.h"

namespace sepconv::cuda {

// ---- separable.cu and separable_mma.cu: a chunk of filters stands in shared memory, 8 KB of it in float.
inline constexpr int64_t kSeparableTaps = 64;

struct SeparableCut {
  int columns = 1;  // output channels of a block

  template <typename Self, typename F>
  static void each(Self& cut, F&& field) {
    field("columns", cut.columns);
  }
};

// ---- inverted_residual.cu: channels of e that are in shared memory at a time, and their row there: its 144 bytes lie
// on other banks from pixel to pixel.
inline constexpr int kBlockChannels = 64, kBlockPitch = kBlockChannels + 8;
inline constexpr int64_t kBlockPixels = 0xFFFF;  // of a tile's halo, at most
inline constexpr int kBlockColumns = 2;          // neighbouring outputs of a thread's walk down the rows

struct BlockCut {
  int most_pixels = 1, most_outputs = 1;  // of a tile, that the kernel is compiled for
  int rows = 1, columns = 1;              // of a tile's outputs

  template <typename Self, typename F>
  static void each(Self& cut, F&& field) {
    field("most_pixels", cut.most_pixels);
    field("most_outputs", cut.most_outputs);
    field("rows", cut.rows);
    field("columns", cut.columns);
  }
};

// Where the parts of a tile lie in shared memory: x, e, d, and the weights of a chunk of channels. Numbers of bytes.
struct BlockTile {
  int64_t halo_h, halo_w;  // of e
  int64_t x_pixels;        // the most that lie inside of the image, whole sixteens
  int64_t x_pitch;         // elements of a row of x, and of w_e
  int64_t x, e, d, expand, project, filters, places, starts, sources, bytes;
};

inline BlockTile block_tile(const BlockShape& s, const BlockCut& cut) {
  const ConvShape& d = s.depthwise;
  BlockTile t{};
  t.halo_h = (cut.rows - 1) * d.stride_h + d.R;
  t.halo_w = (cut.columns - 1) * d.stride_w + d.S;
  t.x_pixels = ceil_div(std::min(t.halo_h, d.H) * std::min(t.halo_w, d.W), 16) * 16;
  t.x_pitch = s.expands ? ceil_div(s.C, 16) * 16 + 8 : 0;
  const auto place = [&](int64_t elements) {
    const int64_t at = t.bytes;
    t.bytes += ceil_div(elements * 2, 16) * 16;
    return at;
  };
  t.x = place(s.expands ? t.x_pixels * t.x_pitch : 0);
  t.e = place(t.halo_h * t.halo_w * kBlockPitch);
  t.d = place(ceil_div(cut.rows * cut.columns, 16) * 16 * kBlockPitch);
  t.expand = place(s.expands ? kBlockChannels * t.x_pitch + kBlockChannels : 0);  // and its bias
  t.project = place(ceil_div(s.K, 16) * 16 * kBlockPitch);
  t.filters = place(kBlockChannels * d.R * d.S + kBlockChannels);  // and their bias
  t.places = place(t.x_pixels);
  t.sources = place(t.x_pixels * 2);  // 32 bits each
  t.starts = place(ceil_div(cut.rows * cut.columns, 16) * 16);
  return t;
}

}  // namespace sepconv::cuda

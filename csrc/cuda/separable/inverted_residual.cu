// Expand (1x1) -> depthwise -> project (1x1) [+ input] in one kernel, on tensor cores, for float16 and bfloat16 in
// channels_last: neither e nor d touches memory (core/block_shape.h).
//
// Threads to data: a block of 256 threads has a tile of outputs of one image, all K of them, whose sums stay in
// registers: the eight warps lie kDown x kAcross on pixels x outputs. The pixels of x under the tile and its halo stay
// in shared memory. For each 64 channels of e:
//   expand     a warp takes 16 pixels x 32 channels at a time; what lies outside of the image stays zero
//   depthwise  a warp has eight channels; each two taps are a product with diagonals of weights, which cost the same as
//              dense ones and are many times faster than plain arithmetic on halves
//   project    sums += d * w_p
// Weights of the next stage but one are on their way meanwhile. Rows of w_p are permuted within 16 outputs, so that the
// sums of a thread are four neighbouring outputs of a pixel: one store.
//
// e is kept finite: what overflows its type becomes the largest number of it, as infinity times the zeros beside a
// diagonal would spoil other channels. Floor: x, y and the weights once; shared memory is busy for longer.
#include "cuda/separable/inverted_residual.cuh"

namespace sepconv::cuda {
namespace {

using namespace block;

// 25 diagonals beside 48 sums take more registers than two blocks have.
constexpr int blocks_a_multiprocessor(int side, int groups) { return side == 5 && groups > 5 ? 1 : 2; }

template <typename T, int kSide, int kStride, int kRows, int kDown, int kGroups>
__global__ void __launch_bounds__(kThreads, blocks_a_multiprocessor(kSide, kRows* kGroups))
    inverted_residual_kernel(const BlockArgs<T> a) {
  wait_for_earlier_kernels();
  constexpr int kAcross = kWarps / kDown;
  DYN_SMEM(smem);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  T* const x = reinterpret_cast<T*>(smem);
  T* const e = reinterpret_cast<T*>(smem + a.at_e);
  T* const d = reinterpret_cast<T*>(smem + a.at_d);
  T* const expand = reinterpret_cast<T*>(smem + a.at_expand);
  T* const project = reinterpret_cast<T*>(smem + a.at_project);
  T* const filters = reinterpret_cast<T*>(smem + a.at_filters);
  auto* const places = reinterpret_cast<uint16_t*>(smem + a.at_places);
  auto* const sources = reinterpret_cast<uint32_t*>(smem + a.at_sources);
  auto* const starts = reinterpret_cast<uint16_t*>(smem + a.at_starts);
  const Place place(a, kStride);
  const int pixels = place.pixels();
  const T* const image = a.x + place.n * a.x_n + place.first_h * a.x_h + place.first_w * a.x_w;
  const auto channels_of = [&](int first) { return min(a.E - first, kChannels); };
  const auto load_expand = [&](int first) {
    const int channels = channels_of(first), all = (channels + 15) / 16 * 16;
    copy_rows(expand, a.x_pitch, a.expand + static_cast<int64_t>(first) * a.C, a.C, channels, all, a.C, a.of_piece,
              [](int row) { return row; });
    const T* const bias = a.expand_bias == nullptr ? nullptr : a.expand_bias + first;
    copy_line(expand + kChannels * a.x_pitch, bias, channels, all, a.expand);
  };

  // Of e what is outside of the image is zero. Outputs that a tile's last sixteen have too many see its first pixel.
  if (pixels < a.halo_h * a.halo_w) {
    for (int i = a.at_e + thread * 16; i < a.at_d; i += kThreads * 16) *reinterpret_cast<uint4*>(smem + i) = {};
  }
  for (int i = thread; i < a.x_pixels; i += kThreads) {
    const int row = i / max(place.inner_w, 1), column = i - row * place.inner_w;
    const int h = place.first_h - place.h + row, w = place.first_w - place.w + column;
    places[i] = i < pixels ? static_cast<uint16_t>(spot<kStride>(a.halo_w, h, w)) : kNowhere;
    sources[i] = i < pixels ? static_cast<uint32_t>(row * a.x_h + column * a.x_w) : 0;
  }
  for (int i = thread; i < (a.rows * a.columns + 15) / 16 * 16; i += kThreads) {
    const int row = static_cast<int>(a.of_column.div(static_cast<uint32_t>(i))), column = i - row * a.columns;
    starts[i] = row < a.rows ? static_cast<uint16_t>(row * kStride * a.halo_w + column) : 0;
  }
  __syncthreads();
  if (a.expand != nullptr) {
    const int count = (pixels + 15) / 16 * 16 * static_cast<int>(a.of_piece.divisor);
    for (int i = thread; i < count; i += kThreads) {
      auto piece = static_cast<uint32_t>(i);
      const int pixel = static_cast<int>(a.of_piece.split(piece)), channel = static_cast<int>(piece) * kVec;
      const bool inside = pixel < pixels && channel < a.C;
      cp_async16(x + pixel * a.x_pitch + channel, inside ? image + sources[pixel] + channel : a.x, inside);
    }
    load_expand(0);
  }
  cp_async_commit();

  const int down = warp % kDown * kRows * 16, tile_pixels = a.rows * a.columns;
  const int all_groups = (a.K + 15) / 16, each = (all_groups + kAcross - 1) / kAcross;
  const int first_group = warp / kDown * each, groups = min(all_groups - first_group, each);
  float sums[kRows][kGroups][2][4] = {};
#pragma unroll 1
  for (int first = 0; first < a.E; first += kChannels) {
    const int channels = channels_of(first), all = (channels + 15) / 16 * 16;
    cp_async_wait<0>();
    __syncthreads();  // w_e is there, and d and w_p have no readers left
    const FastDiv& pieces = channels == kChannels ? a.of_chunk : a.of_rest;
    copy_rows(project, kPitch, a.project + first, a.E, a.K, all_groups * 16, channels, pieces,
              [](int row) { return row_of(row); });
    copy_line(filters, a.filters + static_cast<int64_t>(first) * (kSide * kSide), channels * kSide * kSide,
              all * kSide * kSide, a.filters);
    const T* const bias = a.depthwise_bias == nullptr ? nullptr : a.depthwise_bias + first;
    copy_line(filters + kChannels * kSide * kSide, bias, channels, all, a.filters);
    if (a.expand != nullptr) {
      cp_async_commit();
      expand_stage(a, smem, e, pixels, all);
    } else {
      copy_e(a, smem, e, image + first, pixels, channels, pieces);
      cp_async_commit();
    }
    cp_async_wait<0>();
    if (a.expand == nullptr) saturate_e(a, smem, e, pixels, pieces);
    __syncthreads();  // e, the filters and w_p are there, and w_e has no readers left
    if (a.expand != nullptr && first + kChannels < a.E) load_expand(first + kChannels);
    cp_async_commit();
    depthwise_stage<T, kSide, kStride>(a, smem, e, d, channels, all);
    __syncthreads();
    if (down >= tile_pixels) continue;
    const T* const left = d + (down + lane % 16) * kPitch + lane / 16 * kVec;
    const T* const right = project + (first_group * 16 + lane / 16 * 8 + lane % 8) * kPitch + lane / 8 % 2 * kVec;
    for (int k = 0; k < all; k += 16) {
      uint32_t pixel[kRows][4];
#pragma unroll
      for (int m = 0; m < kRows; ++m) {
        if (down + m * 16 < tile_pixels) ldmatrix_x4(pixel[m], left + m * 16 * kPitch + k);
      }
#pragma unroll
      for (int j = 0; j < kGroups; ++j) {
        if (j >= groups) break;
        uint32_t weight[4];
        ldmatrix_x4(weight, right + j * 16 * kPitch + k);
#pragma unroll
        for (int m = 0; m < kRows; ++m) {
          if (down + m * 16 >= tile_pixels) break;
          mma_m16n8k16<T>(sums[m][j][0], pixel[m], {weight[0], weight[1]});
          mma_m16n8k16<T>(sums[m][j][1], pixel[m], {weight[2], weight[3]});
        }
      }
    }
  }

  // A thread has outputs 4t .. 4t + 3 of each group, of pixels g and g + 8 of each m16.
  const int output = first_group * 16 + lane % 4 * 4;
  const auto each_store = [&](const auto& act) {
#pragma unroll
    for (int m = 0; m < kRows; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int pixel = down + m * 16 + half * 8 + lane / 4;
        const int row = static_cast<int>(a.of_column.div(static_cast<uint32_t>(pixel)));
        const int p = place.p + row, q = place.q + pixel - row * a.columns;
        if (row >= a.rows || p >= a.P || q >= a.Q) continue;
#pragma unroll
        for (int j = 0; j < kGroups; ++j) {
          if (j >= groups || output + j * 16 >= a.K) break;
          act(sums[m][j][0][half * 2], sums[m][j][0][half * 2 + 1], sums[m][j][1][half * 2],
              sums[m][j][1][half * 2 + 1], p, q, output + j * 16);
        }
      }
    }
  };
  if (a.project_bias != nullptr || a.residual) {
    each_store([&](float& v0, float& v1, float& v2, float& v3, int p, int q, int k) {
      float b[4] = {}, r[4] = {};
      if (a.project_bias != nullptr) load_vec<4>(b, a.project_bias + k);
      if (a.residual) {
        load_vec<4>(r, x + ((p - place.first_h) * place.inner_w + q - place.first_w) * a.x_pitch + k);
      }
      v0 += b[0] + r[0], v1 += b[1] + r[1], v2 += b[2] + r[2], v3 += b[3] + r[3];
    });
  }
  activate_all<T>(a.project_activation, reinterpret_cast<float (&)[kRows * kGroups * 8]>(sums));
  T* const result = a.y + place.n * a.y_n;
  each_store([&](float v0, float v1, float v2, float v3, int p, int q, int k) {
    const float values[4] = {v0, v1, v2, v3};
    store_vec<4>(result + p * a.y_h + q * a.y_w + k, values);
  });
}

template <typename T>
BlockArgs<T> make_args(const BlockShape& s, const BlockMemory& m, const BlockCut& cut) {
  const ConvShape& d = s.depthwise;
  const BlockTile t = block_tile(s, cut);
  const auto data = [](const void* p) { return static_cast<const T*>(p); };
  const auto number = [](int64_t i) { return static_cast<int>(i); };
  const int64_t across = ceil_div<int64_t>(d.Q, cut.columns);
  BlockArgs<T> a{};
  a.x = data(m.x), a.y = static_cast<T*>(m.y);
  a.expand = data(m.expand_weight), a.expand_bias = data(m.expand.bias);
  a.filters = data(m.depthwise_weight), a.depthwise_bias = data(m.depthwise.bias);
  a.project = data(m.project_weight), a.project_bias = data(m.project.bias);
  a.C = number(s.C), a.E = number(d.C), a.K = number(s.K);
  a.H = number(d.H), a.W = number(d.W), a.P = number(d.P), a.Q = number(d.Q);
  a.pad_h = number(d.pad_h), a.pad_w = number(d.pad_w);
  a.rows = cut.rows, a.columns = cut.columns;
  a.halo_h = number(t.halo_h), a.halo_w = number(t.halo_w);
  a.x_pitch = number(t.x_pitch), a.x_pixels = number(t.x_pixels);
  a.tiles_across = FastDiv(across), a.tiles = FastDiv(across * ceil_div<int64_t>(d.P, cut.rows));
  a.of_column = FastDiv(cut.columns);
  a.x_n = d.x.n, a.x_h = d.x.h, a.x_w = d.x.w, a.y_n = d.y.n, a.y_h = d.y.h, a.y_w = d.y.w;
  a.at_e = number(t.e), a.at_d = number(t.d), a.at_expand = number(t.expand), a.at_project = number(t.project);
  a.at_filters = number(t.filters), a.at_places = number(t.places), a.at_starts = number(t.starts);
  a.at_sources = number(t.sources);
  a.of_piece = FastDiv(ceil_div<int64_t>(s.C, 16) * 2);
  a.of_chunk = FastDiv(kBlockChannels / kVec);
  const int64_t rest = d.C % kBlockChannels;
  a.of_rest = FastDiv(rest == 0 ? kBlockChannels / kVec : ceil_div<int64_t>(rest, 16) * 2);
  a.expand_activation = m.expand.activation, a.depthwise_activation = m.depthwise.activation;
  // Others have no largest value.
  a.saturates = m.expand.activation != Activation::relu6 && m.expand.activation != Activation::sigmoid &&
                m.expand.activation != Activation::tanh;
  a.project_activation = m.project.activation, a.residual = s.residual;
  return a;
}

template <typename T, int kSide, int kStride>
cudaError_t start(const BlockShape& s, const BlockMemory& m, const BlockCut& cut, cudaStream_t stream) {
  const BlockArgs<T> a = make_args<T>(s, m, cut);
  const LaunchConfig config{dim3(static_cast<unsigned>(s.depthwise.N * a.tiles.divisor)), dim3(kThreads),
                            static_cast<size_t>(block_tile(s, cut).bytes), stream};
  if (cut.most_pixels == 128 && cut.most_outputs == 32) {
    return launch(inverted_residual_kernel<T, kSide, kStride, 1, 8, 2>, config, a);
  }
  if (cut.most_pixels == 128 && cut.most_outputs == 96) {
    return launch(inverted_residual_kernel<T, kSide, kStride, 2, 4, 3>, config, a);
  }
  if (cut.most_pixels == 64 && cut.most_outputs == 64) {
    return launch(inverted_residual_kernel<T, kSide, kStride, 1, 4, 2>, config, a);
  }
  if (cut.most_pixels == 64 && cut.most_outputs == 160) {
    return launch(inverted_residual_kernel<T, kSide, kStride, 1, 4, 5>, config, a);
  }
  return cudaErrorInvalidValue;
}

}  // namespace

cudaError_t launch_inverted_residual(const BlockShape& s, DType dtype, const BlockMemory& memory, const BlockCut& cut,
                                     cudaStream_t stream) {
  return dispatch_half(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const ConvShape& d = s.depthwise;
    if (d.R == 3) {
      return d.stride_h == 1 ? start<T, 3, 1>(s, memory, cut, stream) : start<T, 3, 2>(s, memory, cut, stream);
    }
    return d.stride_h == 1 ? start<T, 5, 1>(s, memory, cut, stream) : start<T, 5, 2>(s, memory, cut, stream);
  });
}

}  // namespace sepconv::cuda

// Depthwise forward and grad_input (forward with the filter turned around) of stride 1 in half types, kernels 3x3, 5x5
// and 7x7, of contiguous images (NCHW) whose rows are whole 4- or 8-byte pieces, on tensor cores.
//
// The products are those of depthwise_toeplitz.cu: for a kernel row r, 8 neighbouring outputs of a row are a window of
// 16 columns times T[j, i] = w[r, j - i - lead], one mma for 16 output rows. What is saved here:
//   - The windows begin `left` columns before the outputs, a multiple of a piece, so that asynchronous copies put the
//     image's rows straight into place; the padding stays what it is zeroed to at the beginning.
//   - All of T is in registers: the kernel is small.
//   - The 16 output rows of an mma lie kPhases rows apart. Kernel row r of phase f then reads the same 16 rows of the
//   image
//     as row r + 1 of phase f - 1, so that R + 3 loads from shared memory serve four mma tiles, where each took R. For
//     ldmatrix to find such rows on different banks, row h of the image stands in section h % kPhases at place h /
//     kPhases.
//
// Thread-to-data map. A block of four warps owns a channel and a part of the places; a place is a strip of `rows`
// output rows, or whole planes in `images` images. Each place is copied while the one before is computed, into the
// other of two tiles. A group is kPhases output rows; a warp takes 16 groups and 16 columns at a time, which are 4 x 2
// mma tiles. The results wait in shared memory as they lie in memory, and leave by stores of whole vectors.
//
// A window reaches up to 7 columns beyond a tap's own: an infinite x there meets a zero of T and makes a NaN. So
// results that are NaN are computed again, tap by tap.
#include "cuda/depthwise/depthwise_single_output.cuh"
#include "cuda/depthwise/nchw/depthwise_nchw_mma.cuh"

#include <cstring>

namespace sepconv::cuda {
namespace {

constexpr int kThreads = kNchwMmaThreads, kPhases = kNchwMmaPhases;

// x is grad_y and y is grad_x in grad_input. Results stand in shared memory in whole groups, group_pitch elements
// apart.
struct NchwMmaArgs {
  MmaPlaces places;
  MmaImage x;
  SingleOutput single;    // the filter, too
  int64_t y_n, y_c, w_n;  // strides, in elements
  int P, Q;
  int parts, vec, group_pitch;  // parts of a channel's places; elements of a store
  FastDiv by_channels, by_multiplier, by_vectors, by_group_vectors;
};

template <typename T>
using Pair = std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>;

// Two neighbouring numbers as a word: the compiler splits the store of a Vec here.
template <typename T>
__device__ __forceinline__ uint32_t two(float low, float high) {
  const Pair<T> pair = {from_acc<T>(low), from_acc<T>(high)};
  uint32_t word;
  memcpy(&word, &pair, sizeof word);
  return word;
}

// NaN where one of the two numbers of any word so far was infinite or NaN.
template <typename T>
__device__ __forceinline__ void look_at(Pair<T>& seen, uint32_t word) {
  const T zero = from_acc<T>(0.f);
  seen = __hfma2(*reinterpret_cast<const Pair<T>*>(&word), Pair<T>{zero, zero}, seen);
}

// The results of a place, kVec at a time. Returns true where one of the thread's is not finite.
template <int kVec, typename T>
__device__ __forceinline__ bool write_results(const NchwMmaArgs& a, const T* results, T* __restrict__ y,
                                              const MmaPlace& place) {
  using Words = std::conditional_t<kVec == 8, uint4, std::conditional_t<kVec == 4, uint2, uint32_t>>;
  const uint32_t vectors = a.by_vectors.divisor, image_stride = static_cast<uint32_t>(a.y_n) / kVec;
  const uint32_t padded = a.places.by_groups.divisor * a.group_pitch / kVec;  // of an image in shared memory
  const uint32_t gap = a.group_pitch / kVec - a.by_group_vectors.divisor;
  const uint32_t count = min(a.places.rows, a.P - place.first_row) * a.Q / kVec;
  const uint32_t all = place.images * vectors;
  Words* const to = reinterpret_cast<Words*>(y + place.first_image * a.y_n + place.first_row * a.Q);
  const T zero = from_acc<T>(0.f);
  Pair<T> seen = {zero, zero};
  for (uint32_t i = threadIdx.x; i < all; i += kThreads) {
    const uint32_t image = a.by_vectors.div(i), j = i - image * vectors;
    if (j >= count) continue;
    const Words words = reinterpret_cast<const Words*>(results)[image * padded + j + a.by_group_vectors.div(j) * gap];
    to[image * image_stride + j] = words;
    if constexpr (kVec == 2) {
      look_at<T>(seen, words);
    } else {
      look_at<T>(seen, words.x), look_at<T>(seen, words.y);
      if constexpr (kVec == 8) look_at<T>(seen, words.z), look_at<T>(seen, words.w);
    }
  }
  const float low = to_acc(seen.x), high = to_acc(seen.y);
  return low != low || high != high;
}

// Blocks a multiprocessor that the registers are cut for: one fewer where nvcc 13.0 would have to keep some in memory.
constexpr int forward_blocks(int kernel) {
  return kernel == 7 ? (kArch == 0 || kArch >= 900 ? 5 : 4) : (kArch < 1000 ? 6 : 5);
}

template <typename T, int kKernel>
__global__ void __launch_bounds__(kThreads, forward_blocks(kKernel))
    forward_kernel(const NchwMmaArgs a, const T* __restrict__ x, const T* __restrict__ w, const T* __restrict__ bias,
                   const Activation activation, T* __restrict__ y) {
  wait_for_earlier_kernels();
  DYN_SMEM(smem);
  T* const tiles = reinterpret_cast<T*>(smem);    // [2, kPhases, slots, pitch]
  T* const results = tiles + 2 * a.x.elements();  // [groups, group_pitch]
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  uint32_t channel = blockIdx.x;
  int i = static_cast<int>(a.by_channels.split(channel));
  const int k = static_cast<int>(channel);
  const T *const x_channel = x + a.by_multiplier.div(k) * a.x.c, *const filter = w + k * a.w_n;
  T* const y_channel = y + k * a.y_c;

  // T's fragments: column lane / 4, rows 2 (lane % 4), the next, and those 8 further.
  uint32_t right[kKernel][2];
#pragma unroll
  for (int r = 0; r < kKernel; ++r) {
    const T* const row = filter + (a.single.turned ? kKernel - 1 - r : r) * a.single.w_h;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      Vec<T, 2> pair;
#pragma unroll
      for (int v = 0; v < 2; ++v) {
        const int s = 8 * half + lane % 4 * 2 + v - lane / 4 - (a.x.left - a.single.pad_w);
        pair.v[v] = static_cast<unsigned>(s) < static_cast<unsigned>(kKernel)
                        ? row[(a.single.turned ? kKernel - 1 - s : s) * a.single.w_w]
                        : from_acc<T>(0.f);
      }
      right[r][half] = *reinterpret_cast<const uint32_t*>(&pair);
    }
  }
  const float add = bias != nullptr ? to_acc(bias[k]) : 0.f;
  clear_tiles(tiles, 2 * a.x.elements());

  T *tile = tiles, *next_tile = tiles + a.x.elements();
  if (i < a.places.count) begin_copies(a.x, tile, x_channel, MmaPlace(a.places, i));
  cp_async_commit();
  for (; i < a.places.count; i += a.parts) {
    const MmaPlace place(a.places, i);
    cp_async_wait<0>();
    __syncthreads();  // the tile is there, and the results and the other tile have no readers left
    if (i + a.parts < a.places.count) begin_copies(a.x, next_tile, x_channel, MmaPlace(a.places, i + a.parts));
    cp_async_commit();

    for (int item = warp; item < a.places.tiles; item += kThreads / 32) {
      const MmaWarpTile own(a.places, item, lane % 16);
      const int gaps = static_cast<int>(a.places.by_groups.div(own.own)) * a.x.between;
      const T* const row = tile + own.own * a.x.pitch + gaps + own.column + lane / 16 * 8;
      float sums[kPhases][2][4];
#pragma unroll
      for (int v = 0; v < kPhases * 8; ++v) sums[v / 8][v / 4 % 2][v % 4] = add;
#pragma unroll
      for (int down = 0; down < kKernel + kPhases - 1; ++down) {  // from the first row of each group
        uint32_t left[2][4];
#pragma unroll
        for (int t = 0; t < 2; ++t) {
          ldmatrix_x4(left[t], row + down % kPhases * a.x.section + down / kPhases * a.x.pitch + 8 * t);
        }
#pragma unroll
        for (int phase = 0; phase < kPhases; ++phase) {
          const int r = down - phase;
          if (r < 0 || r >= kKernel) continue;
#pragma unroll
          for (int t = 0; t < 2; ++t) mma_m16n8k16<T>(sums[phase][t], left[t], right[r]);
        }
      }
      activate_all<T>(activation, reinterpret_cast<float (&)[kPhases * 8]>(sums));
#pragma unroll
      for (int t = 0; t < 2; ++t) {
        const int q = own.column + 8 * t + lane % 4 * 2;
        if (q >= a.Q) continue;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int group = own.set + lane / 4 + 8 * half;
          if (group >= a.places.groups) continue;
          T* const out = results + group * a.group_pitch + q;
#pragma unroll
          for (int phase = 0; phase < kPhases; ++phase) {
            const uint32_t pair = two<T>(sums[phase][t][2 * half], sums[phase][t][2 * half + 1]);
            *reinterpret_cast<uint32_t*>(out + phase * a.Q) = pair;
          }
        }
      }
    }
    __syncthreads();  // the results are there

    const bool again = a.vec == 8   ? write_results<8>(a, results, y_channel, place)
                       : a.vec == 4 ? write_results<4>(a, results, y_channel, place)
                                    : write_results<2>(a, results, y_channel, place);
    if (again) {
      const int groups = static_cast<int>(a.places.by_groups.divisor), rows = a.places.rows;
      int e = static_cast<int>(threadIdx.x) * a.vec;  // the same results as above
#pragma unroll 1
      for (; e < place.images * rows * a.Q; e += (e + 1) % a.vec == 0 ? (kThreads - 1) * a.vec + 1 : 1) {
        const int image = e / (rows * a.Q), row = e / a.Q % rows, q = e % a.Q;
        const int n = place.first_image + image, p = place.first_row + row;
        const float result =
            to_acc(results[(image * groups + row / kPhases) * a.group_pitch + row % kPhases * a.Q + q]);
        if (result == result || p >= a.P) continue;
        y_channel[n * a.y_n + p * a.Q + q] = a.single.compute(x_channel + n * a.x.n, filter, add, activation, p, q);
      }
    }
    T* const swap = tile;
    tile = next_tile, next_tile = swap;
  }
}

cudaError_t run(Map map, const Launch& call, const NchwMmaCut& cut) {
  const ConvShape& s = call.shape;
  const Correlation c = correlation(map, s);
  const NchwMmaBlock block = nchw_mma_block(map, s, cut);
  NchwMmaArgs a{};
  a.P = static_cast<int>(c.result_h), a.Q = static_cast<int>(c.result_w);
  a.places = make_mma_places(s, cut, block, a.P);
  a.x = make_mma_image(c.image, c.image_h, c.pad_h, block.in, block, block.slots, block.image_pitch, cut.images);
  a.y_n = c.result.n, a.y_c = c.result.c, a.w_n = s.w.n;
  a.single = {a.x.h,
              static_cast<int>(s.w.h),
              static_cast<int>(s.w.w),
              a.x.H,
              static_cast<int>(c.image_w),
              static_cast<int>(s.R),
              static_cast<int>(s.S),
              a.x.up,
              static_cast<int>(c.pad_w),
              c.turned};
  a.parts = cut.splits, a.vec = cut.vec, a.group_pitch = block.group_pitch;
  a.by_channels = FastDiv(s.K), a.by_multiplier = FastDiv(s.K / s.C);
  a.by_vectors = FastDiv(cut.rows * a.Q / cut.vec), a.by_group_vectors = FastDiv(kPhases * a.Q / cut.vec);
  const LaunchConfig config{dim3(static_cast<unsigned>(s.K * a.parts)), dim3(kThreads),
                            static_cast<size_t>(block.smem_bytes), call.stream};
  return dispatch_half(call.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto start = [&](auto kernel) {
      return launch(forward_kernel<T, decltype(kernel)::value>, config, a, call.first_as<T>(), call.second_as<T>(),
                    call.bias_as<T>(), call.epilogue.activation, call.out_as<T>());
    };
    return s.R == 3 ? start(Int<3>{}) : s.R == 5 ? start(Int<5>{}) : start(Int<7>{});
  });
}

}  // namespace

cudaError_t launch_depthwise_nchw_mma_forward(const Launch& call, const NchwMmaCut& cut) {
  return run(Map::forward, call, cut);
}

cudaError_t launch_depthwise_nchw_mma_grad_input(const Launch& call, const NchwMmaCut& cut) {
  return run(Map::grad_input, call, cut);
}

}  // namespace sepconv::cuda

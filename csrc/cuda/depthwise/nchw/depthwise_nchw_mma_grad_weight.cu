// Depthwise grad_weight of stride 1 in half types, kernels 3x3, 5x5 and 7x7, of contiguous images (NCHW) whose rows are
// whole 4- or 8-byte pieces, on tensor cores.
//
// For a kernel row r, the products of 16 columns of x, transposed, with 8 columns of grad_y, summed over 16 rows p, are
// one mma:
//     D_r[i, j] += sum over p of  x[p - pad_h + r, q0 - left + i] * grad_y[p, q0 + j]
// What tap s needs lies on a diagonal, i = j + s + lead with lead = left - pad_w, for every q0: so the sums of all
// tiles of all images gather in the same few registers, and the diagonals are added up once, at the end. The 16 rows
// are kPhases apart (depthwise_nchw_mma.cuh), which lets one load of x serve up to four kernel rows.
//
// Thread-to-data map. A block of four warps owns a channel and a part of its places. The images of a place are copied
// while the place before is worked on, into the other two of four tiles; its tiles of 16 groups of rows and 16 columns
// are dealt to the warps. The warps' sums are added in order, then launch_sum_partials adds the parts, where there are
// several.
//
// Rows and columns beyond grad_y count as zeros: an infinite x there makes a NaN, also for taps that do not meet it.
#include "cuda/depthwise/nchw/depthwise_nchw_mma.cuh"

namespace sepconv::cuda {
namespace {

constexpr int kThreads = kNchwMmaThreads, kPhases = kNchwMmaPhases, kWarps = kThreads / 32;

struct NchwMmaGradWeightArgs {
  MmaPlaces places;
  MmaImage x, y;
  int64_t w_n, w_h, w_w;  // strides of grad_w, in elements
  int parts, K, lead;
  FastDiv by_channels, by_multiplier;
};

template <typename T, int kKernel>
__global__ void __launch_bounds__(kThreads, kKernel == 7 ? 4 : 5)
    grad_weight_kernel(const NchwMmaGradWeightArgs a, const T* __restrict__ grad_y, const T* __restrict__ x,
                       float* __restrict__ partials, T* __restrict__ grad_w) {
  wait_for_earlier_kernels();
  DYN_SMEM(smem);
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  uint32_t channel = blockIdx.x;
  const int part = static_cast<int>(a.by_channels.split(channel)), k = static_cast<int>(channel);
  const T *const x_channel = x + a.by_multiplier.div(k) * a.x.c, *const y_channel = grad_y + k * a.y.c;
  const int both = a.x.elements() + a.y.elements();
  T *tile = reinterpret_cast<T*>(smem), *next_tile = tile + both;  // x, then grad_y: [kPhases, slots, pitch]
  clear_tiles(tile, 2 * both);
  const auto begin = [&](int i, T* to) {
    const MmaPlace place(a.places, i);
    begin_copies(a.x, to, x_channel, place);
    begin_copies(a.y, to + a.x.elements(), y_channel, place);
    cp_async_commit();
  };

  float sums[kKernel][4] = {};
  if (part < a.places.count) begin(part, tile);
  for (int i = part; i < a.places.count; i += a.parts) {
    cp_async_wait<0>();
    __syncthreads();  // the images are there, and the other tiles have no readers left
    if (i + a.parts < a.places.count) begin(i + a.parts, next_tile);
    const T* const y_tile = tile + a.x.elements();
    for (int item = warp; item < a.places.tiles; item += kWarps) {
      const MmaWarpTile own(a.places, item, lane % 8 + lane / 16 * 8);
      const int gaps = static_cast<int>(a.places.by_groups.div(own.own)) * a.x.between;
      const T* const x_row = tile + own.own * a.x.pitch + gaps + own.column + lane / 8 % 2 * 8;
      const int y_slot = min(own.set + lane % 16, a.places.groups);  // the last one is never written: zeros
      const T* const y_row = y_tile + y_slot * a.y.pitch + own.column + lane / 16 * 8;
      uint32_t right[kPhases][4];  // two windows: the first two words, and the others
#pragma unroll
      for (int phase = 0; phase < kPhases; ++phase) ldmatrix_x4_trans(right[phase], y_row + phase * a.y.section);
#pragma unroll
      for (int down = 0; down < kKernel + kPhases - 1; ++down) {  // from the first row of each group
#pragma unroll
        for (int window = 0; window < 2; ++window) {
          uint32_t left[4];
          ldmatrix_x4_trans(left, x_row + down % kPhases * a.x.section + down / kPhases * a.x.pitch + 8 * window);
#pragma unroll
          for (int phase = 0; phase < kPhases; ++phase) {
            const int r = down - phase;
            if (r < 0 || r >= kKernel) continue;
            mma_m16n8k16<T>(sums[r], left, reinterpret_cast<const uint32_t (&)[2]>(right[phase][2 * window]));
          }
        }
      }
    }
    T* const swap = tile;
    tile = next_tile, next_tile = swap;
  }

  __syncthreads();                                      // the images have no readers left
  float* const total = reinterpret_cast<float*>(smem);  // [kWarps, kKernel, 16, 8], rows of taps on other banks
#pragma unroll
  for (int r = 0; r < kKernel; ++r) {
#pragma unroll
    for (int v = 0; v < 4; ++v) {
      const int m = lane / 4 + v / 2 * 8, n = lane % 4 * 2 + v % 2;
      total[(warp * kKernel + r) * kNchwMmaSums + m * 8 + n] = sums[r][v];
    }
  }
  __syncthreads();
  const int tap = static_cast<int>(threadIdx.x);
  if (tap < kKernel * kKernel) {
    const int r = tap / kKernel, s = tap % kKernel;
    float sum = 0;
    for (int from = 0; from < kWarps; ++from) {
#pragma unroll
      for (int j = 0; j < 8; ++j) sum += total[(from * kKernel + r) * kNchwMmaSums + (j + s + a.lead) * 8 + j];
    }
    if (a.parts > 1) {
      partials[(static_cast<int64_t>(part) * a.K + k) * kKernel * kKernel + tap] = sum;
    } else {
      grad_w[k * a.w_n + r * a.w_h + s * a.w_w] = from_acc<T>(sum);
    }
  }
}

}  // namespace

cudaError_t launch_depthwise_nchw_mma_grad_weight(const Launch& call, const NchwMmaCut& cut) {
  const ConvShape& s = call.shape;
  const NchwMmaBlock block = nchw_mma_block(Map::grad_weight, s, cut);
  NchwMmaGradWeightArgs a{};
  a.places = make_mma_places(s, cut, block, s.P);
  a.x = make_mma_image(s.x, s.H, s.pad_h, block.in, block, block.slots, block.image_pitch, cut.images);
  a.y = make_mma_image(s.y, s.P, 0, block.other, block, block.groups, block.groups * block.pitch, cut.images, 1);
  a.w_n = s.w.n, a.w_h = s.w.h, a.w_w = s.w.w;
  a.parts = cut.splits, a.K = static_cast<int>(s.K), a.lead = block.in.left - static_cast<int>(s.pad_w);
  a.by_channels = FastDiv(s.K), a.by_multiplier = FastDiv(s.K / s.C);
  const LaunchConfig config{dim3(static_cast<unsigned>(s.K * cut.splits)), dim3(kThreads),
                            static_cast<size_t>(block.smem_bytes), call.stream};
  const cudaError_t error = dispatch_half(call.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto start = [&](auto kernel) {
      return launch(grad_weight_kernel<T, decltype(kernel)::value>, config, a, call.first_as<T>(), call.second_as<T>(),
                    call.workspace_as<float>(), call.out_as<T>());
    };
    return s.R == 3 ? start(Int<3>{}) : s.R == 5 ? start(Int<5>{}) : start(Int<7>{});
  });
  return error != cudaSuccess || cut.splits == 1 ? error : launch_sum_partials(call, cut.splits);
}

}  // namespace sepconv::cuda

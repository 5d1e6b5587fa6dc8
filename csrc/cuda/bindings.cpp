// The CUDA dispatch key: what convolve.h has to know of this device. Kernels run on the current stream, and every
// launch is checked.
//
// Nothing here synchronises, copies between host and device, or keeps memory between calls, so CUDA graphs capture
// every call; scratch memory comes from the caching allocator and goes back to it when the call returns, in stream
// order.
#include <ATen/Context.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime_api.h>
#include <torch/library.h>

#include <array>
#include <atomic>

#include "core/explain.h"
#include "cuda/architectures.h"
#include "cuda/plan.h"
#include "cuda/runtime.h"
#include "cuda/spatial/cut.h"
#include "ops/convolve.h"
#include "ops/matmul.h"
#include "ops/runtime.h"

namespace sepconv::cuda {
namespace {

using at::Tensor;

constexpr int64_t kBestAlignment = 16;  // bytes that one load can move

// Asked once for each of the first devices, as the answer may have to load a kernel.
bool copies_boxes(int index) {
  enum : int { unknown, yes, no };
  static std::array<std::atomic<int>, 64> answers{};
  std::atomic<int> none{unknown}, &answer = index < static_cast<int>(answers.size()) ? answers[index] : none;
  if (answer == unknown) {
    const c10::cuda::CUDAGuard guard(static_cast<c10::DeviceIndex>(index));
    answer = has_depthwise_nhwc_tma() ? yes : no;
  }
  return answer == yes;
}

// What torch's own convolution asks, at every call: users may change it at any time.
bool allows_tf32() { return at::globalContext().allowTF32CuDNN(at::Float32Op::CONV); }

bool has_code(int capability) {
  static const auto answers = [] {
    std::array<bool, 256> found{};
    for (size_t i = 0; i < found.size(); ++i) found[i] = has_code_for(SEPCONV_CUDA_ARCHS, static_cast<int>(i));
    return found;
  }();
  return capability < static_cast<int>(answers.size()) && answers[static_cast<size_t>(capability)];
}

struct Cuda {
  struct Guard : c10::cuda::CUDAGuard {
    explicit Guard(const Tensor& t) : CUDAGuard(t.device()) {}
  };
  static constexpr const char* kBorders = "cuda_borders";
  static constexpr bool kKeepsIntermediate = false, kAddsResidual = true;

  static Launch launch_of(const Call& c, const Tensor& out, const Tensor& workspace) {
    return {c.shape,
            c.dtype(),
            c.first_data(),
            c.second_data(),
            c.epilogue(),
            out.mutable_data_ptr(),
            workspace.defined() ? workspace.mutable_data_ptr() : nullptr,
            c10::cuda::getCurrentCUDAStream()};
  }

  static Plan plan(const Call& c) {
    const Epilogue epilogue = c.epilogue();
    const int64_t alignment = common_alignment({c.first_data(), c.second_data(), epilogue.bias, epilogue.residual});
    const Device device = device_facts(c.first->get_device());
    Plan p = cuda::plan(c.map, c.shape, c.dtype(), device, alignment, strict(), c.finish());
    const PlanByHand* hand = plan_by_hand();
    return hand == nullptr ? p : overruled(std::move(p), c.map, c.shape, c.dtype(), hand->kernel, hand->cut);
  }

  static Tensor aten(const Plan&, const Call& c) { return by_aten(c); }

  static Tensor fresh(const Result& result, const Tensor& like) { return result.empty(like); }

  static void copy_image(const Tensor& to, const Tensor& from) { to.copy_(from); }

  static void run(const Plan& plan, const Call& c, const Tensor& out) {
    if (plan.kernel == Kernel::pointwise_matmul) return matmul::run(c, out);
    Tensor workspace;
    if (plan.workspace_bytes > 0) workspace = at::empty({plan.workspace_bytes}, out.options().dtype(at::kByte));
    raise_if(cuda::run(plan, c.map, launch_of(c, out, workspace)), plan.name);
  }

  static void run_borders(const Call& c, const Tensor& out) {
    raise_if(cuda::run_borders(c.map, launch_of(c, out, {}), c.args.padding_mode), kBorders);
  }

  static Plan plan_separable(const SeparableShape& shape, const Tensor& input) {
    return cuda::plan_separable(shape, dtype_of(input), device_facts(input.get_device()), strict());
  }

  static void run_separable(const Plan& plan, const SeparableShape& shape, DType dtype, const SeparableMemory& memory) {
    raise_if(cuda::run_separable(plan, shape, dtype, memory, c10::cuda::getCurrentCUDAStream()), plan.name);
  }

  // None where the filters fit no tile. The device is the current one.
  static const char* spatial_kernel(const ConvShape& shape, DType dtype) {
    const bool runs = device_facts(c10::cuda::current_device()).has_code;
    return runs && spatial_tile(shape, dtype).columns > 0 ? "cuda_spatial_separable" : nullptr;
  }

  static void run_spatial(const ConvShape& shape, DType dtype, const void* x, const SpatialFilters& filters, void* y) {
    raise_if(launch_spatial_separable(shape, dtype, x, filters, y, c10::cuda::getCurrentCUDAStream()),
             "cuda_spatial_separable");
  }
};

}  // namespace

// The driver holds these: a question costs a few nanoseconds, and may be asked while a graph is captured.
Device device_facts(int index) {
  int multiprocessors = 0, major = 0, minor = 0;
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, index));
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index));
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index));
  const int capability = major * 10 + minor;
  return {.multiprocessors = multiprocessors,
          .compute_capability = capability,
          .copies_boxes = major >= 9 && copies_boxes(index),
          .has_code = has_code(capability),
          .tf32 = allows_tf32()};
}

// Results come from the caching allocator, which aligns better, so only the tensors that came with the call are asked.
int64_t common_alignment(std::initializer_list<const void*> addresses) {
  uintptr_t bits = kBestAlignment;
  for (const void* address : addresses) bits |= reinterpret_cast<uintptr_t>(address);
  return static_cast<int64_t>(bits & -bits);
}

void raise_if(cudaError_t error, const char* kernel) {
  if (error == cudaSuccess) return;
  (void)cudaGetLastError();  // the error is reported here: later calls should not meet it again
  TORCH_CHECK(false, "the CUDA kernel ", kernel, " could not be launched: ", cudaGetErrorString(error));
}

Explanation explain(Map map, const ConvShape& shape, DType dtype, const Finish& finish, int device) {
  return explain(map, plan(map, shape, dtype, device_facts(device), kBestAlignment, strict(), finish));
}

Explanation explain(const SeparableShape& shape, DType dtype, int device) {
  return explain(Map::forward, plan_separable(shape, dtype, device_facts(device), strict()));
}

Explanation explain(const BlockShape& shape, DType dtype, int device) {
  return explain(Map::forward, plan_block(shape, dtype, device_facts(device), kBestAlignment, strict()));
}

Explanation explain(const BlockShape& shape, DType dtype, int multiprocessors, int compute_capability) {
  const Device device{.multiprocessors = multiprocessors, .compute_capability = compute_capability};
  return explain(Map::forward, plan_block(shape, dtype, device, kBestAlignment, strict()));
}

Explanation explain(Map map, const ConvShape& shape, DType dtype, const Finish& finish, int multiprocessors,
                    int compute_capability) {
  // A build's machine code for 9.0 and newer has the copy engine's kernels, and drivers for those make its maps.
  const Device device{.multiprocessors = multiprocessors,
                      .compute_capability = compute_capability,
                      .copies_boxes = compute_capability >= 90,
                      .tf32 = allows_tf32()};
  return explain(map, plan(map, shape, dtype, device, kBestAlignment, strict(), finish));
}

TORCH_LIBRARY_IMPL(sepconv_ext, CUDA, m) { register_ops<Cuda>(m); }

}  // namespace sepconv::cuda

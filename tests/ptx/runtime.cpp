// A CUDA runtime whose GPU is the machine: the functions that nvcc's host code and csrc/cuda call, so that the shipped
// launch(), its kernels' doors and tensor_map.cpp run as they are. Kernels are found by their names in PTX files
// (PTX_FILES, separated by colons). runner.cpp of the emulator runs the cases; what it asks of the emulator (which
// memory is written, seeds, traces) is answered here.
//
// With PTX_COUNTS=1 every launch prints what it counted, with PTX_LINES=1 which lines ran. With PTX_DRY=1 it prints its
// grid and does not run.
#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <memory>
#include <set>
#include <sstream>

#include "../emulator/machine.h"
#include "../emulator/race.h"
#include "../emulator/tensor.h"
#include "machine.h"
#include "tensor_map.h"

namespace {

struct Kernel {
  std::string name;
  uint32_t most_shared = 48 << 10;  // dynamic bytes that a launch may ask for
  std::unique_ptr<ptx::Program> program;
};

std::map<const void*, Kernel>& kernels() {
  static std::map<const void*, Kernel> all;
  return all;
}

ptx::GlobalMemory& memory() {
  static ptx::GlobalMemory all;
  return all;
}

uint64_t seed = 0;

const std::vector<std::string>& ptx_texts() {
  static const std::vector<std::string> all = [] {
    std::vector<std::string> texts;
    const char* files = getenv("PTX_FILES");
    std::istringstream list(files ? files : "");
    for (std::string path; std::getline(list, path, ':');) {
      std::ifstream file(path);
      texts.emplace_back(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
    }
    return texts;
  }();
  return all;
}

const ptx::Program& program_of(const void* function) {
  const auto found = kernels().find(function);
  if (found == kernels().end()) throw ptx::Fault("a kernel that nobody has registered");
  Kernel& kernel = found->second;
  for (const std::string& text : ptx_texts()) {
    if (kernel.program) break;
    if (ptx::has_entry(text, kernel.name))
      kernel.program = std::make_unique<ptx::Program>(ptx::parse(text, kernel.name));
  }
  if (!kernel.program) throw ptx::Fault("no PTX file has the entry " + kernel.name);
  return *kernel.program;
}

// Shared memory that a block may have, by architecture, the runtime's own kilobyte taken off (CUDA C++ Programming
// Guide, "Technical Specifications per Compute Capability").
uint32_t shared_limit(int architecture) {
  switch (architecture) {
    case 80:
    case 87: return 163 << 10;
    case 90:
    case 100:
    case 103:
    case 110: return 227 << 10;
    default: return 99 << 10;
  }
}

// The lines of the PTX file that ran, for who plants faults in them.
void print_lines(const ptx::Machine& machine) {
  printf("lines: %s", machine.program.name.c_str());
  for (const ptx::Instruction& in : machine.program.code) {
    if (machine.executed[static_cast<size_t>(&in - machine.program.code.data())]) printf(" %d", in.line);
  }
  printf("\n");
}

void print_counts(const ptx::Machine& machine) {
  uint64_t all = 0;
  for (const auto& [opcode, times] : machine.counts.executed) all += times;
  printf("counts: kernel=%s instructions=%llu\n", machine.program.name.c_str(), (unsigned long long)all);
  const auto& c = machine.counts;
  printf("traffic: reads=%zu writes=%zu block_reads=%llu block_writes=%llu in_flight=%llu\n", c.reads.launch.size(),
         c.writes.launch.size(), (unsigned long long)c.reads.blocks, (unsigned long long)c.writes.blocks,
         (unsigned long long)c.most_in_flight);
  for (const auto& [opcode, times] : machine.counts.executed) {
    printf("executed: %s %llu\n", opcode.c_str(), (unsigned long long)times);
  }
  for (const auto& [what, c] : machine.counts.memory) {
    printf("memory: requests=%llu wavefronts=%llu ideal=%llu sectors=%llu bytes=%llu %s\n",
           (unsigned long long)c.requests, (unsigned long long)c.wavefronts, (unsigned long long)c.ideal,
           (unsigned long long)c.sectors, (unsigned long long)c.bytes, what.c_str());
  }
}

void read_attribute(ptx::Launch& launch, const cudaLaunchAttribute& a) {
  if (a.id == cudaLaunchAttributeProgrammaticStreamSerialization) {
    launch.early = a.val.programmaticStreamSerializationAllowed != 0;
  } else if (a.id != cudaLaunchAttributePreferredSharedMemoryCarveout || a.val.sharedMemCarveout > 100) {
    throw ptx::Fault("an attribute of a launch that is not known here");  // a carveout is a wish, without effect
  }
}

void run(const void* function, const cudaLaunchConfig_t& config, void** arguments) {
  const ptx::Program& program = program_of(function);
  const Kernel& kernel = kernels().at(function);
  const uint32_t limit = shared_limit(ptx::architecture_of(program.target));
  ptx::Launch launch;
  launch.grid = {config.gridDim.x, config.gridDim.y, config.gridDim.z};
  launch.block = {config.blockDim.x, config.blockDim.y, config.blockDim.z};
  launch.dynamic_shared = static_cast<uint32_t>(config.dynamicSmemBytes);
  for (unsigned i = 0; i < config.numAttrs; ++i) read_attribute(launch, config.attrs[i]);
  if (launch.dynamic_shared > kernel.most_shared) {
    throw ptx::Fault("a launch asks for " + std::to_string(launch.dynamic_shared) +
                     " bytes of shared memory, allowed are " + std::to_string(kernel.most_shared));
  }
  if (program.static_shared + launch.dynamic_shared > limit) throw ptx::Fault("more shared memory than a block has");
  if (launch.grid[0] == 0 || launch.grid[0] > 0x7FFFFFFF || launch.grid[1] == 0 || launch.grid[1] > 65535 ||
      launch.grid[2] == 0 || launch.grid[2] > 65535) {
    throw ptx::Fault("a grid that no GPU takes");
  }
  launch.parameters.assign(program.parameter_bytes, 0xFF);
  for (size_t i = 0; i < program.parameters.size(); ++i) {
    const ptx::Parameter& p = program.parameters[i];
    memcpy(&launch.parameters[p.offset], arguments[i], p.bytes);
  }
  printf("entry: %s\n", program.name.c_str());
  const bool counting = getenv("PTX_COUNTS") != nullptr, dry = getenv("PTX_DRY") != nullptr;
  if (counting || dry) {
    printf("launch: blocks=%llu threads=%u shared=%u least_blocks=%d most_threads=%d\n",
           (unsigned long long)launch.grid[0] * launch.grid[1] * launch.grid[2],
           launch.block[0] * launch.block[1] * launch.block[2], program.static_shared + launch.dynamic_shared,
           program.least_blocks, program.most_threads);
  }
  if (dry) return;  // the runner says that nothing was launched, and compares nothing
  ptx::Machine machine(program, launch, memory(), seed);
  machine.counts.traffic = counting;
  machine.run();
  auto& counters = emulator::counters();
  ++counters.launches;
  counters.blocks += uint64_t{launch.grid[0]} * launch.grid[1] * launch.grid[2];
  counters.threads +=
      uint64_t{launch.grid[0]} * launch.grid[1] * launch.grid[2] * launch.block[0] * launch.block[1] * launch.block[2];
  if (counting) print_counts(machine);
  if (getenv("PTX_LINES")) print_lines(machine);
}

// The rules of the driver's manual, for what tensor_map.cpp asks of it.
CUresult encode(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* base, const cuuint64_t* sizes,
                const cuuint64_t* strides, const cuuint32_t* box, const cuuint32_t* steps,
                CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle, CUtensorMapL2promotion,
                CUtensorMapFloatOOBfill fill) {
  if (rank != 4 || interleave != CU_TENSOR_MAP_INTERLEAVE_NONE || swizzle != CU_TENSOR_MAP_SWIZZLE_NONE ||
      fill != CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) {
    return CUDA_ERROR_NOT_SUPPORTED;
  }
  ptx::TensorMap m{};
  m.magic = ptx::TensorMap::kMagic;
  m.element_bytes = type == CU_TENSOR_MAP_DATA_TYPE_FLOAT32 ? 4 : 2;
  m.base = reinterpret_cast<uint64_t>(base);
  bool fits = m.base % 16 == 0 && box[0] * m.element_bytes % 16 == 0;
  for (int i = 0; i < 4; ++i) {
    fits &= sizes[i] >= 1 && sizes[i] <= uint64_t{1} << 32 && box[i] >= 1 && box[i] <= 256 && steps[i] == 1;
    m.sizes[i] = static_cast<uint32_t>(sizes[i]);
    m.box[i] = box[i];
    if (i == 3) break;
    fits &= strides[i] % 16 == 0 && strides[i] < uint64_t{1} << 40 && strides[i] >= 16;
    m.strides[i] = strides[i];
  }
  memset(map, 0, sizeof *map);
  memcpy(map, &m, sizeof m);
  return fits ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

const bool kWatching = [] {
  emulator::buffer_watcher = [](const void* data, size_t bytes, bool alive) {
    alive ? memory().add(data, bytes) : memory().remove(data);
  };
  return true;
}();

}  // namespace

// ---- what nvcc's host code calls

extern "C" {

void** __cudaRegisterFatBinary(void*) {
  static void* handle = nullptr;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*,
                            int*) {
  kernels()[host].name = name;
}
// Of <<<>>>, which launch() does not use.
cudaError_t __cudaPopCallConfiguration(dim3*, dim3*, size_t*, void*) { return cudaErrorNotSupported; }
cudaError_t __cudaGetKernel(cudaKernel_t*, const void*) { return cudaErrorNotSupported; }
cudaError_t __cudaLaunchKernel(cudaKernel_t, dim3, dim3, void**, size_t, cudaStream_t) { return cudaErrorNotSupported; }

// ---- the runtime

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function, void** arguments) {
  try {
    run(function, *config, arguments);
  } catch (const ptx::Fault& fault) {
    throw emulator::Fault(fault.what());
  }
  return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaErrorNotSupported;
  const uint32_t limit = shared_limit(ptx::architecture_of(program_of(function).target));
  if (value < 0 || static_cast<uint32_t>(value) + program_of(function).static_shared > limit)
    return cudaErrorInvalidValue;
  kernels().at(function).most_shared = static_cast<uint32_t>(value);
  return cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* function) {
  *attributes = {};
  attributes->ptxVersion = ptx::architecture_of(program_of(function).target);
  return cudaSuccess;
}
// Memory that a kernel may read and write (golden.cu).
cudaError_t cudaMalloc(void** data, size_t bytes) {
  if (posix_memalign(data, 256, bytes)) return cudaErrorMemoryAllocation;
  memory().watch(*data, bytes);
  return cudaSuccess;
}
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
  memcpy(to, from, bytes);
  if (kind == cudaMemcpyHostToDevice) memory().fill(to);
  return cudaSuccess;
}
cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int) { return cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  if (attribute != cudaDevAttrComputeCapabilityMajor || ptx_texts().empty()) return cudaErrorNotSupported;
  const std::string& text = ptx_texts().front();
  const size_t at = text.find(".target sm_");
  if (at == std::string::npos) return cudaErrorNotSupported;
  *value = std::stoi(text.substr(at + strlen(".target sm_"))) / 10;
  return cudaSuccess;
}
cudaError_t cudaGetDriverEntryPointByVersion(const char*, void** found, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
  *found = reinterpret_cast<void*>(&encode);
  *result = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}

}  // extern "C"

// ---- what runner.cpp asks of the emulator

namespace emulator {

Counters& counters() {
  static Counters values;
  return values;
}
const std::set<Trace>& traces() {  // run() prints the entries instead
  static const std::set<Trace> none;
  return none;
}
void set_seed(uint64_t s) { seed = s; }

namespace race {
void watch(const void* begin, size_t bytes) { memory().watch(begin, bytes); }
void watch_in_place(const void* begin, size_t bytes) {
  memory().watch(begin, bytes);
  memory().fill(begin);
}
void forget() {}
std::string describe_writer(const void*) { return {}; }
}  // namespace race

}  // namespace emulator

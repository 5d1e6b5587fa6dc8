// Which instruction sets this binary holds kernels for, and which of them this process uses.
#include <atomic>
#include <cstdlib>
#include <stdexcept>

#include "cpu/kernels.h"
#include "cpu/simd/processor.h"

namespace sepconv::cpu {
namespace {

constexpr const char* kIsaNames[] = {"baseline", "avx2", "avx512"};

bool processor_has(Isa isa) {
#if defined(__x86_64__)
  // Every processor with AVX2 converts float16 too (F16C). The builtins also ask if the system saves the registers.
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  switch (isa) {
    case Isa::baseline: return true;
    case Isa::avx2: return avx2;
    case Isa::avx512:
      return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  }
#endif
  return isa == Isa::baseline;
}

// The instruction set of that name; throws where there is none or the processor lacks it.
Isa find(const std::string& name, const char* asked_by) {
  for (const Isa isa : {Isa::baseline, Isa::avx2, Isa::avx512}) {
    if (name != isa_name(isa)) continue;
    if (processor_has(isa)) return isa;
    throw std::invalid_argument(std::string(asked_by) + " is " + name + ", which this processor lacks");
  }
  throw std::invalid_argument(std::string(asked_by) + " must be baseline, avx2 or avx512, but is '" + name + "'");
}

Isa choose() {
  const char* wanted = std::getenv("SEPCONV_CPU_ISA");
  if (wanted != nullptr && *wanted != '\0') return find(wanted, "SEPCONV_CPU_ISA");
  for (const Isa isa : {Isa::avx512, Isa::avx2}) {
    if (processor_has(isa)) return isa;
  }
  return Isa::baseline;
}

std::atomic<Isa>& chosen() {
  static std::atomic<Isa> isa{choose()};
  return isa;
}

std::atomic<bool>& long_runs() {
#if defined(__x86_64__)
  static std::atomic<bool> likes{!__builtin_cpu_is("amd")};
#else
  static std::atomic<bool> likes{true};
#endif
  return likes;
}

}  // namespace

bool likes_long_runs() { return long_runs().load(std::memory_order_relaxed); }

bool set_likes_long_runs(bool likes) { return long_runs().exchange(likes, std::memory_order_relaxed); }

Isa isa() { return chosen().load(std::memory_order_relaxed); }

void set_isa(const std::string& name) { chosen().store(find(name, "the instruction set"), std::memory_order_relaxed); }

const char* isa_name(Isa isa) { return kIsaNames[static_cast<int>(isa)]; }

std::vector<std::string> isas_built() {
#if defined(__x86_64__)
  return {std::begin(kIsaNames), std::end(kIsaNames)};
#else
  return {kIsaNames[0]};
#endif
}

}  // namespace sepconv::cpu

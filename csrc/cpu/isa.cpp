// Which instruction sets this binary holds kernels for, and which of them this process uses.
#include <cstdlib>
#include <stdexcept>

#include "kernels.h"

namespace sepconv::cpu {
namespace {

constexpr const char* kIsaNames[] = {"baseline", "avx2", "avx512"};

bool processor_has(Isa isa) {
#if defined(__x86_64__)
  // Every processor with AVX2 converts float16 (F16C) too; the builtins also ask whether the system saves the registers.
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

Isa choose() {
  Isa best = Isa::baseline;
  for (const Isa isa : {Isa::avx2, Isa::avx512}) {
    if (processor_has(isa)) best = isa;
  }
  const char* wanted = std::getenv("SEPCONV_CPU_ISA");
  if (wanted == nullptr || *wanted == '\0') return best;
  for (const Isa isa : {Isa::baseline, Isa::avx2, Isa::avx512}) {
    if (std::string(wanted) != isa_name(isa)) continue;
    if (processor_has(isa)) return isa;
    throw std::runtime_error(std::string("SEPCONV_CPU_ISA is ") + wanted + ", but the best of this processor is " +
                             isa_name(best));
  }
  throw std::runtime_error(std::string("SEPCONV_CPU_ISA is ") + wanted + ", expected baseline, avx2 or avx512");
}

}  // namespace

Isa isa() {
  static const Isa chosen = choose();
  return chosen;
}

const char* isa_name(Isa isa) { return kIsaNames[static_cast<int>(isa)]; }

std::vector<std::string> isas_built() {
#if defined(__x86_64__)
  return {std::begin(kIsaNames), std::end(kIsaNames)};
#else
  return {kIsaNames[0]};
#endif
}

}  // namespace sepconv::cpu

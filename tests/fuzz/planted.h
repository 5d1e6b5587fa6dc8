// Faults as a kernel may have them, planted after a sound one has run: the fuzzer has to find each.
#pragma once

#include "../emulator/tensor.h"

namespace fuzz {

struct PlantedFault {
  const char* name;
  void (*plant)(emulator::Buffer& operand, emulator::Buffer& result);
};

inline constexpr int kPlantedFaults = 8;
extern const PlantedFault planted_faults[kPlantedFaults];

}  // namespace fuzz

// Barriers, warp synchronisation, shuffles and votes.
#pragma once

#include <cstdint>

#include "machine.h"

namespace emulator {

void barrier(int id, int threads, Location);

// A warp instruction: every lane of the mask brings `mine`; the last to arrive runs execute over all of them. An own
// lane missing from the mask, or lanes that meet in different instructions, is a fault. `name` is for reports.
void collective(uint32_t mask, void (*execute)(void** lanes, uint32_t mask), void* mine, const char* name, Location);

void sync_warp(uint32_t mask, Location);

template <typename T>
struct ShuffleLane {
  T value;
  T result;
  int source;  // the lane to read; -1: keep the own value
};

template <typename T>
T shuffle(uint32_t mask, T value, int source, const char* name, Location at) {
  ShuffleLane<T> mine{value, value, source};
  collective(
      mask,
      [](void** lanes, uint32_t mask) {
        for (int i = 0; i < 32; ++i) {
          if (!(mask >> i & 1)) continue;
          auto* lane = static_cast<ShuffleLane<T>*>(lanes[i]);
          if (lane->source < 0) continue;
          if (!(mask >> lane->source & 1)) {
            die("lane " + std::to_string(i) + " shuffles from lane " + std::to_string(lane->source) +
                ", which is not in the mask");
          }
          lane->result = static_cast<ShuffleLane<T>*>(lanes[lane->source])->value;
        }
      },
      &mine, name, at);
  return mine.result;
}

uint32_t ballot(uint32_t mask, bool predicate, Location);

}  // namespace emulator

inline void __syncthreads(EMULATOR_HERE) { emulator::barrier(0, emulator::block().threads, EMULATOR_LOCATION); }
inline void __syncwarp(uint32_t mask = 0xFFFFFFFFu, EMULATOR_HERE) { emulator::sync_warp(mask, EMULATOR_LOCATION); }

template <typename T>
T __shfl_sync(uint32_t mask, T value, int source, int width = 32, EMULATOR_HERE) {
  const int first = emulator::current().lane & ~(width - 1);
  return emulator::shuffle(mask, value, first + (source & (width - 1)), "__shfl_sync", EMULATOR_LOCATION);
}
template <typename T>
T __shfl_xor_sync(uint32_t mask, T value, int lane_mask, int width = 32, EMULATOR_HERE) {
  const int lane = emulator::current().lane, source = lane ^ lane_mask;
  const bool beyond = source >= 32 || (source & ~(width - 1)) > (lane & ~(width - 1));
  return emulator::shuffle(mask, value, beyond ? -1 : source, "__shfl_xor_sync", EMULATOR_LOCATION);
}
template <typename T>
T __shfl_down_sync(uint32_t mask, T value, uint32_t delta, int width = 32, EMULATOR_HERE) {
  const int lane = emulator::current().lane;
  const bool beyond = (lane & (width - 1)) + int(delta) >= width;
  return emulator::shuffle(mask, value, beyond ? -1 : lane + int(delta), "__shfl_down_sync", EMULATOR_LOCATION);
}
template <typename T>
T __shfl_up_sync(uint32_t mask, T value, uint32_t delta, int width = 32, EMULATOR_HERE) {
  const int lane = emulator::current().lane;
  const bool beyond = (lane & (width - 1)) - int(delta) < 0;
  return emulator::shuffle(mask, value, beyond ? -1 : lane - int(delta), "__shfl_up_sync", EMULATOR_LOCATION);
}

inline uint32_t __ballot_sync(uint32_t mask, int predicate, EMULATOR_HERE) {
  return emulator::ballot(mask, predicate != 0, EMULATOR_LOCATION);
}
inline int __any_sync(uint32_t mask, int predicate, EMULATOR_HERE) {
  return emulator::ballot(mask, predicate != 0, EMULATOR_LOCATION) != 0;
}
inline int __all_sync(uint32_t mask, int predicate, EMULATOR_HERE) {
  return emulator::ballot(mask, predicate != 0, EMULATOR_LOCATION) == mask;
}

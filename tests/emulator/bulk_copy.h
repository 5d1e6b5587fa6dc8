// mbarriers, and copies of boxes of a tensor to shared memory (TMA) that arrive at them. A copy takes effect when a
// thread waits for the phase that it belongs to and cannot go on without it, never earlier. Until then the destination
// holds NaN, and touching it is a fault in both builds; so is reading what has come without having waited for it (race
// build).
#pragma once

#include <cstdint>

#include "cuda/device/tensor_map.h"
#include "machine.h"

namespace emulator {

void init_mbarrier(void* barrier, int arrivals, Location);
void fence_mbarriers(Location);  // of this thread: the copy engine may know them from now on
void fence_bulk_copies();        // of this thread: what has come so far is read, and may be written over
void expect_bytes(void* barrier, int bytes, Location);
void wait_for_phase(void* barrier, int parity, Location);
void copy_box(void* destination, const sepconv::cuda::TensorMap&, int c, int w, int h, int n, void* barrier, Location);

}  // namespace emulator

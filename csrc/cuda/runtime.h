// What every bindings file of this device needs: facts about it, and errors of its launches (bindings.cpp).
#pragma once

#include <driver_types.h>

#include <initializer_list>

#include "cuda/plan.h"

namespace sepconv::cuda {

Device device_facts(int index);

// The largest power of two, up to what one load can move, that divides every address.
int64_t common_alignment(std::initializer_list<const void*> addresses);

// Throws for what is not cudaSuccess.
void raise_if(cudaError_t error, const char* kernel);

}  // namespace sepconv::cuda

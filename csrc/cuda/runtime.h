// What every bindings file of this device needs: facts about it, and errors of its launches (bindings.cpp).
#pragma once

#include <driver_types.h>

#include "cuda/plan.h"

namespace sepconv::cuda {

Device device_facts(int index);

// Throws for what is not cudaSuccess.
void raise_if(cudaError_t error, const char* kernel);

}  // namespace sepconv::cuda

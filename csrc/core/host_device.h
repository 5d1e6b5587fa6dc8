// What nvcc compiles for both sides.
#pragma once

#if defined(__CUDACC__)
#define SEPCONV_HOST_DEVICE __host__ __device__
#else
#define SEPCONV_HOST_DEVICE
#endif

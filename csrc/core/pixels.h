// Float images in NHWC whose pixels lie apart: dense ones, or some channels of wider ones.
#pragma once

#include <cstdint>

namespace sepconv {

struct Pixels {
  const float* data;
  int64_t pitch;  // numbers from one pixel to the next, also from a row's last and from an image's
};
struct Written {
  float* data;
  int64_t pitch;
};

}  // namespace sepconv

// What differs between processors of one instruction set, and is a matter of speed alone.
#pragma once

namespace sepconv::cpu {

// isa.cpp: whether pixels come faster as long runs of an image's row, which the processor fetches ahead by itself, than
// as tiles of several rows. So it is on Intel's, and not on AMD's (benchmarks/notes/depthwise-nhwc.md).
bool likes_long_runs();
bool set_likes_long_runs(bool);  // another answer, for tests; returns the former one

}  // namespace sepconv::cpu

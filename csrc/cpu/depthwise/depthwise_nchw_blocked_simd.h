// Tiny planes into tiles and back. Like simd.h, read once for each instruction set by the files that need it, in their
// second half, after scratch_simd.h and transpose_simd.h: hence no include guard and no include.

// Blocks of kLane pixels: of `pixels` that are not whole blocks the last block overlaps the one before, and fewer than
// kLane are one block in part.
template <typename T>
SEPCONV_INLINE Floats load_block(const T* p, int64_t pixels) {
  return pixels >= kLane ? load(p) : load_first(p, static_cast<int>(pixels));
}

// Row i of `from`, kept for `lanes` rows, becomes lane i; column j becomes vector places[j] of the tile.
template <typename T>
SEPCONV_INLINE void turn_in(float* tile, const T* from, int64_t row_step, int lanes, const int32_t* places,
                            int64_t pixels) {
  for (int64_t done = 0; done < pixels; done += kLane) {
    const int64_t first = std::max<int64_t>(0, std::min(done, pixels - kLane));
    Floats rows[kLane];
    if (lanes == kLane) {
#pragma GCC unroll 16
      for (int i = 0; i < kLane; ++i) rows[i] = load_block(from + i * row_step + first, pixels);
    } else {
#pragma GCC unroll 16
      for (int i = 0; i < kLane; ++i) {
        rows[i] = i < lanes ? load_block(from + i * row_step + first, pixels) : Floats{};
      }
    }
    transpose<float>(rows);
    const int32_t* const place = places + first;
    if (pixels >= kLane) {
#pragma GCC unroll 16
      for (int i = 0; i < kLane; ++i) store(tile + int64_t{place[i]} * kLane, rows[i]);
    } else {
#pragma GCC unroll 16
      for (int i = 0; i < kLane; ++i) {
        if (i < pixels) store(tile + int64_t{place[i]} * kLane, rows[i]);
      }
    }
  }
}

// Vectors of a dense tile, to rows of as many numbers.
template <typename T>
SEPCONV_INLINE void turn_out(T* to, int64_t row_step, int lanes, const float* tile, int64_t pixels) {
  for (int64_t done = 0; done < pixels; done += kLane) {
    const int64_t first = std::max<int64_t>(0, std::min(done, pixels - kLane));
    Floats rows[kLane];
#pragma GCC unroll 16
    for (int i = 0; i < kLane; ++i) rows[i] = i < pixels ? load(tile + (first + i) * kLane) : Floats{};
    transpose<float>(rows);
    if (lanes == kLane && pixels >= kLane) {
#pragma GCC unroll 16
      for (int i = 0; i < kLane; ++i) store(to + i * row_step + first, rows[i]);
    } else {
      const int count = static_cast<int>(std::min<int64_t>(kLane, pixels));
#pragma GCC unroll 16
      for (int i = 0; i < kLane; ++i) {
        if (i < lanes) store_first(to + i * row_step + first, rows[i], count);
      }
    }
  }
}

// Planes as they lie in memory: runs of dense pixels, which are whole planes where no gaps lie between their rows.
struct PlaneRuns {
  int64_t count, pixels, step;  // step: from one run to the next

  PlaneRuns(int64_t rows, int64_t columns, int64_t row_step) : count(rows), pixels(columns), step(row_step) {
    if (rows == 1 || row_step == columns) pixels *= rows, count = 1;
  }
};

// Planes `plane_step` apart into a tile and back; places as above, in the order of the pixels.
template <typename T>
SEPCONV_INLINE void turn_planes_in(float* tile, const T* from, int64_t plane_step, int lanes, const int32_t* places,
                                   const PlaneRuns& runs) {
  for (int64_t i = 0; i < runs.count; ++i, from += runs.step, places += runs.pixels) {
    turn_in(tile, from, plane_step, lanes, places, runs.pixels);
  }
}
template <typename T>
SEPCONV_INLINE void turn_planes_out(T* to, int64_t plane_step, int lanes, const float* tile, const PlaneRuns& runs) {
  for (int64_t i = 0; i < runs.count; ++i, to += runs.step, tile += runs.pixels * kLane) {
    turn_out(to, plane_step, lanes, tile, runs.pixels);
  }
}

// The planes of the next unit, fetched into the first-level cache.
template <typename T>
SEPCONV_INLINE void fetch_planes(const T* from, int64_t plane_step, int lanes, const PlaneRuns& runs) {
  int64_t pixels = runs.pixels;
  if (runs.count == 1 && plane_step == pixels) pixels *= lanes, lanes = 1;
  for (int i = 0; i < lanes; ++i) {
    for (int64_t run = 0; run < runs.count; ++run) {
      const char* at = reinterpret_cast<const char*>(from + i * plane_step + run * runs.step);
      for (const char* const end = at + pixels * sizeof(T); at < end; at += 64) __builtin_prefetch(at);
    }
  }
}

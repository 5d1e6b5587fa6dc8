// Small planes into scratch memory. Like simd.h, read once for each instruction set by the files that need it, in their
// second half, after planes_simd.h: hence no include guard and no include.

inline constexpr int kLane = kLanes<float>;

class Scratch {  // aligned to a cache line, zero
 public:
  explicit Scratch(int64_t count) : memory_(new float[count + 16]) {
    void* start = memory_.get();
    size_t space = (count + 16) * sizeof(float);
    data_ = static_cast<float*>(std::align(64, count * sizeof(float), start, space));
    std::fill_n(data_, count, 0.0f);
  }
  float* data() const { return data_; }

 private:
  std::unique_ptr<float[]> memory_;
  float* data_;
};

// Copies `count` numbers in overlapping pieces where there are no masked loads.
SEPCONV_INLINE void copy_overlapping(float* to, const float* from, int64_t count) {
  using Four = typename VectorOf<float, 4>::unaligned;
  if (count >= 4) {
    for (int64_t i = 0; i < count - 4; i += 4) {
      *reinterpret_cast<Four*>(to + i) = *reinterpret_cast<const Four*>(from + i);
    }
    *reinterpret_cast<Four*>(to + count - 4) = *reinterpret_cast<const Four*>(from + count - 4);
  } else {
    for (int64_t i = 0; i < count; ++i) to[i] = from[i];
  }
}

template <typename T>
SEPCONV_INLINE void copy_in(float* scratch, const T* image, const Frame& f) {
  if (f.stride == 1) {
    float* to = scratch + f.top * f.row_step + f.left;
    if constexpr (std::is_same_v<T, float> && SEPCONV_ISA_LEVEL < 2) {
      for (int64_t h = 0; h < f.rows; ++h) copy_overlapping(to + h * f.row_step, image + h * f.columns, f.columns);
    } else {
      copy_rows(to, f.row_step, image, f.columns, f.rows, f.columns);
    }
    return;
  }
  float* const even = f.left % 2 * f.pitch + f.left / 2 + scratch;
  float* const odd = (f.left + 1) % 2 * f.pitch + (f.left + 1) / 2 + scratch;
  for (int64_t h = 0; h < std::min<int64_t>(2, f.rows); ++h) {
    const int64_t row = (f.top + h) % 2 * f.row_phase + (f.top + h) / 2 * f.row_step;
    split_rows(even + row, odd + row, f.row_step, image + h * f.columns, 2 * f.columns, (f.rows - h + 1) / 2,
               (f.columns + 1) / 2, f.columns / 2);
  }
}

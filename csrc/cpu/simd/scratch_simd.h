// Scratch memory. Like simd.h, read once for each instruction set by the files that need it, in their second half:
// hence no include guard and no include.

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

// The correlation of depthwise_nhwc.h by phases of its dilation, for one image. Read by depthwise_nhwc.cpp once for
// each instruction set, inside its namespace (see foreach_isa.h): hence no include guard and no include.

// Taps that lie `dilation` apart meet one input in so many. The outputs f, f + phases, ... see the same ones, as
// neighbours: one dimension of a correlation becomes that of these inputs and outputs.
inline int64_t phases_of(int64_t stride, int64_t dilation) { return dilation / std::gcd(stride, dilation); }

template <typename T>
void take_phase(int64_t f, const T*& x, int64_t& inputs, int64_t& x_step, T*& y, int64_t& outputs, int64_t& y_step,
                int64_t& stride, int64_t& pad, int64_t& dilation) {
  const int64_t phases = phases_of(stride, dilation), input = f * stride - pad;
  const int64_t whole = input >= 0 ? input / dilation : -ceil_div(-input, dilation), first = input - whole * dilation;
  y += f * y_step, y_step *= phases, outputs = ceil_div(outputs - f, phases);
  inputs = first < inputs ? ceil_div(inputs - first, dilation) : 0;
  if (inputs > 0) x += first * x_step;
  x_step *= dilation, stride = stride * phases / dilation, pad = -whole, dilation = 1;
}

// Output rows [p0, p1), of a kernel whose taps are neighbours.
template <typename T>
void correlate_phase(const Correlation<T>& k, const NhwcKernel<T>& kernel, int64_t p0, int64_t p1) {
  if (k.C >= kLanes<accumulate_t<T>> || k.R == 0 || k.S == 0) return correlate_neighbours(k, kernel, p0, p1);
  for (int64_t q = 0; q < k.Q; q += kFewColumns) {
    correlate_few(columns_of(k, q, std::min(q + kFewColumns, k.Q)), p0, p1);
  }
}

// Output rows [p0, p1).
template <typename T>
void correlate_rows(const Correlation<T>& k, const NhwcKernel<T>& kernel, int64_t p0, int64_t p1) {
  if (k.R > 1 && k.dilation_h > 1) {
    const int64_t phases = phases_of(k.stride_h, k.dilation_h);
    for (int64_t f = 0; f < std::min(phases, k.P); ++f) {
      Correlation<T> part = k;
      take_phase(f, part.x, part.H, part.x_row, part.y, part.P, part.y_row, part.stride_h, part.pad_h, part.dilation_h);
      correlate_rows(part, kernel, ceil_div(p0 - f, phases), ceil_div(p1 - f, phases));
    }
    return;
  }
  if (k.S <= 1 || k.dilation_w == 1) return correlate_phase(k, kernel, p0, p1);
  const int64_t phases = phases_of(k.stride_w, k.dilation_w);
  for (int64_t p = p0; p < p1; p += kRowGroup) {  // its input is in cache for the phases that follow
    for (int64_t f = 0; f < std::min(phases, k.Q); ++f) {
      Correlation<T> part = k;
      take_phase(f, part.x, part.W, part.x_pixel, part.y, part.Q, part.y_pixel, part.stride_w, part.pad_w,
                 part.dilation_w);
      correlate_phase(part, kernel, p, std::min(p + kRowGroup, p1));
    }
  }
}

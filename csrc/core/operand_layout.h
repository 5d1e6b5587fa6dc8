// How the images of a call lie in memory, and which of them are copied for a kernel. The same on every device; no
// torch.
//
// A kernel takes an image where it is if its channels (channels_last) or its columns (NCHW) are dense: slices of
// channels, crops, every other row or image, expanded gradients. Else a dense copy and the best kernel beat a general
// one. So a plan is made for dense images in the layout of the call, and then says which images its kernel does not
// take as they are.
#pragma once

#include <string>

#include "core/conv_shape.h"

namespace sepconv {

struct ImageShape {
  int64_t N, channels, rows, columns;
  Strides strides;
};
inline ImageShape input_image(const ConvShape& s) { return {s.N, s.C, s.H, s.W, s.x}; }
inline ImageShape output_image(const ConvShape& s) { return {s.N, s.K, s.P, s.Q, s.y}; }

// Strides as torch gives them to a fresh tensor: a dimension of size 0 counts as 1.
inline Strides dense_strides(int64_t channels, int64_t rows, int64_t columns, Layout layout) {
  const auto at_least_one = [](int64_t n) { return n > 1 ? n : 1; };
  const int64_t c = at_least_one(channels), h = at_least_one(rows), w = at_least_one(columns);
  return layout == Layout::nhwc ? Strides{h * w * c, 1, w * c, c} : Strides{c * h * w, h * w, w, 1};
}

// The innermost dimension of `layout` is dense: channels (nhwc) or columns (nchw). A dimension of size 1 has no say.
inline bool is_dense_along(Layout layout, const ImageShape& image) {
  const Strides& s = image.strides;
  return layout == Layout::nhwc ? image.channels <= 1 || s.c == 1 : image.columns <= 1 || s.w == 1;
}

// The same, and rows follow each other without gaps.
inline bool has_dense_rows(const ImageShape& image) {
  return is_dense_along(Layout::nchw, image) && (image.rows <= 1 || image.strides.h == image.columns);
}

inline bool is_dense(Layout layout, const ImageShape& image) {
  const Strides expected = dense_strides(image.channels, image.rows, image.columns, layout), &s = image.strides;
  const auto same = [](int64_t size, int64_t stride, int64_t wanted) { return size <= 1 || stride == wanted; };
  return same(image.N, s.n, expected.n) && same(image.channels, s.c, expected.c) && same(image.rows, s.h, expected.h) &&
         same(image.columns, s.w, expected.w);
}

inline bool is_expanded_batch(const ImageShape& image) { return image.N > 1 && image.strides.n == 0; }

// Every pixel is the same one: a gradient behind sum or mean.
inline bool is_one_pixel(const ImageShape& image) {
  const bool rows_are = image.rows <= 1 || image.strides.h == 0;
  const bool columns_are = image.columns <= 1 || image.strides.w == 0;
  return image.rows * image.columns > 1 && rows_are && columns_are;
}

// A forward call whose images are all the same memory.
inline bool is_one_image(Map map, const ConvShape& s) {
  return map == Map::forward && is_expanded_batch(input_image(s));
}

// Filters lie one after the other, [K, C / groups, R, S] for one channel each.
inline bool has_dense_filters(const ConvShape& s) { return s.w.n == s.R * s.S && s.w.h == s.S && s.w.w == 1; }

// The layout that an image asks for; strided: none, as that of one channel or of one pixel, or a transposed one.
inline Layout own_layout(const ImageShape& image) {
  if (image.channels <= 1 || image.rows * image.columns <= 1) return Layout::strided;
  if (image.strides.c == 1) return Layout::nhwc;
  return is_dense_along(Layout::nchw, image) ? Layout::nchw : Layout::strided;
}

// The layout that a call is planned for: its result's, or else an operand's.
inline Layout call_layout(Map map, const ConvShape& s) {
  const Layout x = own_layout(input_image(s)), y = own_layout(output_image(s));
  const Layout first = map == Map::forward ? y : x, second = map == Map::forward ? x : y;
  if (first != Layout::strided) return first;
  return second != Layout::strided ? second : Layout::nchw;
}

// Images that are copied into `layout`: an operand before the kernel runs, a result after. And the weight, made
// contiguous. What an operand repeats is copied once, unless the kernel wants `all_images`.
struct Copies {
  Layout layout = Layout::nchw;
  bool x = false, y = false, weight = false, all_images = false;
  bool any() const { return x || y || weight; }
};

// For a fused kernel, which takes any input whose channels are dense as the result's are (nhwc), or any dense columns.
inline Copies separable_copies(const ConvShape& s, Layout result) {
  const ImageShape x = input_image(s);
  const bool taken = is_dense_along(result, x) || is_dense_along(Layout::nchw, x);
  return {result == Layout::nhwc ? Layout::nhwc : Layout::nchw, !taken};
}

// For the spatially separable kernels, which take what is dense along the result's own layout.
inline Copies spatial_copies(const ConvShape& s) {
  const Layout layout = output_layout(s) == Layout::nchw ? Layout::nchw : Layout::nhwc;
  return {layout, !is_dense_along(layout, input_image(s))};
}

// The strides of an image's copy. What an operand repeats (a stride of 0) stays so: images, and pixels of channels_last
// or planes. A gradient behind a sum is then a pixel or a plane, which stays in cache. Rows of a plane are all copied,
// as kernels go along planes without gaps.
inline Strides copied_strides(const ImageShape& image, Layout layout, bool all_images) {
  const Strides& from = image.strides;
  const auto repeats = [&](int64_t size, int64_t stride) { return !all_images && size > 1 && stride == 0; };
  const bool channels_last = layout == Layout::nhwc, batch = repeats(image.N, from.n);
  const bool planes = !channels_last && repeats(image.channels, from.c);
  const bool rows = channels_last && repeats(image.rows, from.h);
  const bool pixels = channels_last && repeats(image.columns, from.w);
  Strides s = dense_strides(planes ? 1 : image.channels, rows ? 1 : image.rows, pixels ? 1 : image.columns, layout);
  if (batch) s.n = 0;
  if (planes) s.c = 0;
  if (rows) s.h = 0;
  if (pixels) s.w = 0;
  return s;
}

// The shape that the kernel sees.
inline ConvShape with_copies(ConvShape s, const Copies& copies) {
  const auto copied = [&](const ImageShape& image) { return copied_strides(image, copies.layout, copies.all_images); };
  if (copies.x) s.x = copied(input_image(s));
  if (copies.y) s.y = copied(output_image(s));
  if (copies.weight) s.w = dense_strides(s.channels_per_group(), s.R, s.S, Layout::nchw);
  return s;
}

// A plan's reason, and what is copied.
inline std::string with_copies(std::string reason, Map map, const Copies& copies) {
  const std::string layout = copies.layout == Layout::nhwc ? "channels_last" : "NCHW";
  const auto add = [&](bool copied, bool result, const char* name) {
    if (copied) reason += std::string("; ") + name + (result ? " is copied from " : " is copied to ") + layout;
  };
  add(copies.x, map == Map::grad_input, map == Map::grad_input ? "the result" : "input");
  add(copies.y, map == Map::forward, map == Map::forward ? "the result" : "grad_output");
  if (copies.weight) reason += "; weight is made contiguous";
  return reason;
}

}  // namespace sepconv

// The op table, callable from C++: each call goes through torch's dispatcher, so that autograd, autocast, compilation
// and the device see it. An op's signature stands here, and as a schema in library.cpp; what is the same for every op
// (transforms.cpp) is a template on it.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/SymInt.h>

#include <algorithm>
#include <optional>
#include <string_view>
#include <tuple>
#include <type_traits>
#include <utility>

namespace sepconv {

// A literal as a template's argument.
template <size_t length>
struct OpName {
  char text[length];
  constexpr OpName(const char (&literal)[length]) { std::copy_n(literal, length, text); }
};

template <OpName name, typename Function>
struct Op;

template <OpName name, typename Result, typename... Arguments>
struct Op<name, Result(Arguments...)> {
  using Signature = Result(Arguments...);

  // The op is looked up once: afterwards a call costs the dispatcher's own work alone.
  Result operator()(Arguments... arguments) const {
    static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow(name.text, "").template typed<Signature>();
    return op.call(std::forward<Arguments>(arguments)...);
  }
};

// The type of the functions that can stand in for an op.
template <const auto& op>
using SignatureOf = typename std::remove_cvref_t<decltype(op)>::Signature;

// A function of an op's arguments that travel as one: `Gathered` is a struct whose members are the first `count`
// arguments of the op, in their order. The function takes it, and the arguments that are left.
template <typename Signature>
struct Gathering;
template <typename Result, typename... Arguments>
struct Gathering<Result(Arguments...)> {
  template <typename Gathered, size_t count, auto function>
  static Result call(Arguments... arguments) {
    const auto all = std::forward_as_tuple(std::forward<Arguments>(arguments)...);
    return [&]<size_t... first, size_t... left>(std::index_sequence<first...>, std::index_sequence<left...>) {
      return function(Gathered{std::get<first>(all)...}, std::get<count + left>(all)...);
    }(std::make_index_sequence<count>(), std::make_index_sequence<sizeof...(Arguments) - count>());
  }
};

namespace ops {

using at::Tensor;
using Bias = const std::optional<Tensor>&;
using Ints = c10::SymIntArrayRef;
using Name = std::string_view;

inline constexpr Op<"sepconv_ext::conv2d",
                    Tensor(const Tensor& input, const Tensor& weight, Bias bias, Ints stride, Ints padding,
                           Ints dilation, c10::SymInt groups, Name activation, Name padding_mode)>
    conv2d{};

inline constexpr Op<"sepconv_ext::conv2d_residual",
                    Tensor(const Tensor& input, const Tensor& weight, Bias bias, const Tensor& residual, Ints stride,
                           Ints padding, Ints dilation, c10::SymInt groups, Name activation)>
    conv2d_residual{};

inline constexpr Op<"sepconv_ext::conv2d_grad_input",
                    Tensor(const Tensor& grad_output, const Tensor& weight, Ints input_size, Ints input_stride,
                           Ints stride, Ints padding, Ints dilation, c10::SymInt groups, Name padding_mode)>
    conv2d_grad_input{};

inline constexpr Op<"sepconv_ext::conv2d_grad_weight",
                    Tensor(const Tensor& grad_output, const Tensor& input, Ints weight_size, Ints weight_stride,
                           Ints stride, Ints padding, Ints dilation, c10::SymInt groups, Name padding_mode)>
    conv2d_grad_weight{};

// (by input, by weight), with the sizes and strides of these.
inline constexpr Op<"sepconv_ext::conv2d_both_grads",
                    std::tuple<Tensor, Tensor>(const Tensor& grad_output, const Tensor& input, const Tensor& weight,
                                               Ints stride, Ints padding, Ints dilation, c10::SymInt groups,
                                               Name padding_mode)>
    conv2d_both_grads{};

inline constexpr Op<"sepconv_ext::separable_conv2d",
                    Tensor(const Tensor& input, const Tensor& depthwise_weight, Bias depthwise_bias,
                           const Tensor& pointwise_weight, Bias pointwise_bias, Ints stride, Ints padding,
                           Ints dilation, Name depthwise_activation, Name pointwise_activation, bool save_intermediate)>
    separable_conv2d{};

inline constexpr Op<"sepconv_ext::separable_conv2d_training",
                    std::tuple<Tensor, Tensor>(const Tensor& input, const Tensor& depthwise_weight, Bias depthwise_bias,
                                               const Tensor& pointwise_weight, Bias pointwise_bias, Ints stride,
                                               Ints padding, Ints dilation, Name depthwise_activation,
                                               Name pointwise_activation, bool output, bool intermediate)>
    separable_conv2d_training{};

inline constexpr Op<"sepconv_ext::spatial_separable_conv2d",
                    Tensor(const Tensor& input, const Tensor& column, const Tensor& row, Ints padding)>
    spatial_separable_conv2d{};

inline constexpr Op<"sepconv_ext::inverted_residual",
                    Tensor(const Tensor& input, Bias expand_weight, Bias expand_bias, const Tensor& depthwise_weight,
                           Bias depthwise_bias, const Tensor& project_weight, Bias project_bias, Bias squeeze_weight,
                           Bias squeeze_bias, Bias excite_weight, Bias excite_bias, Ints stride, Ints padding,
                           Ints dilation, Name expand_activation, Name depthwise_activation, Name squeeze_activation,
                           Name gate, Name project_activation, bool residual)>
    inverted_residual{};

// What a map is told besides its tensors. It refers to the lists: it does not outlive the function that got them.
struct Args {
  Ints stride, padding, dilation;
  c10::SymInt groups;
  Name padding_mode = "zeros";
};

// The three maps, C(x, w), Cx(g, w) and Cw(g, x), as ops; the gradients have the sizes and strides that are asked for.
inline Tensor C(const Tensor& x, const Tensor& w, const Args& a, Bias bias = std::nullopt,
                Name activation = "identity") {
  return conv2d(x, w, bias, a.stride, a.padding, a.dilation, a.groups, activation, a.padding_mode);
}
inline Tensor Cx(const Tensor& g, const Tensor& w, Ints size, Ints stride, const Args& a) {
  return conv2d_grad_input(g, w, size, stride, a.stride, a.padding, a.dilation, a.groups, a.padding_mode);
}
inline Tensor Cw(const Tensor& g, const Tensor& x, Ints size, Ints stride, const Args& a) {
  return conv2d_grad_weight(g, x, size, stride, a.stride, a.padding, a.dilation, a.groups, a.padding_mode);
}

}  // namespace ops

}  // namespace sepconv

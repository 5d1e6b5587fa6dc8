// A test case as text, "key=value" by key, and what it stands for. runner.cpp lists the keys.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "core/block_shape.h"
#include "core/causal_shape.h"
#include "cuda/plan.h"

namespace emulator {

class Arguments {
 public:
  explicit Arguments(const std::vector<std::string>& words);
  std::string text(const std::string& key, const std::string& otherwise) const;
  int64_t number(const std::string& key, int64_t otherwise) const;
  std::vector<int64_t> numbers(const std::string& key, const std::string& otherwise, char separator = ',') const;

 private:
  std::map<std::string, std::string> values_;
};

struct Case {
  sepconv::Map map;
  sepconv::DType dtype;
  sepconv::ConvShape shape;
  sepconv::PaddingMode padding_mode;
  bool bias, residual;
  sepconv::Activation activation;
  std::string op;                  // conv2d, separable, inverted_residual, spatial_separable, causal, causal_update
  bool spatial;                    // a column and a row filter in the place of the weight
  bool shared_column, shared_row;  // one for all channels
  int64_t offset;                  // elements by which every tensor lies off its allocation's alignment
};

Case read_case(const Arguments&);

// With op=separable the case is the depthwise stage, and this is the 1x1 convolution on its output: outputs=,
// pointwise_bias= and pointwise_activation=.
Case read_pointwise(const Arguments&, const Case& depthwise);
bool is_separable(const Arguments&);

// With op=inverted_residual the case is the depthwise stage, and this the whole block: inputs= (0: it expands nothing),
// outputs=, expand_activation=, pointwise_activation=, residual=; bias= is for all stages.
sepconv::BlockShape read_block(const Arguments&, const Case& depthwise);
sepconv::cuda::Plan make_block_plan(const Case& depthwise, const Arguments&);

// With op=causal a case has W positions of C channels, S taps and a dilation; and states=1, packed= (the mean length of
// a run; with numbers of 64 bits where wide=1), state_layout=.
sepconv::CausalShape read_causal(const Arguments&, const Case&);
// With op=causal_update a case has W tokens of C channels, S taps and a dilation; and length= of a state, ring=1,
// rows=1 (states are named, and there are more of them), wide=1 (numbers have 64 bits), float_weight=1, state_layout=.
sepconv::CausalUpdateShape read_causal_update(const Arguments&, const Case&);

// The plan of the call, as csrc/cuda/bindings.cpp makes it, with what the command line overrules: kernel=, numbers of
// its cut, and "tuning." before numbers of the plan's table.
sepconv::cuda::Plan make_plan(const Case&, const Arguments&);
// Other kernels and cuts, the plan's own first.
std::vector<sepconv::cuda::Plan> make_alternatives(const Case&, const Arguments&);
sepconv::cuda::Plan make_separable_plan(const Case& depthwise, const Case& pointwise, const Arguments&);

}  // namespace emulator

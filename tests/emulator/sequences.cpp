#include "sequences.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

namespace emulator {

namespace {

// The sum over the taps of the output behind `seen`, whose last element its last tap sees.
void add_taps(Expected& e, const std::vector<double>& seen, size_t last, int64_t c, int64_t S, int64_t dilation,
              const Buffer& w) {
  for (int64_t back = 0; back < S; ++back) {
    const double product = seen.at(last - static_cast<size_t>(back * dilation)) * w.at(c, 0, 0, S - 1 - back);
    e.value += product;
    e.magnitude += std::fabs(product);
    ++e.terms;
  }
}

void finish(Expected& e, const Buffer* bias, int64_t c, sepconv::Activation activation) {
  if (bias) {
    e.value += bias->at(0, c, 0, 0);
    e.magnitude += std::fabs(bias->at(0, c, 0, 0));
    ++e.terms;
  }
  e.value = activate(activation, e.value);
}

}  // namespace

Numbers::Numbers(const std::vector<int64_t>& values, int64_t L, bool wide)
    : L_(L), wide_(wide), memory_(values.empty() ? 0 : ((values.size() - 1) * kGap + 1) * (wide ? 8 : 4)) {
  for (size_t i = 0; i < values.size(); ++i) {
    const auto narrow = static_cast<int32_t>(values[i]);
    auto* const to = static_cast<unsigned char*>(memory_.data()) + i * kGap * (wide ? 8 : 4);
    memcpy(to, wide ? static_cast<const void*>(&values[i]) : &narrow, wide ? 8 : 4);
  }
}

std::vector<Expected> causal_reference(const sepconv::CausalShape& s, const Buffer& x, const Buffer* states,
                                       const Buffer& w, const Buffer* bias, sepconv::Activation activation,
                                       const std::vector<int64_t>& numbers) {
  std::vector<Expected> result;
  for (int64_t n = 0; n < s.N; ++n)
    for (int64_t c = 0; c < s.C; ++c)
      for (int64_t q = 0; q < s.L; ++q) {
        Expected& e = result.emplace_back();
        const auto number = [&](int64_t p) { return numbers.empty() ? 0 : numbers[n * s.L + p]; };
        if (number(q) < 0) continue;
        for (int64_t tap = 0; tap < s.S; ++tap) {
          const int64_t at = q - (s.S - 1 - tap) * s.dilation;
          bool one_run = at >= 0 || states != nullptr;
          for (int64_t p = std::max<int64_t>(at, 0); p < q; ++p) one_run = one_run && number(p) == number(p + 1);
          if (!one_run) continue;
          const double value = at >= 0 ? x.at(n, c, 0, at) : states->at(n, c, 0, s.reach() + at);
          const double product = value * w.at(c, 0, 0, tap);
          e.value += product;
          e.magnitude += std::fabs(product);
          ++e.terms;
        }
        finish(e, bias, c, activation);
      }
  return result;
}

Updated update_reference(const sepconv::CausalUpdateShape& s, const Buffer& x, const Buffer& w, const Buffer* bias,
                         sepconv::Activation activation, const std::vector<int64_t>& lengths,
                         const std::vector<int64_t>& rows, const Buffer& state) {
  Updated result;
  result.y.resize(s.N * s.C * s.T), result.state.resize(s.states * s.C * s.length);
  const auto of_state = [&](int64_t row, int64_t c, int64_t i) -> Expected& {
    return result.state[(row * s.C + c) * s.length + i];
  };
  for (int64_t row = 0; row < s.states; ++row)
    for (int64_t c = 0; c < s.C; ++c)
      for (int64_t i = 0; i < s.length; ++i) of_state(row, c, i).value = state.at(row, c, 0, i);
  for (int64_t n = 0; n < s.N; ++n)
    for (int64_t c = 0; c < s.C; ++c) {
      const int64_t row = rows.empty() ? n : rows[n];
      Expected* const y = &result.y[(n * s.C + c) * s.T];
      if (row < 0 || row >= s.states) {
        for (int64_t t = 0; t < s.T; ++t) y[t].value = row < 0 ? 0 : std::numeric_limits<double>::quiet_NaN();
        continue;
      }
      std::vector<double> seen;
      for (int64_t i = 0; i < s.length; ++i) {
        int64_t at = i;
        if (!lengths.empty()) {
          at = (lengths[n] - s.length + i) % s.length;
          if (at < 0) at += s.length;
        }
        seen.push_back(state.at(row, c, 0, at));
      }
      for (int64_t t = 0; t < s.T; ++t) {
        seen.push_back(x.at(n, c, 0, t));
        add_taps(y[t], seen, seen.size() - 1, c, s.S, s.dilation, w);
        finish(y[t], bias, c, activation);
      }
      for (int64_t i = 0; i < s.length; ++i) {
        int64_t at = i;
        if (!lengths.empty()) {
          at = (lengths[n] + s.T - s.length + i) % s.length;
          if (at < 0) at += s.length;
        }
        of_state(row, c, at).value = seen[s.T + i];
      }
    }
  return result;
}

}  // namespace emulator

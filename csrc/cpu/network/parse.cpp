// From the text of a program to its steps.
#include <algorithm>
#include <charconv>
#include <cstring>
#include <stdexcept>

#include "core/activation.h"
#include "cpu/network/program.h"

namespace sepconv::cpu::network {
namespace {

// The words of a line.
class Words {
 public:
  explicit Words(std::string_view line) : line_(line) {}

  // The next word; empty at the end.
  std::string_view next() {
    line_.remove_prefix(std::min(line_.find_first_not_of(' '), line_.size()));
    const std::string_view word = line_.substr(0, line_.find(' '));
    line_.remove_prefix(word.size());
    return word;
  }

 private:
  std::string_view line_;
};

[[noreturn]] void fail(std::string_view what, std::string_view word) {
  throw std::invalid_argument(std::string(what) + " '" + std::string(word) + "'");
}

template <typename T>
T number(std::string_view word) {
  T value{};
  const auto [end, error] = std::from_chars(word.data(), word.data() + word.size(), value);
  if (error != std::errc() || end != word.data() + word.size()) fail("not a number:", word);
  return value;
}

// 3x3, 1x1x0x0
void numbers(std::string_view word, std::initializer_list<int64_t*> to) {
  for (auto next = to.begin(); next != to.end(); ++next) {
    const bool last = next + 1 == to.end();
    const size_t end = last ? word.size() : std::min(word.find('x'), word.size());
    **next = number<int64_t>(word.substr(0, end));
    if (!last && end == word.size()) fail("numbers are missing behind", word);
    word.remove_prefix(std::min(end + 1, word.size()));
  }
}

Activation activation(std::string_view name) {
  for (int i = 0; i < kActivationCount; ++i) {
    if (name == kActivationNames[i]) return static_cast<Activation>(i);
  }
  fail("unknown activation", name);
}

class Parser {
 public:
  Program run(std::string_view code) {
    while (!code.empty()) {
      const std::string_view line = code.substr(0, code.find('\n'));
      code.remove_prefix(std::min(line.size() + 1, code.size()));
      try {
        parse_line(line);
      } catch (const std::invalid_argument& error) {
        throw std::invalid_argument(std::string(error.what()) + " in the line \"" + std::string(line) + '"');
      }
    }
    if (program_.outputs.empty()) throw std::invalid_argument("the program returns nothing");
    return std::move(program_);
  }

 private:
  void parse_line(std::string_view line) {
    Words words(line);
    const std::string_view first = words.next();
    if (first.empty()) return;
    if (first == "return") return parse_outputs(words);
    if (!program_.outputs.empty()) throw std::invalid_argument("nothing may follow what is returned");
    if (first != '%' + std::to_string(program_.values)) fail("the next value is not", first);
    if (words.next() != "=") fail("no = behind", first);
    const std::string_view name = words.next();
    if (name == "input") {
      if (!program_.steps.empty()) throw std::invalid_argument("inputs come first");
      program_.inputs.push_back({program_.values, is_matrix(words.next())});
    } else {
      program_.steps.push_back(parse_step(name, words));
    }
    ++program_.values;
  }

  void parse_outputs(Words& words) {
    for (std::string_view word = words.next(); !word.empty(); word = words.next()) {
      const int value = parse_value(word);
      program_.outputs.push_back({value, is_matrix(words.next())});
    }
  }

  static bool is_matrix(std::string_view word) {
    if (word != "image" && word != "matrix") fail("neither image nor matrix:", word);
    return word == "matrix";
  }

  int parse_value(std::string_view word) const {
    if (word.empty() || word[0] != '%') fail("not a value:", word);
    const int value = number<int>(word.substr(1));
    if (value < 0 || value >= program_.values) fail("unknown value", word);
    return value;
  }

  Step parse_step(std::string_view name, Words& words) const {
    Step step;
    step.kind = &kind_of(name);
    step.writes = program_.values;
    for (std::string_view word = words.next(); !word.empty(); word = words.next()) {
      const size_t equals = word.find('=');
      if (equals == word.npos) {
        step.reads.push_back(parse_value(word));
      } else {
        parse_field(step, word.substr(0, equals), word.substr(equals + 1));
      }
    }
    const int reads = static_cast<int>(step.reads.size());
    if (reads < step.kind->least_reads || reads > step.kind->most_reads) fail("wrong number of values for", name);
    if (std::min({step.K, step.R - 1, step.S - 1, step.groups - 1, step.stride_h - 1, step.stride_w - 1,
                  step.dilation_h - 1, step.dilation_w - 1, step.top, step.bottom, step.left, step.right, step.begin,
                  step.ceil}) < 0) {
      fail("a size below its least one for", name);
    }
    return step;
  }

  void parse_field(Step& step, std::string_view key, std::string_view value) const {
    if (key == "weight") return numbers(value, {&step.weight});
    if (key == "bias") return numbers(value, {&step.bias});
    if (key == "K") return numbers(value, {&step.K});
    if (key == "groups") return numbers(value, {&step.groups});
    if (key == "begin") return numbers(value, {&step.begin});
    if (key == "ceil") return numbers(value, {&step.ceil});
    if (key == "kernel") return numbers(value, {&step.R, &step.S});
    if (key == "stride") return numbers(value, {&step.stride_h, &step.stride_w});
    if (key == "dilation") return numbers(value, {&step.dilation_h, &step.dilation_w});
    if (key == "padding") return numbers(value, {&step.top, &step.bottom, &step.left, &step.right});
    if (key == "residual") return step.reads.push_back(parse_value(value));
    if (key == "act") return void(step.activation = activation(value));
    if (key == "eps") return void(step.eps = number<float>(value));
    if (key == "factor") return void(step.factor = number<float>(value));
    if (key == "shift") return void(step.shift = number<float>(value));
    if (key == "low") return void(step.low = number<float>(value));
    if (key == "high") return void(step.high = number<float>(value));
    fail("unknown field", key);
  }

  Program program_;
};

}  // namespace

Program parse(std::string_view code) { return Parser().run(code); }

}  // namespace sepconv::cpu::network

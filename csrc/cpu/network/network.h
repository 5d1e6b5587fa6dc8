// Programs as they are kept from call to call: parsed once, planned once for each size, with arenas that are used
// again.
#pragma once

#include <atomic>
#include <functional>
#include <map>
#include <mutex>
#include <string>
#include <string_view>
#include <vector>

#include "cpu/network/program.h"

namespace sepconv::cpu::network {

// Memory for the values of one run, in huge pages where the system has them.
class Arena {
 public:
  float* take(int64_t floats);  // grows, and keeps nothing of what it held
  int64_t bytes() const { return floats_ * int64_t{sizeof(float)}; }

 private:
  struct Free {
    void operator()(float* data) const;
  };
  void grow(int64_t floats);
  std::unique_ptr<float[], Free> data_;
  int64_t floats_ = 0;
};

// The tensors of a call. Images of one input or output follow at a distance; there are `N` of them everywhere.
struct Operands {
  int64_t N = 0;
  std::vector<const float*> inputs;
  std::vector<InputSize> input_sizes;
  std::vector<float*> outputs;
  const float* constants = nullptr;
  int64_t constant_count = 0;
};

// Called after each step, for who measures.
using AfterStep = std::function<void(const PlannedStep&)>;

class Network {
 public:
  explicit Network(std::string_view code) : program_(parse(code)) {}

  const Program& program() const { return program_; }
  // The sizes of the outputs for inputs of these sizes. Throws std::invalid_argument where they do not fit.
  std::vector<Size> output_sizes(const Operands&);
  void run(const Operands&);
  // All images at once, step by step.
  void run_timed(const Operands&, const AfterStep&);

  int64_t idle_bytes();

 private:
  class Borrowed;
  using Key = std::vector<int64_t>;

  std::shared_ptr<const Plan> plan_for(const Operands&, int64_t images);
  int64_t images_at_a_time(const Operands&, int64_t share);
  void run_images(const Operands&, int64_t begin, int64_t end, int64_t at_a_time);

  const Program program_;
  std::mutex mutex_;  // of what follows
  std::map<Key, std::shared_ptr<const Plan>> plans_;
  std::vector<std::unique_ptr<Arena>> idle_;
};

// The network of this text. Those that someone retains stay until the last one lets go of them; of the others the most
// recent ones stay.
std::shared_ptr<Network> network_of(std::string_view code);
void retain_network(const std::string& code);
void release_network(const std::string& code);
int64_t idle_arena_bytes();  // of all networks

}  // namespace sepconv::cpu::network

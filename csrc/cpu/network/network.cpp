// Runs a plan over a batch.
//
// With at least an image for each thread, every thread takes images of its own through the whole program: what one step
// writes, the next one finds in the caches of the same core, and nobody waits. The images that are left, and fewer
// images than threads, go one after another, with the steps cut between the threads of one team (cpu/team.h). Kernels
// give the same results either way.
#include "cpu/network/network.h"

#include <algorithm>
#include <cstdlib>
#include <new>
#include <shared_mutex>
#include <unordered_map>

#include "cpu/kernels.h"
#include "cpu/simd/huge_pages.h"
#include "cpu/simd/thread_scratch.h"
#include "cpu/team.h"

namespace sepconv::cpu::network {
namespace {

constexpr size_t kMostPlans = 64, kMostUnretained = 16;
constexpr int64_t kNearBytes = 512 << 10;  // of the values of the images that go through the steps together

}  // namespace

// ---- arenas ----

void Arena::Free::operator()(float* data) const { std::free(data); }

float* Arena::take(int64_t floats) {
  if (floats > floats_) grow(floats);
  poison_scratch(data_.get(), floats);
  return data_.get();
}

void Arena::grow(int64_t floats) {
  constexpr size_t kHugePage = size_t{2} << 20, kPage = 4096;
  const size_t wanted = static_cast<size_t>(floats) * sizeof(float), page = wanted >= kHugePage ? kHugePage : kPage;
  const size_t bytes = (wanted + page - 1) / page * page;
  data_.reset(), floats_ = 0;
  data_.reset(static_cast<float*>(std::aligned_alloc(page, bytes)));
  if (data_ == nullptr) throw std::bad_alloc();
  advise_huge_pages(data_.get(), bytes);
  floats_ = static_cast<int64_t>(bytes / sizeof(float));
}

// An arena for as long as this lives: one that lies idle, or a new one.
class Network::Borrowed {
 public:
  explicit Borrowed(Network& network) : network_(network) {
    const std::lock_guard lock(network.mutex_);
    if (!network.idle_.empty()) {
      arena_ = std::move(network.idle_.back());
      network.idle_.pop_back();
    }
    if (!arena_) arena_ = std::make_unique<Arena>();
  }
  ~Borrowed() {
    const std::lock_guard lock(network_.mutex_);
    const size_t most = std::max(2 * num_threads(), 8);
    if (network_.idle_.size() < most) network_.idle_.push_back(std::move(arena_));
  }
  Arena& operator*() { return *arena_; }

 private:
  Network& network_;
  std::unique_ptr<Arena> arena_;
};

int64_t Network::idle_bytes() {
  const std::lock_guard lock(mutex_);
  int64_t bytes = 0;
  for (const auto& arena : idle_) bytes += arena->bytes();
  return bytes;
}

// ---- plans ----

std::shared_ptr<const Plan> Network::plan_for(const Operands& operands, int64_t images) {
  Key key;
  key.reserve(2 + 7 * operands.input_sizes.size());
  key.insert(key.end(), {images, operands.constant_count});
  for (const InputSize& input : operands.input_sizes) {
    const auto& [size, s] = input;
    for (const int64_t number : {size.H, size.W, size.C, s.c, s.h, s.w, images > 1 ? s.n : 0}) key.push_back(number);
  }
  {
    const std::lock_guard lock(mutex_);
    const auto found = plans_.find(key);
    if (found != plans_.end()) return found->second;
  }
  std::vector<InputSize> inputs = operands.input_sizes;
  for (InputSize& input : inputs) input.size.N = images;
  auto plan = std::make_shared<const Plan>(make_plan(program_, inputs, operands.constant_count));
  const std::lock_guard lock(mutex_);
  if (plans_.size() >= kMostPlans) plans_.clear();
  plans_[std::move(key)] = plan;
  return plan;
}

std::vector<Size> Network::output_sizes(const Operands& operands) {
  std::vector<Size> sizes = plan_for(operands, 1)->outputs;
  for (Size& size : sizes) size.N = operands.N;
  return sizes;
}

// As many images as leave the values in the second-level cache, or are worth reading the weights for once.
int64_t Network::images_at_a_time(const Operands& operands, int64_t share) {
  const int64_t one = plan_for(operands, 1)->arena * int64_t{sizeof(float)};
  const int64_t near = std::max(kNearBytes, operands.constant_count * int64_t{sizeof(float)} / 4);
  const int64_t most = std::clamp<int64_t>(near / std::max<int64_t>(one, 1), 1, share);
  const int64_t times = (share + most - 1) / most;
  return (share + times - 1) / times;
}

// ---- runs ----

namespace {

void run_steps(const Plan& plan, const Operands& operands, int64_t image, float* arena, const AfterStep* after) {
  const auto read = [&](const Place& place) -> const float* {
    switch (place.memory) {
      case Memory::input:
        return operands.inputs[place.at] + image * operands.input_sizes[place.at].strides.n + place.offset;
      case Memory::output:
        return operands.outputs[place.at] + image * plan.outputs[place.at].per_image() + place.offset;
      case Memory::arena: return arena + place.at;
    }
    return nullptr;
  };
  for (const PlannedStep& planned : plan.steps) {
    Call call{planned.step,
              planned.in,
              planned.pitch,
              planned.out,
              planned.out_pitch,
              planned.shape,
              {},
              const_cast<float*>(read(planned.write)),
              operands.constants};
    for (size_t i = 0; i < planned.step.reads.size(); ++i) call.read[i] = read(planned.read[i]);
    planned.step.kind->run(call);
    if (after != nullptr) (*after)(planned);
  }
}

}  // namespace

void Network::run_images(const Operands& operands, int64_t begin, int64_t end, int64_t at_a_time) {
  Borrowed arena(*this);
  for (int64_t image = begin; image < end; image += at_a_time) {
    const auto plan = plan_for(operands, std::min(at_a_time, end - image));
    run_steps(*plan, operands, image, (*arena).take(plan->arena), nullptr);
  }
}

void Network::run(const Operands& operands) {
  const int64_t threads = num_threads(), share = operands.N / threads;
  if (threads > 1 && share > 0) {
    struct Shares {
      Network& network;
      const Operands& operands;
      int64_t share, at_a_time;
    } shares{*this, operands, share, images_at_a_time(operands, share)};
    const auto body = [](void* context, int64_t task) {
      const Shares& s = *static_cast<const Shares*>(context);
      s.network.run_images(s.operands, task * s.share, (task + 1) * s.share, s.at_a_time);
    };
    parallel_tasks(threads, body, &shares);
  }
  struct Rest {
    Network& network;
    const Operands& operands;
    int64_t begin;
  } rest{*this, operands, threads > 1 ? share * threads : 0};
  if (rest.begin == operands.N) return;
  const auto sequence = [](void* context) {
    const Rest& r = *static_cast<const Rest*>(context);
    r.network.run_images(r.operands, r.begin, r.operands.N,
                         r.network.images_at_a_time(r.operands, r.operands.N - r.begin));
  };
  if (threads == 1) return sequence(&rest);
  run_as_team(threads, sequence, &rest);
}

void Network::run_timed(const Operands& operands, const AfterStep& after) {
  struct Timed {
    Network& network;
    const Operands& operands;
    const AfterStep& after;
  } timed{*this, operands, after};
  const auto sequence = [](void* context) {
    const Timed& t = *static_cast<const Timed*>(context);
    Borrowed arena(t.network);
    const auto plan = t.network.plan_for(t.operands, t.operands.N);
    run_steps(*plan, t.operands, 0, (*arena).take(plan->arena), &t.after);
  };
  if (num_threads() == 1) return sequence(&timed);
  run_as_team(num_threads(), sequence, &timed);
}

// ---- all networks ----

namespace {

struct TextHash {
  using is_transparent = void;
  size_t operator()(std::string_view text) const { return std::hash<std::string_view>{}(text); }
};
struct Kept {
  std::shared_ptr<Network> network;
  std::atomic<int64_t> last_use{0};
  int64_t retained = 0;
};

std::shared_mutex& mutex() {
  static std::shared_mutex it;
  return it;
}
using Networks = std::unordered_map<std::string, Kept, TextHash, std::equal_to<>>;
Networks& networks() {
  static Networks& them = *new Networks;  // never destroyed: a thread may run at exit
  return them;
}
std::atomic<int64_t> uses{0};

// With the mutex held alone.
void drop_oldest() {
  for (;;) {
    auto oldest = networks().end();
    size_t unretained = 0;
    for (auto it = networks().begin(); it != networks().end(); ++it) {
      if (it->second.retained > 0) continue;
      ++unretained;
      if (oldest == networks().end() || it->second.last_use < oldest->second.last_use) oldest = it;
    }
    if (unretained <= kMostUnretained) return;
    networks().erase(oldest);
  }
}

}  // namespace

std::shared_ptr<Network> network_of(std::string_view code) {
  {
    const std::shared_lock lock(mutex());
    const auto found = networks().find(code);
    if (found != networks().end()) {
      found->second.last_use = ++uses;
      return found->second.network;
    }
  }
  auto network = std::make_shared<Network>(code);
  const std::unique_lock lock(mutex());
  Kept& kept = networks()[std::string(code)];
  if (!kept.network) kept.network = std::move(network);
  kept.last_use = ++uses;
  auto result = kept.network;
  drop_oldest();
  return result;
}

void retain_network(const std::string& code) {
  network_of(code);
  const std::unique_lock lock(mutex());
  Kept& kept = networks()[code];
  if (!kept.network) kept.network = std::make_shared<Network>(code);
  ++kept.retained;
}

void release_network(const std::string& code) {
  const std::unique_lock lock(mutex());
  const auto found = networks().find(code);
  if (found != networks().end() && --found->second.retained <= 0) networks().erase(found);
}

int64_t idle_arena_bytes() {
  const std::shared_lock lock(mutex());
  int64_t bytes = 0;
  for (auto& [code, kept] : networks()) bytes += kept.network->idle_bytes();
  return bytes;
}

}  // namespace sepconv::cpu::network

#include "machine.h"

#include <execinfo.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <numeric>
#if defined(EMULATOR_ASAN)
#include <sanitizer/common_interface_defs.h>
#endif

#include "race.h"
#include "shared_memory.h"

namespace emulator {
namespace {

struct Machine {
  Block block;
  std::vector<Thread> threads;
  std::vector<Thread*> ready, starved;  // who may run; the starved only when no other can
  Fiber main;
  Thread* running = nullptr;  // null while the host runs
  void (*body)(void*) = nullptr;
  void* context = nullptr;
  std::string fault;
  uint64_t random = 1;
};
Machine machine;

constexpr size_t kMaxDynamicShared = 96 << 10;  // kMostShared of csrc/cuda/launch.h

Fiber& fiber_of(Thread* thread) { return thread ? thread->fiber : machine.main; }

// Null (back to the host) when nobody can run: all done, or a deadlock, or a fault.
Thread* pick() {
  if (!machine.fault.empty()) return nullptr;
  auto& queue = machine.ready.empty() ? machine.starved : machine.ready;
  if (queue.empty()) return nullptr;
  std::swap(queue[random_number() % queue.size()], queue.back());
  Thread* next = queue.back();
  queue.pop_back();
  return next;
}

void switch_to(Thread* next, bool ends = false) {
  Thread* previous = machine.running;
  if (next == previous) return;
  machine.running = next;
  Fiber::switch_to(fiber_of(previous), fiber_of(next), ends);
}

void thread_main() {
  Fiber::arrived(machine.main);
  machine.body(machine.context);
  Thread& me = current();
  bool in_flight = !me.open_copies.empty();
  for (const auto& group : me.committed_copies) in_flight |= !group.empty();
  if (in_flight) die("the thread ends while its cp.async copies are in flight");
  me.state = State::done;
  --machine.block.alive;
  switch_to(pick(), true);
}

void check_configuration(dim3 grid, dim3 size, size_t smem_bytes) {
  const uint64_t threads = uint64_t(size.x) * size.y * size.z;
  const auto text = [&] {
    char line[200];
    snprintf(line, sizeof line, "invalid launch: grid (%u, %u, %u), block (%u, %u, %u), %zu bytes of shared memory",
             grid.x, grid.y, grid.z, size.x, size.y, size.z, smem_bytes);
    return std::string(line);
  };
  if (threads < 1 || threads > 1024 || size.z > 64 || smem_bytes > kMaxDynamicShared) throw Fault(text());
  if (!grid.x || !grid.y || !grid.z || grid.x > 0x7FFFFFFFu || grid.y > 65535 || grid.z > 65535) throw Fault(text());
  if (threads % 32) throw Fault(text() + ": the block is not a multiple of 32 threads");
}

// Who waits where: one line for each place in the source.
std::string describe_deadlock() {
  const Block& block = machine.block;
  std::map<std::tuple<std::string, int, std::string>, std::vector<const Thread*>> places;
  for (int i = 0; i < block.threads; ++i) {
    const Thread& thread = machine.threads[i];
    if (thread.state == State::done) continue;
    places[{thread.at.file ? thread.at.file : "", thread.at.line, thread.doing}].push_back(&thread);
  }
  std::string text = "deadlock: " + std::to_string(block.alive) + " of " + std::to_string(block.threads) +
                     " threads wait for ever, the others have ended";
  for (const auto& [place, threads] : places) {
    text += "\n  " + std::to_string(threads.size()) + " threads, the first: " + describe(*threads.front());
  }
  return text;
}

void run_block() {
  Block& block = machine.block;
  block.alive = block.threads;
  block.epoch = 0;
  for (Barrier& barrier : block.barriers) barrier = {};
  block.mbarriers.clear();
  block.phases = 0;
  block.warps.assign(block.threads / 32, {});
  machine.ready.clear();
  machine.starved.clear();
  // Half of the blocks starve about a quarter of their warps.
  const uint64_t starved_warps = random_number() & 1 ? 0 : random_number() & random_number();
  for (int i = 0; i < block.threads; ++i) {
    Thread& thread = machine.threads[i];
    thread.fiber.prepare(thread_main);
    const uint32_t u = i;
    thread.index = {u % block.size.x, u / block.size.x % block.size.y, u / (block.size.x * block.size.y)};
    thread.linear = i;
    thread.lane = i % 32;
    thread.warp = i / 32;
    thread.starved = starved_warps >> (thread.warp % 64) & 1;
    thread.doing = "has not synchronised yet";
    thread.at = {};
    thread.warp_epoch = 0;
    thread.open_copies.clear();
    thread.committed_copies.clear();
    thread.phases_seen.clear();
    wake(thread);
  }
  ++counters().blocks;
  counters().threads += block.threads;
  switch_to(pick());
  if (machine.fault.empty() && block.alive) machine.fault = describe_deadlock();
  for (const auto& [_, barrier] : block.mbarriers) {
    if (machine.fault.empty() && !barrier.in_flight.empty()) {
      machine.fault = "the block ends while bulk copies are in flight to its shared memory";
    }
  }
}

std::set<Trace> all_traces;
extern "C" const char __executable_start;  // from the linker

void remember(const void* kernel) {
  const auto relative = [](const void* p) {
    return static_cast<uintptr_t>(static_cast<const char*>(p) - &__executable_start);
  };
  void* frames[16];
  const int count = backtrace(frames, 16);
  Trace trace{relative(kernel)};
  for (int i = 0; i < count; ++i) trace.push_back(relative(frames[i]));
  all_traces.insert(trace);
}

#if defined(EMULATOR_ASAN)
// AddressSanitizer and UndefinedBehaviorSanitizer end the process; this adds which CUDA thread was at it.
void name_the_thread() {
  if (machine.running) fprintf(stderr, "CUDA thread: %s\n", describe(*machine.running).c_str());
}
const bool kDeathCallback = (__sanitizer_set_death_callback(name_the_thread), true);
extern "C" void __ubsan_on_report() { name_the_thread(); }  // UndefinedBehaviorSanitizer's own hook
#endif

}  // namespace

bool a_kernel_runs() { return machine.running != nullptr; }
int planted_fault = getenv("EMULATOR_MUTANT") ? atoi(getenv("EMULATOR_MUTANT")) : -1;

Thread& current() { return *machine.running; }
Thread& thread(int linear) { return machine.threads[linear]; }
Block& block() { return machine.block; }
Counters& counters() {
  static Counters values;
  return values;
}

const std::set<Trace>& traces() { return all_traces; }

uint64_t random_number() {  // xorshift64
  uint64_t& x = machine.random;
  x ^= x << 13;
  x ^= x >> 7;
  return x ^= x << 17;
}

void set_seed(uint64_t seed) { machine.random = 88172645463325252ull ^ (seed * 0x9E3779B97F4A7C15ull); }

std::string describe(const Thread& thread) {
  const uint3 b = machine.block.index;
  char line[400];
  snprintf(line, sizeof line, "block (%u, %u, %u) thread (%u, %u, %u): %s", b.x, b.y, b.z, thread.index.x,
           thread.index.y, thread.index.z, thread.doing);
  std::string text = line;
  if (thread.at.file) text += std::string(" at ") + thread.at.file + ":" + std::to_string(thread.at.line);
  return text;
}

void die(const std::string& what) {
  if (!machine.running) throw Fault(what);
  if (machine.fault.empty()) machine.fault = what + "\n  " + describe(current());
  switch_to(nullptr, true);
  __builtin_unreachable();
}

void wake(Thread& thread) {
  thread.state = State::ready;
  thread.waits_for = nullptr;
  (thread.starved ? machine.starved : machine.ready).push_back(&thread);
}

void wake_all(const void* what) {
  for (int i = 0; i < machine.block.threads; ++i) {
    Thread& thread = machine.threads[i];
    if (thread.state == State::waiting && thread.waits_for == what) wake(thread);
  }
}

void wait(const void* what, const char* doing, Location at) {
  Thread& me = current();
  me.state = State::waiting;
  me.waits_for = what;
  me.doing = doing;
  me.at = at;
  switch_to(pick());
}

void give_way() {
  wake(current());
  switch_to(pick());
}

void launch_body(dim3 grid, dim3 size, size_t smem_bytes, const void* kernel, void (*body)(void*), void* context) {
  if (machine.running) throw Fault("a kernel launches a kernel");
  check_configuration(grid, size, smem_bytes);
  ++counters().launches;
  remember(kernel);
  machine.body = body;
  machine.context = context;
  machine.fault.clear();
  Block& block = machine.block;
  block.size = size;
  block.grid = grid;
  block.threads = size.x * size.y * size.z;
  if (machine.threads.size() < size_t(block.threads)) machine.threads.resize(block.threads);

  std::vector<uint64_t> order(uint64_t(grid.x) * grid.y * grid.z);
  std::iota(order.begin(), order.end(), 0);
  for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[random_number() % i]);
  race::begin_launch();
  for (uint64_t i : order) {
    block.index = {uint32_t(i % grid.x), uint32_t(i / grid.x % grid.y), uint32_t(i / (uint64_t(grid.x) * grid.y))};
    shared_memory::begin_block(smem_bytes);
    race::begin_block();
    run_block();
    if (!machine.fault.empty()) throw Fault(machine.fault);
  }
}

}  // namespace emulator

// The machine: threads, blocks, the random scheduler, and launch().
//
// Blocks run one after another in random order. A block's threads are fibers; one runs until it has to wait (a barrier,
// a warp instruction) or ends, then the scheduler picks another at random. In half of the blocks some warps are
// starved: they run only when nobody else can, which lets the others run as far ahead as the barriers allow.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <map>
#include <set>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "cuda/device/tensor_map.h"
#include "fiber.h"

namespace emulator {

// What a faulty kernel ends in: thrown by launch(). (Out-of-bounds accesses end the process in AddressSanitizer
// instead.)
struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Location {
  const char* file = nullptr;
  int line = 0;
};
// A default argument of every synchronising function, so that reports name the kernel's own line.
#define EMULATOR_HERE const char *file_ = __builtin_FILE(), int line_ = __builtin_LINE()
#define EMULATOR_LOCATION (::emulator::Location{file_, line_})

enum class State { ready, waiting, done };

struct AsyncCopy {
  unsigned char* destination;  // in shared memory
  const void* source;          // in global memory; null: zero fill
  uint32_t bytes, source_bytes;
};

// A box of a tensor on its way to shared memory (bulk_copy.h).
struct BulkCopy {
  unsigned char* destination;
  sepconv::cuda::TensorMap map;
  int at[4];  // c, w, h, n
  uint32_t bytes;
};

// A barrier in shared memory that counts bytes.
struct Mbarrier {
  int arrivals = 0, pending = 0;  // of a phase; those that it still waits for
  int64_t bytes = 0;              // announced and not there yet
  uint32_t phase = 0;
  uint32_t running = 0, ended = 0;  // the numbers of this phase and of the last one, among all of the block's
  int maker = 0;                    // the thread that initialised it
  bool fenced = false;
  std::set<int> readers;  // threads that may have read what came, without a fence since
  std::vector<BulkCopy> in_flight;
};

struct Thread {
  Fiber fiber;
  uint3 index{};
  int linear = 0, lane = 0, warp = 0;
  bool starved = false;
  State state = State::done;
  const void* waits_for = nullptr;  // the barrier that wakes it; null where the one who ends the wait knows the thread
  const char* doing = "";           // for reports: the last synchronising instruction, and where it stands
  Location at;
  uint32_t warp_epoch = 0;                               // how many __syncwarp it has passed, for the race detector
  std::vector<AsyncCopy> open_copies;                    // issued, not yet committed
  std::vector<std::vector<AsyncCopy>> committed_copies;  // one entry a group, oldest first
  std::set<uint32_t> phases_seen;                        // of mbarriers that it has waited for, for the race detector
};

struct Barrier {
  int arrived = 0;
  Location at;
};

// A warp instruction that not every lane of its mask has reached yet.
struct Collective {
  uint32_t mask = 0, arrived = 0;
  void (*execute)(void** lanes, uint32_t mask) = nullptr;
  Location at;
  void* lanes[32] = {};  // each lane's arguments and results
};

struct Block {
  uint3 index{};
  dim3 size, grid;
  int threads = 0, alive = 0;
  uint32_t epoch = 0;  // how many __syncthreads have completed, for the race detector
  Barrier barriers[16];
  std::map<const void*, Mbarrier> mbarriers;
  uint32_t phases = 0;                         // of all mbarriers, so far
  std::vector<std::vector<Collective>> warps;  // the unfinished collectives of each warp
};

bool a_kernel_runs();
Thread& current();
Thread& thread(int linear);  // of the running block
Block& block();
uint64_t random_number();

// Every launch after this call runs in an order that depends on the seed only.
void set_seed(uint64_t seed);

// Records the fault (the first one counts) and leaves the kernel for good.
[[noreturn]] void die(const std::string& what);
std::string describe(const Thread&);

void wait(const void* what, const char* doing, Location);  // gives way until wake_all(what) or wake()
void wake(Thread&);
void wake_all(const void* what);
void give_way();  // lets another thread run first, perhaps

// Planted faults (mutate.py): 1 where fault number k is the one that this process has switched on, else 0.
extern int planted_fault;
inline int mutant(int k) { return planted_fault == k; }

// Statistics of this process, so that a test can prove that a kernel really ran here.
struct Counters {
  uint64_t launches = 0, blocks = 0, threads = 0;
};
Counters& counters();

// Which kernels were launched, and from where: the kernel's address, then the return addresses of the host's call
// stack, all relative to the program's beginning. One entry for each way by which a kernel was reached.
using Trace = std::vector<uintptr_t>;
const std::set<Trace>& traces();

void launch_body(dim3 grid, dim3 block, size_t smem_bytes, const void* kernel, void (*body)(void*), void* context);

template <typename... P, typename... A>
void launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t smem_bytes, A&&... arguments) {
  auto values = std::tuple<std::decay_t<P>...>(std::forward<A>(arguments)...);
  struct Context {
    void (*kernel)(P...);
    decltype(values)* arguments;
  } context{kernel, &values};
  launch_body(
      grid, block, smem_bytes, reinterpret_cast<const void*>(kernel),
      [](void* p) {
        auto* c = static_cast<Context*>(p);
        std::apply(c->kernel, *c->arguments);
      },
      &context);
}

}  // namespace emulator

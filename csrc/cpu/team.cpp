#include "cpu/team.h"

#include <atomic>
#include <memory>
#include <thread>

#include "cpu/kernels.h"

namespace sepconv::cpu {
namespace {

// Instructions that pause, some 0.4 ms on Zen 3: what steps of a network have to wait for takes less. Who yields
// earlier may come back late: with 1,000 of them a network with two threads took 1.3 times as long on a busy machine.
constexpr int kSpins = 20000;

class Wait {
 public:
  void once() {
#if defined(__x86_64__)
    if (spins_ < kSpins) {
      ++spins_;
      return __builtin_ia32_pause();
    }
#endif
    std::this_thread::yield();
  }

 private:
  int spins_ = 0;
};

thread_local Team* led = nullptr;

// While it lives the thread leads nobody: it is in a task.
class InTask {
 public:
  InTask() : before_(led) { led = nullptr; }
  ~InTask() { led = before_; }

 private:
  Team* before_;
};

}  // namespace

// `state_` says which call is open: its number, whether threads may still join, and how many have and are not done. A
// thread joins by one exchange of the whole word. Once the call is closed and nobody is in it, the leader may change
// what it is about.
class Team {
 public:
  explicit Team(int64_t threads) : threads_(threads), shares_(new Share[threads]) {}

  int64_t size() const { return threads_; }

  void lead(void (*sequence)(void*), void* context) {
    struct Lead {
      Team& team;
      explicit Lead(Team& t) : team(t) { led = &team; }
      ~Lead() {
        led = nullptr;
        team.state_.store(kOver, std::memory_order_release);
      }
    } lead(*this);
    sequence(context);
  }

  void help(int64_t who) {
    uint64_t done = 0;  // the last call that this thread was in
    for (Wait wait;;) {
      uint64_t state = state_.load(std::memory_order_acquire);
      if (state & kOver) return;
      if ((state & kOpen) != 0 && number_of(state) != done) {
        if (!state_.compare_exchange_weak(state, state + 1, std::memory_order_acquire)) continue;
        const Joined joined{*this};
        done = number_of(state);
        work(who);
        wait = Wait();
      } else {
        wait.once();
      }
    }
  }

  void run(int64_t tasks, void (*body)(void*, int64_t), void* context) {
    body_ = body, context_ = context;
    for (int64_t i = 0; i < threads_; ++i) {
      shares_[i].next.store(tasks * i / threads_, std::memory_order_relaxed);
      shares_[i].end = tasks * (i + 1) / threads_;
    }
    struct Open {
      Team& team;
      explicit Open(Team& t) : team(t) {
        team.state_.store(++team.calls_ << kNumber | kOpen, std::memory_order_release);
      }
      ~Open() {
        team.state_.fetch_and(~kOpen, std::memory_order_acq_rel);
        for (Wait wait; (team.state_.load(std::memory_order_acquire) & kJoined) != 0;) wait.once();
      }
    };
    const Open open(*this);
    work(0);
  }

 private:
  static constexpr uint64_t kJoined = (uint64_t{1} << 16) - 1, kOpen = uint64_t{1} << 16, kOver = uint64_t{1} << 17;
  static constexpr int kNumber = 18;
  static uint64_t number_of(uint64_t state) { return state >> kNumber; }

  struct alignas(64) Share {
    std::atomic<int64_t> next{0};
    int64_t end = 0;
  };
  struct Joined {
    Team& team;
    ~Joined() { team.state_.fetch_sub(1, std::memory_order_release); }
  };

  void work(int64_t who) {
    const InTask in_task;
    for (int64_t i = 0; i < threads_; ++i) {
      Share& share = shares_[(who + i) % threads_];
      while (share.next.load(std::memory_order_relaxed) < share.end) {
        const int64_t task = share.next.fetch_add(1, std::memory_order_relaxed);
        if (task < share.end) body_(context_, task);
      }
    }
  }

  const int64_t threads_;
  const std::unique_ptr<Share[]> shares_;
  void (*body_)(void*, int64_t) = nullptr;
  void* context_ = nullptr;
  uint64_t calls_ = 0;
  alignas(64) std::atomic<uint64_t> state_{0};
};

Team* led_team() { return led; }
int team_size(const Team& team) { return static_cast<int>(team.size()); }
void run_tasks(Team& team, int64_t tasks, void (*body)(void*, int64_t), void* context) {
  if (tasks > 1) return team.run(tasks, body, context);
  if (tasks == 1) body(context, 0);  // alone, it may share what it starts, as in torch's pool
}

// Task 0 of the region leads. The thread that calls has it, and nobody waits before it has begun: where the region has
// fewer threads than tasks, those that come later find that all is over.
void run_as_team(int64_t threads, void (*sequence)(void*), void* context) {
  struct Region {
    Team team;
    void (*sequence)(void*);
    void* context;
  } region{Team(threads), sequence, context};
  const auto body = [](void* context, int64_t task) {
    Region& r = *static_cast<Region*>(context);
    if (task > 0) return r.team.help(task);
    r.team.lead(r.sequence, r.context);
  };
  parallel_tasks(threads, body, &region);
}

}  // namespace sepconv::cpu

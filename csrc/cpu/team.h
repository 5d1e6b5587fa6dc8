// Threads that stay together for a sequence of parallel calls, as a frozen network's steps are.
//
// One thread leads: it runs the sequence, and what is parallel in it is offered to the others. They wait in one
// parallel region of torch's pool from the first call to the last, so that a call costs no region of its own. Nobody is
// waited for but who has begun with a task: on a busy machine, where a thread may not get a core for milliseconds, the
// leader does the work of those who are not there. Who waits spins shortly and then yields its core.
#pragma once

#include <cstdint>

namespace sepconv::cpu {

// Calls sequence(context) once. What it runs by parallel_tasks() is shared by so many threads, of which num_threads()
// tells inside it. Not in a task.
void run_as_team(int64_t threads, void (*sequence)(void* context), void* context);

// The team that the calling thread leads, or null: also within a task.
class Team;
Team* led_team();
int team_size(const Team&);
// As parallel_tasks() in kernels.h: each thread begins with the tasks that it would have if all took equal shares, and
// goes on with those of others.
void run_tasks(Team&, int64_t tasks, void (*body)(void* context, int64_t task), void* context);

}  // namespace sepconv::cpu

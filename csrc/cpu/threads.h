// Threads and memory, compiled once for all instruction sets.
#pragma once
#include <cstddef>
#include <cstdint>

namespace ffk {

using Task = void (*)(void* context, int64_t task, int worker);

// Runs task 0 .. tasks - 1 on up to `workers` threads and waits. Which worker runs a task is left
// to chance; no result may depend on it.
void run_tasks(int64_t tasks, int workers, Task task, void* context);

// Memory that stays with the calling thread from step to step, since fresh pages cost more than the
// work on them; null where there is none. Its contents are lost at the next call.
float* workspace(size_t floats);

}  // namespace ffk

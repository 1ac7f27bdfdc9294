#include "threads.h"

#include <atomic>
#include <cstdlib>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "interface.h"

namespace {

using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
std::atomic<GompParallel> gomp_parallel{nullptr};

struct Team {
    ffk::Task task;
    void* context;
    int64_t tasks;
    std::atomic<int64_t> next{0};
    std::atomic<int> workers{0};

    static void work(void* self) {
        Team& team = *static_cast<Team*>(self);
        const int worker = team.workers.fetch_add(1);
        for (int64_t task; (task = team.next.fetch_add(1)) < team.tasks;)
            team.task(team.context, task, worker);
    }
};

struct Memory {
    void* at = nullptr;
    size_t bytes = 0;
    ~Memory() { std::free(at); }
};
thread_local Memory memory;
// Operands spread over small pages fall onto the same lines of a cache by chance, in some processes
// and not in others.
constexpr size_t HUGE_PAGE = size_t(2) << 20;
// What a step on a very large batch took is given back by the next small one.
constexpr size_t KEPT_BYTES = size_t(256) << 20;

}  // namespace

void ffk::run_tasks(int64_t tasks, int workers, Task task, void* context) {
    if (workers > tasks) workers = int(tasks);
    if (workers <= 1) {
        for (int64_t i = 0; i < tasks; i++) task(context, i, 0);
        return;
    }
    Team team{task, context, tasks};
    if (const GompParallel parallel = gomp_parallel.load())
        return parallel(Team::work, &team, unsigned(workers), 0);
    std::vector<std::thread> others;
    for (int i = 1; i < workers; i++) others.emplace_back(Team::work, &team);
    Team::work(&team);
    for (std::thread& other : others) other.join();
}

float* ffk::workspace(size_t floats) {
    const size_t bytes = (floats * 4 + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
    if (bytes > memory.bytes || (memory.bytes > KEPT_BYTES && bytes <= KEPT_BYTES)) {
        std::free(memory.at);
        memory.at = std::aligned_alloc(HUGE_PAGE, bytes);
        memory.bytes = memory.at == nullptr ? 0 : bytes;
#if defined(__linux__)
        if (memory.at != nullptr) madvise(memory.at, bytes, MADV_HUGEPAGE);
#endif
    }
    return static_cast<float*>(memory.at);
}

extern "C" void ffk_use_threads(void* parallel) {
    gomp_parallel.store(reinterpret_cast<GompParallel>(parallel));
}

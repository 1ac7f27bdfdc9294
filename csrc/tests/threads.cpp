// Tasks on the library's own threads and on those of a made-up OpenMP runtime, and the memory that
// stays with a thread; built with -fsanitize=thread, without a race.
#include "../cpu/threads.h"

#include <atomic>
#include <chrono>
#include <thread>

#include "../cpu/interface.h"
#include "check.h"

namespace {

// Each task runs once, and no two at once under one worker's number: a race on its own sum.
void tasks(int64_t count, int workers, const char* runtime) {
    struct Context {
        std::vector<int> runs;
        std::vector<int64_t> sums;
        std::atomic<int> strangers{0};
        bool slow;
    } context{
        std::vector<int>(size_t(count)), std::vector<int64_t>(size_t(workers)), {}, count < 10};
    const ffk::Task task = [](void* at, int64_t index, int worker) {
        Context& c = *static_cast<Context*>(at);
        c.runs[size_t(index)]++;
        // So long that each worker has its turn.
        if (c.slow) std::this_thread::sleep_for(std::chrono::milliseconds(5));
        if (worker >= 0 && size_t(worker) < c.sums.size())
            c.sums[size_t(worker)] += index;
        else
            c.strangers++;
    };
    ffk::run_tasks(count, workers, task, &context);
    check::same(context.strangers, 0, "tasks under numbers of no worker, %lld on %d of %s",
                (long long)count, workers, runtime);
    int64_t sum = 0;
    for (const int64_t part : context.sums) sum += part;
    for (size_t i = 0; i < context.runs.size(); i++)
        check::same(context.runs[i], 1, "runs of task %zu of %lld on %d of %s", i, (long long)count,
                    workers, runtime);
    check::same(sum, count * (count - 1) / 2, "the workers' sums of %lld tasks on %d of %s",
                (long long)count, workers, runtime);
}

// What an OpenMP runtime offers: `work` on so many threads at once.
void parallel(void (*work)(void*), void* data, unsigned threads, unsigned) {
    std::vector<std::thread> others;
    for (unsigned i = 1; i < threads; i++) others.emplace_back(work, data);
    work(data);
    for (std::thread& other : others) other.join();
}

// Memory stays from one call to the next, is each thread's own, and is whole.
void memory() {
    const size_t floats = size_t(3) << 18;
    float* own = ffk::workspace(floats);
    own[0] = own[floats - 1] = 1;
    check::same(own == ffk::workspace(floats / 2), 1,
                "whether a smaller workspace is the one before");
    float* another = nullptr;
    std::thread([&] {
        another = ffk::workspace(floats);
        another[0] = another[floats - 1] = 2;
    }).join();
    check::near(own[0] + own[floats - 1], 2, 0, "a workspace after another thread wrote its own");
    own = ffk::workspace(2 * floats);
    own[0] = own[2 * floats - 1] = 1;
}

}  // namespace

int main() {
    for (const bool openmp : {false, true}) {
        ffk_use_threads(openmp ? reinterpret_cast<void*>(parallel) : nullptr);
        for (const int64_t count : {0, 1, 2, 7, 50000})
            for (const int workers : {1, 2, 5})
                tasks(count, workers, openmp ? "OpenMP's threads" : "the library's threads");
    }
    memory();
    return check::result();
}

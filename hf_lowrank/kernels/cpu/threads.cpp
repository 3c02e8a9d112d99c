#include "threads.h"

#include <dlfcn.h>
#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>

namespace hf_lowrank {
namespace {

// Indices are handed out in runs, so that a thread reads neighboring rows. Runs are small enough for fast threads to
// help slow ones.
constexpr int64_t kRunsPerThread = 8;

struct Job {
    std::atomic<int64_t> next{0};
    int64_t count, step;
    void (*task)(void*, int64_t);
    void* context;

    void work() {
        for (int64_t start; (start = next.fetch_add(step, std::memory_order_relaxed)) < count;)
            for (int64_t index = start; index < std::min(start + step, count); ++index) task(context, index);
    }
};

void work_on(void* job) { static_cast<Job*>(job)->work(); }

// Sleeping threads that join whatever job is open. A second caller meanwhile works alone.
class Pool {
   public:
    void run(Job& job, int threads) {
        std::unique_lock<std::mutex> ownership(owner_, std::try_to_lock);
        if (!ownership.owns_lock()) return job.work();
        {
            std::lock_guard<std::mutex> lock(mutex_);
            for (; started_ < threads - 1; ++started_) std::thread(&Pool::serve, this).detach();
            job_ = &job;
            places_ = threads - 1;
        }
        wake_.notify_all();
        job.work();
        std::unique_lock<std::mutex> lock(mutex_);
        job_ = nullptr;
        idle_.wait(lock, [this] { return running_ == 0; });
    }

   private:
    void serve() {
        std::unique_lock<std::mutex> lock(mutex_);
        for (;;) {
            wake_.wait(lock, [this] { return job_ && places_ > 0; });
            Job* job = job_;
            --places_;
            ++running_;
            lock.unlock();
            job->work();
            lock.lock();
            if (--running_ == 0) idle_.notify_one();
        }
    }

    std::mutex owner_, mutex_;
    std::condition_variable wake_, idle_;
    Job* job_ = nullptr;
    int places_ = 0, running_ = 0, started_ = 0;
};

// The pool is never destroyed, as its threads sleep in it until the process ends. A forked child starts afresh.
std::atomic<Pool*> pool{nullptr};
std::atomic<bool> forked{false};

Pool& own_pool() {
    Pool* current = pool.load();
    if (!current) {
        Pool* fresh = new Pool;
        if (pool.compare_exchange_strong(current, fresh)) return *fresh;
        delete fresh;
    }
    return *current;
}

using ParallelRegion = void (*)(void (*)(void*), void*, unsigned, unsigned);

ParallelRegion openmp_region() {
    static const ParallelRegion region = [] {
        pthread_atfork(nullptr, nullptr, [] {
            forked = true;
            pool = nullptr;
        });
        return reinterpret_cast<ParallelRegion>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    }();
    return region;
}

}  // namespace

void parallel_for(int threads, int64_t count, void (*task)(void*, int64_t), void* context) {
    Job job;
    job.count = count;
    job.step = std::max<int64_t>(count / (threads * kRunsPerThread), 1);
    job.task = task;
    job.context = context;
    if (threads <= 1 || count <= 1) return job.work();
    ParallelRegion region = openmp_region();
    // The team always has all threads: OpenMP would end those that a smaller team leaves over.
    if (region && !forked) region(work_on, &job, static_cast<unsigned>(threads), 0);
    else own_pool().run(job, threads);
}

}  // namespace hf_lowrank

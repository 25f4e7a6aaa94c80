// Threads that share the tasks of one phase at a time.
//
// Owns: helper threads, handing out tasks, waiting. Must not: know what a task computes.
// Tasks are taken one by one from a counter, so a helper that the kernel takes off its core delays a phase by one task,
// not by its share of all. Helpers spin for SPIN_NS after a phase, since the next follows at once within a step, and
// then sleep: between steps the cores belong to the router and the clients.
#pragma once
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

class Pool {
  public:
    explicit Pool(int threads) {
        for (int i = 1; i < threads; i++) helpers_.emplace_back([this] { help(); });
    }
    ~Pool() {
        {
            std::lock_guard<std::mutex> hold(mutex_);
            stopping_ = true;
        }
        wake_.notify_all();
        for (auto& helper : helpers_) helper.join();
    }
    int threads() const { return int(helpers_.size()) + 1; }

    // Calls task(i) for each i below count, from all threads; returns when all are done.
    template <class Task>
    void run(long count, const Task& task) {
        if (helpers_.empty() || count == 1) {
            for (long i = 0; i < count; i++) task(i);
            return;
        }
        Job job{[](const void* context, long i) { (*static_cast<const Task*>(context))(i); }, &task, count};
        job_.store(&job);
        if (sleepers_.load() > 0) {
            std::lock_guard<std::mutex> hold(mutex_);
            wake_.notify_all();
        }
        work(job);
        for (long turns = 0; job.done.load(std::memory_order_acquire) < count; turns++) relax(turns);
        job_.store(nullptr);
        for (long turns = 0; active_.load() != 0; turns++) relax(turns);
    }

  private:
    static constexpr long SPIN_NS = 40'000;
    static constexpr long SPINS_BEFORE_YIELD = 2'000;

    struct Job {
        void (*call)(const void*, long);
        const void* context;
        long count;
        std::atomic<long> next{0}, done{0};
    };

    static void work(Job& job) {
        long mine = 0;
        for (long i; (i = job.next.fetch_add(1, std::memory_order_relaxed)) < job.count; mine++) job.call(job.context, i);
        if (mine) job.done.fetch_add(mine, std::memory_order_release);
    }

    static void relax(long turns) {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
        if (turns > SPINS_BEFORE_YIELD) std::this_thread::yield();
    }

    // A helper counts as active before it looks for a job, and the job is withdrawn before its memory goes: so whoever
    // saw it is waited for.
    void help() {
        auto idle_since = std::chrono::steady_clock::now();
        for (long turns = 0;; turns++) {
            active_.fetch_add(1);
            Job* job = job_.load();
            const bool busy = job && job->next.load(std::memory_order_relaxed) < job->count;
            if (busy) work(*job);
            active_.fetch_sub(1);
            if (busy) {
                idle_since = std::chrono::steady_clock::now();
                continue;
            }
            for (int i = 0; i < 16; i++) relax(0);
            if (std::chrono::steady_clock::now() - idle_since < std::chrono::nanoseconds(SPIN_NS)) continue;
            if (!sleep()) return;
            idle_since = std::chrono::steady_clock::now();
        }
    }

    bool sleep() {
        std::unique_lock<std::mutex> hold(mutex_);
        sleepers_.fetch_add(1);
        // `run` stores the job before it reads `sleepers_`, so either it sees this sleeper or this sees the job.
        wake_.wait(hold, [this] {
            Job* job = job_.load();
            return stopping_ || job != nullptr;
        });
        sleepers_.fetch_sub(1);
        return !stopping_;
    }

    std::vector<std::thread> helpers_;
    std::atomic<Job*> job_{nullptr};
    std::atomic<int> active_{0}, sleepers_{0};
    std::mutex mutex_;
    std::condition_variable wake_;
    bool stopping_ = false;
};

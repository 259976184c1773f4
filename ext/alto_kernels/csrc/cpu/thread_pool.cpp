#include "thread_pool.hpp"

#include <pthread.h>

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

namespace alto::cpu {
namespace {

class Pool {
  public:
    void run(std::int64_t count, int threads, const std::function<void(std::int64_t)>& task) {
        std::lock_guard<std::mutex> one_caller(callers_);
        while (static_cast<int>(workers_.size()) < threads - 1) {
            const int index = static_cast<int>(workers_.size());
            workers_.emplace_back([this, index] { serve(index); });
        }
        {
            std::lock_guard<std::mutex> lock(mutex_);
            task_ = &task;
            count_ = count;
            next_.store(0);
            wanted_ = threads - 1;
            busy_ = wanted_;
            ++round_;
        }
        start_.notify_all();
        drain(task, count);
        std::unique_lock<std::mutex> lock(mutex_);
        done_.wait(lock, [this] { return busy_ == 0; });
        task_ = nullptr;
    }

  private:
    void drain(const std::function<void(std::int64_t)>& task, std::int64_t count) {
        for (std::int64_t i = next_.fetch_add(1); i < count; i = next_.fetch_add(1)) task(i);
    }

    void serve(int index) {
        std::uint64_t seen = 0;
        for (;;) {
            const std::function<void(std::int64_t)>* task = nullptr;
            std::int64_t count = 0;
            {
                std::unique_lock<std::mutex> lock(mutex_);
                start_.wait(lock, [&] { return round_ != seen && index < wanted_; });
                seen = round_;
                task = task_;
                count = count_;
            }
            drain(*task, count);
            std::lock_guard<std::mutex> lock(mutex_);
            if (--busy_ == 0) done_.notify_one();
        }
    }

    std::mutex callers_;
    std::mutex mutex_;
    std::condition_variable start_;
    std::condition_variable done_;
    std::vector<std::thread> workers_;
    const std::function<void(std::int64_t)>* task_ = nullptr;
    std::int64_t count_ = 0;
    std::atomic<std::int64_t> next_{0};
    std::uint64_t round_ = 0;
    int wanted_ = 0;
    int busy_ = 0;
};

// Never destroyed: its threads sleep until the process ends. A forked child has none of them, so it starts anew.
Pool* pool = nullptr;
std::once_flag fork_handler;

Pool& current_pool() {
    static std::mutex guard;
    std::lock_guard<std::mutex> lock(guard);
    std::call_once(fork_handler, [] { pthread_atfork(nullptr, nullptr, [] { pool = nullptr; }); });
    if (pool == nullptr) pool = new Pool();
    return *pool;
}

}  // namespace

void parallel_for(std::int64_t count, int threads, const std::function<void(std::int64_t)>& task) {
    if (count <= 1 || threads <= 1) {
        for (std::int64_t i = 0; i < count; ++i) task(i);
        return;
    }
    const auto limit = static_cast<std::int64_t>(threads);
    current_pool().run(count, static_cast<int>(count < limit ? count : limit), task);
}

}  // namespace alto::cpu

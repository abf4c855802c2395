// Threads that share the chunks of one job at a time.
//
// The caller works too and never waits for a thread that has not begun: a sleeping thread joins when it wakes, or not at all. Chunks are
// taken from a counter, so that a core that is needed elsewhere costs its share and no more. A second caller works alone.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>

namespace cloven {

class Pool {
 public:
  using Work = void (*)(const void* job, std::int64_t chunk);

  // Calls work(job, i) once for every i < chunks, on up to `threads` threads; returns when all calls have returned.
  void run(Work work, const void* job, std::int64_t chunks, int threads) {
    if (threads <= 1 || chunks <= 1) return by_itself(work, job, chunks);  // from within another job, too
    std::unique_lock<std::mutex> alone(callers_, std::try_to_lock);
    if (!alone.owns_lock()) return by_itself(work, job, chunks);
    {
      std::lock_guard<std::mutex> lock(state_);
      while (started_ < threads - 1 && start()) {
      }
      work_ = work;
      job_ = job;
      chunks_ = chunks;
      next_.store(0);
      seats_ = threads - 1;
    }
    wake_.notify_all();
    take(work, job, chunks);
    std::unique_lock<std::mutex> lock(state_);
    seats_ = 0;  // whoever wakes now finds nothing to do
    done_.wait(lock, [this] { return inside_ == 0; });
  }

 private:
  static void by_itself(Work work, const void* job, std::int64_t chunks) {
    for (std::int64_t i = 0; i < chunks; ++i) work(job, i);
  }

  bool start() {
    try {
      std::thread([this] { serve(); }).detach();
    } catch (...) {  // no thread to be had: fewer will do
      return false;
    }
    ++started_;
    return true;
  }

  [[noreturn]] void serve() {
    std::unique_lock<std::mutex> lock(state_);
    for (;;) {
      wake_.wait(lock, [this] { return seats_ > 0 && next_.load() < chunks_; });
      --seats_;
      ++inside_;
      const Work work = work_;
      const void* job = job_;
      const std::int64_t chunks = chunks_;
      lock.unlock();
      take(work, job, chunks);
      lock.lock();
      if (--inside_ == 0) done_.notify_one();
    }
  }

  void take(Work work, const void* job, std::int64_t chunks) {
    for (std::int64_t i; (i = next_.fetch_add(1)) < chunks;) work(job, i);
  }

  std::mutex callers_;  // held by the one caller that shares its job
  std::mutex state_;    // guards what follows
  std::condition_variable wake_, done_;
  Work work_ = nullptr;
  const void* job_ = nullptr;
  std::int64_t chunks_ = 0;
  std::atomic<std::int64_t> next_{0};
  int seats_ = 0;  // threads that may still join the job
  int inside_ = 0;
  int started_ = 0;
};

}  // namespace cloven

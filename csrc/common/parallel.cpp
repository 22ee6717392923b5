#include "common/parallel.hpp"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <utility>

#include <unistd.h>

namespace moeyard {
namespace {

long process_id() { return getpid(); }

// Going to sleep and being woken costs more than most waits last: first look on for a moment.
template <class Condition>
void look_on(Condition&& met) {
  const auto patience = std::chrono::steady_clock::now() + std::chrono::microseconds(50);
  while (!met() && std::chrono::steady_clock::now() < patience) {
  }
}

// One job at a time: workers and the caller draw task numbers from `next_`, in ascending order, until none is left.
class Pool {
 public:
  explicit Pool(long pid) : pid(pid) {}

  /// False, with nothing done, while another job runs: that of another thread, or the one that this call is nested in.
  bool try_run(int64_t count, int threads, const std::function<void(int64_t)>& task) {
    if (busy_.exchange(true, std::memory_order_acquire)) return false;
    const Release release{busy_};
    const int helpers = int(std::min<int64_t>(threads - 1, count - 1));
    grow(helpers);
    int asleep;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      task_ = &task, count_ = count, next_ = 0;
      wanted_ = helpers, ++generation_;
      asleep = asleep_;
    }
    wake(helpers - (size_ - asleep), asleep);
    draw();
    if (std::exception_ptr error = finish()) std::rethrow_exception(error);
    return true;
  }

  const long pid;

 private:
  struct Release {
    std::atomic<bool>& flag;
    ~Release() { flag.store(false, std::memory_order_release); }
  };

  // A system that refuses another thread costs speed, not the call: the caller draws every task that is left.
  void grow(int workers) {
    try {
      for (; size_ < workers; ++size_) std::thread(&Pool::work, this).detach();
    } catch (const std::system_error&) {
    }
  }

  // No more than are wanted: an earlier call may have asked for many more threads.
  void wake(int wanted, int asleep) {
    if (wanted >= asleep && asleep > 0) {
      wake_.notify_all();
      return;
    }
    for (int i = 0; i < wanted; ++i) wake_.notify_one();
  }

  // Every task below one that threw was drawn before it and runs to its end, so the lowest error is the one that a
  // single thread would have met.
  void draw() {
    for (int64_t i; (i = next_.fetch_add(1)) < count_;) {
      try {
        (*task_)(i);
      } catch (...) {
        std::lock_guard<std::mutex> lock(mutex_);
        if (!error_ || i < error_task_) error_ = std::current_exception(), error_task_ = i;
        next_ = count_;
      }
    }
  }

  std::exception_ptr finish() {
    std::unique_lock<std::mutex> lock(mutex_);
    wanted_ = 0;  // a worker that has not joined yet finds nothing left to do
    if (running_ > 0) {
      lock.unlock();
      look_on([&] { return running_ == 0; });
      lock.lock();
      done_.wait(lock, [&] { return running_ == 0; });
    }
    return std::exchange(error_, nullptr);
  }

  void work() {
    for (int64_t seen = 0;;) {
      look_on([&] { return generation_ != seen; });  // the next phase of the same call often comes at once
      std::unique_lock<std::mutex> lock(mutex_);
      ++asleep_;
      wake_.wait(lock, [&] { return generation_ != seen && wanted_ > 0; });
      --asleep_;
      seen = generation_, --wanted_, ++running_;
      lock.unlock();
      draw();
      lock.lock();
      if (--running_ == 0) done_.notify_one();
    }
  }

  std::atomic<bool> busy_{false};
  std::mutex mutex_;
  std::condition_variable wake_, done_;
  const std::function<void(int64_t)>* task_ = nullptr;
  int64_t count_ = 0, error_task_ = 0;
  std::atomic<int64_t> next_{0}, generation_{0};
  std::atomic<int> running_{0};
  int wanted_ = 0, size_ = 0, asleep_ = 0;
  std::exception_ptr error_;
};

// The pool is never destroyed: its workers sleep until the process ends. In a forked child the parent's pool has no
// threads and perhaps a held lock, so it is left alone and a new one takes its place.
Pool& pool() {
  static std::atomic<Pool*> current{nullptr};
  Pool* have = current.load(std::memory_order_acquire);
  const long pid = process_id();
  while (!have || have->pid != pid) {
    Pool* fresh = new Pool(pid);
    if (current.compare_exchange_strong(have, fresh, std::memory_order_acq_rel)) return *fresh;
    delete fresh;
  }
  return *have;
}

}  // namespace

void run_tasks(int64_t count, int threads, const std::function<void(int64_t)>& task) {
  if (threads > 1 && count > 1 && pool().try_run(count, threads, task)) return;
  for (int64_t i = 0; i < count; ++i) task(i);
}

}  // namespace moeyard

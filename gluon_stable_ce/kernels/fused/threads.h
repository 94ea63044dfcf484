/*
 * for_each: the parts of a work, on all processors. The results do not depend on how many there are.
 */
#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <mutex>
#include <system_error>
#include <thread>

#include <pthread.h>
#include <sched.h>

namespace {

// Threads do not survive a fork: forked workers compute alone.
bool forked = false;
const int kForkHandler = pthread_atfork(nullptr, nullptr, [] { forked = true; });

int count_processors() {
#ifdef __linux__
  cpu_set_t allowed;
  if (!sched_getaffinity(0, sizeof(allowed), &allowed)) return CPU_COUNT(&allowed);
#endif
  return int(std::thread::hardware_concurrency());
}

// All processors, where MXNet gives its worker half of them, as if each core were two; but what the user has
// set, as for the rest of MXNet. Small work takes one thread: to wake another one would take longer.
int count_threads(int64_t work) {
  static const int all = [] {
    const char *set = getenv("OMP_NUM_THREADS"), *most = getenv("MXNET_OMP_MAX_THREADS");
    const int threads = set && atoi(set) > 0 ? atoi(set) : count_processors();
    return most && atoi(most) > 0 ? std::min(threads, atoi(most)) : threads;
  }();
  return work < 1 << 18 || forked ? 1 : std::max(1, all);
}

// Threads that sleep until there is work. Whoever has work does not wait for those that have not begun: when
// other programs keep the processors busy, that would take longer than the work. OpenMP does wait.
class Helpers {
  std::mutex in_use, mutex;
  std::condition_variable wake, done;
  const std::function<void()>* job = nullptr;
  int count = 0, wanted = 0, active = 0;

  void help() {
    std::unique_lock<std::mutex> lock(mutex);
    for (;;) {
      wake.wait(lock, [this] { return wanted > 0; });
      const std::function<void()>* const mine = job;
      wanted--, active++;
      lock.unlock();
      (*mine)();
      lock.lock();
      if (--active == 0) done.notify_one();
    }
  }

 public:
  // Runs `all`, which ends when nothing is left to do, here and in up to `helpers` other threads.
  void run(int helpers, const std::function<void()>& all) {
    std::unique_lock<std::mutex> only(in_use, std::try_to_lock);
    if (!only) return all();
    {
      std::lock_guard<std::mutex> lock(mutex);
      try {
        for (; count < helpers; count++) std::thread(&Helpers::help, this).detach();
      } catch (const std::system_error&) {  // the system allows no more
      }
      job = &all, wanted = std::min(helpers, count);
    }
    wake.notify_all();
    all();
    std::unique_lock<std::mutex> lock(mutex);
    wanted = 0;
    done.wait(lock, [this] { return active == 0; });
  }
};

// One for all loops. Never deleted: its threads wait for it until the process ends.
Helpers& all_helpers() {
  static Helpers& helpers = *new Helpers;
  return helpers;
}

template <typename F> void for_each(int64_t n, int64_t work, F body) {
  const int threads = int(std::min<int64_t>(n, count_threads(work)));
  std::atomic<int64_t> next(0);
  const auto all = [&] {
    for (int64_t i; (i = next++) < n;) body(i);
  };
  if (threads > 1) all_helpers().run(threads - 1, all);
  else all();
}

}  // namespace

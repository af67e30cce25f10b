// One product by several threads, each taking chunks of columns until none is left.
#pragma once

#include <atomic>
#include <functional>
#include <memory>
#include <thread>

#include "problem.h"

namespace mesh_transformer {

// The caller takes chunks too and would finish alone, so that nothing is lost or stuck if `schedule` starts its tasks
// late or never. A task that starts late finds no chunk left and touches nothing but the counters, which it owns a share
// of.
template <class Schedule>
void multiply(const Problem& problem, const Path& path, size_t threads, Schedule&& schedule) {
  struct Work {
    Problem problem;
    Columns columns;
    size_t chunk, chunks;
    std::atomic<size_t> next{0}, done{0};
    void run() {
      for (size_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < chunks;) {
        const size_t begin = i * chunk, end = begin + chunk;
        columns(problem, begin, end < problem.columns ? end : problem.columns);
        done.fetch_add(1, std::memory_order_release);
      }
    }
  };
  if (problem.rows == 0 || problem.columns == 0) return;
  if (threads < 1) threads = 1;
  // Below this many weights waking another thread takes longer than the work.
  if (problem.inner * problem.columns < (size_t{1} << 15)) threads = 1;
  auto work = std::make_shared<Work>();
  work->problem = problem;
  work->columns = path.columns;
  work->chunk = chunk_columns(problem, threads);
  work->chunks = (problem.columns + work->chunk - 1) / work->chunk;
  for (size_t i = 1; i < threads && i < work->chunks; ++i) schedule(std::function<void()>([work] { work->run(); }));
  work->run();
  // Others may be in the middle of a chunk, which takes microseconds; if they were interrupted, let them run.
  for (size_t spins = 0; work->done.load(std::memory_order_acquire) < work->chunks; ++spins)
    if (spins > 1000) std::this_thread::yield();
}

}  // namespace mesh_transformer

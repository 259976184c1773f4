// A fixed set of worker threads that share out numbered tasks.
#pragma once

#include <cstdint>
#include <functional>

namespace alto::cpu {

// Calls task(i) once for every i in [0, count), on up to `threads` threads, the caller's among them; returns when all
// are done. Which thread runs a task never changes what the task computes. One caller at a time; others wait.
void parallel_for(std::int64_t count, int threads, const std::function<void(std::int64_t)>& task);

}  // namespace alto::cpu

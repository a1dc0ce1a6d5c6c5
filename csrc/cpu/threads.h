// Work that is shared among threads.
#pragma once

#include <cstdint>
#include <functional>

namespace unike {

// work(part, begin, end) over [0, n) in contiguous parts, as many as `threads` or fewer, the first on this thread. What no
// thread can be started for runs on this one too. It returns when all are done; what one of them throws, it throws.
void share(int64_t n, int64_t threads, const std::function<void(int64_t, int64_t, int64_t)>& work);

}  // namespace unike

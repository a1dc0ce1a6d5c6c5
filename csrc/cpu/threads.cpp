#include "threads.h"

#include <algorithm>
#include <exception>
#include <system_error>
#include <thread>
#include <vector>

namespace unike {
namespace {

// Threads that are waited for, whatever is thrown meanwhile: one that is destroyed while it runs ends the process.
class Joined {
  public:
    explicit Joined(int64_t most) { threads_.reserve(size_t(most)); }
    ~Joined() {
        for (std::thread& thread : threads_) thread.join();
    }
    Joined(const Joined&) = delete;
    Joined& operator=(const Joined&) = delete;

    // false: the system has no more of them.
    template <typename Work>
    bool start(const Work& work, int64_t part) {
        try {
            threads_.emplace_back(work, part);
        } catch (const std::system_error&) {
            return false;
        }
        return true;
    }

  private:
    std::vector<std::thread> threads_;
};

}  // namespace

void share(int64_t n, int64_t threads, const std::function<void(int64_t, int64_t, int64_t)>& work) {
    const int64_t parts = std::max<int64_t>(1, std::min(threads, n));
    const auto run = [&](int64_t part) { work(part, n * part / parts, n * (part + 1) / parts); };
    std::vector<std::exception_ptr> thrown(static_cast<size_t>(parts));
    const auto elsewhere = [&](int64_t part) {
        try {
            run(part);
        } catch (...) {
            thrown[size_t(part)] = std::current_exception();
        }
    };
    {
        Joined others(parts - 1);
        int64_t part = 1;
        while (part < parts && others.start(elsewhere, part)) ++part;
        run(0);
        for (; part < parts; ++part) run(part);
    }
    for (const std::exception_ptr& error : thrown)
        if (error) std::rethrow_exception(error);
}

}  // namespace unike

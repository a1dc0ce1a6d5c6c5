// Preloaded into a process, it makes threads and memory scarce from when it is told: see test_cpu_threads.py.
#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>

#include <cstdlib>
#include <new>

static const pthread_t first = pthread_self();

extern "C" {

int threads_left = -1;  // that can still be started; below zero: any number
int starved = 0;        // whether threads of the process but the first get no memory

int pthread_create(pthread_t* thread, const pthread_attr_t* how, void* (*run)(void*), void* argument) noexcept {
    if (threads_left == 0) return EAGAIN;
    if (threads_left > 0) --threads_left;
    return reinterpret_cast<decltype(&pthread_create)>(dlsym(RTLD_NEXT, "pthread_create"))(thread, how, run, argument);
}

}  // extern "C"

void* operator new(std::size_t bytes) {
    void* found = starved && !pthread_equal(pthread_self(), first) ? nullptr : std::malloc(bytes);
    if (found == nullptr) throw std::bad_alloc();
    return found;
}

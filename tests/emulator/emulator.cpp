// Runs the blocks of a launch one after the other in pieces, in an order drawn by a seed: every thread is a fiber, which runs
// until it must wait for another.
#include <sys/mman.h>

#include <algorithm>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "device.cuh"

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace emulator {

constexpr size_t kStack = 128 * 1024;
constexpr size_t kGuard = 128;  // bytes around a block's shared memory
constexpr unsigned char kPattern = 0xA5;
constexpr uint64_t kCanary = 0x5ca1ab1e0ddba11u;

const Place* place = nullptr;
dim3 block_size, grid_size;
uint32_t blocks_of_cluster = 1;

namespace {

uint64_t seed = 1, state = 1;
std::string message = "no error";
int multiprocessors = 3, shared_limit = 227 * 1024;
uint64_t launches = 0, bulk_copies = 0;
enum class Copies { late, at_once, either } copies = Copies::late;
const std::function<void()>* body = nullptr;

uint32_t draw(uint32_t below) {  // xorshift64*
    state ^= state >> 12, state ^= state << 25, state ^= state >> 27;
    return static_cast<uint32_t>((state * 0x2545f4914f6cdd1dull) >> 32) % below;
}

// ---------------------------------------------------------------------------------------------- switching stacks

#if defined(__x86_64__)
struct Context {
    void* stack = nullptr;
};
extern "C" void emulator_switch(void** from, void* to);
asm(R"(
.text
.hidden emulator_switch
.globl emulator_switch
.type emulator_switch, @function
emulator_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size emulator_switch, . - emulator_switch
)");
void prepare(Context& context, char* stack, void (*start)()) {
    void** top = reinterpret_cast<void**>(stack + kStack);
    *--top = nullptr;  // the return address that `start` never uses
    *--top = reinterpret_cast<void*>(start);
    for (int i = 0; i < 6; ++i) *--top = nullptr;
    context.stack = top;
}
void go(Context& from, Context& to) { emulator_switch(&from.stack, to.stack); }
#else
using Context = ucontext_t;
void prepare(Context& context, char* stack, void (*start)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack, context.uc_stack.ss_size = kStack, context.uc_link = nullptr;
    makecontext(&context, start, 0);
}
void go(Context& from, Context& to) { swapcontext(&from, &to); }
#endif

}  // namespace

// ---------------------------------------------------------------------------------------------- what is running

struct Copy {
    void* to;
    const void* from;
    int bytes;
};

struct BulkCopy {
    void* to;
    const void* from;
    int bytes;
    CopyBarrier* barrier;
};

struct Barrier {
    int arrived = 0;
    std::vector<Fiber*> waiting;
};

struct Warp;
struct Block;

struct Fiber {
    Place place;
    Context context;
    char* stack = nullptr;
    Block* block = nullptr;
    Warp* warp = nullptr;
    bool done = false;
    const char* waits_for = nullptr;
    std::vector<Copy> pending;   // started, oldest first
    std::vector<size_t> groups;  // ends of the committed groups in `pending`
};

struct Meeting {  // of the lanes of one mask, again and again
    uint32_t mask = 0;
    int turn = 0;
    const char* what = nullptr;
    Barrier barrier;
    alignas(64) unsigned char left[2][32 * 64];
};

struct Warp {
    std::vector<std::unique_ptr<Fiber>> lanes;
    uint32_t ready = 0;
    std::vector<std::unique_ptr<Meeting>> meetings;
};

struct Cluster;

struct Block {
    Cluster* cluster = nullptr;
    std::vector<std::unique_ptr<Warp>> warps;
    std::vector<unsigned char> storage;
    unsigned char* shared = nullptr;
    Barrier barrier;
    int threads = 0, left = 0;
    bool started = false;  // one of its threads has run
    std::vector<BulkCopy> bulk;  // not done yet
};

struct Cluster {
    std::vector<std::unique_ptr<Block>> blocks;
    Barrier barrier;
    int left = 0;
};

namespace {

Context scheduler;
Fiber* current = nullptr;
bool failed = false;
bool stragglers = false;  // in this launch, some warp, or some of its lanes, do not run while any other can
bool released = false;    // a barrier was just passed: whoever is held back stays where it is
int shared_size = 0;
std::vector<char*> stacks;  // not in use
std::vector<std::unique_ptr<Cluster>> running;

char* take_stack() {
    if (stacks.empty()) {
        void* memory = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (memory == MAP_FAILED) throw std::bad_alloc();
        stacks.push_back(static_cast<char*>(memory));
    }
    char* stack = stacks.back();
    stacks.pop_back();
    *reinterpret_cast<uint64_t*>(stack) = kCanary;
    return stack;
}

void leave() { go(current->context, scheduler); }

void block_on(Barrier& barrier, const char* what) {
    barrier.waiting.push_back(current);
    current->waits_for = what;
    current->warp->ready &= ~(1u << current->place.lane);
    leave();
}

void arrive(Barrier& barrier, int expected, const char* what, bool of_block = true) {
    if (++barrier.arrived < expected) return block_on(barrier, what);
    barrier.arrived = 0;
    for (Fiber* fiber : barrier.waiting) {
        fiber->warp->ready |= 1u << fiber->place.lane;
        fiber->waits_for = nullptr;
    }
    barrier.waiting.clear();
    released = of_block && stragglers;
    yield(released);  // the last to arrive is not always the first to go on
}

void perform(const Copy& copy) {
    std::memcpy(copy.to, copy.from, static_cast<size_t>(copy.bytes));
    std::memset(static_cast<char*>(copy.to) + copy.bytes, 0, static_cast<size_t>(16 - copy.bytes));
}

void start() {
    current->block->started = true;
    (*body)();
    current->done = true;
    current->warp->ready &= ~(1u << current->place.lane);
    leave();
    std::abort();
}

std::unique_ptr<Cluster> make_cluster(dim3 first, const dim3& size, int blocks) {
    auto cluster = std::make_unique<Cluster>();
    const int threads = static_cast<int>(size.x * size.y * size.z);
    cluster->left = blocks;
    for (int rank = 0; rank < blocks; ++rank) {
        auto block = std::make_unique<Block>();
        block->cluster = cluster.get();
        block->threads = block->left = threads;
        // Poison: NaN in every floating-point format, -1 in integers.
        block->storage.assign(static_cast<size_t>(shared_size) + 2 * kGuard + 128, kPattern);
        auto base = reinterpret_cast<uintptr_t>(block->storage.data()) + kGuard;
        block->shared = reinterpret_cast<unsigned char*>((base + 127) / 128 * 128);
        std::memset(block->shared, 0xff, static_cast<size_t>(shared_size));
        for (int i = 0; i < threads; ++i) {
            if (i % 32 == 0) block->warps.push_back(std::make_unique<Warp>());
            Warp& warp = *block->warps.back();
            auto fiber = std::make_unique<Fiber>();
            fiber->place.thread = dim3(i % size.x, i / size.x % size.y, i / (size.x * size.y));
            fiber->place.block = dim3(first.x + rank, first.y, first.z);
            fiber->place.lane = i % 32, fiber->place.shared = block->shared;
            fiber->block = block.get(), fiber->warp = &warp;
            fiber->stack = take_stack();
            prepare(fiber->context, fiber->stack, &start);
            warp.ready |= 1u << fiber->place.lane;
            warp.lanes.push_back(std::move(fiber));
        }
        cluster->blocks.push_back(std::move(block));
    }
    return cluster;
}

std::string name_of(const Fiber& fiber) {
    const Place& p = fiber.place;
    const auto three = [](const dim3& d) {
        return "(" + std::to_string(d.x) + ", " + std::to_string(d.y) + ", " + std::to_string(d.z) + ")";
    };
    return "thread " + three(p.thread) + " of block " + three(p.block);
}

void complain(const std::string& what) {
    if (!failed) message = what + ", seed " + std::to_string(seed);
    failed = true;
}

void resume(Fiber& fiber) {
    current = &fiber;
    place = &fiber.place;
    go(scheduler, fiber.context);
    if (*reinterpret_cast<uint64_t*>(fiber.stack) != kCanary) complain("the stack of " + name_of(fiber) + " overflowed");
    if (fiber.done) --fiber.block->left;
}

void end_block(Block& block) {
    const unsigned char* after = block.shared + shared_size;
    const unsigned char* before = block.storage.data();
    const auto whole = [](const unsigned char* from, const unsigned char* to) {
        return std::all_of(from, to, [](unsigned char byte) { return byte == kPattern; });
    };
    if (!whole(before, block.shared) || !whole(after, after + kGuard))
        complain("a block wrote outside of its " + std::to_string(shared_size) + " bytes of shared memory");
    std::memset(block.shared, 0xff, static_cast<size_t>(shared_size));  // gone for the others of its cluster
}

void drop(Cluster& cluster) {
    for (auto& block : cluster.blocks)
        for (auto& warp : block->warps)
            for (auto& fiber : warp->lanes) stacks.push_back(fiber->stack);
}

}  // namespace

void fail(const char* what) {
    complain(name_of(*current) + ": " + what);
    leave();
    std::abort();
}

void yield(bool always) {
    if (always || draw(4) == 0) leave();
}

void sync_block() { arrive(current->block->barrier, current->block->threads, "__syncthreads"); }

void sync_cluster() {
    Cluster& cluster = *current->block->cluster;
    arrive(cluster.barrier, current->block->threads * static_cast<int>(cluster.blocks.size()), "cluster_sync");
}

unsigned char* shared_of(uint32_t rank) {
    const Block& block = *current->block->cluster->blocks[rank];
    if (!block.started) fail("cluster_ptr: that block may not have started: cluster_sync first");
    return block.shared;
}

bool in_shared(const void* address, size_t bytes) {
    const auto* at = static_cast<const unsigned char*>(address);
    return at >= place->shared && at + bytes <= place->shared + shared_size;
}

const unsigned char* meet(uint32_t mask, const char* what, const void* left, size_t bytes) {
    const uint32_t lane = place->lane;
    if (bytes > 64) fail("more than 64 bytes of a lane");
    if (!(mask >> lane & 1)) fail("a lane is not in the mask that it names");
    auto& meetings = current->warp->meetings;
    auto found = std::find_if(meetings.begin(), meetings.end(), [mask](auto& one) { return one->mask == mask; });
    if (found == meetings.end()) {
        meetings.push_back(std::make_unique<Meeting>());
        meetings.back()->mask = mask;
        found = meetings.end() - 1;
    }
    Meeting& meeting = **found;
    if (meeting.barrier.arrived == 0) meeting.what = what;
    if (std::strcmp(meeting.what, what)) {
        complain(name_of(*current) + ": " + what + ", while other lanes of its mask are at " + meeting.what);
        leave();
    }
    unsigned char* slots = meeting.left[meeting.turn];
    if (bytes) std::memcpy(slots + 64 * lane, left, bytes);
    if (meeting.barrier.arrived + 1 == __builtin_popcount(mask)) meeting.turn ^= 1;
    arrive(meeting.barrier, __builtin_popcount(mask), what, false);
    return slots;
}

void copy_async(void* shared, const void* global, int bytes) {
    if (bytes < 0 || bytes > 16) fail("cp_async16: bytes must be 0 to 16");
    if (reinterpret_cast<uintptr_t>(shared) % 16 || reinterpret_cast<uintptr_t>(global) % 16)
        fail("cp_async16: an address is not 16-byte aligned");
    if (!in_shared(shared, 16)) fail("cp_async16: not the block's shared memory");
    const Copy copy{shared, global, bytes};
    if (copies == Copies::at_once || (copies == Copies::either && draw(2))) return perform(copy);
    current->pending.push_back(copy);
}

void commit_copies() { current->groups.push_back(current->pending.size()); }

void wait_copies(int groups) {
    auto& ends = current->groups;
    if (static_cast<int>(ends.size()) <= groups) return;
    const size_t done = ends[ends.size() - 1 - static_cast<size_t>(groups)];
    for (size_t i = 0; i < done; ++i) perform(current->pending[i]);
    current->pending.erase(current->pending.begin(), current->pending.begin() + static_cast<long>(done));
    ends.erase(ends.begin(), ends.end() - groups);
    for (size_t& end : ends) end -= done;
}

// A barrier's phase: its parity in the lowest bit, and above it a mark that no memory holds by chance.
constexpr uint16_t kStarted = 0x5ac6;
constexpr int kPatience = 100000;  // turns that a thread waits for bytes which nobody sends

CopyBarrier* checked(CopyBarrier* barrier, const char* what) {
    if (!in_shared(barrier, sizeof(CopyBarrier)) || reinterpret_cast<uintptr_t>(barrier) % 8)
        fail((std::string(what) + ": the barrier is not 8 aligned bytes of shared memory").c_str());
    if ((barrier->phase & ~1) != kStarted) fail((std::string(what) + ": nobody started the barrier").c_str());
    return barrier;
}

void settle(CopyBarrier* barrier) {
    if (barrier->named && barrier->bytes == 0) barrier->named = 0, barrier->phase ^= 1;
}

void perform(const BulkCopy& copy) {
    ++bulk_copies;
    std::memcpy(copy.to, copy.from, static_cast<size_t>(copy.bytes));
    copy.barrier->bytes -= copy.bytes;
    settle(copy.barrier);
}

void start_barrier(CopyBarrier* barrier) {
    if (!in_shared(barrier, sizeof(CopyBarrier))) fail("start_barrier: not the block's shared memory");
    *barrier = {0, 0, kStarted};
}

void expect_bytes(CopyBarrier* barrier, int bytes) {
    if (checked(barrier, "expect_bytes")->named) fail("expect_bytes: this phase's bytes were named before");
    barrier->bytes += bytes, barrier->named = 1;
    settle(barrier);
    yield(false);
}

void bulk_copy(void* shared, const void* global, int bytes, CopyBarrier* barrier) {
    checked(barrier, "bulk_copy");
    if (reinterpret_cast<uintptr_t>(shared) % 16 || reinterpret_cast<uintptr_t>(global) % 16 || bytes <= 0 || bytes % 16)
        fail("bulk_copy: addresses and bytes must be multiples of 16");
    if (!in_shared(shared, static_cast<size_t>(bytes))) fail("bulk_copy: not the block's shared memory");
    const BulkCopy copy{shared, global, bytes, barrier};
    if (copies == Copies::at_once || (copies == Copies::either && draw(2))) return perform(copy);
    current->block->bulk.push_back(copy);
}

void wait_for_bytes(CopyBarrier* barrier, uint32_t parity) {
    checked(barrier, "wait_for_bytes");
    for (int turn = 0; (barrier->phase & 1u) == parity; ++turn) {
        auto& waiting = current->block->bulk;  // what others asked for comes when somebody needs it
        std::vector<BulkCopy> rest;
        for (const BulkCopy& copy : waiting)
            if (copy.barrier == barrier)
                perform(copy);
            else
                rest.push_back(copy);
        waiting.swap(rest);
        if ((barrier->phase & 1u) != parity) break;
        if (turn == kPatience) fail("wait_for_bytes: nobody sends them");
        yield(true);
    }
}

cudaError_t run(const dim3& grid, const dim3& block, int cluster, int shared_bytes, const std::function<void()>& kernel) {
    const uint64_t threads = uint64_t(block.x) * block.y * block.z, blocks = uint64_t(grid.x) * grid.y * grid.z;
    message = "";
    if (threads < 1 || threads > 1024) message = std::to_string(threads) + " threads in a block";
    if (blocks < 1 || grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535) message = "no device takes this grid";
    if (cluster < 1 || cluster > 8 || grid.x % static_cast<unsigned>(cluster))
        message = "clusters of " + std::to_string(cluster) + " in a grid of " + std::to_string(grid.x);
    if (shared_bytes < 0 || shared_bytes > shared_limit) message = std::to_string(shared_bytes) + " bytes of shared memory";
    if (!message.empty()) return cudaErrorInvalidConfiguration;

    state = (seed + 1) * 0x9e3779b97f4a7c15ull + ++launches;
    copies = static_cast<Copies>(draw(3));
    body = &kernel, block_size = block, grid_size = grid, shared_size = shared_bytes, failed = false;
    blocks_of_cluster = static_cast<uint32_t>(cluster);
    std::vector<uint64_t> order(blocks / static_cast<unsigned>(cluster));
    for (size_t i = 0; i < order.size(); ++i) order[i] = i;
    for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[draw(static_cast<uint32_t>(i))]);
    const size_t together = 1 + draw(8);  // clusters that are under way at a time
    stragglers = draw(2), released = false;
    const bool whole = draw(2);  // nor do the others of its block
    const Warp* straggler = nullptr;
    uint32_t held = 0;  // the straggler's lanes that do not run
    size_t next = 0;
    std::vector<Warp*> ready;
    while (!failed && (next < order.size() || !running.empty())) {
        while (running.size() < together && next < order.size()) {
            const uint64_t first = order[next++] * static_cast<unsigned>(cluster);
            const dim3 at(static_cast<unsigned>(first % grid.x), static_cast<unsigned>(first / grid.x % grid.y),
                          static_cast<unsigned>(first / (uint64_t(grid.x) * grid.y)));
            running.push_back(make_cluster(at, block, cluster));
        }
        ready.clear();
        for (auto& one : running)
            for (auto& of_cluster : one->blocks)
                for (auto& warp : of_cluster->warps)
                    if (warp->ready) ready.push_back(warp.get());
        if (ready.empty()) {
            std::string where = "nothing can go on";
            for (auto& one : running)
                for (auto& of_cluster : one->blocks)
                    for (auto& warp : of_cluster->warps)
                        for (auto& fiber : warp->lanes)
                            if (fiber->waits_for && where.size() < 400)
                                where += "; " + name_of(*fiber) + " waits at " + fiber->waits_for;
            complain(where);
            break;
        }
        if (std::find(ready.begin(), ready.end(), straggler) == ready.end() || draw(32) == 0) {
            straggler = stragglers ? ready[draw(static_cast<uint32_t>(ready.size()))] : nullptr;
            held = whole || draw(2) ? ~0u : draw(~0u);
        }
        const auto late = [&](const Warp* warp) -> uint32_t {  // the lanes that are held back
            if (!straggler) return 0;
            if (warp == straggler) return held;
            return whole && warp->lanes[0]->block == straggler->lanes[0]->block ? ~0u : 0;
        };
        const auto stuck = [&](const Warp* warp) { return (warp->ready & ~late(warp)) == 0; };
        const bool all_stuck = std::all_of(ready.begin(), ready.end(), stuck);
        if (!all_stuck) ready.erase(std::remove_if(ready.begin(), ready.end(), stuck), ready.end());
        // A few turns before the list is made anew; a warp of it may meanwhile have become unable to go on.
        released = false;
        for (size_t turn = 0; turn < 2 * ready.size() && !failed && !released; ++turn) {
            Warp& warp = *ready[draw(static_cast<uint32_t>(ready.size()))];
            const uint32_t offset = draw(32), may = all_stuck ? ~0u : ~late(&warp);
            for (uint32_t i = 0; i < 32 && !failed && !released; ++i) {
                const uint32_t lane = (i + offset) % 32;
                if (warp.ready & may & 1u << lane) resume(*warp.lanes[lane]);
            }
        }
        for (auto& one : running)
            for (auto& of_cluster : one->blocks)
                if (of_cluster->left == 0) end_block(*of_cluster), of_cluster->left = -1, --one->left;
        for (size_t i = running.size(); i-- > 0;)
            if (running[i]->left == 0) {
                drop(*running[i]);
                running.erase(running.begin() + static_cast<long>(i));
            }
    }
    for (auto& one : running) drop(*one);
    running.clear();
    current = nullptr, place = nullptr, body = nullptr;
    return failed ? cudaErrorLaunchFailure : cudaSuccess;
}

}  // namespace emulator

namespace unike {

cudaError_t current_device(Device& device) {
    device = {emulator::multiprocessors, emulator::shared_limit, 9};
    return cudaSuccess;
}

}  // namespace unike

cudaError_t cudaGetDeviceCount(int* count) {
    *count = 1;
    return cudaSuccess;
}
const char* cudaGetErrorString(cudaError_t) { return emulator::message.c_str(); }
const char* cudaGetErrorName(cudaError_t error) { return error == cudaErrorLaunchFailure ? "failed" : "refused"; }

#define EXPORT extern "C" __attribute__((visibility("default")))
EXPORT void emulator_seed(uint64_t seed) { emulator::seed = seed, emulator::launches = 0; }
EXPORT void emulator_device(int multiprocessors, int shared_bytes) {
    emulator::multiprocessors = multiprocessors, emulator::shared_limit = shared_bytes;
}
// How many rows the copy engine has brought since it was asked last.
EXPORT uint64_t emulator_bulk_copies() { return std::exchange(emulator::bulk_copies, 0); }

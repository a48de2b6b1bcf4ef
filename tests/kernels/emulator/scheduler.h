// Runs the threads of a block on the CPU, one at a time, each as a fiber that gives way where CUDA threads wait for
// each other. What a GPU answers with a hang or wrong numbers ends here with a message: deadlocks, divergent warps,
// accesses outside of shared memory, misaligned vectors.
#pragma once

#include <csetjmp>
#include <csignal>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

struct uint3 {
    unsigned x, y, z;
};

// Everything is static: a process loads many kernels, each with its own emulator.
static uint3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

constexpr int MAX_THREADS = 1024;
constexpr size_t STACK = 64 << 10, FENCE = 256 << 10;
constexpr size_t PAGE = 16 << 10;  // a multiple of the system's

enum class State { ready, in_warp, at_barrier, done };

// What the lanes of a warp do together: gets the data of each lane, of which those in the mask are there.
using Perform = void (*)(unsigned mask, void *const *lanes);

struct Copy {
    void *shared;
    const void *global;
    int size, group;
};

struct Fiber {
    State state;
    bool started;
    uint3 index;
    jmp_buf context;
    // in_warp
    const char *operation;
    unsigned mask;
    Perform perform;
    void *data;
    // asynchronous copies under way
    int groups;
    std::vector<Copy> copies;
};

// Pages between two that nobody may touch: [fence | memory | fence].
class FencedMemory {
public:
    explicit FencedMemory(size_t size) : size_((size + PAGE - 1) / PAGE * PAGE) {
        void *pages = mmap(nullptr, size_ + 2 * FENCE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        begin_ = static_cast<unsigned char *>(pages) + FENCE;
        mprotect(begin_, size_, PROT_READ | PROT_WRITE);
    }
    FencedMemory(const FencedMemory &) = delete;
    ~FencedMemory() { munmap(begin_ - FENCE, size_ + 2 * FENCE); }
    unsigned char *begin() const { return begin_; }
    unsigned char *end() const { return begin_ + size_; }
    bool fences(const unsigned char *address) const {
        return begin_ - FENCE <= address && address < end() + FENCE && !(begin_ <= address && address < end());
    }

private:
    size_t size_;
    unsigned char *begin_;
};

static std::vector<Fiber> fibers;
static std::vector<FencedMemory *> stacks;  // kept from launch to launch
static Fiber *current;
static int running, arrived;  // threads that did not end; of these, at the barrier
static jmp_buf scheduler;
static ucontext_t entry;
static void (*kernel)(const void *params);
static const void *kernel_params;
static FencedMemory *shared_memory;
static unsigned char *shared;  // ends at the fence
static size_t shared_size;
static std::string failure;

inline int lane() { return (current - fibers.data()) % 32; }

inline std::string place() {
    char text[160];
    snprintf(text, sizeof text, "thread (%u, %u, %u) of block (%u, %u, %u)", threadIdx.x, threadIdx.y, threadIdx.z,
             blockIdx.x, blockIdx.y, blockIdx.z);
    return text;
}

// Ends the launch from inside a fiber.
[[noreturn]] __attribute__((noinline, format(printf, 1, 2))) static void fail(const char *format, ...) {
    char text[512];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    failure = place() + ": " + text;
    _longjmp(scheduler, 1);
}

__attribute__((noinline)) static void give_way() {
    if (!_setjmp(current->context)) _longjmp(scheduler, 1);
}

// Lanes meet: the last to come does the work of all.
__attribute__((noinline)) static void collective(const char *operation, unsigned mask, Perform perform, void *data) {
    Fiber *warp = current - lane();
    if (!(mask >> lane() & 1)) fail("%s with mask %08x, in which lane %d is not", operation, mask, lane());
    current->operation = operation, current->mask = mask, current->perform = perform, current->data = data;
    current->state = State::in_warp;
    void *lanes[32] = {};
    bool complete = true;
    for (int i = 0; i < 32; i++) {
        if (!(mask >> i & 1)) continue;
        const Fiber &other = warp[i];
        if (other.state == State::done) fail("%s waits for lane %d, which left the kernel", operation, i);
        bool meets = other.state == State::in_warp && other.mask >> lane() & 1;
        if (meets && (other.mask != mask || other.perform != perform))
            fail("divergent warp: %s with mask %08x, but lane %d is in %s with mask %08x", operation, mask, i,
                 other.operation, other.mask);
        complete &= meets;
        lanes[i] = other.data;
    }
    if (!complete) return give_way();
    perform(mask, lanes);
    for (int i = 0; i < 32; i++)
        if (mask >> i & 1) warp[i].state = State::ready;
}

inline void release_barrier() {
    if (arrived < running) return;
    for (Fiber &fiber : fibers)
        if (fiber.state == State::at_barrier) fiber.state = State::ready;
    arrived = 0;
}

__attribute__((noinline)) static void wait_at_barrier() {
    arrived++;
    current->state = State::at_barrier;
    release_barrier();
    if (current->state != State::ready) give_way();
}

static void run_thread() {
    kernel(kernel_params);
    current->state = State::done;
    running--;
    release_barrier();
    _longjmp(scheduler, 1);
}

__attribute__((noinline)) static void resume(Fiber &fiber, FencedMemory &stack) {
    current = &fiber;
    threadIdx = fiber.index;
    if (_setjmp(scheduler)) return;
    if (fiber.started) _longjmp(fiber.context, 1);
    fiber.started = true;
    entry.uc_stack.ss_sp = stack.begin();
    entry.uc_stack.ss_size = STACK;
    entry.uc_link = nullptr;
    makecontext(&entry, run_thread, 0);
    setcontext(&entry);
}

static std::string describe_deadlock() {
    char text[256];
    snprintf(text, sizeof text, "deadlock in block (%u, %u, %u): %d of %d threads in __syncthreads;", blockIdx.x,
             blockIdx.y, blockIdx.z, arrived, running);
    std::string message = text;
    for (size_t i = 0; i < fibers.size(); i += 32) {
        int waiting = 0;
        const Fiber *first = nullptr;
        for (size_t j = i; j < i + 32; j++) {
            if (fibers[j].state != State::in_warp) continue;
            if (!waiting++) first = &fibers[j];
        }
        if (!waiting) continue;
        snprintf(text, sizeof text, " %d lanes of warp %zu in %s with mask %08x;", waiting, i / 32, first->operation,
                 first->mask);
        message += text;
    }
    message.pop_back();
    return message;
}

// Runs the block whose index is set. Threads that nothing orders run in the order of their index, or against it.
static void run_block(bool reverse) {
    int count = int(fibers.size());
    for (int i = 0; i < count; i++) {
        fibers[i] = Fiber();
        fibers[i].index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y};
    }
    memset(shared, 0xff, shared_size);  // NaN in every floating-point format
    running = count;
    arrived = 0;
    while (running) {
        bool progress = false;
        for (int i = 0; i < count; i++) {
            int thread = reverse ? count - 1 - i : i;
            if (fibers[thread].state != State::ready) continue;
            progress = true;
            resume(fibers[thread], *stacks[thread]);
            if (!failure.empty()) return;
        }
        if (!progress) {
            failure = describe_deadlock();
            return;
        }
    }
}

static void on_signal(int signal, siginfo_t *info, void *) {
    auto *address = static_cast<unsigned char *>(info->si_addr);
    if (signal == SIGILL)  // where the compiler's checks trap
        fail("a misaligned access, or an index outside of an array");
    if (shared_memory->fences(address))
        fail("touches byte %td of the %zu bytes of dynamic shared memory", address - shared, shared_size);
    if (stacks[current - fibers.data()]->fences(address)) fail("needs more than %zu bytes of stack", STACK);
    fail("touches the address %p, where no memory is", static_cast<void *>(address));
}

// Turns the process's memory faults into failures while it lives.
class Signals {
public:
    Signals() : stack_(STACK) {
        struct sigaction action = {};
        action.sa_sigaction = on_signal;
        action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;  // the handler never returns
        stack_t stack = {};
        stack.ss_sp = stack_.begin();
        stack.ss_size = STACK;
        sigaltstack(&stack, &old_stack_);
        for (int i = 0; i < 3; i++) sigaction(SIGNALS[i], &action, &old_[i]);
    }
    ~Signals() {
        for (int i = 0; i < 3; i++) sigaction(SIGNALS[i], &old_[i], nullptr);
        sigaltstack(&old_stack_, nullptr);
    }

private:
    static constexpr int SIGNALS[3] = {SIGSEGV, SIGBUS, SIGILL};
    FencedMemory stack_;
    stack_t old_stack_;
    struct sigaction old_[3];
};

// Returns an empty text, or what went wrong.
static const std::string &launch(void (*function)(const void *), const unsigned (&grid)[3], const unsigned (&block)[3],
                                 size_t shared_bytes, const void *params, bool reverse) {
    failure.clear();
    blockDim = {block[0], block[1], block[2]};
    gridDim = {grid[0], grid[1], grid[2]};
    size_t threads = size_t(block[0]) * block[1] * block[2];
    if (threads == 0 || threads > MAX_THREADS || threads % 32)
        return failure = "a block of " + std::to_string(threads) + " threads: it takes whole warps, up to 1024 threads";
    kernel = function;
    kernel_params = params;
    fibers.resize(threads);
    while (stacks.size() < threads) stacks.push_back(new FencedMemory(STACK));
    shared_size = (shared_bytes + 15) / 16 * 16;
    FencedMemory memory(shared_size);
    shared_memory = &memory;
    shared = memory.end() - shared_size;
    Signals signals;
    getcontext(&entry);
    size_t blocks = size_t(grid[0]) * grid[1] * grid[2];
    for (size_t i = 0; i < blocks && failure.empty(); i++) {
        size_t index = reverse ? blocks - 1 - i : i;
        blockIdx.x = index % grid[0];
        blockIdx.y = index / grid[0] % grid[1];
        blockIdx.z = index / grid[0] / grid[1];
        run_block(reverse);
    }
    return failure;
}

}  // namespace emulator

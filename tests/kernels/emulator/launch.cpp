// The library of the kernels of a source, EMULATED_SOURCE: EMULATED_KERNELS is EMULATE(name) for each.
#include EMULATED_SOURCE

namespace emulator {

template <typename Params>
constexpr size_t size_of_params(void (*)(Params)) {
    return sizeof(Params);
}

template <typename Params>
static void call(void (*kernel)(Params), const void *params) {
    kernel(*static_cast<const Params *>(params));
}

}  // namespace emulator

// launch_<name> returns an empty text, or what went wrong.
#define EMULATE(name)                                                                                                 \
    extern "C" __attribute__((visibility("default"))) const size_t params_size_##name =                               \
        emulator::size_of_params(name);                                                                               \
    extern "C" __attribute__((visibility("default"))) const char *launch_##name(                                      \
        const unsigned(&grid)[3], const unsigned(&block)[3], size_t shared_bytes, const void *params, bool reverse) { \
        auto kernel = [](const void *bytes) { emulator::call(name, bytes); };                                         \
        return emulator::launch(kernel, grid, block, shared_bytes, params, reverse).c_str();                          \
    }

EMULATED_KERNELS

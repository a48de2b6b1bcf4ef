// The library of one kernel: EMULATED_KERNEL of the file EMULATED_SOURCE.
#include EMULATED_SOURCE

template <typename Params>
constexpr size_t size_of_params(void (*)(Params)) {
    return sizeof(Params);
}

template <typename Params>
static void call(void (*kernel)(Params), const void *params) {
    kernel(*static_cast<const Params *>(params));
}

extern "C" __attribute__((visibility("default"))) size_t params_size() { return size_of_params(EMULATED_KERNEL); }

// Returns an empty text, or what went wrong.
extern "C" __attribute__((visibility("default"))) const char *emulate(const unsigned (&grid)[3],
                                                                      const unsigned (&block)[3], size_t shared_bytes,
                                                                      const void *params, bool reverse) {
    auto kernel = [](const void *bytes) { call(EMULATED_KERNEL, bytes); };
    return emulator::launch(kernel, grid, block, shared_bytes, params, reverse).c_str();
}

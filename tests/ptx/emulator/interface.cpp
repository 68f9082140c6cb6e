// What machine.py calls.
#include <algorithm>
#include <cstdio>
#include <exception>

#include "machine.h"

namespace {

// A program, or why there is none.
struct Loaded {
    ptx::Program program;
    std::string error;
};

}  // namespace

extern "C" {

void* ptx_load(const char* text) {
    Loaded* loaded = new Loaded;
    try {
        loaded->program = ptx::parse(text);
    } catch (const std::exception& error) {
        loaded->error = error.what();
    }
    return loaded;
}

// Empty if there is none.
const char* ptx_error(const void* loaded) {
    return static_cast<const Loaded*>(loaded)->error.c_str();
}

int ptx_threads(const void* loaded) {
    return static_cast<const Loaded*>(loaded)->program.threads;
}

int ptx_parameter_count(const void* loaded) {
    return static_cast<int>(static_cast<const Loaded*>(loaded)->program.parameters.size());
}

int ptx_parameter_size(const void* loaded, int number) {
    return static_cast<const Loaded*>(loaded)->program.parameters[number].size;
}

// parameters: the values, one after the other. Returns whether nothing was found; else `report` says what.
int ptx_run(const void* loaded, const ptx::u8* parameters, const ptx::u32* grid, int threads, ptx::u32 shared_bytes,
            const ptx::Buffer* buffers, int num_buffers, const ptx::Options* options, char* report, int report_bytes) {
    const ptx::Program& program = static_cast<const Loaded*>(loaded)->program;
    ptx::Machine machine(program, *options, std::vector<ptx::Buffer>(buffers, buffers + num_buffers));
    bool fine = machine.run(parameters, grid, threads, shared_bytes);
    snprintf(report, report_bytes, "%s", machine.report().c_str());
    return fine;
}

}

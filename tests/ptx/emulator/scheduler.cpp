// The programs of a grid, one after another, and the order in which the warps of a program run.
#include <algorithm>

#include "machine.h"

namespace ptx {

constexpr int MBARRIER_CLOCKS = 128;
constexpr s64 UNTIL_IT_WAITS = 1 << 20;

Machine::Machine(const Program& program, const Options& options, std::vector<Buffer> buffers)
    : program_(program), options_(options), buffers_(std::move(buffers)) {
    has_chained_ = std::any_of(buffers_.begin(), buffers_.end(), [](const Buffer& b) { return b.chained != 0; });
    random_state_ = 88172645463325252ull ^ (static_cast<u64>(options.seed) * 0x9e3779b97f4a7c15ull);
    for (int i = 0; i < 5; i++) {
        random();
    }
}

// xorshift: the same on every machine.
u64 Machine::random() {
    random_state_ ^= random_state_ << 13;
    random_state_ ^= random_state_ >> 7;
    random_state_ ^= random_state_ << 17;
    return random_state_;
}

bool Machine::run(const u8* parameters, const u32 grid[3], int threads, u32 shared_bytes) {
    parameters_.assign(program_.parameter_bytes, 0);
    for (const Parameter& parameter : program_.parameters) {
        memcpy(&parameters_[parameter.offset], parameters, parameter.size);
        parameters += parameter.size;
    }
    std::copy(grid, grid + 3, grid_);
    num_threads_ = threads;
    num_warps_ = threads / LANES;
    shared_bytes_ = shared_bytes;
    try {
        for (position_[2] = 0; position_[2] < grid[2]; position_[2]++) {
            for (position_[1] = 0; position_[1] < grid[1]; position_[1]++) {
                for (position_[0] = 0; position_[0] < grid[0]; position_[0]++) {
                    run_program();
                }
            }
        }
    } catch (const Fault& fault) {
        report_ += std::string(fault.what()) + "\n  at " + here() + "\n";
        report_state();
        return false;
    }
    // PTX ISA, "griddepcontrol": a launch that is chained must not end before the ones before it.
    if ((program_.waits_for_grid || has_chained_) && !any_grid_wait_) {
        report_ += "no griddepcontrol.wait: no thread of the grid has run it\n";
        found_ = true;
    }
    return !found_;
}

void Machine::begin_program() {
    mbarriers_.clear();
    copies_.clear();
    std::fill(std::begin(named_barriers_), std::end(named_barriers_), NamedBarrier());
    priorities_.clear();
    num_products_ = 0;
    turn_ = 0;
    past_grid_wait_ = false;
    current_ = nullptr;
    clock_size_ = num_warps_ + MBARRIER_CLOCKS;
    // A program has registers for whole warpgroups.
    int allocated = (num_warps_ + WARPGROUP - 1) / WARPGROUP * WARPGROUP;
    free_registers_ = program_.registers_at_start * (allocated - num_warps_);
    size_t cells = (shared_bytes_ + 1) / 2;
    last_writes_.assign(cells, LastWrite{0, 0, 0});
    last_reads_.assign(cells * num_warps_, 0);
    memory_.assign(shared_bytes_, 0xcd);
    byte_states_.assign(shared_bytes_, ByteState::Unwritten);
    stored_at_.assign(shared_bytes_, 0);
    stored_by_.assign(shared_bytes_, 0);
    warps_.assign(num_warps_, Warp());
    for (int number = 0; number < num_warps_; number++) {
        begin_warp(warps_[number], number);
    }
}

void Machine::begin_warp(Warp& warp, int number) {
    warp.number = number;
    warp.num_registers = program_.registers_at_start;
    warp.clock.assign(clock_size_, 0);
    warp.clock[number] = 1;
    warp.registers.assign(static_cast<size_t>(program_.num_registers) * LANES, 0);
    auto set = [&](int place, u64 value) { std::fill_n(warp.lanes_of(place), LANES, value); };
    set(THREADS_X, num_threads_);
    set(PROGRAM_X, position_[0]);
    set(PROGRAM_Y, position_[1]);
    set(PROGRAM_Z, position_[2]);
    set(PROGRAMS_X, grid_[0]);
    set(PROGRAMS_Y, grid_[1]);
    set(PROGRAMS_Z, grid_[2]);
    for (int lane = 0; lane < LANES; lane++) {
        warp.lanes_of(THREAD_X)[lane] = number * LANES + lane;
        warp.lanes_of(LANE)[lane] = lane;
    }
    for (const auto& [place, value] : program_.constants) {
        set(place, value);
    }
}

void Machine::run_program() {
    begin_program();
    std::vector<int> ready;
    while (true) {
        ready.clear();
        bool all_ended = true;
        for (const Warp& warp : warps_) {
            bool may_go_on = warp.state == WarpState::AtMbarrier || warp.state == WarpState::AtRegisters;
            all_ended = all_ended && warp.state == WarpState::Ended;
            if (warp.state == WarpState::Runs || (may_go_on && warp.waits_since != version_)) {
                ready.push_back(warp.number);
            }
        }
        if (all_ended) {
            break;
        }
        bool copies_now = options_.copies == CopyTime::Random && !copies_.empty() && random() % 4 == 0;
        if (copies_now) {
            finish_copy(random() % copies_.size());
        } else if (ready.empty()) {
            if (!step_others()) {
                current_ = nullptr;
                fail("deadlock: all warps wait");
            }
        } else {
            s64 steps = UNTIL_IT_WAITS;
            int number = pick_warp(ready, steps);
            run_warp(warps_[number], steps);
        }
    }
    end_program();
}

// When all warps wait: a copy arrives, or else the launches before are over. Returns whether there was any such thing.
bool Machine::step_others() {
    if (!copies_.empty()) {
        finish_copy(options_.seed ? random() % copies_.size() : 0);
        return true;
    }
    bool any = false;
    for (Warp& warp : warps_) {
        if (warp.state == WarpState::AtGrid) {
            warp.state = WarpState::Runs;
            past_grid_wait_ = any = true;
        }
    }
    return any;
}

// steps: for how many instructions it runs.
int Machine::pick_warp(const std::vector<int>& ready, s64& steps) {
    if (options_.seed == 0) {
        int picked = ready[0];
        for (int number : ready) {
            if (number >= turn_) {
                picked = number;
                break;
            }
        }
        turn_ = (picked + 1) % num_warps_;
        return picked;
    }
    if (options_.seed % 2 == 0) {
        int picked = pick_by_priority(ready);
        steps = random() % 4 ? UNTIL_IT_WAITS : 1 + static_cast<s64>(random() % 300);
        return picked;
    }
    int picked = ready[random() % ready.size()];
    steps = 1 + static_cast<s64>(random() % (random() % 8 == 0 ? 2000 : 60));
    return picked;
}

// By priorities that change now and then, sometimes for a whole warpgroup: some warps wait for long while others run ahead.
int Machine::pick_by_priority(const std::vector<int>& ready) {
    if (priorities_.empty()) {
        for (int number = 0; number < num_warps_; number++) {
            priorities_.push_back(number);
        }
        for (int number = num_warps_ - 1; number > 0; number--) {
            std::swap(priorities_[number], priorities_[random() % (number + 1)]);
        }
    }
    if (random() % 64 == 0) {
        int changed = static_cast<int>(random() % num_warps_);
        auto [least, most] = std::minmax_element(priorities_.begin(), priorities_.end());
        int priority = random() & 1 ? *least - 1 : *most + 1;
        bool whole_group = random() % 2 == 1;
        for (int number = 0; number < num_warps_; number++) {
            if (number == changed || (whole_group && number / WARPGROUP == changed / WARPGROUP)) {
                priorities_[number] = priority;
            }
        }
    }
    return *std::max_element(ready.begin(), ready.end(),
                             [&](int x, int y) { return priorities_[x] < priorities_[y]; });
}

// Nothing may be left over.
void Machine::end_program() {
    current_ = nullptr;
    for (const Warp& warp : warps_) {
        size_t first = warps_[warp.number / WARPGROUP * WARPGROUP].register_changes.size();
        if (warp.register_changes.size() != first) {
            finding("setmaxnreg differs", format("warp %d has run %zu, and the first warp of its warpgroup %zu",
                                                 warp.number, warp.register_changes.size(), first));
        }
    }
    if (!copies_.empty()) {
        finding("end with copies under way", format("%zu", copies_.size()));
    }
    for (const auto& [address, barrier] : mbarriers_) {
        if (barrier.bytes != 0) {
            finding("end with bytes to come", format("the mbarrier at offset %u waits for %lld bytes",
                                                     address - SHARED_BASE, static_cast<long long>(barrier.bytes)));
        }
    }
}

}  // namespace ptx

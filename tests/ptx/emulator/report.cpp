// What was found, and where: findings, the instruction at hand, and the state of a program that waits for ever.
#include "machine.h"

namespace ptx {

constexpr size_t MOST_FINDINGS = 40;

// Each kind is reported once for an instruction.
void Machine::finding(const std::string& kind, const std::string& what) {
    found_ = true;
    if (found_at_.size() < MOST_FINDINGS && found_at_.insert({kind, pc_}).second) {
        report_ += kind + ": " + what + "\n  at " + here() + "\n";
    }
}

std::string Machine::instruction_text(u32 pc) const {
    const Instruction& i = program_.code[pc];
    std::string text = format("PTX line %d: %s", i.line, i.text.c_str());
    if (i.location > 0) {
        SourceLine place = program_.locations[i.location - 1];
        const std::string& file = program_.files.at(place.file);
        text += format("  (%s:%d)", file.c_str(), place.line);
    }
    return text;
}

std::string Machine::here() const {
    std::string text = format("program (%u,%u,%u)", position_[0], position_[1], position_[2]);
    if (current_ != nullptr) {
        text += format(", warp %d, ", current_->number) + instruction_text(pc_);
    }
    return text;
}

std::string Machine::warp_text(Warp& warp) const {
    if (warp.state == WarpState::Ended) {
        return "ended";
    }
    u32 pc = warp.together ? warp.pc : warp.lane_pc[first_lane(warp.live)];
    std::string text = "runs";
    if (warp.state == WarpState::AtNamedBarrier) {
        text = "waits at a barrier";
    } else if (warp.state == WarpState::AtRegisters) {
        text = format("waits for registers: it has %d a thread, and %d are free", warp.num_registers, free_registers_);
    } else if (warp.state == WarpState::AtGrid) {
        text = "waits for the launches before";
    } else if (warp.state == WarpState::AtMbarrier) {
        text = format("waits at the mbarrier at %u, parity %u", warp.waits_at - SHARED_BASE, warp.waits_for_parity);
    }
    text += "; " + instruction_text(pc);
    if (!warp.together) {
        std::set<u32> places;
        for_each_lane(warp.live, [&](int lane) {
            if (places.insert(warp.lane_pc[lane]).second) {
                text += format("\n      lane %d: ", lane) + instruction_text(warp.lane_pc[lane]);
            }
        });
    }
    return text;
}

void Machine::report_state() {
    for (Warp& warp : warps_) {
        report_ += format("  warp %d: ", warp.number) + warp_text(warp) + "\n";
    }
    for (const auto& [address, barrier] : mbarriers_) {
        report_ += format("  mbarrier at %u: count %u, %lld arrivals and %lld bytes to come, phase %llu\n",
                          address - SHARED_BASE, barrier.count, static_cast<long long>(barrier.pending),
                          static_cast<long long>(barrier.bytes), static_cast<unsigned long long>(barrier.phase));
    }
    for (int number = 0; number < NUM_NAMED_BARRIERS; number++) {
        const NamedBarrier& barrier = named_barriers_[number];
        if (barrier.arrived > 0) {
            int expected = barrier.expected == ALL_THREADS ? num_threads_ : barrier.expected;
            report_ += format("  barrier %d: %d threads of %d have arrived\n", number, barrier.arrived, expected);
        }
    }
    report_ += format("  copies under way: %zu\n", copies_.size());
}

}  // namespace ptx

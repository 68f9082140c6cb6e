// Races in shared memory, found by vector clocks: independent of the order in which the warps happened to run.
//
// Each warp has a clock. It knows of the work of other warps what barriers have told it. An access is a race if the warp does not
// know of the last write to the same two bytes or, for a write, of the reads since. A copy is known to a warp that has waited
// for the phase of the mbarrier at which the copy arrives. Lanes of one warp are not told apart.
#include <algorithm>

#include "machine.h"

namespace ptx {

void join(Clock& into, const Clock& other) {
    if (into.empty()) {
        into = other;
        return;
    }
    for (size_t i = 0; i < other.size(); i++) {
        into[i] = std::max(into[i], other[i]);
    }
}

void Machine::race_read(u32 address, u32 bytes, bool checks) {
    const Clock& clock = current_->clock;
    int own = current_->number;
    u32 last = (address + bytes - 1 - SHARED_BASE) / 2;
    for (u32 cell = (address - SHARED_BASE) / 2; cell <= last; cell++) {
        const LastWrite& write = last_writes_[cell];
        if (checks && write.time > 0 && write.agent != own && clock[write.agent] < write.time) {
            std::string writer = write.agent < num_warps_ ? format("warp %d's ", write.agent) : "the copy's ";
            finding("race", format("the read of shared offset %u is not ordered behind the write by ", cell * 2) + writer +
                                instruction_text(write.pc));
        }
        last_reads_[static_cast<size_t>(cell) * num_warps_ + own] = clock[own];
    }
}

// agent, time: the writer's entry in clocks, and its value there. A write of the same bytes as before is no race.
void Machine::race_write(u32 address, u32 bytes, int agent, u32 time, bool same_bytes) {
    const Clock& clock = current_->clock;
    int own = current_->number;
    u32 last = (address + bytes - 1 - SHARED_BASE) / 2;
    for (u32 cell = (address - SHARED_BASE) / 2; cell <= last; cell++) {
        LastWrite& write = last_writes_[cell];
        if (!same_bytes) {
            if (write.time > 0 && write.agent != own && clock[write.agent] < write.time) {
                std::string writer = write.agent < num_warps_ ? format("warp %d's ", write.agent) : "the copy's ";
                finding("race", format("the write to shared offset %u is not ordered behind the write by ", cell * 2) +
                                    writer + instruction_text(write.pc));
            }
            const u32* reads = &last_reads_[static_cast<size_t>(cell) * num_warps_];
            for (int warp = 0; warp < num_warps_; warp++) {
                if (warp != own && reads[warp] > clock[warp]) {
                    finding("race", format("the write to shared offset %u is not ordered behind a read by warp %d",
                                           cell * 2, warp));
                }
            }
        }
        write = {time, pc_, agent};
    }
}

}  // namespace ptx

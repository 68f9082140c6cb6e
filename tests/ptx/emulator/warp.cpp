// How a warp runs: which of its lanes go on, and what each instruction does that is not arithmetic.
#include <algorithm>

#include "machine.h"

namespace ptx {

constexpr u64 MOST_INSTRUCTIONS = 2'000'000'000;

// Lanes are no longer all at the same instruction.
void Machine::separate(Warp& warp) {
    if (warp.together) {
        std::fill(warp.lane_pc, warp.lane_pc + LANES, warp.pc);
        warp.together = false;
    }
}

// The lanes that run next: of those that do not wait, the ones that are furthest behind. So lanes meet again behind a branch.
// Sets pc_. No lanes: all wait.
u32 Machine::next_lanes(Warp& warp) {
    if (warp.together) {
        pc_ = warp.pc;
        return warp.live;
    }
    pc_ = ~0u;
    for_each_lane(warp.live & ~warp.blocked, [&](int lane) { pc_ = std::min(pc_, warp.lane_pc[lane]); });
    u32 lanes = 0;
    for_each_lane(warp.live, [&](int lane) { lanes |= static_cast<u32>(warp.lane_pc[lane] == pc_) << lane; });
    if (lanes == warp.live) {
        warp.together = true;
        warp.pc = pc_;
    }
    return lanes;
}

// Run a warp until it waits or ends, or for so many instructions.
void Machine::run_warp(Warp& warp, s64 steps) {
    current_ = &warp;
    warp.state = WarpState::Runs;
    warp.blocked = 0;
    while (steps-- > 0) {
        u32 lanes = next_lanes(warp);
        if (lanes == 0) {
            warp.state = WarpState::AtMbarrier;
            warp.waits_since = version_;
            return;
        }
        const Instruction& i = program_.code[pc_];
        if (i.waits_for_lanes && lanes != warp.live) {
            u32 needed = warp.live;
            if (i.op == Op::WarpSync) {
                needed &= static_cast<u32>(warp.lanes_of(i.a)[first_lane(lanes)]);
            }
            if ((needed & ~lanes) != 0) {
                warp.blocked |= lanes;
                continue;
            }
        }
        Step step = execute(warp, i, lanes);
        if (step == Step::Next && warp.together) {
            warp.pc++;
        } else if (step == Step::Next) {
            for_each_lane(lanes, [&](int lane) { warp.lane_pc[lane]++; });
        } else if (step == Step::Ended && warp.live == 0) {
            return;
        } else if (step == Step::Waits) {
            if (warp.state == WarpState::Runs && warp.together) {
                warp.state = WarpState::AtMbarrier;
            }
            warp.waits_since = version_;
            if (warp.state != WarpState::Runs) {
                return;
            }
            warp.blocked |= lanes;
        }
    }
}

// lanes: those at the instruction; it has an effect in those whose predicate holds.
Machine::Step Machine::execute(Warp& warp, const Instruction& i, u32 lanes) {
    u32 active = lanes;
    if (i.predicate != NO_REGISTER) {
        const u64* values = warp.lanes_of(i.predicate);
        u32 holds = 0;
        for (int lane = 0; lane < LANES; lane++) {
            holds |= static_cast<u32>(values[lane] & 1) << lane;
        }
        active &= i.predicate_negated ? ~holds : holds;
    }
    instructions_ += __builtin_popcount(active);
    if (instructions_ > MOST_INSTRUCTIONS) {
        fail("too many instructions: an endless loop?");
    }
    if (active == 0) {
        return Step::Next;
    }
    switch (i.op) {
        case Op::Nop:
        case Op::WarpSync:
            return Step::Next;
        case Op::Branch:
        case Op::BranchIndexed:
            return branch(warp, i, lanes, active);
        case Op::Return:
            return end_lanes(warp, lanes, active);
        case Op::Load:
            load(warp, i, active);
            return Step::Next;
        case Op::Store:
            store(warp, i, active);
            return Step::Next;
        case Op::LoadMatrix:
        case Op::StoreMatrix:
            move_matrices(warp, i);
            return Step::Next;
        case Op::Elect:
            elect(warp, i, active);
            return Step::Next;
        case Op::Shuffle:
            shuffle(warp, i, active);
            return Step::Next;
        case Op::BarrierWait:
            return wait_mbarrier(warp, i, active);
        case Op::NamedBarrier:
            return wait_named_barrier(warp, i, active);
        default:
            return execute_rare(warp, i, active);
    }
}

Machine::Step Machine::execute_rare(Warp& warp, const Instruction& i, u32 active) {
    switch (i.op) {
        case Op::BarrierInit:
            initialise_mbarrier(warp, i, active);
            return Step::Next;
        case Op::BarrierArrive:
            arrive(warp, i, active);
            return Step::Next;
        case Op::TensorLoad:
            issue_copies(warp, i, active);
            return Step::Next;
        case Op::ProxyFence:
            warp.fenced_at = ++stores_;
            return Step::Next;
        case Op::SetRegisters:
            return set_registers(warp, i);
        case Op::GridWait:
            any_grid_wait_ = true;
            // It takes as long as possible: until no other warp can go on.
            warp.state = past_grid_wait_ ? WarpState::Runs : WarpState::AtGrid;
            return past_grid_wait_ ? Step::Next : Step::Waits;
        case Op::Wgmma:
            if (active != ALL_LANES) {
                fail("wgmma without all lanes of the warp");
            }
            issue_product(warp, i);
            return Step::Next;
        case Op::WgmmaCommit:
            commit_products(warp);
            return Step::Next;
        case Op::WgmmaWait:
            wait_products(warp, i.number);
            return Step::Next;
        default:
            arithmetic(warp, i, active);
            return Step::Next;
    }
}

Machine::Step Machine::branch(Warp& warp, const Instruction& i, u32 lanes, u32 active) {
    u32 targets[LANES];
    bool same = active == lanes;
    for_each_lane(active, [&](int lane) {
        u64 index = i.op == Op::BranchIndexed ? warp.lanes_of(i.a)[lane] : 0;
        if (index >= i.targets.size()) {
            fail("brx.idx beyond its table");
        }
        targets[lane] = i.targets[index];
        same = same && targets[lane] == targets[first_lane(active)];
    });
    if (same && warp.together) {
        warp.pc = targets[first_lane(active)];
        return Step::Jumped;
    }
    separate(warp);
    for_each_lane(lanes, [&](int lane) {
        warp.lane_pc[lane] = active >> lane & 1 ? targets[lane] : warp.lane_pc[lane] + 1;
    });
    return Step::Jumped;
}

Machine::Step Machine::end_lanes(Warp& warp, u32 lanes, u32 active) {
    if (!warp.products.empty()) {
        finding("end with unfinished wgmma", "the warp ends and has not waited for its products");
    }
    if (active != warp.live) {
        separate(warp);
    }
    warp.live &= ~active;
    for_each_lane(lanes & ~active, [&](int lane) { warp.lane_pc[lane]++; });
    if (warp.live == 0) {
        warp.state = WarpState::Ended;
        version_++;
        for (u32 number = 0; number < NUM_NAMED_BARRIERS; number++) {
            if (named_barriers_[number].expected == ALL_THREADS) {
                release_named_barrier(number);
            }
        }
    }
    return Step::Ended;
}

void Machine::elect(Warp& warp, const Instruction& i, u32 active) {
    int leader = first_lane(active);
    for_each_lane(active, [&](int lane) {
        if (i.d != NO_REGISTER) {
            warp.lanes_of(i.d)[lane] = leader;
        }
        warp.lanes_of(i.second_d)[lane] = lane == leader;
    });
}

// PTX ISA, "shfl.sync": c has the last lane of a segment in its low bits, and the segment's mask 8 bits above.
void Machine::shuffle(Warp& warp, const Instruction& i, u32 active) {
    u64 source[LANES];
    memcpy(source, warp.lanes_of(i.a), sizeof source);
    for_each_lane(active, [&](int lane) {
        int by = warp.lanes_of(i.b)[lane] & 31;
        int segment = warp.lanes_of(i.c)[lane] >> 8 & 31;
        int clamp = warp.lanes_of(i.c)[lane] & 31;
        int last = (lane & segment) | (clamp & ~segment);
        int from = (lane & segment) | (by & ~segment);
        if (i.shuffle == ShuffleMode::Up) {
            from = lane - by;
        } else if (i.shuffle == ShuffleMode::Down) {
            from = lane + by;
        } else if (i.shuffle == ShuffleMode::Butterfly) {
            from = lane ^ by;
        }
        bool inside = i.shuffle == ShuffleMode::Up ? from >= last : from <= last;
        from = inside ? from : lane;
        if ((active >> from & 1) == 0) {
            finding("shuffle from an absent lane", format("lane %d reads lane %d", lane, from));
        }
        warp.lanes_of(i.d)[lane] = source[from] & 0xffffffff;
        if (i.second_d != NO_REGISTER) {
            warp.lanes_of(i.second_d)[lane] = inside;
        }
    });
}

// PTX ISA, "setmaxnreg": registers come from a pool of the program. All warps of a warpgroup must set the same.
Machine::Step Machine::set_registers(Warp& warp, const Instruction& i) {
    std::pair<bool, int> change{i.increases, i.number};
    size_t count = warp.register_changes.size();
    for (const Warp& other : warps_) {
        bool same_group = other.number / WARPGROUP == warp.number / WARPGROUP;
        if (same_group && other.register_changes.size() > count && other.register_changes[count] != change) {
            finding("setmaxnreg differs", format("warp %d of the warpgroup has set %d here", other.number,
                                                 other.register_changes[count].second));
        }
    }
    if (program_.registers_at_start > 0) {
        int more = i.number - warp.num_registers;
        if (i.increases ? more < 0 : more > 0) {
            finding("setmaxnreg", format("from %d to %d", warp.num_registers, i.number));
        }
        if (more > free_registers_) {
            warp.state = WarpState::AtRegisters;
            return Step::Waits;
        }
        free_registers_ -= more;
        version_ += more < 0;
        warp.num_registers = i.number;
    }
    warp.register_changes.push_back(change);
    return Step::Next;
}

}  // namespace ptx

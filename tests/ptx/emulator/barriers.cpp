// Mbarriers (PTX ISA, "mbarrier") and named barriers (PTX ISA, "bar, barrier").
//
// A phase of an mbarrier completes when as many have arrived as it was initialised for, and as many bytes as expect_tx has
// announced. A warp that waits for a phase then knows what those that arrived had done.
#include "machine.h"

namespace ptx {

constexpr s64 MOST_BYTES = (1 << 20) - 1;
constexpr int MOST_MBARRIERS = 128;

Mbarrier& Machine::mbarrier_at(u64 address) {
    u32 offset = static_cast<u32>(address) - SHARED_BASE;
    if (address % 8 != 0) {
        fail("a misaligned mbarrier");
    }
    auto found = mbarriers_.find(static_cast<u32>(address));
    if (found == mbarriers_.end()) {
        fail(format("the mbarrier at offset %u is not initialised", offset));
    }
    Mbarrier& barrier = found->second;
    bool is_other = !copying_ && barrier.initialised_by != current_->number;
    if (is_other && current_->clock[barrier.initialised_by] < barrier.initialised_at) {
        finding("mbarrier used too soon", format("the use of the mbarrier at offset %u is not ordered behind its "
                                                 "initialisation by warp %d", offset, barrier.initialised_by));
    }
    return barrier;
}

void Machine::initialise_mbarrier(Warp& warp, const Instruction& i, u32 active) {
    for_each_lane(active, [&](int lane) {
        u32 address = static_cast<u32>(warp.address(i.address, lane));
        shared(address, 8, true, 8);
        if (mbarriers_.count(address) > 0) {
            finding("mbarrier initialised again", format("at offset %u", address - SHARED_BASE));
        }
        int agent = num_warps_ + static_cast<int>(mbarriers_.size());
        if (agent >= clock_size_) {
            fail("too many mbarriers");
        }
        u32 count = static_cast<u32>(warp.lanes_of(i.b)[lane]);
        mbarriers_[address] = {count, count, 0, 0, agent, {}, {}, warp.number, warp.clock[warp.number]};
        for (u32 byte = 0; byte < 8; byte++) {
            byte_states_[address - SHARED_BASE + byte] = ByteState::Barrier;
        }
    });
}

void Machine::complete_phase(Mbarrier& barrier) {
    if (barrier.pending > 0 || barrier.bytes != 0) {
        return;
    }
    barrier.phase++;
    barrier.pending = barrier.count;
    barrier.arrivals.resize(clock_size_, 0);
    barrier.arrivals[barrier.agent] = static_cast<u32>(barrier.phase);
    barrier.released = barrier.arrivals;
    version_++;
}

void Machine::add_bytes(Mbarrier& barrier, s64 bytes) {
    barrier.bytes += bytes;
    if (barrier.bytes > MOST_BYTES || barrier.bytes < -MOST_BYTES) {
        fail("an mbarrier waits for more bytes than it can count");
    }
}

void Machine::arrive(Warp& warp, const Instruction& i, u32 active) {
    for_each_lane(active, [&](int lane) {
        Mbarrier& barrier = mbarrier_at(static_cast<u32>(warp.address(i.address, lane)));
        s64 number = i.b == NO_REGISTER ? 1 : static_cast<s64>(warp.lanes_of(i.b)[lane]);
        if (i.expects_bytes) {
            add_bytes(barrier, number);
            number = 1;
        }
        if (barrier.pending < number) {
            fail(format("%lld arrive at an mbarrier of count %u that waits for %lld in phase %llu",
                        static_cast<long long>(number), barrier.count, static_cast<long long>(barrier.pending),
                        static_cast<unsigned long long>(barrier.phase)));
        }
        barrier.pending -= number;
        join(barrier.arrivals, warp.clock);
        complete_phase(barrier);
    });
    // What the warp does from here on is not known to those that wait for this phase.
    warp.clock[warp.number]++;
}

// try_wait.parity: true if the phase of this parity has completed. The machine lets the warp wait until it is.
Machine::Step Machine::wait_mbarrier(Warp& warp, const Instruction& i, u32 active) {
    bool all = true;
    for_each_lane(active, [&](int lane) {
        u32 address = static_cast<u32>(warp.address(i.address, lane));
        Mbarrier& barrier = mbarrier_at(address);
        u64 parity = warp.lanes_of(i.b)[lane];
        if (parity > 1) {
            fail("a parity that is neither 0 nor 1");
        }
        bool completed = (barrier.phase & 1) != parity;
        warp.lanes_of(i.d)[lane] = completed;
        if (completed) {
            join(warp.clock, barrier.released);
        } else {
            all = false;
            warp.waits_at = address;
            warp.waits_for_parity = static_cast<u32>(parity);
        }
    });
    return all ? Step::Next : Step::Waits;
}

Machine::Step Machine::wait_named_barrier(Warp& warp, const Instruction& i, u32 active) {
    int lane = first_lane(active);
    u64 number = warp.lanes_of(i.a)[lane];
    int expected = i.b == NO_REGISTER ? ALL_THREADS : static_cast<int>(warp.lanes_of(i.b)[lane]);
    if (number >= NUM_NAMED_BARRIERS) {
        fail("there is no barrier of this number");
    }
    if (expected != ALL_THREADS && expected % LANES != 0) {
        fail("the number of threads of a barrier is not a multiple of 32");
    }
    NamedBarrier& barrier = named_barriers_[number];
    if (barrier.arrived > 0 && barrier.expected != expected) {
        finding("barrier counts differ", format("barrier %d waits for %d threads, and here for %d",
                                                static_cast<int>(number), barrier.expected, expected));
    }
    barrier.expected = expected;
    barrier.arrived += LANES;
    join(barrier.clock, warp.clock);
    warp.state = WarpState::AtNamedBarrier;
    barrier.waiting.push_back(warp.number);
    release_named_barrier(static_cast<u32>(number));
    return warp.state == WarpState::AtNamedBarrier ? Step::Waits : Step::Jumped;
}

// Lets the warps at a barrier go on if all that it waits for have arrived.
void Machine::release_named_barrier(u32 number) {
    NamedBarrier& barrier = named_barriers_[number];
    int expected = barrier.expected;
    if (expected == ALL_THREADS) {
        expected = num_threads_;
        for (const Warp& warp : warps_) {
            expected -= warp.state == WarpState::Ended ? LANES : 0;
        }
    }
    if (barrier.arrived == 0 || barrier.arrived < expected) {
        return;
    }
    if (barrier.arrived > expected) {
        finding("too many at a barrier", format("%d threads at barrier %u, which waits for %d", barrier.arrived, number,
                                                expected));
    }
    for (int waiting : barrier.waiting) {
        Warp& warp = warps_[waiting];
        warp.state = WarpState::Runs;
        join(warp.clock, barrier.clock);
        warp.clock[warp.number]++;
        warp.pc++;
        for_each_lane(warp.live, [&](int lane) { warp.lane_pc[lane]++; });
    }
    barrier = NamedBarrier();
}

}  // namespace ptx

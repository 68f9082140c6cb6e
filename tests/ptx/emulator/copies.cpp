// Copies of tiles of a tensor to shared memory (PTX ISA, "cp.async.bulk.tensor").
//
// A copy reads and writes at some time after it is issued, and then arrives at its mbarrier. Until then its destination holds
// 0xff bytes, and reading it is a finding.
#include "machine.h"

namespace ptx {

TensorMap Machine::read_tensor_map(u64 address) {
    Space space = Space::Generic;
    TensorMap map;
    if (address % 64 != 0) {
        fail("a tensor map is not aligned to 64 bytes");
    }
    memcpy(&map, resolve(space, address, sizeof map, false), sizeof map);
    if (map.magic != TENSOR_MAP_MAGIC) {
        fail("there is no tensor map at this address");
    }
    return map;
}

void Machine::issue_copies(Warp& warp, const Instruction& i, u32 active) {
    for_each_lane(active, [&](int lane) {
        Copy copy;
        copy.map = read_tensor_map(warp.address(i.tensor_map, lane));
        if (copy.map.rank != i.number) {
            fail(format("a tensor map of %d dimensions, but coordinates of %d", copy.map.rank, i.number));
        }
        copy.bytes = copy.map.element_bytes;
        for (int dimension = 0; dimension < i.number; dimension++) {
            copy.coordinates[dimension] = static_cast<s32>(warp.lanes_of(i.registers[dimension])[lane]);
            copy.bytes *= copy.map.box[dimension];
        }
        copy.destination = static_cast<u32>(warp.address(i.address, lane));
        copy.mbarrier = static_cast<u32>(warp.address(i.mbarrier, lane));
        copy.warp = warp.number;
        copy.pc = pc_;
        issue_copy(copy);
    });
}

// PTX ISA, "Swizzling modes": the destination is aligned to 128 bytes, and to the 8 rows that a swizzle permutes.
void Machine::check_destination(const Copy& copy) {
    u32 offset = copy.destination - SHARED_BASE;
    u32 swizzle_bytes = copy.map.swizzle == 0 ? 16 : 16u << copy.map.swizzle;
    u32 row_bytes = copy.map.box[0] * copy.map.element_bytes;
    if (copy.destination % 128 != 0 || copy.destination % (8 * swizzle_bytes) != 0) {
        fail(format("the copy's destination, offset %u, is not aligned to %u bytes", offset, 8 * swizzle_bytes));
    }
    if (copy.map.swizzle != 0 && row_bytes != swizzle_bytes) {
        fail(format("rows of %u bytes with a swizzle of %u are not emulated", row_bytes, swizzle_bytes));
    }
}

void Machine::issue_copy(Copy& copy) {
    check_destination(copy);
    shared(copy.destination, copy.bytes, true, 16);
    const Mbarrier& barrier = mbarrier_at(copy.mbarrier);
    check_products(copy.destination, copy.bytes, "the copy");
    race_write(copy.destination, copy.bytes, barrier.agent, static_cast<u32>(barrier.phase) + 1, false);
    check_chained(copy.map.base, copy.map.base + 1, "copy");
    for (const Copy& other : copies_) {
        bool overlaps = other.destination < copy.destination + copy.bytes &&
                        copy.destination < other.destination + other.bytes;
        if (overlaps) {
            finding("copies overlap", format("a copy to shared offset %u is under way", other.destination - SHARED_BASE));
        }
    }
    u32 first = copy.destination - SHARED_BASE;
    for (u32 offset = first; offset < first + copy.bytes; offset++) {
        if (byte_states_[offset] == ByteState::Barrier) {
            finding("write over an mbarrier", format("the copy writes shared offset %u", offset));
        }
        byte_states_[offset] = ByteState::CopyUnderWay;
        stored_at_[offset] = 0;
        memory_[offset] = 0xff;
    }
    copies_.push_back(copy);
    if (options_.copies == CopyTime::Early) {
        finish_copy(copies_.size() - 1);
    }
}

// Do a copy that is under way.
void Machine::finish_copy(size_t number) {
    Copy copy = copies_[number];
    copies_.erase(copies_.begin() + static_cast<s64>(number));
    // Messages name the instruction that has issued it.
    Warp* warp = current_;
    u32 pc = pc_;
    current_ = &warps_[copy.warp];
    pc_ = copy.pc;
    copying_ = true;
    do_copy(copy);
    Mbarrier& barrier = mbarrier_at(copy.mbarrier);
    add_bytes(barrier, -static_cast<s64>(copy.bytes));
    complete_phase(barrier);
    copying_ = false;
    current_ = warp;
    pc_ = pc;
}

// Elements outside the tensor are zeros. The swizzle exchanges chunks of 16 bytes: bits 4 to 6 of an address (fewer with a
// narrower swizzle) are combined with bits 7 to 9.
void Machine::do_copy(const Copy& copy) {
    const TensorMap& map = copy.map;
    u32 swizzled_bits = (1u << (4 + map.swizzle)) - 16;
    u32 rows = copy.bytes / (map.box[0] * map.element_bytes);
    u32 address = copy.destination;
    for (u32 row = 0; row < rows; row++) {
        bool inside = true;
        u64 source = map.base;
        u32 rest = row;
        for (int dimension = 1; dimension < map.rank; dimension++) {
            s64 index = copy.coordinates[dimension] + rest % map.box[dimension];
            rest /= map.box[dimension];
            inside = inside && index >= 0 && index < static_cast<s64>(map.dimensions[dimension]);
            source += index * map.strides[dimension - 1];
        }
        for (u32 column = 0; column < map.box[0]; column++) {
            s64 index = copy.coordinates[0] + column;
            u8* to = &memory_[(address ^ ((address >> 3) & swizzled_bits)) - SHARED_BASE];
            if (inside && index >= 0 && index < static_cast<s64>(map.dimensions[0])) {
                u64 from = source + index * map.element_bytes;
                memcpy(to, global(from, map.element_bytes, false, map.element_bytes), map.element_bytes);
            } else {
                memset(to, 0, map.element_bytes);
            }
            address += map.element_bytes;
        }
    }
    u32 first = copy.destination - SHARED_BASE;
    for (u32 offset = first; offset < first + copy.bytes; offset++) {
        byte_states_[offset] = ByteState::Written;
    }
}

}  // namespace ptx

// Loads and stores: bounds, alignment, and what each byte of shared memory holds.
#include <algorithm>

#include "machine.h"

namespace ptx {

static bool in_window(u64 address, u64 window) {
    return address >= window && address < window + WINDOW_BYTES;
}

// Where the bytes at an address lie in this process. `space` becomes the one that a generic address means.
u8* Machine::resolve(Space& space, u64 address, u32 bytes, bool writes) {
    if (space == Space::Generic) {
        space = Space::Global;
        if (in_window(address, SHARED_WINDOW)) {
            space = Space::Shared;
            address -= SHARED_WINDOW;
        } else if (in_window(address, PARAMETER_WINDOW)) {
            space = Space::Parameter;
            address -= PARAMETER_WINDOW;
        }
    }
    if (space == Space::Global) {
        return global(address, bytes, writes, bytes);
    }
    if (space == Space::Shared) {
        return shared(address, bytes, writes, bytes);
    }
    if (writes || address + bytes > parameters_.size()) {
        fail(format("an access of %u bytes at %llu leaves the parameters", bytes,
                    static_cast<unsigned long long>(address)));
    }
    return &parameters_[address];
}

u8* Machine::global(u64 address, u32 bytes, bool writes, u32 alignment) {
    const char* access = writes ? "write" : "read";
    if (!copying_) {
        check_chained(address, address + bytes, access);
    }
    if (address % alignment != 0) {
        fail(format("misaligned global %s of %u bytes", access, bytes));
    }
    std::string nearest;
    u64 least = ~0ull;
    for (const Buffer& buffer : buffers_) {
        if (address >= buffer.begin && address + bytes <= buffer.end) {
            return reinterpret_cast<u8*>(address);
        }
        u64 distance = address < buffer.begin ? buffer.begin - address : address - buffer.begin;
        if (distance < least) {
            least = distance;
            nearest = format("%lld from the first of the %llu bytes of %s", static_cast<long long>(address - buffer.begin),
                             static_cast<unsigned long long>(buffer.end - buffer.begin), buffer.name);
        }
    }
    fail(format("global %s of %u bytes out of bounds: %s", access, bytes, nearest.c_str()));
}

// PTX ISA, "griddepcontrol": what the launches before have written may be touched behind the wait only.
void Machine::check_chained(u64 begin, u64 end, const char* what) {
    if (!has_chained_ || past_grid_wait_) {
        return;
    }
    for (const Buffer& buffer : buffers_) {
        if (buffer.chained && begin < buffer.end && end > buffer.begin) {
            finding("before griddepcontrol.wait", format("%s of %s", what, buffer.name));
        }
    }
}

u8* Machine::shared(u64 address, u32 bytes, bool writes, u32 alignment) {
    const char* access = writes ? "write" : "read";
    if (address % alignment != 0) {
        fail(format("misaligned shared %s of %u bytes", access, bytes));
    }
    if (address < SHARED_BASE || address + bytes > SHARED_BASE + shared_bytes_) {
        fail(format("shared %s of %u bytes out of bounds: offset %lld of %u", access, bytes,
                    static_cast<long long>(address) - SHARED_BASE, shared_bytes_));
    }
    return &memory_[address - SHARED_BASE];
}

void Machine::check_read(u32 address, u32 bytes) {
    race_read(address, bytes, true);
    u32 first = address - SHARED_BASE;
    for (u32 offset = first; offset < first + bytes; offset++) {
        ByteState state = byte_states_[offset];
        if (state == ByteState::Written) {
            continue;
        }
        const char* kind = state == ByteState::Barrier        ? "read of an mbarrier"
                           : state == ByteState::CopyUnderWay ? "read before the copy has arrived"
                                                              : "read of memory that nothing has written";
        finding(kind, format("shared offset %u", offset));
        return;
    }
}

// PTX ISA, "Async proxy": wgmma reads what a store has written only behind a fence.proxy.async, by the writer or by the reader.
void Machine::check_async_read(u32 address, u32 bytes) {
    check_read(address, bytes);
    u32 first = address - SHARED_BASE;
    for (u32 offset = first; offset < first + bytes; offset += 2) {
        u64 time = stored_at_[offset];
        const Warp& writer = warps_[stored_by_[offset]];
        if (time > 0 && writer.fenced_at <= time && current_->fenced_at <= time) {
            finding("no proxy fence", format("wgmma reads shared offset %u, and there is no fence.proxy.async since warp %d "
                                             "has stored there", offset, writer.number));
            return;
        }
    }
}

// After a store of the current warp. same_bytes: whether they have not changed.
void Machine::wrote(u32 address, u32 bytes, bool same_bytes) {
    race_write(address, bytes, current_->number, current_->clock[current_->number], same_bytes);
    u32 first = address - SHARED_BASE;
    for (u32 offset = first; offset < first + bytes; offset++) {
        if (byte_states_[offset] == ByteState::Barrier) {
            finding("write over an mbarrier", format("shared offset %u", offset));
        } else if (byte_states_[offset] == ByteState::CopyUnderWay) {
            finding("write over a copy under way", format("shared offset %u", offset));
        }
        byte_states_[offset] = ByteState::Written;
        stored_at_[offset] = static_cast<u32>(stores_);
        stored_by_[offset] = static_cast<u8>(current_->number);
    }
    if (num_products_ > 0) {
        check_products(address, bytes, "the store");
    }
}

// PTX ISA, "Asynchronous warpgroup-level matrix instructions": the operands must not change before wait_group.
void Machine::check_products(u32 address, u32 bytes, const char* what) {
    for (const Warp& warp : warps_) {
        for (const Product& product : warp.products) {
            bool hits_b = product.b_begin < address + bytes && address < product.b_end;
            bool hits_a = product.a_begin < address + bytes && address < product.a_end;
            if (hits_a || hits_b) {
                finding("operand of an unfinished wgmma is overwritten",
                        format("%s to shared offset %u overwrites %s of warp %d's wgmma in PTX line %d", what,
                               address - SHARED_BASE, hits_b ? "B" : "A", warp.number, product.instruction->line));
                return;
            }
        }
    }
}

void Machine::load(Warp& warp, const Instruction& i, u32 active) {
    u32 size = size_of(i.type);
    u32 count = static_cast<u32>(i.registers.size());
    for_each_lane(active, [&](int lane) {
        Space space = i.space;
        const u8* from = resolve(space, warp.address(i.address, lane), size * count, false);
        if (space == Space::Shared) {
            check_read(static_cast<u32>(from - memory_.data()) + SHARED_BASE, size * count);
        }
        for (u32 number = 0; number < count; number++) {
            u64 value = 0;
            memcpy(&value, from + number * size, size);
            if (is_signed(i.type) && size < 4) {
                value = static_cast<u32>(sign_extended(value, size));
            }
            if (i.registers[number] != NO_REGISTER) {
                warp.lanes_of(i.registers[number])[lane] = value;
            }
        }
    });
}

void Machine::store(Warp& warp, const Instruction& i, u32 active) {
    u32 size = size_of(i.type);
    u32 count = static_cast<u32>(i.registers.size());
    stores_++;
    for_each_lane(active, [&](int lane) {
        Space space = i.space;
        u8* to = resolve(space, warp.address(i.address, lane), size * count, true);
        u8 value[64];
        for (u32 number = 0; number < count; number++) {
            memcpy(value + number * size, &warp.lanes_of(i.registers[number])[lane], size);
        }
        bool same_bytes = memcmp(to, value, size * count) == 0;
        memcpy(to, value, size * count);
        if (space == Space::Shared) {
            wrote(static_cast<u32>(to - memory_.data()) + SHARED_BASE, size * count, same_bytes);
        }
    });
}

// ldmatrix and stmatrix: matrices of 8 rows of 8 numbers of 16 bits. Lane 8m + r has the address of row r of matrix m.
void Machine::move_matrices(Warp& warp, const Instruction& i) {
    bool is_store = i.op == Op::StoreMatrix;
    stores_ += is_store;
    u64 loaded[4][LANES];
    for (size_t matrix = 0; matrix < i.registers.size(); matrix++) {
        u8* rows[8];
        for (int row = 0; row < 8; row++) {
            u64 address = warp.address(i.address, static_cast<int>(matrix) * 8 + row) & 0xffffffff;
            rows[row] = shared(address, 16, is_store, 16);
            if (!is_store) {
                check_read(static_cast<u32>(address), 16);
            }
        }
        for (int lane = 0; lane < LANES; lane++) {
            u64& value = is_store ? warp.lanes_of(i.registers[matrix])[lane] : loaded[matrix][lane];
            u16 pair[2] = {static_cast<u16>(value), static_cast<u16>(value >> 16)};
            for (int half = 0; half < 2; half++) {
                int row = lane / 4;
                int column = lane % 4 * 2 + half;
                if (i.transposed) {
                    std::swap(row, column);
                }
                u8* place = rows[row] + 2 * column;
                is_store ? memcpy(place, &pair[half], 2) : memcpy(&pair[half], place, 2);
            }
            if (!is_store) {
                value = pair[0] | static_cast<u64>(pair[1]) << 16;
            }
        }
        for (int row = 0; row < 8 && is_store; row++) {
            wrote(static_cast<u32>(rows[row] - memory_.data()) + SHARED_BASE, 16, false);
        }
    }
    for (size_t matrix = 0; matrix < i.registers.size() && !is_store; matrix++) {
        memcpy(warp.lanes_of(i.registers[matrix]), loaded[matrix], sizeof loaded[matrix]);
    }
}

}  // namespace ptx

// Products of a warpgroup (PTX ISA, "wgmma.mma_async"). Each warp computes its 16 of the 64 rows when it gets there.
//
// A product is computed when it is issued or when it is waited for. A kernel is right only if both give the same.
#include <algorithm>

#include "machine.h"

namespace ptx {

// PTX ISA, "Matrix descriptor": offsets are in units of 16 bytes; bits 62 and 63 are the swizzle.
MatrixDescriptor Machine::decode_descriptor(u64 bits) {
    static const int swizzles[] = {0, 3, 2, 1};
    if ((bits >> 49 & 7) != 0) {
        fail("a descriptor of wgmma with a base offset is not emulated");
    }
    auto field = [&](int first) { return static_cast<u32>(bits >> first & 0x3fff) << 4; };
    return {field(0), field(16), field(32), swizzles[bits >> 62]};
}

static u32 swizzled(u32 address, int swizzle) {
    return address ^ ((address >> 3) & ((1u << (4 + swizzle)) - 16));
}

// 16 bytes of a row of an operand, whose inner dimension is k. chunk: 0 or 1. PTX ISA, "Canonical layouts", K-major.
static u32 chunk_along_k(const MatrixDescriptor& d, u32 row, u32 chunk) {
    u32 group = d.start + row / 8 * d.stride_offset;
    if (d.swizzle == 0) {
        return group + row % 8 * 16 + chunk * d.leading_offset;
    }
    return swizzled(group + row % 8 * (16u << d.swizzle) + chunk * 16, d.swizzle);
}

// 16 bytes of 8 rows at one k, for an operand that is stored transposed: MN-major.
static u32 chunk_along_rows(const MatrixDescriptor& d, u32 eight_rows, u32 k) {
    if (d.swizzle == 0) {
        return d.start + eight_rows * d.stride_offset + k % 8 * 16 + k / 8 * d.leading_offset;
    }
    u32 chunks = 1u << d.swizzle;
    u32 address = d.start + eight_rows % chunks * 16 + eight_rows / chunks * d.leading_offset;
    return swizzled(address + k % 8 * (16u << d.swizzle) + k / 8 * d.stride_offset, d.swizzle);
}

// Calls visit(address, row, k) for each 16 bytes of an operand's rows. They are numbers of one row, from k on, or if the operand
// is transposed, of 8 rows at one k.
template <class Visit>
void Machine::visit_operand(const MatrixDescriptor& d, bool transposed, u32 first, u32 rows, u32 k, Visit visit) {
    if (!transposed) {
        for (u32 row = 0; row < rows; row++) {
            visit(chunk_along_k(d, first + row, 0), row, 0u);
            visit(chunk_along_k(d, first + row, 1), row, k / 2);
        }
        return;
    }
    if (k != 16) {
        fail("a transposed operand of wgmma has numbers of 16 bits");
    }
    for (u32 row = 0; row < rows; row += 8) {
        for (u32 step = 0; step < k; step++) {
            visit(chunk_along_rows(d, (first + row) / 8, step), row, step);
        }
    }
}

// values: [rows, k].
void Machine::read_operand(u64 descriptor, bool transposed, const Instruction& i, u32 first, u32 rows, float* values) {
    u32 k = i.k;
    int count = static_cast<int>(k / 2);
    visit_operand(decode_descriptor(descriptor), transposed, first, rows, k, [&](u32 address, u32 row, u32 step) {
        const u8* chunk = shared(address, 16, false, 16);
        check_async_read(address, 16);
        for (int number = 0; number < (transposed ? 8 : count); number++) {
            u32 place = transposed ? (row + number) * k + step : row * k + step + number;
            values[place] = element(chunk, number, i.source_type);
        }
    });
}

static u32 first_row(const Warp& warp) {
    return 16 * (warp.number % WARPGROUP);
}

// A product reads its operands until it is waited for. So its reads count when it is issued and when it is waited for.
void Machine::note_operand_read(Warp& warp, const Product& product, bool checks) {
    const Instruction& i = *product.instruction;
    auto note = [&](u32 address, u32, u32) { race_read(address, 16, checks); };
    visit_operand(decode_descriptor(product.descriptor_b), i.transposed_b, 0, i.n, i.k, note);
    if (i.a_registers.empty()) {
        visit_operand(decode_descriptor(product.descriptor_a), i.transposed_a, first_row(warp), 16, i.k, note);
    }
}

void Machine::issue_product(Warp& warp, const Instruction& i) {
    bool loads_a = i.a_registers.empty();
    Product product;
    product.instruction = &i;
    product.descriptor_a = loads_a ? warp.lanes_of(i.a)[0] : 0;
    product.descriptor_b = warp.lanes_of(i.b)[0];
    product.adds = warp.lanes_of(i.c)[0] & 1;
    for (int lane = 0; lane < LANES; lane++) {
        bool same = warp.lanes_of(i.b)[lane] == product.descriptor_b;
        if (!same || (loads_a && warp.lanes_of(i.a)[lane] != product.descriptor_a)) {
            fail("the descriptors of wgmma differ among lanes");
        }
    }
    auto extend = [&](u32& begin, u32& end) {
        begin = ~0u;
        end = 0;
        return [&](u32 address, u32, u32) {
            shared(address, 16, false, 16);
            begin = std::min(begin, address);
            end = std::max(end, address + 16);
        };
    };
    visit_operand(decode_descriptor(product.descriptor_b), i.transposed_b, 0, i.n, i.k,
                  extend(product.b_begin, product.b_end));
    if (loads_a) {
        visit_operand(decode_descriptor(product.descriptor_a), i.transposed_a, first_row(warp), 16, i.k,
                      extend(product.a_begin, product.a_end));
    }
    note_operand_read(warp, product, true);
    if (!options_.late_products) {
        do_product(warp, product);
    }
    warp.products.push_back(product);
    num_products_++;
}

void Machine::commit_products(Warp& warp) {
    int count = 0;
    for (Product& product : warp.products) {
        count += !product.committed;
        product.committed = true;
    }
    warp.groups.push_back(count);
}

// Wait until only so many groups are not done. What is waited for late reads its operands, and A in registers, only now.
void Machine::wait_products(Warp& warp, int still_running) {
    while (static_cast<int>(warp.groups.size()) > still_running) {
        int count = warp.groups.front();
        for (int number = 0; number < count; number++) {
            Product& product = warp.products[number];
            if (!product.done) {
                do_product(warp, product);
            }
            note_operand_read(warp, product, false);
        }
        warp.products.erase(warp.products.begin(), warp.products.begin() + count);
        warp.groups.erase(warp.groups.begin());
        num_products_ -= count;
    }
}

// PTX ISA, "Register fragments for wgmma": lane l has rows l / 4 and l / 4 + 8, and in each run of 8 columns (for A: of k / 2),
// as many neighbours as a register holds.
void Machine::do_product(Warp& warp, Product& product) {
    const Instruction& i = *product.instruction;
    u32 n = i.n;
    u32 k = i.k;
    float a[16 * 32];
    static thread_local float b[256 * 32], b_by_k[32 * 256], sums[16 * 256];
    if (i.a_registers.empty()) {
        read_operand(product.descriptor_a, i.transposed_a, i, first_row(warp), 16, a);
    }
    for (size_t part = 0; part < i.a_registers.size(); part++) {
        int count = 4 / size_of(i.source_type);
        for (int lane = 0; lane < LANES; lane++) {
            u32 value = static_cast<u32>(warp.lanes_of(i.a_registers[part])[lane]);
            u8 bytes[4];
            memcpy(bytes, &value, 4);
            u32 first = (lane / 4 + 8 * (part & 1)) * k + (part >> 1) * (k / 2) + lane % 4 * count;
            for (int number = 0; number < count; number++) {
                a[first + number] = element(bytes, number, i.source_type);
            }
        }
    }
    read_operand(product.descriptor_b, i.transposed_b, i, 0, n, b);
    for (u32 column = 0; column < n; column++) {
        for (u32 step = 0; step < k; step++) {
            b_by_k[step * n + column] = b[column * k + step];
        }
    }
    std::fill(sums, sums + 16 * n, 0.0f);
    for (u32 row = 0; row < 16; row++) {
        for (u32 step = 0; step < k; step++) {
            for (u32 first = 0; first < n; first += 8) {
                for (u32 column = first; column < first + 8; column++) {  // A fixed number, so that it becomes vectors.
                    sums[row * n + column] += a[row * k + step] * b_by_k[step * n + column];
                }
            }
        }
    }
    for (size_t part = 0; part < i.registers.size(); part++) {
        u64* results = warp.lanes_of(i.registers[part]);
        for (int lane = 0; lane < LANES; lane++) {
            u32 row = static_cast<u32>(lane / 4 + 8 * (part >> 1 & 1));
            float sum = sums[row * n + (part >> 2) * 8 + lane % 4 * 2 + (part & 1)];
            results[lane] = bits_of(product.adds ? as_float(results[lane]) + sum : sum);
        }
    }
    product.done = true;
}

}  // namespace ptx

// Arithmetic: what a lane computes from its own registers.
//
// Functions such as exp2 are those of the C library, so their last bits may differ from a GPU's.
#include <algorithm>
#include <cmath>
#include <type_traits>

#include "machine.h"

namespace ptx {

// One instruction of one warp: its operands and result, LANES values each.
class Arithmetic {
public:
    Arithmetic(Warp& warp, const Instruction& i, u32 active) : i_(i), active_(active) {
        static const u64 zeros[LANES] = {};
        a_ = i.a == NO_REGISTER ? zeros : warp.lanes_of(i.a);
        b_ = i.b == NO_REGISTER ? zeros : warp.lanes_of(i.b);
        c_ = i.c == NO_REGISTER ? zeros : warp.lanes_of(i.c);
        d_ = i.d == NO_REGISTER ? unused_ : warp.lanes_of(i.d);
    }

    // d = compute(a, b, c), for the bits of registers. The result is cut to the instruction's type.
    template <class Compute>
    void bits(Compute compute) {
        u64 mask = mask_of(i_.type);
        bits_as_they_are([&](u64 a, u64 b, u64 c) { return compute(a, b, c) & mask; });
    }

    template <class Compute>
    void bits_as_they_are(Compute compute) {
        if (active_ == ALL_LANES) {
            for (int lane = 0; lane < LANES; lane++) {
                d_[lane] = compute(a_[lane], b_[lane], c_[lane]);
            }
        } else {
            for_each_lane(active_, [&](int lane) { d_[lane] = compute(a_[lane], b_[lane], c_[lane]); });
        }
    }

    // The same for signed integers.
    template <class Compute>
    void signed_bits(Compute compute) {
        int size = size_of(i_.type);
        bits([&](u64 a, u64 b, u64 c) {
            return static_cast<u64>(compute(sign_extended(a, size), sign_extended(b, size), sign_extended(c, size)));
        });
    }

    // The same for floats.
    template <class Compute>
    void floats(Compute compute) {
        if (i_.type == Type::F32) {
            auto flush = [&](float number) { return i_.flushes ? flushed(number) : number; };
            bits([&](u64 a, u64 b, u64 c) {
                return bits_of(flush(compute(flush(as_float(a)), flush(as_float(b)), flush(as_float(c)))));
            });
            return;
        }
        if (i_.type != Type::BF16 && i_.type != Type::BF16X2) {
            throw Fault("arithmetic in this float type is not emulated");
        }
        auto half = [&](u64 a, u64 b, u64 c) {
            return to_bfloat16(compute(from_bfloat16(a), from_bfloat16(b), from_bfloat16(c)));
        };
        bool two = i_.type == Type::BF16X2;
        bits([&](u64 a, u64 b, u64 c) {
            return half(a, b, c) | (two ? half(a >> 16, b >> 16, c >> 16) << 16 : 0);
        });
    }

    // The same for numbers of the instruction's type.
    template <class Compute>
    void numbers(Compute compute) {
        if (is_float(i_.type)) {
            floats(compute);
        } else if (is_signed(i_.type)) {
            signed_bits(compute);
        } else {
            bits(compute);
        }
    }

private:
    const Instruction& i_;
    u32 active_;
    const u64 *a_, *b_, *c_;
    u64* d_;
    u64 unused_[LANES];
};

// PTX ISA, "min" and "max": the operand that is not NaN; -0 is less than 0.
static float lesser(float a, float b) {
    if (std::isnan(a) || std::isnan(b)) {
        return std::isnan(a) ? b : a;
    }
    return a < b || (a == b && std::signbit(a)) ? a : b;
}

static float greater(float a, float b) {
    if (std::isnan(a) || std::isnan(b)) {
        return std::isnan(a) ? b : a;
    }
    return a > b || (a == b && !std::signbit(a)) ? a : b;
}

template <class Number>
static Number lesser(Number a, Number b) {
    return std::min(a, b);
}

template <class Number>
static Number greater(Number a, Number b) {
    return std::max(a, b);
}

template <class Number>
static bool holds(Comparison comparison, bool or_unordered, Number a, Number b) {
    bool unordered = a != a || b != b;
    switch (comparison) {
        case Comparison::Equal:
            return a == b || (or_unordered && unordered);
        case Comparison::NotEqual:
            return unordered ? or_unordered : a != b;
        case Comparison::Less:
            return a < b || (or_unordered && unordered);
        case Comparison::LessOrEqual:
            return a <= b || (or_unordered && unordered);
        case Comparison::Greater:
            return a > b || (or_unordered && unordered);
        case Comparison::GreaterOrEqual:
            return a >= b || (or_unordered && unordered);
        case Comparison::OrderedPair:
            return !unordered;
        default:
            return unordered;
    }
}

static bool compare(const Instruction& i, u64 a, u64 b) {
    if (i.type == Type::F32) {
        float x = i.flushes ? flushed(as_float(a)) : as_float(a);
        float y = i.flushes ? flushed(as_float(b)) : as_float(b);
        return holds(i.comparison, i.or_unordered, x, y);
    }
    if (i.type == Type::BF16 || i.type == Type::BF16X2) {
        return holds(i.comparison, i.or_unordered, from_bfloat16(a), from_bfloat16(b));
    }
    if (is_float(i.type)) {
        throw Fault("a comparison of this float type is not emulated");
    }
    int size = size_of(i.type);
    if (is_signed(i.type)) {
        return holds(i.comparison, false, sign_extended(a, size), sign_extended(b, size));
    }
    return holds(i.comparison, false, a & mask_of(i.type), b & mask_of(i.type));
}

// PTX ISA, "cvt". With two sources, the first is the upper number.
static u64 convert(const Instruction& i, u64 a, u64 b) {
    Type to = i.type;
    Type from = i.source_type;
    if (to == Type::BF16X2 && from == Type::F32) {
        return to_bfloat16(as_float(a)) << 16 | to_bfloat16(as_float(b));
    }
    if (to == Type::E4M3X2 && from == Type::F32) {
        return to_e4m3(as_float(a)) << 8 | to_e4m3(as_float(b));
    }
    s64 integer = is_signed(from) ? sign_extended(a, size_of(from)) : static_cast<s64>(a & mask_of(from));
    if (!is_float(to) && !is_float(from)) {
        return static_cast<u64>(integer) & mask_of(to);
    }
    float number;
    if (from == Type::F32) {
        number = i.flushes ? flushed(as_float(a)) : as_float(a);
    } else if (from == Type::BF16 || from == Type::F16) {
        number = from == Type::BF16 ? from_bfloat16(a) : from_float16(a);
    } else if (size_of(from) < 8) {
        number = static_cast<float>(integer);
    } else {
        throw Fault("this conversion is not emulated");
    }
    if (to == Type::F32) {
        return bits_of(number);
    }
    if (to == Type::BF16) {
        return to_bfloat16(number);
    }
    throw Fault("this conversion is not emulated");
}

static u64 lop3(int table, u64 a, u64 b, u64 c) {
    u64 result = 0;
    for (int row = 0; row < 8; row++) {
        if (table >> row & 1) {
            result |= (row & 4 ? a : ~a) & (row & 2 ? b : ~b) & (row & 1 ? c : ~c);
        }
    }
    return result & 0xffffffff;
}

// PTX ISA, "prmt": each four bits of c choose a byte of a and b, or the sign of that byte.
static u64 permute(u64 a, u64 b, u64 c) {
    u64 bytes = (a & 0xffffffff) | b << 32;
    u64 result = 0;
    for (int place = 0; place < 4; place++) {
        u64 selector = c >> (4 * place) & 15;
        u64 byte = bytes >> (8 * (selector & 7)) & 255;
        if (selector & 8) {
            byte = byte & 128 ? 255 : 0;
        }
        result |= byte << (8 * place);
    }
    return result;
}

static u64 window_of(Space space) {
    return space == Space::Shared ? SHARED_WINDOW : space == Space::Parameter ? PARAMETER_WINDOW : 0;
}

// Several registers that are the parts of one, the lowest first.
static void pack(Warp& warp, const Instruction& i, u32 active) {
    size_t bits = 8 * size_of(i.type) / i.registers.size();
    u64 mask = (1ull << bits) - 1;
    for_each_lane(active, [&](int lane) {
        u64 whole = i.op == Op::Unpack ? warp.lanes_of(i.a)[lane] : 0;
        for (size_t part = 0; part < i.registers.size(); part++) {
            if (i.op == Op::Pack) {
                whole |= (warp.lanes_of(i.registers[part])[lane] & mask) << (bits * part);
            } else if (i.registers[part] != NO_REGISTER) {
                warp.lanes_of(i.registers[part])[lane] = whole >> (bits * part) & mask;
            }
        }
        if (i.op == Op::Pack) {
            warp.lanes_of(i.d)[lane] = whole;
        }
    });
}

static void multiply(Arithmetic& lanes, const Instruction& i) {
    if (is_float(i.type)) {
        lanes.floats([](float x, float y, float) { return x * y; });
        return;
    }
    int size = size_of(i.type);
    bool has_sign = is_signed(i.type);
    auto product = [=](u64 x, u64 y) {
        return has_sign ? static_cast<u64>(sign_extended(x, size) * sign_extended(y, size)) : x * y;
    };
    u64 wide_mask = size == 2 ? 0xffffffff : ~0ull;
    if ((i.op == Op::MulHigh && size > 4) || i.type == Type::None) {
        throw Fault("this multiplication is not emulated");
    }
    switch (i.op) {
        case Op::Mul:
            lanes.bits([](u64 x, u64 y, u64) { return x * y; });
            break;
        case Op::Mad:
            lanes.bits([](u64 x, u64 y, u64 z) { return x * y + z; });
            break;
        case Op::MulHigh:
            lanes.bits([=](u64 x, u64 y, u64) { return product(x, y) >> (8 * size); });
            break;
        case Op::MulWide:
            lanes.bits_as_they_are([=](u64 x, u64 y, u64) { return product(x, y) & wide_mask; });
            break;
        default:  // MadWide
            lanes.bits_as_they_are([=](u64 x, u64 y, u64 z) { return (product(x, y) + z) & wide_mask; });
    }
}

static void divide(Arithmetic& lanes, const Instruction& i) {
    if (is_float(i.type)) {
        lanes.floats([](float x, float y, float) { return x / y; });
        return;
    }
    bool remainder = i.op == Op::Rem;
    lanes.numbers([=](auto x, auto y, auto) {
        if (y == 0) {
            throw Fault("division by zero");
        }
        auto quotient = x;
        if (std::is_signed_v<decltype(y)> && y + 1 == 0) {
            quotient = 0 - x;  // Division would overflow for the least number.
        } else {
            quotient = x / y;
        }
        return remainder ? x - quotient * y : quotient;
    });
}

static void shift_or_extract(Arithmetic& lanes, const Instruction& i) {
    u32 width = 8 * size_of(i.type);
    bool has_sign = is_signed(i.type);
    if (i.op == Op::ShiftLeft) {
        lanes.bits([=](u64 x, u64 by, u64) { return (by & 0xffffffff) >= width ? 0 : x << by; });
    } else if (i.op == Op::ShiftRight && has_sign) {
        s64 most = width - 1;
        lanes.signed_bits([=](s64 x, s64 by, s64) { return x >> (by < 0 ? most : std::min(by, most)); });
    } else if (i.op == Op::ShiftRight) {
        lanes.bits([=](u64 x, u64 by, u64) { return (by & 0xffffffff) >= width ? 0 : x >> by; });
    } else {
        lanes.bits([=](u64 x, u64 first, u64 count) {
            first &= 255;
            count &= 255;
            if (has_sign && first + count > width) {
                throw Fault("bfe of signed numbers beyond their bits is not emulated");
            }
            u64 mask = count >= 64 ? ~0ull : (1ull << count) - 1;
            u64 found = first >= width ? 0 : x >> first & mask;
            bool negative = has_sign && count > 0 && found >> (count - 1) & 1;
            return negative ? found | ~mask : found;
        });
    }
}

void Machine::arithmetic(Warp& warp, const Instruction& i, u32 active) {
    Arithmetic lanes(warp, i, active);
    u64 window = window_of(i.space);
    switch (i.op) {
        case Op::Add:
            return lanes.numbers([](auto x, auto y, auto) { return x + y; });
        case Op::Sub:
            return lanes.numbers([](auto x, auto y, auto) { return x - y; });
        case Op::Neg:
            return lanes.numbers([](auto x, auto, auto) { return -x; });
        case Op::Abs:
            return lanes.floats([](float x, float, float) { return std::fabs(x); });
        case Op::InverseRoot:
            return lanes.floats([](float x, float, float) { return 1.0f / std::sqrt(x); });
        case Op::Min:
            return lanes.numbers([](auto x, auto y, auto) { return lesser(x, y); });
        case Op::Max:
            return lanes.numbers([](auto x, auto y, auto) { return greater(x, y); });
        case Op::Mul:
        case Op::MulHigh:
        case Op::MulWide:
        case Op::Mad:
        case Op::MadWide:
            return multiply(lanes, i);
        case Op::Div:
        case Op::Rem:
            return divide(lanes, i);
        case Op::Fma:
            return lanes.floats([](float x, float y, float z) { return std::fma(x, y, z); });
        case Op::Exp2:
            return lanes.floats([](float x, float, float) { return std::exp2(x); });
        case Op::And:
            return lanes.bits([](u64 x, u64 y, u64) { return x & y; });
        case Op::Or:
            return lanes.bits([](u64 x, u64 y, u64) { return x | y; });
        case Op::Xor:
            return lanes.bits([](u64 x, u64 y, u64) { return x ^ y; });
        case Op::Not:
            return lanes.bits([&](u64 x, u64, u64) { return i.type == Type::Predicate ? !x : ~x; });
        case Op::ShiftLeft:
        case Op::ShiftRight:
        case Op::ExtractBits:
            return shift_or_extract(lanes, i);
        case Op::Move:
            return lanes.bits([](u64 x, u64, u64) { return x; });
        case Op::Select:
            return lanes.bits([](u64 x, u64 y, u64 chooses_x) { return chooses_x ? x : y; });
        case Op::Convert:
            return lanes.bits_as_they_are([&](u64 x, u64 y, u64) { return convert(i, x, y); });
        case Op::Compare:
            if (i.second_d != NO_REGISTER) {  // Of two numbers in a register, this is for the upper one.
                u64 *upper = warp.lanes_of(i.second_d), *x = warp.lanes_of(i.a), *y = warp.lanes_of(i.b);
                for_each_lane(active, [&](int lane) { upper[lane] = compare(i, x[lane] >> 16, y[lane] >> 16); });
            }
            return lanes.bits_as_they_are([&](u64 x, u64 y, u64) { return compare(i, x, y); });
        case Op::Lop3:
            return lanes.bits_as_they_are([&](u64 x, u64 y, u64 z) { return lop3(i.number, x, y, z); });
        case Op::Permute:
            return lanes.bits_as_they_are([](u64 x, u64 y, u64 z) { return permute(x, y, z); });
        case Op::ToGeneric:
            return lanes.bits_as_they_are([=](u64 x, u64, u64) { return x + window; });
        case Op::FromGeneric:
            return lanes.bits_as_they_are([=](u64 x, u64, u64) { return x - window; });
        case Op::Pack:
        case Op::Unpack:
            return pack(warp, i, active);
        default:
            fail("an instruction without a meaning");
    }
}

}  // namespace ptx

// The names of types, and the conversion of small floats by tables.
#include "numbers.h"

#include <algorithm>
#include <array>
#include <map>

namespace ptx {

Type type_named(const std::string& modifier) {
    static const std::map<std::string, Type> names = {
        {"b8", Type::B8},     {"b16", Type::B16},   {"b32", Type::B32},         {"b64", Type::B64},
        {"u8", Type::U8},     {"u16", Type::U16},   {"u32", Type::U32},         {"u64", Type::U64},
        {"s8", Type::S8},     {"s16", Type::S16},   {"s32", Type::S32},         {"s64", Type::S64},
        {"f16", Type::F16},   {"bf16", Type::BF16}, {"bf16x2", Type::BF16X2},   {"f32", Type::F32},
        {"e4m3", Type::E4M3}, {"e4m3x2", Type::E4M3X2}, {"pred", Type::Predicate},
    };
    auto found = names.find(modifier);
    return found == names.end() ? Type::None : found->second;
}

// The value of a float without a sign: `exponents` bits of exponent with this bias, then `mantissas` bits.
static float small_float(u32 bits, int mantissas, int bias) {
    u32 exponent = bits >> mantissas;
    float fraction = std::ldexp(static_cast<float>(bits & ((1u << mantissas) - 1)), -mantissas);
    if (exponent == 0) {
        return std::ldexp(fraction, 1 - bias);
    }
    return std::ldexp(1.0f + fraction, static_cast<int>(exponent) - bias);
}

float from_float16(u64 value) {
    u32 bits = value & 0x7fff;
    float size = small_float(bits, 10, 15);
    if (bits >= 0x7c00) {
        size = bits == 0x7c00 ? INFINITY : NAN;
    }
    return value & 0x8000 ? -size : size;
}

static std::array<float, 256> e4m3_values() {
    std::array<float, 256> values;
    for (u32 bits = 0; bits < 256; bits++) {
        // There is no infinity: the largest exponent is that of other numbers, and only all ones are NaN.
        float size = (bits & 0x7f) == 0x7f ? NAN : small_float(bits & 0x7f, 3, 7);
        values[bits] = bits & 0x80 ? -size : size;
    }
    return values;
}

float from_e4m3(u64 value) {
    static const std::array<float, 256> values = e4m3_values();
    return values[value & 255];
}

u64 to_e4m3(float number) {
    constexpr float largest = 448.0f;
    if (std::isnan(number)) {
        return 0x7f;
    }
    u64 sign = std::signbit(number) ? 0x80 : 0;
    float size = std::min(std::fabs(number), largest);
    // Numbers below 2^-6 have the exponent of that. An eighth of 2^exponent is the last place.
    int exponent = std::max(size > 0 ? std::ilogb(size) : -6, -6);
    u64 eighths = static_cast<u64>(std::nearbyint(std::ldexp(size, 3 - exponent)));
    // If rounding gives 16 eighths, the sum below carries into the exponent.
    return sign | (static_cast<u64>(exponent + 6) * 8 + eighths);
}

}  // namespace ptx

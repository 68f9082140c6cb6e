// The types of PTX, and the bits of numbers in registers.
//
// A register of one lane is kept as 64 bits. The bits above a narrower value are zero.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>

namespace ptx {

using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;
using s32 = int32_t;
using s64 = int64_t;

enum class Type : u8 {
    None, B8, B16, B32, B64, U8, U16, U32, U64, S8, S16, S32, S64, F16, BF16, F32, BF16X2, E4M3,
    E4M3X2, Predicate
};

// The type that a modifier of an instruction names; None if it names none.
Type type_named(const std::string& modifier);

constexpr int size_of(Type type) {
    switch (type) {
        case Type::B8:
        case Type::U8:
        case Type::S8:
        case Type::E4M3:
        case Type::Predicate:
            return 1;
        case Type::B16:
        case Type::U16:
        case Type::S16:
        case Type::F16:
        case Type::BF16:
        case Type::E4M3X2:
            return 2;
        case Type::B64:
        case Type::U64:
        case Type::S64:
            return 8;
        default:
            return 4;
    }
}

constexpr bool is_signed(Type type) {
    return type == Type::S8 || type == Type::S16 || type == Type::S32 || type == Type::S64;
}

constexpr bool is_float(Type type) {
    return type == Type::F16 || type == Type::BF16 || type == Type::F32 || type == Type::BF16X2;
}

// A register's bits that a value of this type takes.
constexpr u64 mask_of(Type type) {
    return size_of(type) == 8 ? ~0ull : (1ull << 8 * size_of(type)) - 1;
}

// The signed value of the lowest `bytes` bytes.
constexpr s64 sign_extended(u64 value, int bytes) {
    int above = 64 - 8 * bytes;
    return static_cast<s64>(value << above) >> above;
}

inline float as_float(u64 value) {
    u32 low = static_cast<u32>(value);
    float number;
    memcpy(&number, &low, 4);
    return number;
}

inline u64 bits_of(float number) {
    u32 bits;
    memcpy(&bits, &number, 4);
    return bits;
}

inline float from_bfloat16(u64 value) {
    return as_float((value & 0xffff) << 16);
}

// Rounded to the nearest, ties to even.
inline u64 to_bfloat16(float number) {
    if (std::isnan(number)) {
        return 0x7fff;
    }
    u32 bits = static_cast<u32>(bits_of(number));
    bits += 0x7fff + ((bits >> 16) & 1);
    return bits >> 16;
}

// With .ftz, subnormal numbers are zeros of the same sign.
inline float flushed(float number) {
    return std::fpclassify(number) == FP_SUBNORMAL ? std::copysign(0.0f, number) : number;
}

float from_float16(u64 value);

float from_e4m3(u64 value);

// Rounded to the nearest, ties to even. What is too large becomes the largest number.
u64 to_e4m3(float number);

// Number `index` of an array of bfloat16, float16 or e4m3.
inline float element(const u8* array, int index, Type type) {
    if (type == Type::E4M3) {
        return from_e4m3(array[index]);
    }
    u16 value;
    memcpy(&value, array + 2 * index, 2);
    return type == Type::BF16 ? from_bfloat16(value) : from_float16(value);
}

}  // namespace ptx

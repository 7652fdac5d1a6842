// Conversions and exp() for bf16 kernels. Everything computes in fp32; NaN and infinity pass through.
#pragma once
#include <cstdint>
#include <cstring>

// Without units for bf16, products of bf16 matrices are fp32 ones (fma.h).
#if defined(__AVX2__) && defined(__FMA__) && !defined(__AMX_BF16__) && !defined(__AVX512BF16__)
#define FMA_PRODUCTS
#endif

using bf16 = std::uint16_t;
using index_t = std::int64_t;

constexpr index_t TILE = 32;  // tokens, inputs and outputs come in multiples of it

static inline float to_float(bf16 value) {
    std::uint32_t bits = static_cast<std::uint32_t>(value) << 16;
    float out;
    std::memcpy(&out, &bits, 4);
    return out;
}

// Round to nearest even; a NaN stays one.
static inline bf16 to_bf16(float value) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, 4);
    std::uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return static_cast<bf16>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

// exp(x) to 2 units in the last place for |x| < 87, clamped there. Source: Cody and Waite's reduction, a Taylor
// polynomial of degree 6 on |r| <= ln(2)/2.
static inline float fast_exp(float x) {
    x = x < -87.0f ? -87.0f : x;
    x = x > 87.0f ? 87.0f : x;
    const float shift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, kept in the low bits
    float shifted = x * 1.44269504f + shift;
    std::int32_t power;
    std::memcpy(&power, &shifted, 4);
    float n = shifted - shift;
    float r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float poly = 1.0f / 720.0f;
    poly = poly * r + 1.0f / 120.0f;
    poly = poly * r + 1.0f / 24.0f;
    poly = poly * r + 1.0f / 6.0f;
    poly = poly * r + 0.5f;
    poly = poly * r + 1.0f;
    poly = poly * r + 1.0f;
    std::int32_t scale_bits = static_cast<std::int32_t>(static_cast<std::uint32_t>(power + 127) << 23);
    float scale;
    std::memcpy(&scale, &scale_bits, 4);
    return poly * scale;
}

static inline float sigmoid(float x) { return 1.0f / (1.0f + fast_exp(-x)); }

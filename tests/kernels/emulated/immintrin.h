// What finetune/kernels/cpp uses of AVX-512, its bf16 conversions and AMX, in software: the tests put this file in the
// place of the compiler's <immintrin.h> (-I) and define __AMX_BF16__ and __AVX512BF16__, on any processor with AVX2.
//
// Semantics are those of Intel's Software Developer's Manual, volume 2 (instructions are named where they are not
// plain), for the rounding to nearest even that processes start with. What faults on the processor stops here:
// addresses that are not aligned, and tiles that are not configured. What cannot be found out here: compilers' mistakes
// around the real instructions (amx.h names two), and anything about speed.
#pragma once
// Not the compiler's whole file, which takes the macros above for what it may compile for. Its parts ask for this name.
#define _IMMINTRIN_H_INCLUDED
#include <emmintrin.h>
#include <smmintrin.h>
#include <avxintrin.h>
#include <fmaintrin.h>

#include <cassert>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <sys/syscall.h>
#include <unistd.h>

using __m512 = float __attribute__((vector_size(64), may_alias));
using __m512i = long long __attribute__((vector_size(64), may_alias));
using __m512bh = std::uint16_t __attribute__((vector_size(64), may_alias));
using __m256bh = std::uint16_t __attribute__((vector_size(32), may_alias));
using __mmask16 = std::uint16_t;

namespace emulated {

using Ints = std::int32_t __attribute__((vector_size(64), may_alias));
using Words = std::uint32_t __attribute__((vector_size(64), may_alias));
using Halves = std::uint16_t __attribute__((vector_size(64), may_alias));

template <class V> constexpr int LANES = sizeof(V) / sizeof(V{}[0]);

// A vector from value(lane).
template <class V, class Value> inline V each(Value value) {
    V out{};
    for (int i = 0; i < LANES<V>; ++i) out[i] = value(i);
    return out;
}

template <class Truth> inline __mmask16 mask_of(Truth holds) {
    unsigned mask = 0;
    for (int i = 0; i < 16; ++i) mask |= (holds(i) ? 1u : 0u) << i;
    return static_cast<__mmask16>(mask);
}

inline bool in(__mmask16 mask, int lane) { return mask >> lane & 1; }

template <class V> inline V load(const void* from) {
    V out;
    std::memcpy(&out, from, sizeof out);
    return out;
}

inline const void* aligned(const void* address) {
    assert(reinterpret_cast<std::uintptr_t>(address) % 64 == 0);
    return address;
}

template <class To, class From> inline To bits(From value) {
    static_assert(sizeof(To) == sizeof(From));
    return load<To>(&value);
}

// VCVTNEPS2BF16: a denormal number becomes zero, a NaN quiet.
inline std::uint16_t to_bf16(float value) {
    const auto word = bits<std::uint32_t>(value), sign = word & 0x80000000u;
    if ((word & 0x7f800000u) == 0) return static_cast<std::uint16_t>(sign >> 16);
    if (value != value) return static_cast<std::uint16_t>(word >> 16 | 0x40u);
    return static_cast<std::uint16_t>((word + 0x7fffu + (word >> 16 & 1u)) >> 16);
}

// VRNDSCALEPS with no bits of fraction.
inline float round_to(float x, int control) {
    assert(control == _MM_FROUND_TO_NEAREST_INT || control == _MM_FROUND_TO_NEG_INF);
    return control == _MM_FROUND_TO_NEAREST_INT ? std::nearbyint(x) : std::floor(x);
}

// VREDUCEPS.
inline float reduce(float x, int control) {
    if (std::isinf(x)) return 0.0f;
    float rest = x - round_to(x, control);
    return rest == 0.0f ? (control == _MM_FROUND_TO_NEG_INF ? -0.0f : 0.0f) : rest;
}

// VSCALEFPS: x * 2^floor(power), rounded once. Beyond 300 nothing is left of a float's range.
inline float scale(float x, float power) {
    if (std::isinf(power)) {
        if (power < 0) return std::isinf(x) ? NAN : x != x ? 0.0f : std::copysign(0.0f, x);
        return x == 0.0f ? NAN : x != x ? INFINITY : std::copysign(INFINITY, x);
    }
    if (x != x || power != power) return x + power;
    const auto whole = static_cast<std::int64_t>(std::floor(std::fmin(std::fmax(power, -300.0f), 300.0f)));
    return static_cast<float>(x * bits<double>((whole + 1023) << 52));
}

// VRCP14PS's relative error is at most 2^-14: here as much as that, or the sources' step after it would not be tested.
inline float near_reciprocal(float x) {
    float exact = 1.0f / x;
    return exact != exact ? exact : bits<float>(bits<std::uint32_t>(exact) & ~0x1ffu);
}

// VPUNPCKL and VPUNPCKH: of the lower or upper half of each 16 bytes, a's elements and b's in turn.
template <class V> inline V unpack(V a, V b, bool high) {
    constexpr int COUNT = 16 / sizeof(a[0]);
    return each<V>([&](int i) {
        int from = i / COUNT * COUNT + high * COUNT / 2 + i % COUNT / 2;
        return i % 2 ? b[from] : a[from];
    });
}

template <class V, class... Element> inline V last_to_first(Element... elements) {
    static_assert(sizeof...(elements) == LANES<V>);
    const decltype(V{}[0] + 0) list[] = {elements...};
    return each<V>([&](int i) { return list[LANES<V> - 1 - i]; });
}

}  // namespace emulated

// Memory

static inline __m512 _mm512_loadu_ps(const void* from) { return emulated::load<__m512>(from); }
static inline __m512 _mm512_load_ps(const void* from) { return _mm512_loadu_ps(emulated::aligned(from)); }
static inline __m512i _mm512_loadu_si512(const void* from) { return emulated::load<__m512i>(from); }
static inline __m512i _mm512_load_si512(const void* from) { return _mm512_loadu_si512(emulated::aligned(from)); }
static inline void _mm512_storeu_ps(void* to, __m512 a) { std::memcpy(to, &a, sizeof a); }
static inline void _mm512_storeu_si512(void* to, __m512i a) { std::memcpy(to, &a, sizeof a); }
static inline void _mm512_store_ps(void* to, __m512 a) { emulated::aligned(to), _mm512_storeu_ps(to, a); }
static inline void _mm512_store_si512(void* to, __m512i a) { emulated::aligned(to), _mm512_storeu_si512(to, a); }
static inline void _mm512_stream_si512(__m512i* to, __m512i a) { _mm512_store_si512(to, a); }

// Lanes outside the mask are not read.
static inline __m512 _mm512_maskz_loadu_ps(__mmask16 mask, const float* from) {
    return emulated::each<__m512>([&](int i) { return emulated::in(mask, i) ? from[i] : 0.0f; });
}

// Constants and casts

static inline __m512 _mm512_setzero_ps() { return __m512{}; }
static inline __m512 _mm512_set1_ps(float a) { return emulated::each<__m512>([&](int) { return a; }); }
static inline __m512i _mm512_setzero_si512() { return __m512i{}; }
static inline __m512i _mm512_set1_epi32(int a) {
    return (__m512i)emulated::each<emulated::Ints>([&](int) { return a; });
}
static inline __m512i _mm512_set1_epi16(short a) {
    return (__m512i)emulated::each<emulated::Halves>([&](int) { return a; });
}
template <class... Element> static inline __m512i _mm512_set_epi32(Element... elements) {
    return (__m512i)emulated::last_to_first<emulated::Ints>(elements...);
}
template <class... Element> static inline __m512i _mm512_set_epi16(Element... elements) {
    return (__m512i)emulated::last_to_first<emulated::Halves>(elements...);
}
static inline __m512 _mm512_castsi512_ps(__m512i a) { return (__m512)a; }

// Arithmetic of floats; as in gcc's own, which may contract them, these are plain operators

static inline __m512 _mm512_add_ps(__m512 a, __m512 b) { return a + b; }
static inline __m512 _mm512_sub_ps(__m512 a, __m512 b) { return a - b; }
static inline __m512 _mm512_mul_ps(__m512 a, __m512 b) { return a * b; }
static inline __m512 _mm512_div_ps(__m512 a, __m512 b) { return a / b; }
// The second operand where one is NaN.
static inline __m512 _mm512_max_ps(__m512 a, __m512 b) { return a > b ? a : b; }
static inline __m512 _mm512_min_ps(__m512 a, __m512 b) { return a < b ? a : b; }
static inline __m512 _mm512_fmadd_ps(__m512 a, __m512 b, __m512 c) {
    return emulated::each<__m512>([&](int i) { return std::fma(a[i], b[i], c[i]); });
}
static inline __m512 _mm512_fmsub_ps(__m512 a, __m512 b, __m512 c) { return _mm512_fmadd_ps(a, b, -c); }
static inline __m512 _mm512_fnmadd_ps(__m512 a, __m512 b, __m512 c) { return _mm512_fmadd_ps(-a, b, c); }
static inline __m512 _mm512_rcp14_ps(__m512 a) {
    return emulated::each<__m512>([&](int i) { return emulated::near_reciprocal(a[i]); });
}
static inline __m512 _mm512_roundscale_ps(__m512 a, int control) {
    return emulated::each<__m512>([&](int i) { return emulated::round_to(a[i], control); });
}
static inline __m512 _mm512_reduce_ps(__m512 a, int control) {
    return emulated::each<__m512>([&](int i) { return emulated::reduce(a[i], control); });
}
static inline __m512 _mm512_scalef_ps(__m512 a, __m512 powers) {
    return emulated::each<__m512>([&](int i) { return emulated::scale(a[i], powers[i]); });
}
// By halves, as gcc adds them up.
static inline float _mm512_reduce_add_ps(__m512 a) {
    for (int width = 8; width > 0; width /= 2)
        for (int i = 0; i < width; ++i) a[i] += a[i + width];
    return a[0];
}

// Masks

static inline __mmask16 _mm512_cmp_ps_mask(__m512 a, __m512 b, int predicate) {
    assert(predicate == _CMP_GT_OQ || predicate == _CMP_NEQ_UQ);
    if (predicate == _CMP_GT_OQ) return emulated::mask_of([&](int i) { return a[i] > b[i]; });
    return emulated::mask_of([&](int i) { return a[i] != b[i]; });
}
static inline __mmask16 _mm512_cmpge_epi32_mask(__m512i a, __m512i b) {
    return emulated::mask_of([&](int i) { return ((emulated::Ints)a)[i] >= ((emulated::Ints)b)[i]; });
}
static inline __mmask16 _mm512_cmple_epi32_mask(__m512i a, __m512i b) { return _mm512_cmpge_epi32_mask(b, a); }
static inline __mmask16 _mm512_cmplt_epi32_mask(__m512i a, __m512i b) { return ~_mm512_cmpge_epi32_mask(a, b); }
static inline __mmask16 _mm512_cmplt_epu32_mask(__m512i a, __m512i b) {
    return emulated::mask_of([&](int i) { return ((emulated::Words)a)[i] < ((emulated::Words)b)[i]; });
}
static inline __m512 _mm512_mask_mov_ps(__m512 other, __mmask16 mask, __m512 a) {
    return emulated::each<__m512>([&](int i) { return emulated::in(mask, i) ? a[i] : other[i]; });
}
static inline __m512 _mm512_maskz_mov_ps(__mmask16 mask, __m512 a) { return _mm512_mask_mov_ps(__m512{}, mask, a); }
static inline __m512 _mm512_maskz_roundscale_ps(__mmask16 mask, __m512 a, int control) {
    return _mm512_maskz_mov_ps(mask, _mm512_roundscale_ps(a, control));
}

// Integers

static inline __m512i _mm512_add_epi16(__m512i a, __m512i b) {
    return (__m512i)((emulated::Halves)a + (emulated::Halves)b);
}
static inline __m512i _mm512_add_epi32(__m512i a, __m512i b) {
    return (__m512i)((emulated::Words)a + (emulated::Words)b);
}
static inline __m512i _mm512_sub_epi32(__m512i a, __m512i b) {
    return (__m512i)((emulated::Words)a - (emulated::Words)b);
}
static inline __m512i _mm512_and_si512(__m512i a, __m512i b) { return a & b; }
static inline __m512i _mm512_slli_epi32(__m512i a, unsigned by) {
    return by > 31 ? __m512i{} : (__m512i)((emulated::Words)a << by);
}
static inline __m512i _mm512_srli_epi32(__m512i a, unsigned by) {
    return by > 31 ? __m512i{} : (__m512i)((emulated::Words)a >> by);
}
static inline __m512i _mm512_cvtepu8_epi32(__m128i a) {
    const auto* bytes = reinterpret_cast<const std::uint8_t*>(&a);
    return (__m512i)emulated::each<emulated::Words>([&](int i) { return bytes[i]; });
}
static inline __m512i _mm512_cvtepu16_epi32(__m256i a) {
    return (__m512i)emulated::each<emulated::Words>([&](int i) { return ((__m256bh)a)[i]; });
}

// Conversions to bf16; of two vectors the second one's come first

static inline __m256bh _mm512_cvtneps_pbh(__m512 a) {
    return emulated::each<__m256bh>([&](int i) { return emulated::to_bf16(a[i]); });
}
static inline __m512bh _mm512_cvtne2ps_pbh(__m512 last, __m512 first) {
    return emulated::each<__m512bh>([&](int i) { return emulated::to_bf16(i < 16 ? first[i] : last[i - 16]); });
}

// Permutations; the upper bits of an index do not count

static inline __m512 _mm512_permutexvar_ps(__m512i index, __m512 a) {
    return emulated::each<__m512>([&](int i) { return a[((emulated::Words)index)[i] % 16]; });
}
static inline __m512i _mm512_permutexvar_epi16(__m512i index, __m512i a) {
    return (__m512i)__builtin_shuffle((emulated::Halves)a, (emulated::Halves)index);
}
static inline __m512i _mm512_permutex2var_epi16(__m512i a, __m512i index, __m512i b) {
    return (__m512i)__builtin_shuffle((emulated::Halves)a, (emulated::Halves)b, (emulated::Halves)index);
}
// VSHUFI32X4: two quarters of a, then two of b, by two bits each.
static inline __m512i _mm512_shuffle_i32x4(__m512i a, __m512i b, int quarters) {
    return emulated::each<__m512i>([&](int i) {
        int from = (quarters >> i / 2 * 2 & 3) * 2 + i % 2;
        return i < 4 ? a[from] : b[from];
    });
}
static inline __m512i _mm512_unpacklo_epi16(__m512i a, __m512i b) {
    return (__m512i)emulated::unpack((emulated::Halves)a, (emulated::Halves)b, false);
}
static inline __m512i _mm512_unpackhi_epi16(__m512i a, __m512i b) {
    return (__m512i)emulated::unpack((emulated::Halves)a, (emulated::Halves)b, true);
}
static inline __m512i _mm512_unpacklo_epi32(__m512i a, __m512i b) {
    return (__m512i)emulated::unpack((emulated::Words)a, (emulated::Words)b, false);
}
static inline __m512i _mm512_unpackhi_epi32(__m512i a, __m512i b) {
    return (__m512i)emulated::unpack((emulated::Words)a, (emulated::Words)b, true);
}
static inline __m512i _mm512_unpacklo_epi64(__m512i a, __m512i b) { return emulated::unpack(a, b, false); }
static inline __m512i _mm512_unpackhi_epi64(__m512i a, __m512i b) { return emulated::unpack(a, b, true); }

// Tiles: a thread's eight registers, of sixteen rows of 64 bytes each

namespace emulated {

struct Tile {
    alignas(64) std::uint32_t rows[16][16];
};

struct Registers {
    bool configured;
    Tile tiles[8];
};
inline thread_local Registers registers;

inline Tile& tile(int number) {
    assert(registers.configured && 0 <= number && number < 8);
    return registers.tiles[number];
}

// TDPBF16PS. Pairs' first and second products have sums of their own, which are added to what was there at the end.
// Not inlined: it runs between changes of how denormal numbers are taken.
__attribute__((noinline)) inline void multiply_tiles(Tile& sums, const Tile& left, const Tile& right) {
    __m256 columns[16][4];  // of the right operand's rows: firsts and seconds, by eight
    for (int k = 0; k < 16; ++k)
        for (int i = 0; i < 4; ++i) {
            using Eight = std::uint32_t __attribute__((vector_size(32)));
            Eight pairs = load<Eight>(right.rows[k] + i % 2 * 8);
            columns[k][i] = i < 2 ? (__m256)(pairs << 16) : (__m256)(pairs & 0xffff0000u);
        }
    for (int row = 0; row < 16; ++row) {
        __m256 added[4] = {};
        for (int k = 0; k < 16; ++k) {
            std::uint32_t pair = left.rows[row][k];
            const float halves[2] = {bits<float>(pair << 16), bits<float>(pair & 0xffff0000u)};
            for (int i = 0; i < 4; ++i)
                added[i] = _mm256_fmadd_ps(_mm256_set1_ps(halves[i / 2]), columns[k][i], added[i]);
        }
        for (int i = 0; i < 2; ++i) {
            auto* to = reinterpret_cast<float*>(sums.rows[row]) + i * 8;
            _mm256_store_ps(to, _mm256_load_ps(to) + (added[i] + added[i + 2]));
        }
    }
}

// ARCH_REQ_XCOMP_PERM for the tiles' data.
inline long granted(long call, long request, long feature) {
    assert(call == SYS_arch_prctl);
    return request == 0x1023 && feature == 18 ? 0 : -1;
}

}  // namespace emulated

// What asks Linux for the tiles. (glibc's own is declared by now.)
#define syscall emulated::granted

// Of all shapes only that of whole registers.
static inline void _tile_loadconfig(const void* from) {
    const auto* bytes = static_cast<const std::uint8_t*>(from);
    assert(bytes[0] == 1);
    for (int i = 1; i < 16; ++i) assert(bytes[i] == 0);
    for (int n = 0; n < 16; ++n) {
        assert(emulated::load<std::uint16_t>(bytes + 16 + 2 * n) == (n < 8 ? 64 : 0));
        assert(bytes[48 + n] == (n < 8 ? 16 : 0));
    }
    emulated::registers = {true, {}};
}
static inline void _tile_release() { emulated::registers.configured = false; }
static inline void _tile_zero(int number) { emulated::tile(number) = {}; }
static inline void _tile_loadd(int number, const void* from, std::int64_t stride) {
    for (auto& row : emulated::tile(number).rows) {
        std::memcpy(row, from, sizeof row);
        from = static_cast<const char*>(from) + stride;
    }
}
static inline void _tile_stream_loadd(int number, const void* from, std::int64_t stride) {
    _tile_loadd(number, from, stride);
}
static inline void _tile_stored(int number, void* to, std::int64_t stride) {
    for (const auto& row : emulated::tile(number).rows) {
        std::memcpy(to, row, sizeof row);
        to = static_cast<char*>(to) + stride;
    }
}
// Denormal numbers are zeros, whatever MXCSR says.
static inline void _tile_dpbf16ps(int sums, int left, int right) {
    const unsigned before = _mm_getcsr();
    _mm_setcsr(before | 0x8040u);
    emulated::multiply_tiles(emulated::tile(sums), emulated::tile(left), emulated::tile(right));
    _mm_setcsr(before);
}

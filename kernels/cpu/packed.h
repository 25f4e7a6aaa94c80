// Packed weights in every form they may have, and the rounding of activations to bytes.
//
// Owns: the forms, their layout, and how a unit of a panel becomes the two vectors a product takes.
// Must not: multiply (gemm.h does), or decide what is quantised. A panel holds 32 outputs and is read front to back:
//   PLAIN      [unit][32] of 4-byte units in the compute type
//   INT8, FP8  [unit][2][values of a unit][16] of one byte: widened to the compute type as they are read, exactly
//   BYTES      [unit of 4 values][32] of int8, for activations that are bytes too
#pragma once
#include <memory>
#include <new>

#include "pool.h"
#include "simd.h"

constexpr long PANEL = 32;
enum Kind : int64_t { PLAIN = 0, INT8 = 1, FP8 = 2, BYTES = 3 };

struct Packed {  // mirrored in ../native.py
    const uint8_t* data;
    const float* scales;     // by output, whole panels; null: PLAIN
    const int32_t* offsets;  // BYTES: 128 times the sum of an output's weights
    int64_t kind;
};

// Sixteen bytes as 32-bit integers. By hand: compilers take the generic conversion apart into single elements.
template <bool SIGNED>
LW_INLINE vi bytes16(const uint8_t* from) {
#if defined(__AVX512F__)
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    return (vi)(SIGNED ? _mm512_cvtepi8_epi32(bytes) : _mm512_cvtepu8_epi32(bytes));
#elif defined(__AVX2__)
    __m256i parts[2];
    for (int i = 0; i < 2; i++) {
        const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from + 8 * i));
        parts[i] = SIGNED ? _mm256_cvtepi8_epi32(bytes) : _mm256_cvtepu8_epi32(bytes);
    }
    return load<vi>(parts);
#else
    vi out;
    for (int i = 0; i < 16; i++) out[i] = SIGNED ? int8_t(from[i]) : from[i];
    return out;
#endif
}

LW_INLINE void store_bytes(uint8_t* to, vu v) {  // the low byte of each
#if defined(__AVX512F__)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8((__m512i)v));
#else
    for (int i = 0; i < 16; i++) to[i] = uint8_t(v[i]);
#endif
}

LW_INLINE vf to_float(vi x) {
#if defined(__AVX512F__)
    return (vf)_mm512_cvtepi32_ps((__m512i)x);
#else
    return __builtin_convertvector(x, vf);
#endif
}

// Sixteen bytes as floats. Both forms have at most 8 significant bits, so bf16 holds them exactly.
template <int KIND>
LW_INLINE vf widen16(const uint8_t* from) {
    if constexpr (KIND == INT8) return to_float(bytes16<true>(from));
    const vu bits = (vu)bytes16<false>(from);  // e4m3: sign, 4 bits of exponent, 3 of mantissa
    return (vf)((bits & 0x80u) << 24 | (bits & 0x7Fu) << 20) * splat(0x1p120f);
}

template <class T, int KIND>
LW_INLINE vu widen_unit(const uint8_t* from) {
    if constexpr (sizeof(T) == 4) return (vu)widen16<KIND>(from);
    return (vu)widen16<KIND>(from) >> 16 | (vu)widen16<KIND>(from + 16);
}

template <class T, int KIND>
constexpr long unit_bytes = KIND == INT8 || KIND == FP8 ? PANEL * per_unit<T> : PANEL * 4;

// Both halves of a unit of a panel.
template <class T, int KIND>
LW_INLINE void read_unit(const uint8_t* at, vu& left, vu& right) {
    if constexpr (KIND == INT8 || KIND == FP8) {
        left = widen_unit<T, KIND>(at), right = widen_unit<T, KIND>(at + 16 * per_unit<T>);
    } else {
        left = load<vu>(at), right = load<vu>(at + 64);
    }
}

// A whole panel in PLAIN form, for products with many rows.
template <class T, int KIND>
void widen_panel(const uint8_t* from, long units, uint8_t* to) {
    for (long k = 0; k < units; k++) {
        vu left, right;
        read_unit<T, KIND>(from + k * unit_bytes<T, KIND>, left, right);
        store(to + k * PANEL * 4, left), store(to + k * PANEL * 4 + 64, right);
    }
}

template <class V>
struct Buffer {  // grows, keeps nothing
    V* get(long count) {
        if (count > size) {
            size = count + count / 4;
            memory.reset(static_cast<V*>(::operator new[](size * sizeof(V), std::align_val_t(64))));
        }
        return memory.get();
    }
    struct Free {
        void operator()(V* p) const { ::operator delete[](p, std::align_val_t(64)); }
    };
    long size = 0;
    std::unique_ptr<V[], Free> memory;
};

// acc + the four products of bytes of each unit: `a` unsigned, `b` signed.
LW_INLINE vi dot4(vi acc, vu a, vu b) {
#if defined(__AVX512VNNI__)
    return (vi)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)a, (__m512i)b);
#else
    for (int shift = 0; shift < 32; shift += 8) acc += (vi)(a >> shift & 0xFFu) * ((vi)(b << (24 - shift)) >> 24);
    return acc;
#endif
}

// One row of `count` activations as bytes with 128 for zero; returns what one step is worth.
template <class T>
LW_INLINE float round_row(const T* from, long count, uint8_t* to) {
    vf most = vf{};
    for (long c = 0; c < count; c += 16) {
        const vf x = load16(from + c);
        most = larger(most, larger(x, -x));
    }
    const float step = largest(most) / 127.0f;
    const vf whole = splat(step > 0 ? step : 1.0f);  // divided by, as the reference does: ties then fall alike
    for (long c = 0; c < count; c += 16) {
        const vu near = (vu)(load16(from + c) / whole + 12582912.0f);  // the low bits are the nearest integer
        store_bytes(to + c, near ^ 0x80u);
    }
    return step;
}

// Rows [0, rows) of `from` [rows][units] become panels; rows past the end are zeros.
inline void pack(Pool& pool, const uint32_t* from, long rows, long units, uint32_t* to) {
    pool.run((rows + PANEL - 1) / PANEL, [&](long p) {
        uint32_t* panel = to + p * units * PANEL;
        const long count = rows - p * PANEL < PANEL ? rows - p * PANEL : PANEL;
        const uint32_t* source = from + p * PANEL * units;
        for (long start = 0; start < units; start += 64) {  // a block of source lines stays in the cache
            const long stop = start + 64 < units ? start + 64 : units;
            for (long k = start; k < stop; k++)
                for (long c = 0; c < PANEL; c++) panel[k * PANEL + c] = c < count ? source[c * units + k] : 0;
        }
    });
}

// As `pack`, of bytes [rows][columns] into the form of INT8 and FP8, with `values` of them in a unit.
inline void pack_bytes(Pool& pool, const uint8_t* from, long rows, long columns, long values, uint8_t* to) {
    pool.run((rows + PANEL - 1) / PANEL, [&](long p) {
        uint8_t* panel = to + p * columns * PANEL;
        for (long c = 0; c < PANEL; c++) {
            const long row = p * PANEL + c;
            for (long k = 0; k < columns; k++) {
                const long at = (k / values * 2 + c / 16) * values + k % values;
                panel[at * 16 + c % 16] = row < rows ? from[row * columns + k] : 0;
            }
        }
    });
}

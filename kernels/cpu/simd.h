// Vectors of 16 floats and the few operations the kernels are made of, on whatever instructions this build may use.
//
// Owns: the vector type, bf16, exp. Must not: know matrices. `madd` is written so that every build does the same
// operation in the same order for one row as for many: results then never depend on how rows are grouped.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define LW_INLINE inline __attribute__((always_inline))
#define LW_INLINE_LAMBDA __attribute__((always_inline))

typedef float vf __attribute__((vector_size(64)));
typedef int32_t vi __attribute__((vector_size(64)));
typedef uint32_t vu __attribute__((vector_size(64)));
typedef uint16_t vh __attribute__((vector_size(32)));

struct bf16 {
    uint16_t bits;
};

// A unit is 4 bytes along the reduced dimension: one float or two bf16.
template <class T>
constexpr long per_unit = 4 / sizeof(T);

template <class V, class P>
LW_INLINE V load(const P* from) {
    V v;
    std::memcpy(&v, from, sizeof(V));
    return v;
}
template <class V, class P>
LW_INLINE void store(P* to, V v) {
    std::memcpy(to, &v, sizeof(V));
}
LW_INLINE vf splat(float x) { return vf{} + x; }
LW_INLINE vu splat_unit(uint32_t x) { return vu{} + x; }

LW_INLINE vf fused(vf a, vf b, vf c) {  // a * b + c, rounded once
#if defined(__AVX512F__)
    return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
    __m256 x[2], y[2], z[2];
    std::memcpy(x, &a, 64), std::memcpy(y, &b, 64), std::memcpy(z, &c, 64);
    z[0] = _mm256_fmadd_ps(x[0], y[0], z[0]), z[1] = _mm256_fmadd_ps(x[1], y[1], z[1]);
    return load<vf>(z);
#else
    return a * b + c;
#endif
}

// acc + a * b over one unit: float, or the two products of a bf16 pair.
template <class T>
LW_INLINE vf madd(vf acc, vu a, vu b);
template <>
LW_INLINE vf madd<float>(vf acc, vu a, vu b) {
    return fused((vf)a, (vf)b, acc);
}
template <>
LW_INLINE vf madd<bf16>(vf acc, vu a, vu b) {
#if defined(__AVX512BF16__)
    return (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b);
#else
    acc = fused((vf)(a << 16), (vf)(b << 16), acc);
    return fused((vf)(a & 0xFFFF0000u), (vf)(b & 0xFFFF0000u), acc);
#endif
}

template <class T>
LW_INLINE void store16(T* to, vf v);
template <>
LW_INLINE void store16<float>(float* to, vf v) {
    store(to, v);
}
template <>
LW_INLINE void store16<bf16>(bf16* to, vf v) {  // to nearest, ties to even; values here are finite
#if defined(__AVX512BF16__)
    store(to, (vh)_mm512_cvtneps_pbh((__m512)v));
#else
    vu bits = (vu)v;
    bits = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
    store(to, __builtin_convertvector(bits, vh));
#endif
}
LW_INLINE vf load16(const float* from) { return load<vf>(from); }
LW_INLINE vf load16(const bf16* from) { return (vf)(__builtin_convertvector(load<vh>(from), vu) << 16); }
LW_INLINE float widen(float x) { return x; }
LW_INLINE float widen(bf16 x) {
    const uint32_t bits = uint32_t(x.bits) << 16;
    return load<float>(&bits);
}

// Halves are combined until one is left: the same order in every build.
template <class F>
LW_INLINE float fold(vf v, const F& both) {
    float part[16];
    store(part, v);
    for (int width = 8; width; width /= 2)
        for (int i = 0; i < width; i++) part[i] = both(part[i], part[i + width]);
    return part[0];
}
LW_INLINE vf larger(vf a, vf b) {
#if defined(__AVX512F__)
    return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#else
    return a > b ? a : b;
#endif
}
LW_INLINE vf smaller(vf a, vf b) {
#if defined(__AVX512F__)
    return (vf)_mm512_min_ps((__m512)a, (__m512)b);
#else
    return a < b ? a : b;
#endif
}
LW_INLINE float sum(vf v) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)v);
#else
    return fold(v, [](float a, float b) { return a + b; });
#endif
}
LW_INLINE float largest(vf v) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps((__m512)v);
#else
    return fold(v, [](float a, float b) { return a > b ? a : b; });
#endif
}

constexpr float LOG2_E = 1.44269504088896341f;

// 2^y for finite y: within 1 ulp for float; for bf16, which keeps 8 bits, within 2^-18 at less cost.
template <class T>
LW_INLINE vf power_of_two(vf y) {
#if defined(__AVX512F__)
    const vf whole = (vf)_mm512_roundscale_ps((__m512)y, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
    y = larger(smaller(y, splat(127.0f)), splat(-127.0f));
    const vf whole = (y + 12582912.0f) - 12582912.0f;
#endif
    const vf rest = y - whole;  // exact
    vf p;
    if constexpr (sizeof(T) == 4) {
        p = splat(1.535336225e-4f);
        p = fused(p, rest, splat(1.339887484e-3f));
        p = fused(p, rest, splat(9.618437360e-3f));
        p = fused(p, rest, splat(5.550332470e-2f));
        p = fused(p, rest, splat(2.402264791e-1f));
        p = fused(p, rest, splat(6.931472029e-1f));
    } else {
        p = splat(9.582853426e-3f);
        p = fused(p, rest, splat(5.590642846e-2f));
        p = fused(p, rest, splat(2.402409863e-1f));
        p = fused(p, rest, splat(6.931241930e-1f));
    }
    p = fused(p, rest, splat(1.0f));
#if defined(__AVX512F__)
    return (vf)_mm512_scalef_ps((__m512)p, (__m512)whole);
#else
    return (vf)((vi)p + (__builtin_convertvector(whole, vi) << 23));  // at -127, zero takes its place
#endif
}

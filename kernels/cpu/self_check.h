// Whether the tile instructions here do what the kernels build on: asked before a library with them is used.
//
// Owns: small products of every shape against plain loops, and of each row alone. Must not: be what tests rely on. They
// run the same kernels on emulated instructions; this looks at the instructions themselves, where nobody has tried them.
#pragma once
#include <cmath>
#include <vector>

#include "attention.h"

#if LANEWISE_TILES
namespace self_check {
constexpr long ROWS = 50, K = 88, COLUMNS = 2 * PANEL;  // rows of two pairs, the second not full; k that leaves a rest
constexpr long HEIGHTS[] = {1, 5, 16, 17, 32, 33, 49};
constexpr double NEAR = 1e-4;  // values are below 1, so sums of 88 products in fp32 are nearer

struct Noise {  // the same on every machine
    uint32_t state = 1;
    uint32_t bits() { return (state = state * 1664525u + 1013904223u) >> 8; }
    bf16 small() {  // in (-1, 1)
        const float value = float(int32_t(bits() % 2047) - 1023) / 1024.0f;
        return {uint16_t(load<uint32_t>(&value) >> 16)};
    }
};

// Products of the first `count` rows, as they come out of `multiply`, on two threads.
inline std::vector<float> sums_of(Pool& pool, const Rows<bf16>& all, long count, const Packed& w) {
    std::vector<float> out(count * COLUMNS);
    Rows<bf16> rows = all;
    rows.count = count;
    multiply(pool, rows, w, COLUMNS / PANEL, nullptr, [&](long r, long c, vf left, vf right) LW_INLINE_LAMBDA {
        store(out.data() + r * COLUMNS + c, left), store(out.data() + r * COLUMNS + c + 16, right);
    });
    return out;
}

// `exact(row, column)` is what a sum must be near.
template <class Exact>
const char* compare(Pool& pool, const Rows<bf16>& rows, const Packed& w, const Exact& exact) {
    const std::vector<float> whole = sums_of(pool, rows, ROWS, w);
    for (long r = 0; r < ROWS; r++)
        for (long c = 0; c < COLUMNS; c++)
            if (!(std::abs(whole[r * COLUMNS + c] - exact(r, c)) < NEAR)) return "AMX products are wrong on this machine";
    for (long count : HEIGHTS) {
        const std::vector<float> some = sums_of(pool, rows, count, w);
        if (std::memcmp(some.data(), whole.data(), some.size() * sizeof(float)) != 0)
            return "AMX products of a row depend on its company on this machine";
    }
    return nullptr;
}

inline const char* pairs(Pool& pool, Noise& noise) {
    std::vector<bf16> a(ROWS * K), weight(COLUMNS * K);
    for (bf16& x : a) x = noise.small();
    for (bf16& x : weight) x = noise.small();
    Buffer<uint32_t> packed;
    pack(pool, reinterpret_cast<const uint32_t*>(weight.data()), COLUMNS, K / 2, packed.get(COLUMNS * K / 2));
    const Packed w{reinterpret_cast<const uint8_t*>(packed.get(0)), nullptr, nullptr, PLAIN};
    return compare(pool, {a.data(), K, ROWS}, w, [&](long r, long c) {
        double sum = 0;
        for (long k = 0; k < K; k++) sum += double(widen(a[r * K + k])) * widen(weight[c * K + k]);
        return sum;
    });
}

inline const char* bytes(Pool& pool, Noise& noise) {
    std::vector<uint8_t> a(ROWS * K);
    std::vector<int8_t> weight(COLUMNS * K);
    std::vector<int32_t> offsets(COLUMNS);
    for (uint8_t& x : a) x = uint8_t(noise.bits());
    for (int8_t& x : weight) x = int8_t(noise.bits());
    for (long i = 0; i < COLUMNS * K; i++) offsets[i / K] += 128 * weight[i];
    Buffer<uint32_t> packed;
    pack(pool, reinterpret_cast<const uint32_t*>(weight.data()), COLUMNS, K / 4, packed.get(COLUMNS * K / 4));
    const Packed w{reinterpret_cast<const uint8_t*>(packed.get(0)), nullptr, offsets.data(), BYTES};
    return compare(pool, {nullptr, K, ROWS, a.data()}, w, [&](long r, long c) {
        long sum = -long(offsets[c]);
        for (long k = 0; k < K; k++) sum += long(a[r * K + k]) * weight[c * K + k];
        return double(sum);
    });
}

// What attention does: sums that are there already count, times the factor of their row.
inline const char* added(Noise& noise) {
    const TileUse registers;
    alignas(64) bf16 a[ROWS * BLOCK], b[BLOCK * PANEL];  // b in pairs of keys
    alignas(64) float sums[ROWS * PANEL], before[ROWS * PANEL], factors[ROWS];
    for (bf16& x : a) x = noise.small();
    for (bf16& x : b) x = noise.small();
    for (float& x : sums) x = widen(noise.small());
    for (float& x : factors) x = widen(noise.small());
    std::memcpy(before, sums, sizeof(sums));
    const long units = BLOCK / 2;
    block_product<bf16, true>({reinterpret_cast<const uint32_t*>(a), units, units, reinterpret_cast<const uint8_t*>(b),
                               units * PANEL * 4, sums, PANEL, nullptr, factors},
                              ROWS, 1);
    for (long r = 0; r < ROWS; r++)
        for (long c = 0; c < PANEL; c++) {
            double sum = double(before[r * PANEL + c]) * factors[r];
            for (long k = 0; k < BLOCK; k++)
                sum += double(widen(a[r * BLOCK + k])) * widen(b[(k / 2 * PANEL + c) * 2 + k % 2]);
            if (!(std::abs(sum - sums[r * PANEL + c]) < NEAR)) return "AMX products added to sums are wrong on this machine";
        }
    return nullptr;
}
}  // namespace self_check
#endif

// Null, or why this library must not be used here, in words.
inline const char* refusal() {
#if LANEWISE_TILES
    if (const char* why = amx::refusal()) return why;
    Pool pool(2);
    self_check::Noise noise;
    if (const char* why = self_check::pairs(pool, noise)) return why;
    if (const char* why = self_check::bytes(pool, noise)) return why;
    return self_check::added(noise);
#else
    return nullptr;
#endif
}

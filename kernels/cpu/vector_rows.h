// Some rows with some panels on vector registers: the inner kernel of a product.
//
// Owns: how many rows and panels meet at once, and the tile that is described to a kernel. Must not: cut products into tasks
// (gemm.h does). Every output is one chain of additions over k in order, whatever the number of rows.
#pragma once
#include "packed.h"

constexpr long AHEAD_BYTES = 24 * PANEL * 4;
#if defined(__AVX512F__)
constexpr int TILE_SUMS = 24;  // vectors; with the weights and one activation at most 29 of 32 registers
constexpr int WIDE = 2;        // panels that many rows are multiplied with at once: a wide tile needs fewer loads
#else
constexpr int TILE_SUMS = 4;
constexpr int WIDE = 1;
#endif
template <int PANELS>
constexpr int most_rows = TILE_SUMS / (2 * PANELS);
constexpr long FEW_ROWS = 2 * most_rows<1>;  // up to here one panel at a time, and bytes are widened in each tile

struct Tile {              // some rows with some panels
    const uint32_t* a;     // `stride` units apart
    long stride, units;
    const uint8_t* panel;  // the first; the next ones are `panel_bytes` apart
    long panel_bytes;
    float* sums;           // row r goes to sums + r * sums_stride
    long sums_stride;
    const int32_t* offsets = nullptr;  // BYTES
    const float* factors = nullptr;    // what is in `sums` counts, times the factor of its row
    const uint8_t* ahead = nullptr;    // fetched meanwhile, `ahead_step` bytes for each unit
    long ahead_step = 0;
};

template <class T, int KIND, int PANELS, bool ADDS, int ROWS>
void tile_rows(const Tile& t) {
    constexpr long step = unit_bytes<T, KIND>;
    constexpr int WIDTH = 2 * PANELS;
    const uint32_t* a = t.a;
    const uint8_t *panel = t.panel, *ahead = t.ahead;
    const long stride = t.stride, units = t.units, panel_bytes = t.panel_bytes, ahead_step = t.ahead_step;
    vf acc[ROWS][WIDTH];
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
        for (int i = 0; i < WIDTH; i++)
            acc[r][i] = ADDS ? load<vf>(t.sums + r * t.sums_stride + 16 * i) * t.factors[r] : vf{};
    for (long k = 0; k < units; k++) {
        vu weights[WIDTH];
#pragma GCC unroll 2
        for (int p = 0; p < PANELS; p++) {
            const uint8_t* at = panel + p * panel_bytes + k * step;
            read_unit<T, KIND>(at, weights[2 * p], weights[2 * p + 1]);
            if (ROWS <= 4)
                for (long line = 0; line < step; line += 64) __builtin_prefetch(at + AHEAD_BYTES + line);
        }
        if (ROWS > 4) __builtin_prefetch(ahead + k * ahead_step, 0, 2);
#pragma GCC unroll 16
        for (int r = 0; r < ROWS; r++) {
            const vu x = splat_unit(a[r * stride + k]);
#pragma GCC unroll 4
            for (int i = 0; i < WIDTH; i++)
                if constexpr (KIND == BYTES)
                    acc[r][i] = (vf)dot4((vi)acc[r][i], x, weights[i]);
                else
                    acc[r][i] = madd<T>(acc[r][i], x, weights[i]);
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
        for (int i = 0; i < WIDTH; i++) {
            if constexpr (KIND == BYTES) acc[r][i] = to_float((vi)acc[r][i] - load<vi>(t.offsets + 16 * i));
            store(t.sums + r * t.sums_stride + 16 * i, acc[r][i]);
        }
}

template <class T, int KIND, int PANELS, bool ADDS, int ROWS>
LW_INLINE void choose_rows(int rows, const Tile& t) {
    if constexpr (ROWS > 1) {
        if (rows < ROWS) return choose_rows<T, KIND, PANELS, ADDS, ROWS - 1>(rows, t);
    }
    tile_rows<T, KIND, PANELS, ADDS, ROWS>(t);
}

// Not a template of what follows: there are few of these.
template <class T, int KIND, int PANELS, bool ADDS>
__attribute__((noinline)) void any_rows(int rows, const Tile& t) {
    choose_rows<T, KIND, PANELS, ADDS, most_rows<PANELS>>(rows, t);
}

// `all`, which has `rows` rows, in tiles of nearly equal height; panels are near.
template <class T, int KIND, int PANELS, bool ADDS>
LW_INLINE void tiles(const Tile& all, long rows) {
    const long count = (rows + most_rows<PANELS> - 1) / most_rows<PANELS>;
    Tile t = all;
    t.ahead = all.panel;
    for (long i = 0; i < count; i++) {
        const long low = rows * i / count, high = rows * (i + 1) / count;
        t.a = all.a + low * all.stride, t.sums = all.sums + low * all.sums_stride;
        if constexpr (ADDS) t.factors = all.factors + low;
        any_rows<T, KIND, PANELS, ADDS>(int(high - low), t);
    }
}

// Products of activations with packed weights: one kernel for one row and for thousands.
//
// Owns: the packed form, the register tiles, how a product is cut into tasks. Must not: know what a product is for; an
// epilogue takes the finished sums. Every output is one chain of additions over k in order, whatever the number of rows:
// a row's result is the same bits alone and in any batch.
//
// Packed weights: panels of 32 outputs, each [k units][32] of 4-byte units, so a panel is read front to back.
#pragma once
#include "pool.h"
#include "simd.h"

constexpr long PANEL = 32;
#if defined(__AVX512F__)
constexpr int MAX_TILE_ROWS = 12;  // 24 accumulators, 2 weights, 1 activation: 27 of 32 registers
#else
constexpr int MAX_TILE_ROWS = 2;
#endif
constexpr long ROW_BLOCK = 96;
constexpr long TASK_BYTES = 128 << 10;

// Sums of ROWS rows with one panel. `a` and `stride` in units.
template <class T, int ROWS>
LW_INLINE void tile(const uint32_t* a, long stride, const uint32_t* panel, long units, vf (&acc)[ROWS][2]) {
    for (long k = 0; k < units; k++) {
        const vu b0 = load<vu>(panel + k * PANEL), b1 = load<vu>(panel + k * PANEL + 16);
        if (ROWS <= 4) __builtin_prefetch(panel + (k + 24) * PANEL), __builtin_prefetch(panel + (k + 24) * PANEL + 16);
#pragma GCC unroll 16
        for (int r = 0; r < ROWS; r++) {
            const vu x = splat_unit(a[r * stride + k]);
            acc[r][0] = madd<T>(acc[r][0], x, b0);
            acc[r][1] = madd<T>(acc[r][1], x, b1);
        }
    }
}

// Sums of ROWS rows with one panel into `sums` [ROWS][32]. Not a template of what follows: there are few of these.
template <class T, int ROWS>
void tile_rows(const uint32_t* a, long stride, const uint32_t* panel, long units, float* sums) {
    vf acc[ROWS][2];
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; r++) acc[r][0] = acc[r][1] = vf{};
    tile<T, ROWS>(a, stride, panel, units, acc);
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; r++) store(sums + r * PANEL, acc[r][0]), store(sums + r * PANEL + 16, acc[r][1]);
}

template <class T, int ROWS>
LW_INLINE void choose_rows(int rows, const uint32_t* a, long stride, const uint32_t* panel, long units, float* sums) {
    if constexpr (ROWS > 1) {
        if (rows < ROWS) return choose_rows<T, ROWS - 1>(rows, a, stride, panel, units, sums);
    }
    tile_rows<T, ROWS>(a, stride, panel, units, sums);
}

template <class T>
__attribute__((noinline)) void any_rows(int rows, const uint32_t* a, long stride, const uint32_t* panel, long units,
                                        float* sums) {
    choose_rows<T, MAX_TILE_ROWS>(rows, a, stride, panel, units, sums);
}

// Rows [0, rows) with one panel, in tiles of nearly equal height; epilogue(row, first 16 sums, last 16).
template <class T, class Epilogue>
LW_INLINE void panel_rows(const uint32_t* a, long stride, long rows, const uint32_t* panel, long units,
                          const Epilogue& epilogue) {
    alignas(64) float sums[MAX_TILE_ROWS * PANEL];
    const long tiles = (rows + MAX_TILE_ROWS - 1) / MAX_TILE_ROWS;
    for (long t = 0; t < tiles; t++) {
        const long low = rows * t / tiles, high = rows * (t + 1) / tiles;
        any_rows<T>(int(high - low), a + low * stride, stride, panel, units, sums);
        for (long r = low; r < high; r++) {
            const float* from = sums + (r - low) * PANEL;
            epilogue(r, load<vf>(from), load<vf>(from + 16));
        }
    }
}

// epilogue(row, first column, left 16, right 16) for all rows of `a` [rows][k] and all panels.
template <class T, class Epilogue>
void multiply(Pool& pool, const T* a, long k, long rows, const uint32_t* packed, long panels, const Epilogue& epilogue) {
    const long units = k / per_unit<T>;
    const uint32_t* in = reinterpret_cast<const uint32_t*>(a);
    const long blocks = (rows + ROW_BLOCK - 1) / ROW_BLOCK;
    const long share = (panels + 3 * pool.threads() - 1) / (3 * pool.threads());
    long group = TASK_BYTES / (units * PANEL * 4);
    group = group < 1 ? 1 : group > share ? share : group;
    const long groups = (panels + group - 1) / group;
    pool.run(blocks * groups, [&](long task) {
        const long block = task / groups, first = task % groups * group;
        const long low = rows * block / blocks, high = rows * (block + 1) / blocks;
        for (long p = first; p < first + group && p < panels; p++) {
            const auto put = [&](long r, vf left, vf right) LW_INLINE_LAMBDA { epilogue(low + r, p * PANEL, left, right); };
            panel_rows<T>(in + low * units, units, high - low, packed + p * units * PANEL, units, put);
        }
    });
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

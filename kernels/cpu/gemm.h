// Products of activations with packed weights: one kernel for one row and for thousands.
//
// Owns: the register tiles, how a product is cut into tasks, scales and biases. Must not: know what a product is for; an
// epilogue takes the finished sums. Every output is one chain of additions over k in order, whatever the number of rows:
// a row's result is the same bits alone and in any batch.
#pragma once
#include <algorithm>

#include "packed.h"

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
constexpr long ROW_BLOCK = 128;
constexpr long TASK_BYTES = 128 << 10;
constexpr long AHEAD_BYTES = 24 * PANEL * 4;

template <class T>
struct Rows {  // activations [count][k]; as bytes with their steps where the weights are BYTES
    const T* values;
    long k, count;
    const uint8_t* bytes = nullptr;
    const float* steps = nullptr;
};

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

// Rows [0, rows) of `a`, `units` long, with PANELS panels; epilogue(row, panel, first 16 sums, last 16). `next` follows.
template <class T, int KIND, int PANELS, class Epilogue>
LW_INLINE void panel_rows(const uint32_t* a, long units, long rows, const uint8_t* panel, const uint8_t* next,
                          const Epilogue& epilogue, const int32_t* offsets = nullptr) {
    alignas(64) float sums[TILE_SUMS * 16];
    const long bytes = units * unit_bytes<T, KIND>, count = (rows + most_rows<PANELS> - 1) / most_rows<PANELS>;
    Tile t{a, units, units, panel, bytes, sums, PANELS * PANEL, offsets};
    t.ahead_step = PANELS * unit_bytes<T, KIND> / count;
    for (long i = 0; i < count; i++) {
        const long low = rows * i / count, high = rows * (i + 1) / count;
        t.a = a + low * units, t.ahead = next + i * t.ahead_step * units;
        any_rows<T, KIND, PANELS, false>(int(high - low), t);
        for (long r = low; r < high; r++)
            for (int p = 0; p < PANELS; p++) {
                const float* from = sums + (r - low) * PANELS * PANEL + p * PANEL;
                epilogue(r, p, load<vf>(from), load<vf>(from + 16));
            }
    }
}

// As `panel_rows` for weights of INT8 or FP8.
template <class T, int KIND, int PANELS, class Epilogue>
LW_INLINE void widened_rows(const uint32_t* a, long units, long rows, const uint8_t* panel, const uint8_t* next,
                            const Epilogue& epilogue) {
    if (rows <= FEW_ROWS) return panel_rows<T, KIND, PANELS>(a, units, rows, panel, next, epilogue);
    static thread_local Buffer<uint8_t> buffer;
    const long bytes = units * PANEL * 4;
    uint8_t* plain = buffer.get(PANELS * bytes);
    for (int p = 0; p < PANELS; p++) widen_panel<T, KIND>(panel + p * units * unit_bytes<T, KIND>, units, plain + p * bytes);
    panel_rows<T, PLAIN, PANELS>(a, units, rows, plain, plain, epilogue);
}

// Rows [low, high) of `a` with panels from `p` on, before scales and biases; panel `next` will follow.
template <class T, int PANELS, class Epilogue>
LW_INLINE void some_panels(const Rows<T>& a, long low, long high, const Packed& w, long p, long next,
                           const Epilogue& epilogue) {
    const long units = a.k / per_unit<T>, count = high - low, bytes = w.kind == PLAIN ? units * PANEL * 4 : a.k * PANEL;
    const uint32_t* in = reinterpret_cast<const uint32_t*>(a.values) + low * units;
    const uint8_t *panel = w.data + p * bytes, *after = w.data + next * bytes;
    switch (w.kind) {
        case PLAIN: return panel_rows<T, PLAIN, PANELS>(in, units, count, panel, after, epilogue);
        case INT8: return widened_rows<T, INT8, PANELS>(in, units, count, panel, after, epilogue);
        case FP8: return widened_rows<T, FP8, PANELS>(in, units, count, panel, after, epilogue);
        default: break;
    }
    in = reinterpret_cast<const uint32_t*>(a.bytes + low * a.k);
    panel_rows<T, BYTES, PANELS>(in, a.k / 4, count, panel, after, epilogue, w.offsets + p * PANEL);
}

// epilogue(row, first column, left 16, right 16) for all rows and all panels, scaled and with `bias` (may be null).
template <class T, class Epilogue>
void multiply(Pool& pool, const Rows<T>& a, const Packed& w, long panels, const float* bias, const Epilogue& epilogue) {
    const long panel_bytes = w.kind == PLAIN ? a.k / per_unit<T> * PANEL * 4 : a.k * PANEL;
    const long wide = a.count > FEW_ROWS ? WIDE : 1;
    const long share = (panels + 3 * pool.threads() - 1) / (3 * pool.threads());
    const long group = std::max(1L, std::min(TASK_BYTES / panel_bytes, share) / wide) * wide;
    const long groups = (panels + group - 1) / group;
    const long enough = std::min((6 * pool.threads() + groups - 1) / groups, a.count / FEW_ROWS);  // for even shares
    const long blocks = std::max((a.count + ROW_BLOCK - 1) / ROW_BLOCK, enough);
    pool.run(blocks * groups, [&](long task) {
        const long block = task / groups, first = task % groups * group, stop = std::min(first + group, panels);
        const long low = a.count * block / blocks, high = a.count * (block + 1) / blocks;
        const auto finish = [&](long r, long c, vf left, vf right) LW_INLINE_LAMBDA {
            if (a.steps && w.kind == BYTES) left *= a.steps[r], right *= a.steps[r];
            if (w.scales) left *= load<vf>(w.scales + c), right *= load<vf>(w.scales + c + 16);
            if (bias) left += load<vf>(bias + c), right += load<vf>(bias + c + 16);
            epilogue(r, c, left, right);
        };
        for (long p = first; p < stop; p += wide) {
            const auto take = [&](long r, long i, vf left, vf right)
                                  LW_INLINE_LAMBDA { finish(low + r, (p + i) * PANEL, left, right); };
            long next = p + wide < stop ? p + wide : p + wide + (pool.threads() - 1) * group;  // of this thread, likely
            if (next + wide > panels) next = p;
            if (wide > 1 && p + wide <= stop)
                some_panels<T, WIDE>(a, low, high, w, p, next, take);
            else
                for (long i = p; i < std::min(p + wide, stop); i++)
                    some_panels<T, 1>(a, low, high, w, i, std::min(i + 1, panels - 1),
                                      [&](long r, long, vf left, vf right)
                                          LW_INLINE_LAMBDA { finish(low + r, i * PANEL, left, right); });
        }
    });
}

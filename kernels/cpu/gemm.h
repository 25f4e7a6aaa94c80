// Products of activations with packed weights: one kernel for one row and for thousands.
//
// Owns: the register tiles, how a product is cut into tasks, scales and biases. Must not: know what a product is for; an
// epilogue takes the finished sums. Every output is one chain of additions over k in order, whatever the number of rows:
// a row's result is the same bits alone and in any batch.
#pragma once
#include "packed.h"

#if defined(__AVX512F__)
constexpr int MAX_TILE_ROWS = 12;  // 24 accumulators, 2 weights, 1 activation: 27 of 32 registers
#else
constexpr int MAX_TILE_ROWS = 2;
#endif
constexpr long ROW_BLOCK = 96;
constexpr long WIDEN_ROWS = 2 * MAX_TILE_ROWS;  // from here on a panel is widened once, not in each tile
constexpr long TASK_BYTES = 128 << 10;
constexpr long AHEAD_BYTES = 24 * PANEL * 4;

template <class T>
struct Rows {  // activations [count][k]; as bytes with their steps where the weights are BYTES
    const T* values;
    long k, count;
    const uint8_t* bytes = nullptr;
    const float* steps = nullptr;
};

// Sums of ROWS rows with one panel into `sums` [ROWS][32]. `a` and `stride` in units of 4 bytes.
template <class T, int KIND, int ROWS>
void tile_rows(const uint32_t* a, long stride, const uint8_t* panel, long units, const int32_t* offsets, float* sums) {
    constexpr long step = unit_bytes<T, KIND>;
    vf acc[ROWS][2];
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; r++) acc[r][0] = acc[r][1] = vf{};
    for (long k = 0; k < units; k++) {
        vu left, right;
        read_unit<T, KIND>(panel + k * step, left, right);
        if (ROWS <= 4)
            for (long line = 0; line < step; line += 64) __builtin_prefetch(panel + k * step + AHEAD_BYTES + line);
#pragma GCC unroll 16
        for (int r = 0; r < ROWS; r++) {
            const vu x = splat_unit(a[r * stride + k]);
            if constexpr (KIND == BYTES) {
                acc[r][0] = (vf)dot4((vi)acc[r][0], x, left), acc[r][1] = (vf)dot4((vi)acc[r][1], x, right);
            } else {
                acc[r][0] = madd<T>(acc[r][0], x, left), acc[r][1] = madd<T>(acc[r][1], x, right);
            }
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; r++) {
#pragma GCC unroll 2
        for (int half = 0; half < 2; half++) {
            if constexpr (KIND == BYTES)
                acc[r][half] = to_float((vi)acc[r][half] - load<vi>(offsets + 16 * half));
            store(sums + r * PANEL + 16 * half, acc[r][half]);
        }
    }
}

template <class T, int KIND, int ROWS>
LW_INLINE void choose_rows(int rows, const uint32_t* a, long stride, const uint8_t* panel, long units,
                           const int32_t* offsets, float* sums) {
    if constexpr (ROWS > 1) {
        if (rows < ROWS) return choose_rows<T, KIND, ROWS - 1>(rows, a, stride, panel, units, offsets, sums);
    }
    tile_rows<T, KIND, ROWS>(a, stride, panel, units, offsets, sums);
}

// Not a template of what follows: there are few of these.
template <class T, int KIND>
__attribute__((noinline)) void any_rows(int rows, const uint32_t* a, long stride, const uint8_t* panel, long units,
                                        const int32_t* offsets, float* sums) {
    choose_rows<T, KIND, MAX_TILE_ROWS>(rows, a, stride, panel, units, offsets, sums);
}

// Rows [0, rows) with one panel, in tiles of nearly equal height; epilogue(row, first 16 sums, last 16).
template <class T, int KIND = PLAIN, class Epilogue>
LW_INLINE void panel_rows(const uint32_t* a, long stride, long rows, const void* panel, long units,
                          const Epilogue& epilogue, const int32_t* offsets = nullptr) {
    alignas(64) float sums[MAX_TILE_ROWS * PANEL];
    const long tiles = (rows + MAX_TILE_ROWS - 1) / MAX_TILE_ROWS;
    for (long t = 0; t < tiles; t++) {
        const long low = rows * t / tiles, high = rows * (t + 1) / tiles;
        const uint8_t* bytes = static_cast<const uint8_t*>(panel);
        any_rows<T, KIND>(int(high - low), a + low * stride, stride, bytes, units, offsets, sums);
        for (long r = low; r < high; r++) {
            const float* from = sums + (r - low) * PANEL;
            epilogue(r, load<vf>(from), load<vf>(from + 16));
        }
    }
}

// As `panel_rows` for weights of INT8 or FP8.
template <class T, int KIND, class Epilogue>
LW_INLINE void widened_rows(const uint32_t* a, long stride, long rows, const uint8_t* panel, long units,
                            const Epilogue& epilogue) {
    if (rows <= WIDEN_ROWS) return panel_rows<T, KIND>(a, stride, rows, panel, units, epilogue);
    static thread_local Buffer<uint8_t> buffer;
    uint8_t* plain = buffer.get(units * PANEL * 4);
    widen_panel<T, KIND>(panel, units, plain);
    panel_rows<T>(a, stride, rows, plain, units, epilogue);
}

// Rows [low, high) of `a` with panel `p` of `w`, before scales and biases.
template <class T, class Epilogue>
LW_INLINE void one_panel(const Rows<T>& a, long low, long high, const Packed& w, long p, const Epilogue& epilogue) {
    const long units = a.k / per_unit<T>, count = high - low;
    const uint32_t* in = reinterpret_cast<const uint32_t*>(a.values) + low * units;
    switch (w.kind) {
        case PLAIN: return panel_rows<T>(in, units, count, w.data + p * units * PANEL * 4, units, epilogue);
        case INT8: return widened_rows<T, INT8>(in, units, count, w.data + p * a.k * PANEL, units, epilogue);
        case FP8: return widened_rows<T, FP8>(in, units, count, w.data + p * a.k * PANEL, units, epilogue);
        default: break;
    }
    const uint32_t* bytes = reinterpret_cast<const uint32_t*>(a.bytes + low * a.k);
    panel_rows<T, BYTES>(bytes, a.k / 4, count, w.data + p * a.k * PANEL, a.k / 4, epilogue, w.offsets + p * PANEL);
}

// epilogue(row, first column, left 16, right 16) for all rows and all panels, scaled and with `bias` (may be null).
template <class T, class Epilogue>
void multiply(Pool& pool, const Rows<T>& a, const Packed& w, long panels, const float* bias, const Epilogue& epilogue) {
    const long panel_bytes = w.kind == PLAIN ? a.k / per_unit<T> * PANEL * 4 : a.k * PANEL;
    const long blocks = (a.count + ROW_BLOCK - 1) / ROW_BLOCK;
    const long share = (panels + 3 * pool.threads() - 1) / (3 * pool.threads());
    long group = TASK_BYTES / panel_bytes;
    group = group < 1 ? 1 : group > share ? share : group;
    const long groups = (panels + group - 1) / group;
    pool.run(blocks * groups, [&](long task) {
        const long block = task / groups, first = task % groups * group;
        const long low = a.count * block / blocks, high = a.count * (block + 1) / blocks;
        for (long p = first; p < first + group && p < panels; p++) {
            const long c = p * PANEL;
            one_panel(a, low, high, w, p, [&](long r, vf left, vf right) LW_INLINE_LAMBDA {
                if (a.steps && w.kind == BYTES) left *= a.steps[low + r], right *= a.steps[low + r];
                if (w.scales) left *= load<vf>(w.scales + c), right *= load<vf>(w.scales + c + 16);
                if (bias) left += load<vf>(bias + c), right += load<vf>(bias + c + 16);
                epilogue(low + r, c, left, right);
            });
        }
    });
}

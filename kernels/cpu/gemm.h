// Products of activations with packed weights: one kernel for one row and for thousands.
//
// Owns: how a product is cut into tasks and panels, on which registers it is made, scales and biases. Must not: know what a
// product is for; an epilogue takes the finished sums. Every output is one chain of additions over k in order, whatever the
// number of rows: a row's result is the same bits alone and in any batch.
#pragma once
#include <algorithm>

#include "tiled_rows.h"
#include "vector_rows.h"

constexpr long ROW_BLOCK = 128;
constexpr long MOST_TILED_ROWS = 512;          // tiles meet a panel with as many rows as fit into half of an L2 cache of
constexpr long TILED_ROWS_BYTES = 1024 << 10;  // 2 MiB: at their rate weights would else be read too often
constexpr long TASK_BYTES = 128 << 10;

template <class T>
struct Rows {  // activations [count][k]; as bytes with their steps where the weights are BYTES
    const T* values;
    long k, count;
    const uint8_t* bytes = nullptr;
    const float* steps = nullptr;
};

// Rows [0, rows) of `a`, `units` long, with PANELS panels; epilogue(row, panel, first 16 sums, last 16). `next` follows.
template <class T, int KIND, int PANELS, class Epilogue>
LW_INLINE void panel_rows(const uint32_t* a, long units, long rows, const uint8_t* panel, const uint8_t* next,
                          const Epilogue& epilogue, const int32_t* offsets = nullptr) {
    if constexpr (TILED<T, KIND>) return tiled_panels<KIND, PANELS>(a, units, rows, panel, next, epilogue, offsets);
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

// As `panel_rows` for weights of INT8 or FP8. Tiles want all rows widened alike.
template <class T, int KIND, int PANELS, class Epilogue>
LW_INLINE void widened_rows(const uint32_t* a, long units, long rows, const uint8_t* panel, const uint8_t* next,
                            const Epilogue& epilogue) {
    if (!TILED<T, PLAIN> && rows <= FEW_ROWS) return panel_rows<T, KIND, PANELS>(a, units, rows, panel, next, epilogue);
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

struct Cut {  // rows in blocks of nearly equal size that begin at multiples of `grain`
    long rows, blocks, grain;
    long row(long block) const { return block < blocks ? rows * block / blocks / grain * grain : rows; }
};

// Blocks of rows for a product: `enough` where so many are wanted for even shares and rows are many enough.
template <class T>
Cut row_blocks(const Rows<T>& a, int64_t kind, long enough) {
    const bool tiled = kind == BYTES ? TILED<T, BYTES> : TILED<T, PLAIN>;
    const long fit = TILED_ROWS_BYTES / (a.k * long(kind == BYTES ? 1 : sizeof(T))) / PAIR_ROWS * PAIR_ROWS;
    const long most = tiled ? std::max(ROW_BLOCK, std::min(MOST_TILED_ROWS, fit)) : ROW_BLOCK;
    const long least = tiled ? PAIR_ROWS : FEW_ROWS;
    return {a.count, std::max((a.count + most - 1) / most, std::min(enough, a.count / least)), tiled ? PAIR_ROWS : 1};
}

// epilogue(row, first column, left 16, right 16) for all rows and all panels, scaled and with `bias` (may be null).
template <class T, class Epilogue>
void multiply(Pool& pool, const Rows<T>& a, const Packed& w, long panels, const float* bias, const Epilogue& epilogue) {
    const long panel_bytes = w.kind == PLAIN ? a.k / per_unit<T> * PANEL * 4 : a.k * PANEL;
    const long wide = a.count > FEW_ROWS ? WIDE : 1;
    const long share = (panels + 3 * pool.threads() - 1) / (3 * pool.threads());
    const long group = std::max(1L, std::min(TASK_BYTES / panel_bytes, share) / wide) * wide;
    const long groups = (panels + group - 1) / group;
    const Cut cut = row_blocks<T>(a, w.kind, (6 * pool.threads() + groups - 1) / groups);
    pool.run(cut.blocks * groups, [&](long task) {
        const TileUse registers;
        const long block = task / groups, first = task % groups * group, stop = std::min(first + group, panels);
        const long low = cut.row(block), high = cut.row(block + 1);
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

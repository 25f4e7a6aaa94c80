// Rows with a panel on tile registers: two by two tiles of 16 rows by 16 outputs.
//
// Owns: which register holds what, their shapes, and what is left of k. Must not: cut products into tasks (gemm.h does).
// A panel is read as it lies: 16 units of 16 outputs are a tile, 128 bytes from unit to unit. Every output is one chain of
// tile instructions over k in order, 16 units each, and each instruction adds in an order of its own that rows have no part
// in: a row's result is the same bits alone and in any batch, so long as all of a weight's products are made here.
#pragma once
#include <algorithm>

#include "tiles.h"
#include "vector_rows.h"

constexpr long TILE_ROWS = 16;
constexpr long TILE_UNITS = 16;
constexpr long PAIR_ROWS = 2 * TILE_ROWS;

template <class T, int KIND>  // whether such products are made here
constexpr bool TILED = HAS_TILES && (KIND == BYTES || (KIND == PLAIN && sizeof(T) == 2));

// The registers are in use while this lives: until the end of a task, since other libraries configure them too, and since a
// thread that has released them is switched at less cost.
class TileUse {
  public:
    TileUse() = default;
    TileUse(const TileUse&) = delete;
    ~TileUse() {
        if (HAS_TILES && rows_ != 0) amx::release(), rows_ = 0;
    }
    // Shapes for `rows` rows, at most PAIR_ROWS: the first 16 in registers 0, 1 and 4, the others in 2, 3 and 5.
    static LW_INLINE void shape(long rows) {
        if (rows_ == rows) return;
        rows_ = rows;
        const uint8_t upper = uint8_t(std::min(rows, TILE_ROWS)), lower = uint8_t(rows - upper);
        const uint8_t of[8] = {upper, upper, lower, lower, upper, lower, TILE_UNITS, TILE_UNITS};
        TileShapes shapes;
        for (int i = 0; i < 8; i++) shapes.rows[i] = of[i], shapes.row_bytes[i] = of[i] ? 64 : 0;
        amx::configure(shapes);
    }

  private:
    static inline thread_local long rows_ = 0;
};

template <int KIND, int SUMS, int A, int B>
LW_INLINE void tile_product() {
    if constexpr (KIND == BYTES)
        amx::add_bytes<SUMS, A, B>();
    else
        amx::add_bf16<SUMS, A, B>();
}

// Sixteen units more. A load is near its first use: four products of 16 cycles each hide those that follow.
template <int KIND, bool PAIR>
LW_INLINE void tile_step(const uint32_t* a, long stride, const uint8_t* weights) {
    amx::load<6>(weights, PANEL * 4);
    amx::load<4>(a, stride * 4);
    tile_product<KIND, 0, 4, 6>();
    amx::load<7>(weights + 64, PANEL * 4);
    tile_product<KIND, 1, 4, 7>();
    if constexpr (PAIR) {
        amx::load<5>(a + TILE_ROWS * stride, stride * 4);
        tile_product<KIND, 2, 5, 6>();
        tile_product<KIND, 3, 5, 7>();
    }
}

// What is left of k, filled up with zeros on both sides: what follows a panel may be anything, and 0 * NaN is NaN.
template <int KIND, bool PAIR>
__attribute__((noinline)) void last_step(const Tile& t, long rows, long done) {
    alignas(64) uint32_t a[PAIR_ROWS * TILE_UNITS] = {}, weights[TILE_UNITS * PANEL] = {};
    const long left = t.units - done;
    for (long r = 0; r < rows; r++) std::memcpy(a + r * TILE_UNITS, t.a + r * t.stride + done, left * 4);
    std::memcpy(weights, t.panel + done * PANEL * 4, left * PANEL * 4);
    tile_step<KIND, PAIR>(a, TILE_UNITS, reinterpret_cast<const uint8_t*>(weights));
}

template <bool PAIR>
LW_INLINE void load_sums(float* sums, long stride) {
    float* lower = sums + TILE_ROWS * stride;
    amx::load<0>(sums, stride * 4), amx::load<1>(sums + 16, stride * 4);
    if constexpr (PAIR) amx::load<2>(lower, stride * 4), amx::load<3>(lower + 16, stride * 4);
}
template <bool PAIR>
LW_INLINE void store_sums(float* sums, long stride) {
    float* lower = sums + TILE_ROWS * stride;
    amx::store<0>(sums, stride * 4), amx::store<1>(sums + 16, stride * 4);
    if constexpr (PAIR) amx::store<2>(lower, stride * 4), amx::store<3>(lower + 16, stride * 4);
}

// Up to 32 rows with one panel: PAIR where there are more than 16. ADDS and the rest of `t` as in vector_rows.h.
template <int KIND, bool PAIR, bool ADDS>
__attribute__((noinline)) void tiled(const Tile& t, long rows) {
    TileUse::shape(rows);
    if constexpr (ADDS) {
        for (long r = 0; r < rows; r++)
            for (long c = 0; c < PANEL; c += 16) {
                float* at = t.sums + r * t.sums_stride + c;
                store(at, load<vf>(at) * t.factors[r]);
            }
        load_sums<PAIR>(t.sums, t.sums_stride);
    } else {
        amx::zero<0>(), amx::zero<1>();
        if constexpr (PAIR) amx::zero<2>(), amx::zero<3>();
    }
    long k = 0;
    for (; k + TILE_UNITS <= t.units; k += TILE_UNITS) {
        for (long line = 0; line < TILE_UNITS * t.ahead_step; line += 64)
            __builtin_prefetch(t.ahead + k * t.ahead_step + line, 0, 2);
        tile_step<KIND, PAIR>(t.a + k, t.stride, t.panel + k * PANEL * 4);
    }
    if (k < t.units) last_step<KIND, PAIR>(t, rows, k);
    store_sums<PAIR>(t.sums, t.sums_stride);
    if constexpr (KIND == BYTES)
        for (long r = 0; r < rows; r++)
            for (long c = 0; c < PANEL; c += 16) {
                float* at = t.sums + r * t.sums_stride + c;
                store(at, to_float(load<vi>(at) - load<vi>(t.offsets + c)));
            }
}

template <int KIND, bool ADDS>
LW_INLINE void any_tiled(const Tile& t, long rows) {
    if (rows > TILE_ROWS)
        tiled<KIND, true, ADDS>(t, rows);
    else
        tiled<KIND, false, ADDS>(t, rows);
}

// As `panel_rows` of gemm.h.
template <int KIND, int PANELS, class Epilogue>
LW_INLINE void tiled_panels(const uint32_t* a, long units, long rows, const uint8_t* panel, const uint8_t* next,
                            const Epilogue& epilogue, const int32_t* offsets) {
    alignas(64) float sums[PAIR_ROWS * PANEL];
    const long bytes = units * PANEL * 4, count = (rows + PAIR_ROWS - 1) / PAIR_ROWS;
    for (int p = 0; p < PANELS; p++) {
        Tile t{a, units, units, panel + p * bytes, bytes, sums, PANEL, offsets ? offsets + p * PANEL : nullptr};
        t.ahead_step = PANEL * 4 / count;
        for (long i = 0; i < count; i++) {
            const long low = i * PAIR_ROWS, high = std::min(rows, low + PAIR_ROWS);
            t.a = a + low * units, t.ahead = next + p * bytes + i * t.ahead_step * units;
            any_tiled<KIND, false>(t, high - low);
            for (long r = low; r < high; r++) {
                const float* from = sums + (r - low) * PANEL;
                epilogue(r, p, load<vf>(from), load<vf>(from + 16));
            }
        }
    }
}

// As `tiles` of vector_rows.h, with one panel.
template <int KIND, bool ADDS>
LW_INLINE void tiled_block(const Tile& all, long rows) {
    Tile t = all;
    for (long low = 0; low < rows; low += PAIR_ROWS) {
        t.a = all.a + low * all.stride, t.sums = all.sums + low * all.sums_stride;
        if constexpr (ADDS) t.factors = all.factors + low;
        any_tiled<KIND, ADDS>(t, std::min(PAIR_ROWS, rows - low));
    }
}

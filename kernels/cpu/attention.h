// Attention of a ragged batch over paged KV, one kernel for decode rows and prompt chunks.
//
// Owns: the walk over KV blocks with a running softmax. Must not: write KV or know layers.
// The query rows of all heads that share a KV head form one small matrix; KV is repacked block by block into the form
// of packed weights, in the core's cache. Blocks are 64 tokens at absolute positions and a row's blocks are added in
// order, so a row's result is the same bits however a prompt is cut into chunks and whatever else is in the batch.
#pragma once
#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include "gemm.h"

constexpr long BLOCK = 64;
constexpr long MAX_HEAD_DIM = 256;
constexpr long MAX_QUERY_ROWS = 96;
// Query rows that meet a block at once: their scores and its keys and values stay near.
constexpr long STRIP = HAS_TILES ? 2 * PAIR_ROWS : 48;

struct Span {  // one sequence of the batch; mirrored in ../native.py
    int64_t first_row, num_new, num_context;
    const int32_t* pages;
    int64_t sampled;  // whether the last row is sampled
};

struct Heads {
    long heads, kv_heads, dim, page_tokens;
    const void* zeros;  // one token's keys or values
    long group() const { return heads / kv_heads; }
    long padded() const { return (dim + PANEL - 1) / PANEL * PANEL; }
};

struct AttentionTask {  // query rows [low, high) of a span, for KV heads [kv_low, kv_high)
    const Span* span;
    long kv_low, kv_high, low, high;
};

template <class T>
struct Scratch {
    alignas(64) T query[MAX_QUERY_ROWS * MAX_HEAD_DIM];
    alignas(64) T weights[STRIP * BLOCK];
    alignas(64) uint32_t keys[MAX_HEAD_DIM * BLOCK];
    alignas(64) uint32_t values[MAX_HEAD_DIM * BLOCK];
    alignas(64) float scores[STRIP * BLOCK];
    alignas(64) float out[MAX_QUERY_ROWS * MAX_HEAD_DIM];
    alignas(64) vf total[MAX_QUERY_ROWS];  // 16 sums of each row
    alignas(64) float top[MAX_QUERY_ROWS + 16];  // read and written 16 at a time
};

#if defined(__AVX512F__)
// Sixteen rows of sixteen units, turned.
LW_INLINE void turn16(const uint32_t* const* rows, long offset, uint32_t* to) {
    __m512i a[16], b[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) a[i] = _mm512_loadu_si512(rows[i] + offset);
#pragma GCC unroll 16
    for (int i = 0; i < 16; i += 2) b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]), b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
#pragma GCC unroll 16
    for (int i = 0; i < 16; i += 4) {
        a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]), a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
        a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]), a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 4; i++) {
        b[i] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0x88), b[i + 4] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0xDD);
        b[i + 8] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0x88), b[i + 12] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0xDD);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 8; i++) {
        _mm512_storeu_si512(to + i * PANEL, _mm512_shuffle_i32x4(b[i], b[i + 8], 0x88));
        _mm512_storeu_si512(to + (i + 8) * PANEL, _mm512_shuffle_i32x4(b[i], b[i + 8], 0xDD));
    }
}
#endif

// Columns [column, column + dim) of the first `count` K rows of a block, a multiple of 16, as panels of 32 keys.
template <class T>
void pack_keys(const T* const* rows, long count, long column, long dim, uint32_t* to) {
    const long units = dim / per_unit<T>, start = column / per_unit<T>;
    const uint32_t* const* from = reinterpret_cast<const uint32_t* const*>(rows);
    for (long first = 0; first < count; first += 16) {
        uint32_t* panel = to + first / PANEL * units * PANEL + first % PANEL;
        long k = 0;
#if defined(__AVX512F__)
        for (; k + 16 <= units; k += 16) turn16(from + first, start + k, panel + k * PANEL);
#endif
        for (; k < units; k++)
            for (long c = 0; c < 16; c++) panel[k * PANEL + c] = from[first + c][start + k];
    }
}

// The same of V rows as panels of 32 columns, reduced over keys.
inline void pack_values(const float* const* rows, long count, long column, long dim, uint32_t* to) {
    for (long c = 0; c < dim; c += 16) {
        uint32_t* panel = to + c / PANEL * BLOCK * PANEL + c % PANEL;
        for (long t = 0; t < count; t++) store(panel + t * PANEL, load<vu>(rows[t] + column + c));
    }
}
inline void pack_values(const bf16* const* rows, long count, long column, long dim, uint32_t* to) {
    for (long c = 0; c < dim; c += 16) {
        uint32_t* panel = to + c / PANEL * BLOCK / 2 * PANEL + c % PANEL;
        for (long t = 0; t < count / 2; t++) {
            const vu even = __builtin_convertvector(load<vh>(rows[2 * t] + column + c), vu);
            const vu odd = __builtin_convertvector(load<vh>(rows[2 * t + 1] + column + c), vu);
            store(panel + t * PANEL, even | (odd << 16));
        }
    }
}

// The largest element of each of 16 vectors.
LW_INLINE vf largest_of_each(const vf* rows) {
    vf out;
#if defined(__AVX512F__)
    __m512 a[16];
    for (int i = 0; i < 16; i++) a[i] = (__m512)rows[i];
    for (int i = 0; i < 8; i++)
        a[i] = _mm512_max_ps(_mm512_unpacklo_ps(a[2 * i], a[2 * i + 1]), _mm512_unpackhi_ps(a[2 * i], a[2 * i + 1]));
    for (int i = 0; i < 4; i++) {
        const __m512d left = (__m512d)a[2 * i], right = (__m512d)a[2 * i + 1];
        a[i] = _mm512_max_ps((__m512)_mm512_unpacklo_pd(left, right), (__m512)_mm512_unpackhi_pd(left, right));
    }
    for (int count = 2; count; count /= 2)
        for (int i = 0; i < count; i++)
            a[i] = _mm512_max_ps(_mm512_shuffle_f32x4(a[2 * i], a[2 * i + 1], 0x88),
                                 _mm512_shuffle_f32x4(a[2 * i], a[2 * i + 1], 0xDD));
    out = (vf)a[0];
#else
    for (int i = 0; i < 16; i++) out[i] = largest(rows[i]);
#endif
    return out;
}

struct Sight {  // which keys of a block a query row sees
    long position, window, group, first;  // of a task's first row within the block; `group` rows share a position
    LW_INLINE vi mask(long row, int part) const {  // of row `first` + `row`, for 16 keys
        const long at = position + (first + row) / group, oldest = window > 0 ? at + 1 - window : 0;
        const vi key = vi{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15} + 16 * part;
        return (key >= int32_t(oldest)) & (key <= int32_t(at));
    }
};

// Scores of `count` rows become weights; their running maxima and sums, from `state` on, move on, and `factors` are what
// was summed before counts by now. `steps`: a score in powers of two. MASKED where not every row sees the whole block.
template <class T, bool MASKED>
LW_INLINE void soften(Scratch<T>& s, long count, long state, const Sight& sight, float steps, float* factors) {
    for (long low = 0; low < count; low += 16) {
        const long high = std::min(count, low + 16);
        vf best[16];
        for (int i = 0; i < 16; i++) best[i] = splat(-INFINITY);  // of rows that are not there: they change nothing
        for (long r = low; r < high; r++) {
            float* score = s.scores + r * BLOCK;
            vf part[4];
            for (int i = 0; i < 4; i++) {
                part[i] = load<vf>(score + 16 * i);
                if constexpr (MASKED) {
                    part[i] = sight.mask(r, i) ? part[i] : splat(-INFINITY);
                    store(score + 16 * i, part[i]);
                }
            }
            best[r - low] = larger(larger(part[0], part[1]), larger(part[2], part[3]));
        }
        const vf old = load<vf>(s.top + state + low), top = larger(old, largest_of_each(best));
        const vf base = top == splat(-INFINITY) ? vf{} : top;  // nothing visible so far: all weights are zero
        store(s.top + state + low, top);
        const vf factor = power_of_two<T>(larger((old - base) * steps, splat(-200.0f)));
        store(factors + low, factor);
        alignas(64) float offsets[16];
        store(offsets, base * -steps);
        for (long r = low; r < high; r++) {
            vf sums = vf{};
            for (int i = 0; i < 4; i++) {
                vf power = fused(load<vf>(s.scores + r * BLOCK + 16 * i), splat(steps), splat(offsets[r - low]));
                if (MASKED) power = larger(power, splat(-200.0f));
                const vf weight = power_of_two<T>(power);
                sums += weight;
                store16(s.weights + r * BLOCK + 16 * i, weight);
            }
            s.total[state + r] = fused(s.total[state + r], splat(factors[r]), sums);
        }
    }
}

// Where the keys (or values) of all heads of each token of a block are; tokens past the end are zeros.
template <class T>
LW_INLINE void block_rows(const Span& span, const Heads& h, long block, const T* cache, const T** rows) {
    const long tokens = span.num_context + span.num_new, width = h.kv_heads * h.dim;
    for (long i = 0; i < BLOCK;) {
        const long token = block * BLOCK + i;
        const long stop = std::min(BLOCK, i + h.page_tokens);  // pages divide blocks
        const T* first = token < tokens ? cache + span.pages[token / h.page_tokens] * h.page_tokens * width : nullptr;
        for (long at = 0; i < stop; i++, at++)
            rows[i] = block * BLOCK + i < tokens ? first + at * width : static_cast<const T*>(h.zeros);
    }
}

// Asks for the rows of the heads of a task: of one head they lie too far apart for hardware prefetchers.
template <class T>
LW_INLINE void fetch(const AttentionTask& task, const Heads& h, const T* const* rows) {
    for (long i = 0; i < BLOCK; i++)
        for (long c = task.kv_low * h.dim; c < task.kv_high * h.dim; c += 64 / sizeof(T)) __builtin_prefetch(rows[i] + c);
}

// `rows` rows of the scratch with `panels` panels of it.
template <class T, bool ADDS>
LW_INLINE void block_product(Tile t, long rows, long panels) {
    long p = 0;
    const auto step = [&](long wide) {
        t.panel += wide * t.panel_bytes, t.sums += wide * PANEL, p += wide;
    };
    if constexpr (TILED<T, PLAIN>)
        for (; p < panels; step(1)) tiled_block<PLAIN, ADDS>(t, rows);
    for (; p + WIDE <= panels; step(WIDE)) tiles<T, PLAIN, WIDE, ADDS>(t, rows);
    for (; p < panels; step(1)) tiles<T, PLAIN, 1, ADDS>(t, rows);
}

// One KV head of a block; `base` is the first of its `count` rows in the scratch.
template <class T>
LW_INLINE void attend_head(Scratch<T>& s, const AttentionTask& task, const Heads& h, long block, long base, long count,
                           const T* const* keys, const T* const* values, long column, long window, float steps) {
    const long units = h.dim / per_unit<T>, key_units = BLOCK / per_unit<T>, padded = h.padded(), start = block * BLOCK;
    const auto position = [&](long row) { return task.span->num_context + task.low + row / h.group() - start; };
    const auto seen_by = [&](long row) { return std::min(BLOCK, position(row) / 16 * 16 + 16); };  // whole vectors
    pack_keys(keys, seen_by(count - 1), column, h.dim, s.keys);
    pack_values(values, seen_by(count - 1), column, h.dim, s.values);
    const uint32_t *query = reinterpret_cast<const uint32_t*>(s.query), *weights = reinterpret_cast<const uint32_t*>(s.weights);
    const uint8_t* near_keys = reinterpret_cast<const uint8_t*>(s.keys);
    const uint8_t* near_values = reinterpret_cast<const uint8_t*>(s.values);
    alignas(64) float factors[STRIP];
    for (long low = 0; low < count; low += STRIP) {
        const long rows = std::min(STRIP, count - low), state = base + low, last = low + rows - 1;
        if (position(last) < 0) continue;  // the block is behind all of them
        const long seen = seen_by(last);
        block_product<T, false>({query + state * units, units, units, near_keys, units * PANEL * 4, s.scores, BLOCK}, rows,
                                (seen + PANEL - 1) / PANEL);
        const Sight sight{position(0), window, h.group(), low};
        if (position(low) + 1 < BLOCK || (window > 0 && position(last) >= window))
            soften<T, true>(s, rows, state, sight, steps, factors);
        else
            soften<T, false>(s, rows, state, sight, steps, factors);
        block_product<T, true>({weights, key_units, seen / per_unit<T>, near_values, key_units * PANEL * 4,
                                s.out + state * padded, padded, nullptr, factors},
                               rows, padded / PANEL);
    }
}

template <class T>
void attend_blocks(Scratch<T>& s, const AttentionTask& task, const Heads& h, const T* keys, const T* values, long window) {
    const Span& span = *task.span;
    const long oldest = span.num_context + task.low, newest = span.num_context + task.high - 1;
    const long start = window > 0 && oldest + 1 > window ? (oldest + 1 - window) / BLOCK : 0, stop = newest / BLOCK + 1;
    const long count = (task.high - task.low) * h.group();
    const float steps = LOG2_E / std::sqrt(float(h.dim));
    const T *key_rows[2][BLOCK], *value_rows[2][BLOCK];
    block_rows(span, h, start, keys, key_rows[start % 2]), block_rows(span, h, start, values, value_rows[start % 2]);
    for (long block = start; block < stop; block++) {
        const long now = block % 2, next = 1 - now;
        if (block + 1 < stop) {
            block_rows(span, h, block + 1, keys, key_rows[next]), block_rows(span, h, block + 1, values, value_rows[next]);
            fetch(task, h, key_rows[next]), fetch(task, h, value_rows[next]);
        }
        for (long g = task.kv_low; g < task.kv_high; g++)
            attend_head(s, task, h, block, (g - task.kv_low) * count, count, key_rows[now], value_rows[now], g * h.dim,
                        window, steps);
    }
}

// One task: `query` and `out` are [rows][heads][dim] of the whole batch.
template <class T>
void attend(const AttentionTask& task, const Heads& h, const T* query, const T* keys, const T* values, long window,
            T* out) {
    static thread_local std::unique_ptr<Scratch<T>> scratch(new Scratch<T>());
    const TileUse registers;
    Scratch<T>& s = *scratch;
    const long group = h.group(), count = (task.high - task.low) * group, padded = h.padded(), row_size = h.heads * h.dim;
    const long rows = count * (task.kv_high - task.kv_low);
    const auto place = [&](long r) {  // rows of the scratch: by KV head, query row, head of the group
        const long row = task.span->first_row + task.low + r % count / group;
        return row * row_size + ((task.kv_low + r / count) * group + r % group) * h.dim;
    };
    for (long r = 0; r < rows; r++) {
        std::memcpy(s.query + r * h.dim, query + place(r), h.dim * sizeof(T));
        s.top[r] = -INFINITY, s.total[r] = vf{};
    }
    std::memset(s.out, 0, rows * padded * sizeof(float));
    if (padded != h.dim) std::memset(s.values, 0, sizeof(s.values));
    attend_blocks(s, task, h, keys, values, window);
    for (long r = 0; r < rows; r++) {
        const float inverse = 1.0f / sum(s.total[r]);
        T* to = out + place(r);
        for (long c = 0; c < h.dim; c += 16) store16(to + c, load<vf>(s.out + r * padded + c) * inverse);
    }
}

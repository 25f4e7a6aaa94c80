// The forward pass of a decoder over a ragged batch.
//
// Owns: the order of the phases of a layer and the buffers between them. Must not: own weights or KV, which stay the
// caller's. The residual stream is kept in fp32; what enters a product is rounded to the compute type once.
#pragma once
#include <algorithm>

#include "attention.h"

struct Layer {  // mirrored in ../native.py; biases and norms in fp32, may be null
    Packed qkv, output, gate_up, down;
    const float *attention_norm, *mlp_norm, *query_norm, *key_norm;
    const float *qkv_bias, *output_bias, *gate_up_bias, *down_bias;
    void *keys, *values;
    int64_t window;  // 0: all
};

struct Model {  // mirrored in ../native.py
    int64_t hidden, inner, vocab, page_tokens, heads, kv_heads, head_dim, num_layers;
    float norm_eps, rope_scale;
    const float* frequencies;  // [head_dim / 2], radians per token
    const void* embedding;     // [vocab][hidden]
    int64_t embedding_kind;    // 0 fp32, 1 bf16, 2 fp16
    Packed head;
    const float* norm;
    const Layer* layers;
};

struct Batch {  // mirrored in ../native.py
    int64_t rows, num_spans;
    const int64_t* ids;
    const Span* spans;
};

struct Decoder {
    virtual ~Decoder() = default;
    virtual void begin(const Batch& batch) = 0;
    virtual void layer(long index) = 0;
    virtual void logits(float* out) = 0;  // [sampled spans][vocab]
    virtual void attend(const Batch& batch, const void* query, const void* keys, const void* values, long window,
                        void* out) = 0;  // attention alone
    virtual void multiply(const void* a, long k, long rows, const Packed& w, long columns, float* out) = 0;  // as well
};

inline float half_to_float(uint16_t h) {
    const uint32_t sign = uint32_t(h & 0x8000) << 16, exponent = (h >> 10) & 31, fraction = h & 1023;
    if (exponent == 0) return (sign ? -1.0f : 1.0f) * float(fraction) * 5.9604644775390625e-08f;
    const uint32_t bits = sign | (exponent == 31 ? 0x7F800000u : (exponent + 112) << 23) | fraction << 13;
    return load<float>(&bits);
}

template <class T>
class DecoderOf final : public Decoder {
  public:
    DecoderOf(const Model& model, Pool& pool) : m_(model), pool_(pool) {
        zeros_.assign(m_.kv_heads * m_.head_dim, T{});
        h_ = {m_.heads, m_.kv_heads, m_.head_dim, m_.page_tokens, zeros_.data()};
    }

    void begin(const Batch& batch) override {
        spans_.assign(batch.spans, batch.spans + batch.num_spans);
        rows_ = batch.rows;
        hidden_ = hidden_buffer_.get(rows_ * m_.hidden);
        positions_.resize(rows_), slots_.resize(rows_);
        for (const Span& span : spans_)
            for (long i = 0; i < span.num_new; i++) {
                const long token = span.num_context + i;
                positions_[span.first_row + i] = token;
                slots_[span.first_row + i] = span.pages[token / m_.page_tokens] * m_.page_tokens + token % m_.page_tokens;
            }
        const long half = m_.head_dim / 2;
        float* angles = angles_.get(rows_ * 2 * half);
        rows_run(rows_, 8, [&](long row) {
            embed(batch.ids[row], hidden_ + row * m_.hidden);
            for (long i = 0; i < half; i++) {
                const float angle = float(positions_[row]) * m_.frequencies[i];
                angles[row * 2 * half + i] = std::cos(angle) * m_.rope_scale;
                angles[row * 2 * half + half + i] = std::sin(angle) * m_.rope_scale;
            }
        });
        make_tasks(all_, false), make_tasks(last_, true);
        sampled_.clear();
        for (const Span& span : spans_)
            if (span.sampled) sampled_.push_back(span.first_row + span.num_new - 1);
    }

    void layer(long index) override {
        const Layer& l = m_.layers[index];
        const long width = h_.heads * h_.dim;
        const bool final_layer = index + 1 == m_.num_layers;
        T* normed = normed_.get(rows_ * m_.hidden);
        normalise(hidden_, rows_, l.attention_norm, normed);
        T *query = query_.get(rows_ * width), *mixed = mixed_.get(rows_ * width);
        project(l, normed, final_layer && long(sampled_.size()) < rows_, query);
        attend_tasks(final_layer ? last_ : all_, query, l.keys, l.values, l.window, mixed);
        if (final_layer) keep_sampled(mixed, width);
        add_product(mixed, width, l.output, l.output_bias);
        normalise(hidden_, rows_, l.mlp_norm, normed);
        T* inner = inner_.get(rows_ * m_.inner);
        product(normed, m_.hidden, rows_, l.gate_up, 2 * m_.inner, l.gate_up_bias,
                [&](long row, long c, vf gate, vf up) LW_INLINE_LAMBDA {  // a panel holds 16 of each
                    const vf falling = power_of_two<T>(gate * -LOG2_E);
                    store16(inner + row * m_.inner + c / 2, gate * up / (1.0f + falling));
                });
        add_product(inner, m_.inner, l.down, l.down_bias);
    }

    void logits(float* out) override {
        T* normed = normed_.get(rows_ * m_.hidden);
        normalise(hidden_, rows_, m_.norm, normed);
        product(normed, m_.hidden, rows_, m_.head, m_.vocab, nullptr,
                [&](long row, long c, vf left, vf right) LW_INLINE_LAMBDA {
                    put(out + row * m_.vocab, c, m_.vocab, left), put(out + row * m_.vocab, c + 16, m_.vocab, right);
                });
    }

    void attend(const Batch& batch, const void* query, const void* keys, const void* values, long window,
                void* out) override {
        spans_.assign(batch.spans, batch.spans + batch.num_spans);
        make_tasks(all_, false);
        attend_tasks(all_, static_cast<const T*>(query), keys, values, window, static_cast<T*>(out));
    }

    void multiply(const void* a, long k, long rows, const Packed& w, long columns, float* out) override {
        product(static_cast<const T*>(a), k, rows, w, columns, nullptr,
                [&](long row, long c, vf left, vf right) LW_INLINE_LAMBDA {
                    put(out + row * columns, c, columns, left), put(out + row * columns, c + 16, columns, right);
                });
    }

  private:
    void attend_tasks(const std::vector<AttentionTask>& tasks, const T* query, const void* keys, const void* values,
                      long window, T* out) {
        pool_.run(long(tasks.size()), [&](long i) {
            ::attend<T>(tasks[i], h_, query, static_cast<const T*>(keys), static_cast<const T*>(values), window, out);
        });
    }

    // Keys and values of all rows into their pages, and queries; where `few` are wanted, those of the sampled rows alone.
    void project(const Layer& l, const T* normed, bool few, T* query) {
        const long width = h_.heads * h_.dim, total = width + 2 * h_.kv_heads * h_.dim, size = padded(total);
        float* qkv = sums_.get(rows_ * size);
        const auto write = [&](long row, long c, vf left, vf right) LW_INLINE_LAMBDA {
            store(qkv + row * size + c, left), store(qkv + row * size + c + 16, right);
        };
        product_of(normed, rows_, l.qkv, few ? width / PANEL * PANEL : 0, total, l.qkv_bias, write);
        rows_run(rows_, 4, [&](long row) {
            if (!few) rotate_queries(l, row, qkv + row * size, query + row * width);
            write_kv(l, row, qkv + row * size + width);
        });
        if (!few) return;
        const long count = long(sampled_.size());
        T* picked = picked_.get(count * m_.hidden);
        for (long i = 0; i < count; i++)
            std::memcpy(picked + i * m_.hidden, normed + sampled_[i] * m_.hidden, m_.hidden * sizeof(T));
        product_of(picked, count, l.qkv, 0, width, l.qkv_bias, write);
        for (long i = 0; i < count; i++) rotate_queries(l, sampled_[i], qkv + i * size, query + sampled_[i] * width);
    }

    static long padded(long columns) { return (columns + PANEL - 1) / PANEL * PANEL; }

    static LW_INLINE void put(float* row, long c, long limit, vf v) {
        if (c + 16 <= limit) return store(row + c, v);
        for (long i = 0; c + i < limit; i++) row[c + i] = v[i];
    }

    template <class F>
    void rows_run(long rows, long at_once, const F& each) {
        pool_.run((rows + at_once - 1) / at_once, [&](long task) {
            for (long row = task * at_once; row < std::min(rows, (task + 1) * at_once); row++) each(row);
        });
    }

    template <class Epilogue>
    void product(const T* a, long k, long rows, const Packed& w, long columns, const float* bias, const Epilogue& each) {
        if (rows == 0) return;
        ::multiply(pool_, rounded(a, k, rows, w), w, padded(columns) / PANEL, bias, each);
    }

    // As `product` of normed rows, for outputs [first, stop) alone; `first` is a multiple of PANEL.
    template <class Epilogue>
    void product_of(const T* a, long rows, Packed w, long first, long stop, const float* bias, const Epilogue& each) {
        w.data += first * m_.hidden * (w.kind == PLAIN ? sizeof(T) : 1);
        w.scales += w.scales ? first : 0, w.offsets += w.offsets ? first : 0;
        product(a, m_.hidden, rows, w, stop - first, bias ? bias + first : nullptr,
                [&](long row, long c, vf left, vf right) LW_INLINE_LAMBDA { each(row, first + c, left, right); });
    }

    // The rows as weights of this kind want them.
    Rows<T> rounded(const T* a, long k, long rows, const Packed& w) {
        if (w.kind != BYTES) return {a, k, rows};
        uint8_t* bytes = bytes_.get(rows * k);
        float* steps = steps_.get(rows);
        rows_run(rows, 16, [&](long row) { steps[row] = round_row(a + row * k, k, bytes + row * k); });
        return {a, k, rows, bytes, steps};
    }

    void add_product(const T* a, long k, const Packed& w, const float* bias) {
        product(a, k, rows_, w, m_.hidden, bias, [&](long row, long c, vf left, vf right) LW_INLINE_LAMBDA {
            add(hidden_ + row * m_.hidden, c, left), add(hidden_ + row * m_.hidden, c + 16, right);
        });
    }
    LW_INLINE void add(float* row, long c, vf v) {  // the hidden size is a multiple of 16
        if (c < m_.hidden) store(row + c, load<vf>(row + c) + v);
    }

    void embed(int64_t id, float* to) {
        const long offset = id * m_.hidden;
        if (m_.embedding_kind == 0) {
            std::memcpy(to, static_cast<const float*>(m_.embedding) + offset, m_.hidden * sizeof(float));
            return;
        }
        const uint16_t* from = static_cast<const uint16_t*>(m_.embedding) + offset;
        for (long c = 0; c < m_.hidden; c++) {
            const uint32_t wide = uint32_t(from[c]) << 16;
            to[c] = m_.embedding_kind == 1 ? load<float>(&wide) : half_to_float(from[c]);
        }
    }

    // RMS norm of one row of fp32.
    template <class To>
    static LW_INLINE void norm_row(const float* from, long count, const float* weight, float eps, To* to) {
        vf squares = vf{};
        for (long c = 0; c < count; c += 16) squares = fused(load<vf>(from + c), load<vf>(from + c), squares);
        const float factor = 1.0f / std::sqrt(sum(squares) / float(count) + eps);
        for (long c = 0; c < count; c += 16) store16(to + c, load<vf>(from + c) * factor * load<vf>(weight + c));
    }

    void normalise(const float* from, long rows, const float* weight, T* to) {
        rows_run(rows, 16, [&](long row) {
            norm_row(from + row * m_.hidden, m_.hidden, weight, m_.norm_eps, to + row * m_.hidden);
        });
    }

    void rotate(float* head, const float* norm, long row, T* to) {
        const long half = h_.dim / 2;
        const float *cosine = angles_.get(0) + row * 2 * half, *sine = cosine + half;
        if (norm) norm_row(head, h_.dim, norm, m_.norm_eps, head);
        float turned[MAX_HEAD_DIM];
        for (long i = 0; i < half; i++) {
            turned[i] = head[i] * cosine[i] - head[i + half] * sine[i];
            turned[i + half] = head[i + half] * cosine[i] + head[i] * sine[i];
        }
        for (long c = 0; c < h_.dim; c += 16) store16(to + c, load<vf>(turned + c));
    }

    void rotate_queries(const Layer& l, long row, float* from, T* query) {
        for (long i = 0; i < h_.heads; i++) rotate(from + i * h_.dim, l.query_norm, row, query + i * h_.dim);
    }

    void write_kv(const Layer& l, long row, float* key) {
        const long width = h_.kv_heads * h_.dim, slot = slots_[row] * width;
        for (long c = 0; c < width; c += h_.dim) rotate(key + c, l.key_norm, row, static_cast<T*>(l.keys) + slot + c);
        for (long c = 0; c < width; c += 16) store16(static_cast<T*>(l.values) + slot + c, load<vf>(key + width + c));
    }

    // Of the last layer only the sampled rows matter beyond their KV.
    void keep_sampled(T* mixed, long width) {
        rows_ = long(sampled_.size());
        for (long i = 0; i < rows_; i++) {
            std::memmove(mixed + i * width, mixed + sampled_[i] * width, width * sizeof(T));
            std::memmove(hidden_ + i * m_.hidden, hidden_ + sampled_[i] * m_.hidden, m_.hidden * sizeof(float));
        }
    }

    // A decode row takes as many KV heads at once as leave every thread enough tasks: their KV lies together.
    void make_tasks(std::vector<AttentionTask>& tasks, bool sampled_only) {
        tasks.clear();
        const long at_once = std::max(1L, MAX_QUERY_ROWS / h_.group());
        const long wide = std::min(at_once, std::max(1L, long(spans_.size()) * h_.kv_heads / (4 * pool_.threads())));
        for (const Span& span : spans_) {
            if (sampled_only && !span.sampled) continue;
            const long first = sampled_only ? span.num_new - 1 : 0;
            const long heads = span.num_new - first == 1 ? wide : 1;
            for (long low = first; low < span.num_new; low += at_once)
                for (long g = 0; g < h_.kv_heads; g += heads)
                    tasks.push_back({&span, g, std::min(g + heads, h_.kv_heads), low, std::min(low + at_once, span.num_new)});
        }
        const auto size = [](const AttentionTask& task) {
            return (task.span->num_context + task.high) * (task.high - task.low) * (task.kv_high - task.kv_low);
        };
        std::stable_sort(tasks.begin(), tasks.end(), [&](const AttentionTask& a, const AttentionTask& b) {
            return size(a) > size(b);  // a large one must not be the last to start
        });
    }

    Model m_;
    Pool& pool_;
    Heads h_;
    long rows_ = 0;
    std::vector<T> zeros_;
    std::vector<Span> spans_;
    std::vector<AttentionTask> all_, last_;
    std::vector<int64_t> positions_, slots_;
    std::vector<long> sampled_;  // rows, in the order of their spans
    Buffer<float> hidden_buffer_, angles_, sums_, steps_;
    Buffer<uint8_t> bytes_;
    Buffer<T> normed_, picked_, query_, mixed_, inner_;
    float* hidden_ = nullptr;
};

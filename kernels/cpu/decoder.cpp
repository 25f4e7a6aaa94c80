// The C interface that native.py loads. Owns: handles. Must not: check shapes (the caller has).
#include "decoder.h"
#include "self_check.h"

namespace {
struct Handle {
    Handle(const Model& model, bool half, int threads) : pool(threads) {
        if (half)
            decoder = std::make_unique<DecoderOf<bf16>>(model, pool);
        else
            decoder = std::make_unique<DecoderOf<float>>(model, pool);
    }
    Pool pool;
    std::unique_ptr<Decoder> decoder;
};
}  // namespace

#pragma GCC visibility push(default)
extern "C" {
// Null where this library may be used here, else why not; asked before anything else is called.
const char* lw_refusal() { return refusal(); }
void* lw_open(const Model* model, int half, int threads) { return new Handle(*model, half != 0, threads); }
void lw_close(void* handle) { delete static_cast<Handle*>(handle); }
void lw_begin(void* handle, const Batch* batch) { static_cast<Handle*>(handle)->decoder->begin(*batch); }
void lw_layers(void* handle, int64_t low, int64_t high) {
    for (int64_t i = low; i < high; i++) static_cast<Handle*>(handle)->decoder->layer(i);
}
void lw_logits(void* handle, float* out) { static_cast<Handle*>(handle)->decoder->logits(out); }
// Single kernels, for tests and benchmarks: out [rows][columns] in fp32; attention as attend() has it.
void lw_multiply(void* handle, const void* a, int64_t k, int64_t rows, const Packed* weight, int64_t columns, float* out) {
    static_cast<Handle*>(handle)->decoder->multiply(a, k, rows, *weight, columns, out);
}
void lw_attend(void* handle, const Batch* batch, const void* query, const void* keys, const void* values, int64_t window,
               void* out) {
    static_cast<Handle*>(handle)->decoder->attend(*batch, query, keys, values, window, out);
}
void lw_pack(const uint32_t* from, int64_t rows, int64_t units, uint32_t* to, int threads) {
    Pool pool(threads);
    pack(pool, from, rows, units, to);
}
void lw_pack_bytes(const uint8_t* from, int64_t rows, int64_t columns, int64_t values, uint8_t* to, int threads) {
    Pool pool(threads);
    pack_bytes(pool, from, rows, columns, values, to);
}
}
#pragma GCC visibility pop

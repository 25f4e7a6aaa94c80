// Tile instructions by the manual, for tests on machines without them (Intel SDM volume 2: LDTILECFG, TDPBF16PS, TDPBUSD).
//
// Owns: their arithmetic and what they refuse. Must not: be fast, or be in a library that serves. What the processor answers
// with a fault ends the process here, with a line that says why.
#pragma once
#include <cstdio>
#include <cstdlib>

extern "C" {
// Set by tests: 1 is a system that permits no tiles, 2 a processor that leaves the last pair of each row out, 3 one whose
// sums depend on how many rows there are.
inline __attribute__((visibility("default"), used)) int lw_tile_fault = 0;
}

#define LANEWISE_TILES 1
namespace amx {
struct Registers {
    bool configured = false;
    TileShapes shapes;
    alignas(64) uint8_t data[8][16][64] = {};
};
inline thread_local Registers registers;

inline void expect(bool right, const char* what) {
    if (right) return;
    std::fprintf(stderr, "tile instruction refused: %s\n", what);
    std::abort();
}
inline const char* refusal() { return lw_tile_fault == 1 ? "the system does not permit AMX" : nullptr; }

inline void release() { registers = Registers(); }
inline void configure(const TileShapes& shapes) {
    expect(shapes.palette == 1 && shapes.start_row == 0, "palette or start row");
    uint8_t reserved = 0;
    for (uint8_t byte : shapes.reserved) reserved |= byte;
    for (int i = 0; i < 8; i++) {
        reserved |= uint8_t(shapes.reserved_bytes[i] != 0) | shapes.reserved_rows[i];
        expect(shapes.rows[i] <= 16 && shapes.row_bytes[i] <= 64, "a tile too large");
        expect((shapes.rows[i] == 0) == (shapes.row_bytes[i] == 0), "rows without bytes or bytes without rows");
    }
    expect(reserved == 0, "a reserved field");
    release();
    registers.configured = true, registers.shapes = shapes;
}

inline void expect_shape(int tile) {
    expect(registers.configured && registers.shapes.rows[tile] > 0, "a register that is not configured");
}
template <int TO>
void zero() {
    expect_shape(TO);
    std::memset(registers.data[TO], 0, sizeof(registers.data[TO]));
}
template <int TO>
__attribute__((noinline)) void load(const void* from, long stride) {
    zero<TO>();
    for (int r = 0; r < registers.shapes.rows[TO]; r++)
        std::memcpy(registers.data[TO][r], static_cast<const uint8_t*>(from) + r * stride, registers.shapes.row_bytes[TO]);
}
template <int FROM>
__attribute__((noinline)) void store(void* to, long stride) {
    expect_shape(FROM);
    for (int r = 0; r < registers.shapes.rows[FROM]; r++)
        std::memcpy(static_cast<uint8_t*>(to) + r * stride, registers.data[FROM][r], registers.shapes.row_bytes[FROM]);
}

// Denormals count as zero, and none comes out.
LW_INLINE vf flushed(vf x) { return (vf)(((vu)x & 0x7F800000u) != 0u ? (vu)x : (vu)x & 0x80000000u); }

// C [m][n] += A [m][k] B [k][n]; `line` adds all k for a row of A, whose units it is given, to a row of sums.
template <class Line>
void product(int sums, int a, int b, const Line& line) {
    expect_shape(sums), expect_shape(a), expect_shape(b);
    const TileShapes& is = registers.shapes;
    expect(sums != a && sums != b && a != b, "one register twice");
    expect(is.row_bytes[sums] % 4 == 0 && is.row_bytes[a] % 4 == 0 && is.row_bytes[b] % 4 == 0, "parts of units");
    expect(is.rows[sums] == is.rows[a], "rows of sums and left");
    expect(is.row_bytes[sums] == is.row_bytes[b], "columns of sums and right");
    expect(is.row_bytes[a] / 4 == is.rows[b], "what is reduced");
    long units = is.rows[b] - (lw_tile_fault == 2);
    if (lw_tile_fault == 3 && is.rows[a] == 1) units--;
    for (int m = 0; m < is.rows[sums]; m++) {
        uint32_t of_a[16];
        std::memcpy(of_a, registers.data[a][m], sizeof(of_a));
        line(registers.data[sums][m], of_a, registers.data[b], units);
    }
}

template <int SUMS, int A, int B>
__attribute__((noinline)) void add_bf16() {
    product(SUMS, A, B, [](uint8_t* sums, const uint32_t* a, const uint8_t(*b)[64], long units) {
        vf even = vf{}, odd = vf{};
        for (long k = 0; k < units; k++) {
            const vu x = splat_unit(a[k]), w = ::load<vu>(b[k]);
            even = flushed(fused(flushed((vf)(x << 16)), flushed((vf)(w << 16)), even));
            odd = flushed(fused(flushed((vf)(x & 0xFFFF0000u)), flushed((vf)(w & 0xFFFF0000u)), odd));
        }
        ::store(sums, flushed(flushed(::load<vf>(sums)) + flushed(even + odd)));
    });
}

template <int SUMS, int A, int B>
__attribute__((noinline)) void add_bytes() {
    product(SUMS, A, B, [](uint8_t* sums, const uint32_t* a, const uint8_t(*b)[64], long units) {
        vi total = ::load<vi>(sums);
        for (long k = 0; k < units; k++)
            for (int shift = 0; shift < 32; shift += 8)
                total += int32_t(a[k] >> shift & 0xFFu) * ((vi)(::load<vu>(b[k]) << (24 - shift)) >> 24);
        ::store(sums, total);
    });
}
}  // namespace amx

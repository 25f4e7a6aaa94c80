// Tile registers: the few instructions that products on them are made of, as the processor does them or emulated.
//
// Owns: what an instruction is. Must not: know matrices (tiled_rows.h does). There are eight registers of at most 16 rows of
// 64 bytes. An operation names its registers by number, as the instructions do.
//   -mamx-tile -mamx-bf16 -mamx-int8   the instructions themselves
//   -DLANEWISE_EMULATE_TILES           the same by the manual, on any CPU: so tests run the kernels that AMX will run
//   neither                            nothing here is called
// Assembly instead of intrinsics: those of gcc take no register number from a template, and do not say that a load reads
// memory, so a store just before it may come too late.
#pragma once
#include "simd.h"

struct TileShapes {  // what LDTILECFG reads
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[8] = {}, reserved_bytes[8] = {};
    uint8_t rows[8] = {}, reserved_rows[8] = {};
};
static_assert(sizeof(TileShapes) == 64, "as the processor reads it");

#if defined(LANEWISE_EMULATE_TILES)
#include "tiles_emulated.h"
#elif defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AMX_INT8__)
#include <sys/syscall.h>
#include <unistd.h>

#define LANEWISE_TILES 1
namespace amx {
// The system gives a process the 8 KiB for each of its threads on demand alone. Null, or why it does not.
inline const char* refusal() {
    constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0 ? nullptr : "the system does not permit AMX";
}
LW_INLINE void configure(const TileShapes& shapes) { asm volatile("ldtilecfg %0" : : "m"(shapes)); }
LW_INLINE void release() { asm volatile("tilerelease"); }
template <int TO>
LW_INLINE void zero() {
    asm volatile("tilezero %%tmm%c0" : : "i"(TO));
}
template <int TO>
LW_INLINE void load(const void* from, long stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride), "i"(TO) : "memory");
}
template <int FROM>
LW_INLINE void store(void* to, long stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(stride), "i"(FROM) : "memory");
}
template <int SUMS, int A, int B>
LW_INLINE void add_bf16() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(SUMS), "i"(A), "i"(B));
}
template <int SUMS, int A, int B>
LW_INLINE void add_bytes() {  // `A` unsigned, `B` signed
    asm volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(SUMS), "i"(A), "i"(B));
}
}  // namespace amx
#else
#define LANEWISE_TILES 0
namespace amx {
inline const char* refusal() { return nullptr; }
inline void configure(const TileShapes&) {}
inline void release() {}
template <int TO>
void zero() {}
template <int TO>
void load(const void*, long) {}
template <int FROM>
void store(void*, long) {}
template <int SUMS, int A, int B>
void add_bf16() {}
template <int SUMS, int A, int B>
void add_bytes() {}
}  // namespace amx
#endif

constexpr bool HAS_TILES = LANEWISE_TILES;

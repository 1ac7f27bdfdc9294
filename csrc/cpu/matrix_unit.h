// The matrix unit of AMX: eight tiles of 16 rows of 64 bytes. Sums are 16 x 16 float32, left
// operands 16 rows of 16 pairs, right operands 16 pairs deep and 16 columns wide. With
// FFK_EMULATES_MATRIX_UNIT it is C++, which rounds as Intel's manual says: its kernels are tested
// on any CPU, and a sanitizer sees what they read.
#pragma once
#include "vector.h"

namespace {

#if defined(FFK_EMULATES_MATRIX_UNIT)
thread_local vec tiles[8][16];

struct MatrixUnit {
    MatrixUnit() {}

    template <int T>
    static void load(const float* from, int64_t stride) {
        for (int m = 0; m < 16; m++) tiles[T][m] = ::load(from + m * stride);
    }

    template <int T>
    static void store(float* to, int64_t stride) {
        for (int m = 0; m < 16; m++) ::store(to + m * stride, tiles[T][m]);
    }

    // Sums over the first numbers of all pairs and over the second ones, of which both are added up
    // before they join what is there. Denormal numbers are zeros, of operands and of results.
    template <int SUM, int A, int B>
    static void multiply() {
        for (int m = 0; m < 16; m++) {
            vec sums[2] = {};
            for (int k = 0; k < 16; k++) {
                const vec_of_bits b = (vec_of_bits)tiles[B][k];
                const uint32_t a = ((vec_of_bits)tiles[A][m])[k];
                const vec right[2] = {(vec)(b << 16), (vec)(b & 0xffff0000u)};
                for (int i = 0; i < 2; i++) {
                    const float left = flushed(from_bfloat16(uint16_t(i ? a >> 16 : a)));
                    sums[i] = flushed(sums[i] + left * flushed(right[i]));
                }
            }
            tiles[SUM][m] = flushed(flushed(tiles[SUM][m]) + flushed(sums[0] + sums[1]));
        }
    }
};
#else
// In use as long as one of these lives, on its thread: a task's length, so that nobody else finds
// the tiles occupied.
struct MatrixUnit {
    MatrixUnit() {
        struct {
            uint8_t palette = 1, start_row = 0, reserved[14] = {};
            uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
            uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
        } shapes;
        asm volatile("ldtilecfg %0" ::"m"(shapes));
    }
    ~MatrixUnit() { asm volatile("tilerelease" ::: "memory"); }
    MatrixUnit(const MatrixUnit&) = delete;

    template <int T>
    static void load(const float* from, int64_t stride) {
        asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride * 4), "i"(T)
                     : "memory");
    }

    template <int T>
    static void store(float* to, int64_t stride) {
        asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride * 4), "i"(T)
                     : "memory");
    }

    // SUM += A B.
    template <int SUM, int A, int B>
    static void multiply() {
        asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(SUM), "i"(A), "i"(B));
    }
};
#endif

}  // namespace

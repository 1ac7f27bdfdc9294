// The library's face: plain C, called through ctypes by ffkernels/backends/native/library.py. No
// torch header and no Python symbol: one build serves every version of both.
#pragma once
#include "records.h"

#pragma GCC visibility push(default)
extern "C" {
int ffk_interface();
// Where the members of a call lie: how many numbers, and the numbers (records.h, LAYOUT).
int64_t ffk_layout(const size_t** offsets);
// The instruction set in use for products of float32 (0), of bfloat16 (1), and of float32 at
// precision "high" (2); `ffk_limit` chooses one by name for all, or the best again where it is
// empty, and returns 0, or 1 if this CPU lacks it.
const char* ffk_instruction_set(int products);
int ffk_limit(const char* name);
// The OpenMP runtime's entry point `GOMP_parallel`, so that torch's own threads do the work; null:
// std::thread.
void ffk_use_threads(void* gomp_parallel);
// 0, or 1 where memory ran out: then nothing has been written.
int ffk_linear_forward(const ffk::Call* call);
int ffk_linear_step(const ffk::Call* call);
int ffk_linear_update(const ffk::Call* call);
// Steps one after the other: 0, or the number from 1 of the one for which memory ran out.
int ffk_linear_steps(const ffk::Call* calls, int count);
// The passes over maps on both sides of a convolution (maps.h).
void ffk_maps_forward(const ffk::MapsPass* call);
void ffk_maps_backward(const ffk::MapsPass* call);
// Sums over places that a normalisation in front of a convolution asks for (maps.h).
void ffk_maps_products(const ffk::MapsPass* call);
// The same with the products between them (convolution.h); results as above.
int ffk_convolution_forward(const ffk::MapsPass* call);
int ffk_convolution_gradient(const ffk::MapsPass* call);
}
#pragma GCC visibility pop

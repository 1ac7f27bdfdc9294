// What each instruction set's copy of the kernels offers.
#pragma once
#include "interface.h"

namespace ffk {

struct Kernels {
    const char* name;
    bool splits_float32;  // makes three products of bfloat16 numbers of one at precision "high"
    int (*linear_forward)(const Call&);
    int (*linear_step)(const Call&);
    int (*linear_update)(const Call&);
    void (*maps_forward)(const MapsPass&);
    void (*maps_backward)(const MapsPass&);
    void (*maps_products)(const MapsPass&);
    int (*convolution_forward)(const MapsPass&);
    int (*convolution_gradient)(const MapsPass&);
};

extern const Kernels amx, avx512_bf16, avx512, avx2, neon_bf16, baseline;

}  // namespace ffk

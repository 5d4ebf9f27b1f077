// Stands in for CUDA's header of the same name: the type and its two conversions.
#pragma once

#define IDLEVIT_ISA host
#include "cpu/rows.h"

struct __nv_bfloat16 {
    idlevit::cpu::host::BFloat16 value;

    __nv_bfloat16() = default;
    explicit __nv_bfloat16(float x) : value(idlevit::cpu::host::to_bfloat16(x)) {}
    explicit operator float() const { return idlevit::cpu::host::to_float(value); }
};

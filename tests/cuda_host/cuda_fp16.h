// Stands in for CUDA's header of the same name: the type and its two conversions.
#pragma once

#define IDLEVIT_ISA host
#include "cpu/rows.h"

struct __half {
    idlevit::cpu::host::Half value;

    __half() = default;
    explicit __half(float x) : value(idlevit::cpu::host::to_half(x)) {}
    explicit operator float() const { return idlevit::cpu::host::to_float(value); }
};

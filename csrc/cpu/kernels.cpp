// Compiled once per instruction set: CMake sets IDLEVIT_ISA and the compiler's flags.
#include "gather.h"
#include "groups.h"
#include "project.h"
#include "scatter.h"
#include "select.h"
#include "spread.h"

#define IDLEVIT_CONCAT(a, b) a##b
#define IDLEVIT_NAME(prefix, isa) IDLEVIT_CONCAT(prefix, isa)
#define IDLEVIT_QUOTE(x) IDLEVIT_STRING(x)

namespace idlevit::cpu {

extern const Kernels IDLEVIT_NAME(kernels_, IDLEVIT_ISA);
const Kernels IDLEVIT_NAME(kernels_, IDLEVIT_ISA) = {
    IDLEVIT_QUOTE(IDLEVIT_ISA),  IDLEVIT_ISA::cls_direction,      IDLEVIT_ISA::token_scores,
    IDLEVIT_ISA::select_tokens,  IDLEVIT_ISA::select_gather_norm, IDLEVIT_ISA::cls_select_gather_norm,
    IDLEVIT_ISA::gather_tokens,  IDLEVIT_ISA::gather_add_norm,    IDLEVIT_ISA::scatter_tokens,
    IDLEVIT_ISA::project_tokens, IDLEVIT_ISA::select_spread,      IDLEVIT_ISA::assign_tokens,
    IDLEVIT_ISA::spread_memory,  IDLEVIT_ISA::gather_mean_norm,   IDLEVIT_ISA::follow_tokens,
    IDLEVIT_ISA::sum_groups,     IDLEVIT_ISA::expand_groups,
};

}  // namespace idlevit::cpu

// Compiled once per instruction set, with GISTKERN_ISA and GISTKERN_LANES from build_extension.py.
#include "kernels.h"

#include "backward.h"
#include "compact.h"
#include "decode.h"
#include "forward.h"

GISTKERN_NAMESPACE_BEGIN

#define GISTKERN_STRING_OF(name) #name
#define GISTKERN_STRING(name) GISTKERN_STRING_OF(name)

extern const Kernels kKernels;
const Kernels kKernels = {
    GISTKERN_STRING(GISTKERN_ISA),
    forward_items,
    forward_scratch_floats,
    forward_item,
    gradient_width,
    backward_scratch_floats,
    backward_chunk,
    reduce_row,
    decode_scratch_floats,
    decode_item,
    compact_row,
    read_row,
    narrow,
};

GISTKERN_NAMESPACE_END

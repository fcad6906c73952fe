#include "kernels.h"

namespace cwbr {

const char* isa_name() { return "portable"; }

}  // namespace cwbr

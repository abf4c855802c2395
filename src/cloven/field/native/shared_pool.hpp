// The one pool of this library's kernels.
#pragma once

#include "pool.hpp"

namespace cloven {

Pool& shared_pool();  // in product.cpp

}  // namespace cloven

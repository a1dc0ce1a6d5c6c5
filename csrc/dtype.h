// The floating-point formats that kernels read.
#pragma once

#include <cstdint>

namespace unike {

enum class Dtype { float32, bfloat16, float16 };

inline int64_t bytes_of(Dtype dtype) { return dtype == Dtype::float32 ? 4 : 2; }

}  // namespace unike

#pragma once

namespace blip2fast {

enum class Format16 { kHalf, kBFloat16 };

}  // namespace blip2fast

// The transform of a splice, as its parameters give it or as `merge` has folded it away.
#pragma once

#include <cmath>

#include "weights.h"

namespace kvsplice {

// Of the numbers of a latent. `c` is encoded from `scale c + shift`, where the scale is the softplus of its parameter,
// and comes back as `(e - shift) / scale` of what `expand` gives; merged, from `c - offset`, and as `e + offset`.
struct Transform {
  Numbers scale, shift;  // null where merged
  Numbers offset;        // null where not

  bool is_merged() const { return scale.data == nullptr; }
};

inline float softplus(float number) { return number > 20.0f ? number : std::log1p(std::exp(number)); }

// What decoding divides by and adds.
inline void invert(const Transform& transform, int64_t column, float& divisor, float& offset) {
  if (transform.is_merged()) {
    divisor = 1.0f;
    offset = number_at(transform.offset, column);
  } else {
    divisor = softplus(number_at(transform.scale, column));
    offset = -number_at(transform.shift, column) / divisor;
  }
}

}  // namespace kvsplice

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
  int64_t is_ready;      // whether `scale` is the scale itself, and not its parameter

  bool is_merged() const { return scale.data == nullptr; }
};

inline float softplus(float number) { return number > 20.0f ? number : std::log1p(std::exp(number)); }

// What encoding multiplies by and adds.
inline void read(const Transform& transform, int64_t column, float& scale, float& shift) {
  if (transform.is_merged()) {
    scale = 1.0f;
    shift = -number_at(transform.offset, column);
  } else {
    const float number = number_at(transform.scale, column);
    scale = transform.is_ready ? number : softplus(number);
    shift = number_at(transform.shift, column);
  }
}

// What decoding divides by and adds.
inline void invert(const Transform& transform, int64_t column, float& divisor, float& offset) {
  float shift;
  read(transform, column, divisor, shift);
  offset = -shift / divisor;
}

}  // namespace kvsplice

// Working memory.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>

#include "lanes.h"

namespace kvsplice {

// Memory of a thread that is kept from call to call: asking the system for it each time would cost more than a short
// context does.
class Workspace {
 public:
  // Room for so many numbers, or null where there is not enough memory.
  float* take(int64_t numbers) {
    numbers = numbers > 0 ? numbers : 1;  // lest no room look like too little
    if (numbers > size_) {
      memory_.reset(static_cast<float*>(std::aligned_alloc(64, round_up(numbers * sizeof(float), 64))));
      size_ = memory_ ? numbers : 0;
    }
    return memory_.get();
  }

 private:
  struct Free {
    void operator()(float* memory) const { std::free(memory); }
  };
  std::unique_ptr<float, Free> memory_;
  int64_t size_ = 0;
};

}  // namespace kvsplice

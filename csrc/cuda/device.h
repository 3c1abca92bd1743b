// The card that a call runs on, made current while this lives.
#pragma once

#include <stdint.h>

namespace duplex {

// Of the CUDA runtime that is linked in, as 1000 * major + 10 * minor.
int64_t runtime_version();

class Device {
 public:
  explicit Device(int32_t index);
  ~Device();
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;

  int capability = 0;     // to compute, as 10 * major + minor
  int processors = 0;     // streaming multiprocessors
  bool overlaps = false;  // launches may be made ahead (stream.h)
  void* stream = nullptr;

 private:
  int before_ = 0, index_ = 0;
};

}  // namespace duplex

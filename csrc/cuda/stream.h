// Where a launch goes.
#pragma once

namespace duplex {

// Made ahead, a launch may begin before the one before it has ended, where Device::overlaps. Every thread is to wait
// for that (ptx::wait_for_launch_before) before it writes, and before it reads what may be written until then: all but
// what was there before the launch before it, which is then not to be made ahead itself.
struct Stream {
  void* handle;
  bool ahead;

  Stream(void* handle, bool ahead = false) : handle(handle), ahead(ahead) {}
};

}  // namespace duplex

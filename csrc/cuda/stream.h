// Where a launch goes.
#pragma once

namespace duplex {

// Made ahead, where Device::overlaps, a launch may begin before the one before it has ended. Every thread is to wait
// for that (ptx::wait_for_launch_before) before it writes anything or reads what that launch writes. It may read sooner
// what was there when that launch began, unless that was made ahead too.
struct Stream {
  void* handle;
  bool ahead;

  Stream(void* handle, bool ahead = false) : handle(handle), ahead(ahead) {}
};

}  // namespace duplex

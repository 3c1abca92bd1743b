// Where a launch goes.
#pragma once

namespace duplex {

// Made ahead, a launch may begin before the one before it has ended, and every thread is to wait for that
// (ptx::wait_for_launch_before) before it reads or writes what is not the launch's own. On Hopper alone: later cards
// run code for Ampere, in which nothing waits.
struct Stream {
  void* handle;
  bool ahead;

  Stream(void* handle, bool ahead = false) : handle(handle), ahead(ahead) {}
};

}  // namespace duplex

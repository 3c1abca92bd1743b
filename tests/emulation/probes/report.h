// Probes behind plain functions: null is success, else what went wrong.
#pragma once

#include <exception>
#include <string>

#define EXPORTED extern "C" __attribute__((visibility("default")))

template <class F>
inline const char* report(F&& f) {
  static std::string what;
  try {
    f();
    return nullptr;
  } catch (const std::exception& error) {
    what = error.what();
    return what.c_str();
  }
}

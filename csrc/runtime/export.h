// Plain C functions for ctypes, so that the library depends on no version of Python.
#pragma once

#define FD_EXPORT extern "C" __attribute__((visibility("default")))

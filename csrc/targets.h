// Compiling a file once for each instruction set: FD_TARGET("avx2,fma") ... FD_END_TARGET.
#pragma once

#define FD_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define FD_TARGET(set) FD_PRAGMA(clang attribute push(__attribute__((target(set))), apply_to = function))
#define FD_END_TARGET _Pragma("clang attribute pop")
#else
#define FD_TARGET(set) _Pragma("GCC push_options") FD_PRAGMA(GCC target(set))
#define FD_END_TARGET _Pragma("GCC pop_options")
#endif

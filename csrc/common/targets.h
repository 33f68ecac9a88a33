// Compiling a file once for each instruction set: FD_TARGET("avx2,fma") ... FD_END_TARGET.
#pragma once

// Whether the compiler knows AMX, and the system has a call that asks for it.
#if defined(__x86_64__) && defined(__linux__) && (defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11)
#define FD_AMX 1
#else
#define FD_AMX 0
#endif

#define FD_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define FD_TARGET(set) FD_PRAGMA(clang attribute push(__attribute__((target(set))), apply_to = function))
#define FD_END_TARGET _Pragma("clang attribute pop")
#else
#define FD_TARGET(set) _Pragma("GCC push_options") FD_PRAGMA(GCC target(set))
#define FD_END_TARGET _Pragma("GCC pop_options")
#endif

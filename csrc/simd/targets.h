// Compiler options of each instruction set, and the pragmas that compile some functions of a file with them:
//
//     FD_TARGET(FD_AVX2_OPTIONS)
//     ... functions ...
//     FD_END_TARGET
#pragma once

// Whether the compiler knows AMX, and the system has the call by which a process asks for AMX's registers.
#if defined(__x86_64__) && defined(__linux__) && (defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11)
#define FD_AMX 1
#else
#define FD_AMX 0
#endif

#define FD_AVX2_OPTIONS "avx2,fma"
#define FD_AVX512_OPTIONS "avx2,fma,avx512f,avx512bw,avx512dq,avx512vl"
#define FD_AVX512_BF16_OPTIONS "avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16"
#define FD_AMX_OPTIONS "avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,amx-tile,amx-bf16,amx-int8"

#define FD_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define FD_TARGET(options) FD_PRAGMA(clang attribute push(__attribute__((target(options))), apply_to = function))
#define FD_END_TARGET _Pragma("clang attribute pop")
#else
#define FD_TARGET(options) _Pragma("GCC push_options") FD_PRAGMA(GCC target(options))
#define FD_END_TARGET _Pragma("GCC pop_options")
#endif

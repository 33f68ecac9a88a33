// Convolutions on one instruction set, for convolution/convolution.cpp.

#include "simd/exp.h"
// gelu.h uses exp.h.
#include "simd/gelu.h"
#include "simd/gemm.h"
#include "simd/lanes.h"

#include "convolution/pixels_cpu.h"
// The others use pixels_cpu.h.
#include "convolution/gated_outputs.h"

#include "convolution/direct.h"
#include "convolution/winograd.h"

#if FD_TILES

#include "amx/tile_gemm.h"
#include "convolution/convolution_amx.h"

#else

template <class T, class Math = Float32>
ConvolutionKernels kernels_of() {
  return {winograd_input<T, Math>, winograd_multiply<Math>, winograd_output<T, Math>, direct_input<T, Math>,
          direct_multiply<T, Math>};
}

#endif

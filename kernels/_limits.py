"""What Python and the compiled code agree on: layouts of packed weights, sizes up to which kernels serve.

csrc/ states the same in the `args.h` of each op. `_native.py` refuses a library that says otherwise.
"""

# Packed weights (docs/packed-weights.md), csrc/convolution/args.h.
PANEL = 64  # output channels of a panel
LANES = 16  # output channels are padded to a multiple
CHUNK = 32  # channels of bfloat16 that AMX multiplies together
BYTE_CHUNK = 64  # channels in bytes that AMX multiplies together
LARGEST_DIGIT = 127  # of the first byte of a number
ZERO = 96  # the first byte of 0 in a map that is mostly above 0
MAX_PRODUCTS = (2**31 - 1) // (128 * (3 * 128 + ZERO))  # of bytes to a sum of 32 bits

# csrc/attention/args.h
MAX_AMX_POSITIONS = 1024
MAX_CUDA_WIDTH = 256  # of a head
WIDE_HEAD = 128  # wider heads take WIDE_SHARED_MEMORY bytes of a block
WIDE_SHARED_MEMORY = 149_760

MAX_CUDA_GROUP_SIZE = 1024  # channels of a group, csrc/group_norm_silu/args.h
ROW_LENGTH = 12  # fields of StepCoefficients, csrc/reverse_step/math.h

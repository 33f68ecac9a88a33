"""Constants shared with the compiled code: layouts of packed weights, and the largest sizes for kernels.

The `args.h` of each op in csrc/ has the same constants. `_native.py` refuses a library in which they differ.
"""

# Packed weights (docs/packed-weights.md), csrc/convolution/args.h.
PANEL = 64  # output channels of a panel
LANES = 16  # output channels are padded to a multiple
CHUNK = 32  # channels of bfloat16 that AMX multiplies together
BYTE_CHUNK = 64  # channels of int8 that AMX multiplies together
LARGEST_LIMB = 127  # largest magnitude of the top limb
ZERO = 96  # zero point of the top limb after SiLU
MAX_PRODUCTS = (2**31 - 1) // (128 * (3 * 128 + ZERO))  # products of int8 that a 32-bit sum can hold

# csrc/attention/args.h
MAX_AMX_POSITIONS = 1024
MAX_CUDA_WIDTH = 256  # width of a head
WIDE_HEAD = 128  # wider heads take WIDE_SHARED_MEMORY bytes of a block
WIDE_SHARED_MEMORY = 149_760

MAX_CUDA_GROUP_SIZE = 1024  # channels of a group, csrc/group_norm_silu/args.h
ROW_LENGTH = 12  # fields of StepCoefficients, csrc/reverse_step/math.h

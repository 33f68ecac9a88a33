// The rounds of Philox4x32-10 (Salmon, Moraes, Dror & Shaw 2011). No include guard: philox/math.h includes this file
// for scalars, philox/noise_cpu.h for the vectors of each instruction set, both after a function
//     Lanes wide_product(Lanes words, uint32_t constant)
// that multiplies the low 32 bits of each lane to 64 bits.

// Four words of 32 bits, each in the low half of a 64-bit lane; the high half may hold anything. So a round is two
// products, two shifts and two exclusive ors, for a scalar as for a vector, and no lane is ever moved.
template <class Lanes>
struct Words {
  Lanes w0, w1, w2, w3;
};

template <class Lanes>
FD_HD Words<Lanes> philox_round(const Words<Lanes>& c, uint32_t k0, uint32_t k1) {
  const Lanes p0 = wide_product(c.w0, 0xD2511F53u), p1 = wide_product(c.w2, 0xCD9E8D57u);
  return {p1 >> 32 ^ c.w1 ^ static_cast<uint64_t>(k0), p1, p0 >> 32 ^ c.w3 ^ static_cast<uint64_t>(k1), p0};
}

// Ten rounds over the counters of kCount blocks with one key, round by round, so that their latencies overlap.
template <int kCount, class Lanes>
FD_HD void philox4x32(Words<Lanes> (&c)[kCount], uint64_t seed) {
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
#if defined(__CUDACC__)
#pragma unroll
#else
#pragma GCC unroll 10
#endif
  for (int round = 0; round < 10; ++round) {
    for (int i = 0; i < kCount; ++i) c[i] = philox_round(c[i], k0, k1);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
}

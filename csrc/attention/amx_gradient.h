// Attention's gradient by AMX, in bfloat16. Included after attention/amx_forward.h.

// The packed factors of the gradient of one head; sizes in blocks of 32. queries, grads: transposed, for the logits and
// the gradients of the weights. *_pairs: for products that sum over positions. key, value: 32 rows as left factors.
// weights, by_query: of 32 keys, rows of queries; by_key: the gradients of all logits, rows of keys.
struct GradientFactors {
  int64_t positions, width;
  char *queries, *grads, *query_pairs, *grad_pairs, *key_pairs, *key, *value, *weights, *by_query, *by_key;

  FD_HD int64_t bytes() const { return kBlock * kBlock * 2; }
};

// A product for 32 positions and the whole width, written to rows of `out`.
FD_HD void write_products(Factors f, const char* right, int64_t right_step, const GradientFactors& p, int64_t block,
                          const AttentionGradientArguments& g, BFloat16* out, int64_t step) {
  alignas(64) float sums[kBlock * kBlock];
  const int64_t first = block * kBlock, count = std::min(kBlock, g.positions - first);
  for (int64_t chunk = 0; chunk < p.width; ++chunk) {
    f.right = right + chunk * right_step;
    sum_products<2, 2, 1>(f, sums, kBlock * 4, []() FD_INLINE {});
    write_sums(sums, out + first * step + chunk * kBlock, step, count, g.width - chunk * kBlock);
  }
}

// Computes weights and gradients of logits from logits and gradients of weights, [32 keys][32 queries]. The results are
// bfloat16 left factors [key][query]; the gradients of logits are also written transposed, [query][key], to `by_key`.
FD_HD void differentiate(const float* logits, const float* d_weights, const float* logsumexp, const float* delta,
                         int64_t keys, int64_t queries, float scale, char* weights, char* by_query, char* by_key) {
  for (int64_t key = 0; key < kBlock; ++key) {
    Vec w[2] = {}, d[2] = {};
    for (int64_t half = 0; half < 2 && key < keys; ++half) {
      const int64_t at = half * kLanes;
      const __mmask16 mask = first_lanes(queries - at);
      const Vec exponent = (load(logits + key * kBlock + at) * spread(scale) - load(logsumexp + at)) * spread(kLog2E);
      w[half] = (Vec)_mm512_maskz_mov_ps(mask, exp2_fast<float>(exponent));
      const Vec difference = load(d_weights + key * kBlock + at) - load(delta + at);
      d[half] = (Vec)_mm512_maskz_mov_ps(mask, w[half] * difference * spread(scale));
    }
    store_splits<1>(weights + key * kRowBytes, 0, w[0], w[1]);
    store_splits<1>(by_query + key * kRowBytes, 0, d[0], d[1]);
  }
  for (int64_t half = 0; half < 2; ++half) {
    __m512i words[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) {
      const char* from = by_query + 2 * i * kRowBytes + half * 32;
      const __m256i first = _mm256_load_si256(reinterpret_cast<const __m256i*>(from));
      const __m256i second = _mm256_load_si256(reinterpret_cast<const __m256i*>(from + kRowBytes));
      words[i] = interleaved(_mm512_inserti64x4(_mm512_castsi256_si512(first), second, 1));
    }
    transpose(words);
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) _mm512_store_si512(by_key + (half * 16 + i) * kRowBytes, words[i]);
  }
}

// Items: all heads.
inline void differentiate_heads(const AttentionGradientArguments& g, int64_t begin, int64_t end) {
  load_shapes();
  alignas(64) float logits[kBlock * kBlock], d_weights[kBlock * kBlock];
  GradientFactors p{};
  p.positions = divide_up(g.positions, kBlock), p.width = divide_up(g.width, kBlock);
  const int64_t row = p.width * p.bytes(), head_bytes = p.positions * row, column = p.positions * p.bytes();
  char* next = reinterpret_cast<char*>(buffer((5 * head_bytes + 2 * row + (2 + p.positions) * column) / 4, 0));
  for (char** factor : {&p.queries, &p.grads, &p.query_pairs, &p.grad_pairs, &p.key_pairs}) {
    *factor = next;
    next += head_bytes;
  }
  p.key = next, p.value = p.key + row, p.weights = p.value + row;
  p.by_query = p.weights + column, p.by_key = p.by_query + column;
  float* logsumexp = buffer(2 * p.positions * kBlock, 1);
  float* delta = logsumexp + p.positions * kBlock;
  const int64_t no_tap = 0;
  Factors f{};
  f.row_step = kRowBytes, f.piece_step = 0, f.chunk_step = p.bytes(), f.taps = &no_tap, f.tap_count = 1;
  for (int64_t head = begin; head < end; ++head) {
    const auto rows = [&](const InputHeads& input) FD_INLINE { return rows_of<BFloat16>(input, head, g.positions, g); };
    const HeadRows<BFloat16> q = rows(g.q), k = rows(g.k), v = rows(g.v), grad = rows(g.grad), out = rows(g.out);
    for (int64_t i = 0; i < p.positions * kBlock; ++i) {
      logsumexp[i] = i < g.positions ? g.logsumexp[head * g.positions + i] : 0.0f;
      Vec sum = {};
      for (int64_t at = 0; at < g.width; at += kLanes) sum = fma(grad.read(i, at), out.read(i, at), sum);
      delta[i] = _mm512_reduce_add_ps(sum);
    }
    for (int64_t block = 0; block < p.positions; ++block) {
      pack_transposed(q, block, p.width, p.queries + block * row);
      pack_transposed(grad, block, p.width, p.grads + block * row);
      pack_pairs(q, block, p.width, p.query_pairs + block * p.bytes(), column);
      pack_pairs(grad, block, p.width, p.grad_pairs + block * p.bytes(), column);
      pack_pairs(k, block, p.width, p.key_pairs + block * p.bytes(), column);
    }
    const auto to = [&](const OutputHeads& output)
                        FD_INLINE { return output.at<BFloat16>(head / g.heads, head % g.heads); };
    for (int64_t j = 0; j < p.positions; ++j) {
      pack_left(k, j, p.width, p.key);
      pack_left(v, j, p.width, p.value);
      f.chunks = p.width;
      for (int64_t i = 0; i < p.positions; ++i) {
        f.left = p.key, f.right = p.queries + i * row;
        sum_products<2, 2, 1>(f, logits, kBlock * 4, []() FD_INLINE {});
        f.left = p.value, f.right = p.grads + i * row;
        sum_products<2, 2, 1>(f, d_weights, kBlock * 4, []() FD_INLINE {});
        differentiate(logits, d_weights, logsumexp + i * kBlock, delta + i * kBlock, g.positions - j * kBlock,
                      g.positions - i * kBlock, g.scale, p.weights + i * p.bytes(), p.by_query + i * p.bytes(),
                      p.by_key + i * column + j * p.bytes());
      }
      f.chunks = p.positions;
      f.left = p.weights;
      write_products(f, p.grad_pairs, column, p, j, g, to(g.dv), g.dv.row);
      f.left = p.by_query;
      write_products(f, p.query_pairs, column, p, j, g, to(g.dk), g.dk.row);
    }
    for (int64_t i = 0; i < p.positions; ++i) {
      f.left = p.by_key + i * column;
      write_products(f, p.key_pairs, column, p, i, g, to(g.dq), g.dq.row);
    }
  }
  _tile_release();
}

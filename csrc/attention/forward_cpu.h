// Attention's forward pass on one instruction set: blocks of queries, with the softmax online over blocks of keys.

// For each query of a block. maximum: the largest logit before scaling, or the largest -logit where the scale is
// negative. The scale multiplies differences to the maximum, so that no rounding makes the largest exponent more than
// 0.
struct alignas(64) OnlineSoftmax {
  float maximum[kQueries], sum[kQueries], rescale[kQueries];
};

// Replaces logits[keys][kQueries] by weights, as units of kPack keys, and adds them to the softmax.
template <class Math>
__attribute__((noinline)) void add_to_softmax(float* logits, OnlineSoftmax& softmax, int64_t keys, int64_t lanes,
                                              float scale, bool first) {
  const Vec direction = spread(scale < 0.0f ? -1.0f : 1.0f), factor = spread(scale < 0.0f ? -scale : scale);
  for (int64_t lane = 0; lane < lanes; lane += kLanes) {
    float* column = logits + lane;
    Vec largest = load(column) * direction;
    for (int64_t key = 1; key < keys; ++key) largest = max_or_b(load(column + key * kQueries) * direction, largest);
    Vec sum = {};
    if (!first) {
      const Vec before = load(softmax.maximum + lane);
      largest = max_or_b(before, largest);
      const Vec rescale = exp_reproducible((before - largest) * factor);
      store(softmax.rescale + lane, rescale);
      sum = load(softmax.sum + lane) * rescale;
    }
    store(softmax.maximum + lane, largest);
    Vec block_sum = {};
    for (int64_t key = 0; key < keys; key += Math::kPack) {
      float* at = column + key * kQueries;
      const Vec weight = exp_reproducible(fma(load(at), direction, -largest) * factor);
      block_sum += weight;
      if constexpr (Math::kPack == 1) {
        store(at, weight);
      } else {
        const Vec next =
            key + 1 < keys ? exp_reproducible(fma(load(at + kQueries), direction, -largest) * factor) : Vec{};
        block_sum += next;
        store(column + key / 2 * kQueries, Math::pair(weight, next));
      }
    }
    store(softmax.sum + lane, sum + block_sum);
  }
}

// Items: blocks of `queries` queries of all heads.
template <class Math, class T>
void forward(const AttentionArguments& g, int64_t queries, int64_t begin, int64_t end) {
  const int64_t S = g.positions, D = g.width, padded = round_up(D, kLanes), depth = units_of<Math>(D);
  const int64_t max_keys = g.keys < kKeys ? g.keys : kKeys, blocks = divide_up(S, queries);
  ScratchArrays scratch((depth + D + max_keys) * kQueries + 2 * max_keys * padded);
  OnlineSoftmax softmax;
  float* q_t = scratch.take(depth * kQueries);
  float* out_t = scratch.take(D * kQueries);
  float* logits = scratch.take(max_keys * kQueries);
  float* k_copy = scratch.take(max_keys * padded);
  float* v_copy = scratch.take(max_keys * padded);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t b = item / blocks / g.heads, h = item / blocks % g.heads, first = item % blocks * queries;
    const int64_t count = S - first < queries ? S - first : queries, lanes = round_up(count, kLanes);
    const T* k = g.k.at<const T>(b, h);
    const T* v = g.v.at<const T>(b, h);
    pack_transposed<Math>(q_t, g.q.at<const T>(b, h) + first * g.q.row, g.q.row, count, D);
    for (int64_t key = 0; key < g.keys; key += kKeys) {
      const int64_t keys = g.keys - key < kKeys ? g.keys - key : kKeys;
      multiply<Math>(rows_as_lhs<Math>(k_copy, k + key * g.k.row, g.k.row, keys, D), q_t, kQueries, logits, kQueries,
                     keys, lanes, false);
      add_to_softmax<Math>(logits, softmax, keys, lanes, g.scale, key == 0);
      for (int64_t d = 0; key > 0 && d < D; ++d) {
        for (int64_t lane = 0; lane < lanes; ++lane) out_t[d * kQueries + lane] *= softmax.rescale[lane];
      }
      multiply<Math>(columns_as_lhs<Math>(v_copy, v + key * g.v.row, g.v.row, keys, D), logits, kQueries, out_t,
                     kQueries, D, lanes, key > 0);
    }
    for (int64_t i = 0; g.logsumexp != nullptr && i < count; ++i) {
      g.logsumexp[(b * g.heads + h) * S + first + i] = softmax.maximum[i] * fabsf(g.scale) + logf(softmax.sum[i]);
    }
    for (int64_t i = 0; i < lanes; ++i) softmax.sum[i] = 1.0f / softmax.sum[i];
    unpack_transposed(g.out.at<T>(b, h) + first * g.out.row, g.out.row, out_t, softmax.sum, count, D);
  }
}

// Attention's gradient on one instruction set.
//
// The gradient of the softmax P is dS_i = P_i (dP_i - D), where D = sum over j of P_j dP_j. Both P and D are computed
// again from whole rows of logits: where one P is nearly 1, dP - D cancels, and from the rounded output and logsumexp
// it would be mostly rounding error.

// On entry p and dp, [keys][kQueries], hold logits and the gradients of the weights. On return they hold the weights
// and the gradients of the logits times the scale, as units of kPack queries; ds holds the latter as units of kPack
// keys.
template <class Math>
__attribute__((noinline)) void differentiate_softmax(float* p, float* dp, float* ds, int64_t keys, int64_t lanes,
                                                     float scale) {
  const Vec direction = spread(scale < 0.0f ? -1.0f : 1.0f), factor = spread(scale), size = direction * factor;
  for (int64_t lane = 0; lane < lanes; lane += kLanes) {
    Vec largest = load(p + lane) * direction;
    for (int64_t key = 1; key < keys; ++key) largest = max_or_b(load(p + key * kQueries + lane) * direction, largest);
    Vec sum = {}, mean = {};
    for (int64_t first = 0; first < keys; first += kKeys) {
      Vec block_sum = {}, block_mean = {};
      for (int64_t key = first; key < keys && key < first + kKeys; ++key) {
        const int64_t at = key * kQueries + lane;
        const Vec weight = exp_reproducible(fma(load(p + at), direction, -largest) * size);
        block_sum += weight;
        block_mean = fma(weight, load(dp + at), block_mean);
        store(p + at, weight);
      }
      sum += block_sum;
      mean += block_mean;
    }
    const Vec normalizer = spread(1.0f) / sum;
    mean = mean / sum;
    for (int64_t key = 0; key < keys; key += Math::kPack) {
      Vec gradients[2] = {};
      for (int i = 0; i < Math::kPack && key + i < keys; ++i) {
        float *weights = p + (key + i) * kQueries, *changes = dp + (key + i) * kQueries;
        const Vec weight = load(weights + lane) * normalizer;
        gradients[i] = weight * (load(changes + lane) - mean) * factor;
        if constexpr (Math::kPack == 1) {
          store(weights + lane, weight);
          store(changes + lane, gradients[i]);
        } else {
          // Pairs of these 16 queries overwrite 8 numbers of this row that were already read.
          Math::store_pairs(weights + lane / 2, weight);
          Math::store_pairs(changes + lane / 2, gradients[i]);
        }
      }
      if constexpr (Math::kPack == 2) {
        store(ds + key / 2 * kQueries + lane, Math::pair(gradients[0], gradients[1]));
      }
    }
  }
}

// Units [keys][queries / kPack] as a left factor.
FD_HD StridedRows units_as_lhs(const float* units, int64_t depth) {
  return {reinterpret_cast<const char*>(units), 4 * kQueries, 4, depth};
}

// Queries [begin, end) of one head: their dq, and their part of the sums dk and dv, float32 [S][padded].
template <class Math, class T>
void differentiate(const AttentionGradientArguments& g, int64_t b, int64_t h, int64_t begin, int64_t end, float* dk,
                   float* dv, ScratchArrays& scratch) {
  const int64_t S = g.positions, D = g.width, padded = round_up(D, kLanes), depth = units_of<Math>(D);
  const int64_t max_keys = S < kKeys ? S : kKeys;
  float* q_t = scratch.take(depth * kQueries);            // for the logits: transposed
  float* grad_t = scratch.take(depth * kQueries);         // for the gradients of the weights
  float* q_stacked = scratch.take(kQueries * padded);     // for dk
  float* grad_stacked = scratch.take(kQueries * padded);  // for dv
  float* dq_t = scratch.take(D * kQueries);
  float* p = scratch.take(S * kQueries);
  float* dp = scratch.take(S * kQueries);
  float* ds = Math::kPack == 1 ? dp : scratch.take(S * kQueries);  // as units of keys
  float* k_copy = scratch.take(max_keys * padded);
  float* v_copy = scratch.take(max_keys * padded);
  alignas(64) float ones[kQueries];
  for (float& one : ones) one = 1.0f;
  const T *q = g.q.at<const T>(b, h), *k = g.k.at<const T>(b, h), *v = g.v.at<const T>(b, h);
  const T* grad = g.grad.at<const T>(b, h);

  for (int64_t first = begin; first < end; first += kQueries) {
    const int64_t count = end - first < kQueries ? end - first : kQueries, lanes = round_up(count, kLanes);
    const bool add = first > begin;
    pack_transposed<Math>(q_t, q + first * g.q.row, g.q.row, count, D);
    pack_transposed<Math>(grad_t, grad + first * g.grad.row, g.grad.row, count, D);
    pack_stacked<Math>(q_stacked, q + first * g.q.row, g.q.row, count, D);
    pack_stacked<Math>(grad_stacked, grad + first * g.grad.row, g.grad.row, count, D);
    for (int64_t key = 0; key < S; key += kKeys) {
      const int64_t keys = S - key < kKeys ? S - key : kKeys;
      multiply<Math>(rows_as_lhs<Math>(k_copy, k + key * g.k.row, g.k.row, keys, D), q_t, kQueries, p + key * kQueries,
                     kQueries, keys, lanes, false);
      multiply<Math>(rows_as_lhs<Math>(v_copy, v + key * g.v.row, g.v.row, keys, D), grad_t, kQueries,
                     dp + key * kQueries, kQueries, keys, lanes, false);
    }
    differentiate_softmax<Math>(p, dp, ds, S, lanes, g.scale);
    for (int64_t key = 0; key < S; key += kKeys) {
      const int64_t keys = S - key < kKeys ? S - key : kKeys, queries = units_of<Math>(count);
      multiply<Math>(units_as_lhs(p + key * kQueries, queries), grad_stacked, padded, dv + key * padded, padded, keys,
                     padded, add);
      multiply<Math>(units_as_lhs(dp + key * kQueries, queries), q_stacked, padded, dk + key * padded, padded, keys,
                     padded, add);
      multiply<Math>(columns_as_lhs<Math>(k_copy, k + key * g.k.row, g.k.row, keys, D),
                     ds + key / Math::kPack * kQueries, kQueries, dq_t, kQueries, D, lanes, key > 0);
    }
    unpack_transposed(g.dq.at<T>(b, h) + first * g.dq.row, g.dq.row, dq_t, ones, count, D);
  }
}

// A row of dk or dv in the output's type, as the sum over `chunks` partial sums, `stride` floats apart.
template <class T>
FD_HD void write_row(T* to, const float* sums, int64_t chunks, int64_t stride, int64_t width) {
  for (int64_t d = 0; d < width; d += kLanes) {
    Vec sum = load(sums + d);
    for (int64_t chunk = 1; chunk < chunks; ++chunk) sum += load(sums + chunk * stride + d);
    store_at_most(to + d, sum, width - d);
  }
}

// Items: chunks of `queries` queries of all heads. Where a head is one chunk, `partial` is null and dk and dv are
// written; otherwise partial[item] gets the chunk's part of both sums, float32 [2][S][padded].
template <class Math, class T>
void backward(const AttentionGradientArguments& g, int64_t queries, float* partial, int64_t begin, int64_t end) {
  const int64_t S = g.positions, D = g.width, padded = round_up(D, kLanes), depth = units_of<Math>(D);
  const int64_t max_keys = S < kKeys ? S : kKeys, chunks = divide_up(S, queries);
  for (int64_t item = begin; item < end; ++item) {
    ScratchArrays scratch((2 * depth + D + 3 * S + 2 * padded) * kQueries + 2 * (max_keys + S) * padded);
    const int64_t b = item / chunks / g.heads, h = item / chunks % g.heads, first = item % chunks * queries;
    float* dk = partial ? partial + 2 * item * S * padded : scratch.take(2 * S * padded);
    float* dv = dk + S * padded;
    differentiate<Math, T>(g, b, h, first, S - first < queries ? S : first + queries, dk, dv, scratch);
    for (int64_t row = 0; !partial && row < S; ++row) {
      write_row(g.dk.at<T>(b, h) + row * g.dk.row, dk + row * padded, 1, 0, D);
      write_row(g.dv.at<T>(b, h) + row * g.dv.row, dv + row * padded, 1, 0, D);
    }
  }
}

// Adds up the partial sums of dk and dv. Items: rows of [B, H, S].
template <class T>
void add_partial_sums(const AttentionGradientArguments& g, int64_t queries, const float* partial, int64_t begin,
                      int64_t end) {
  const int64_t S = g.positions, D = g.width, padded = round_up(D, kLanes), chunks = divide_up(S, queries);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t head = item / S, b = head / g.heads, h = head % g.heads, row = item % S;
    const float* dk = partial + 2 * head * chunks * S * padded + row * padded;
    write_row(g.dk.at<T>(b, h) + row * g.dk.row, dk, chunks, 2 * S * padded, D);
    write_row(g.dv.at<T>(b, h) + row * g.dv.row, dk + S * padded, chunks, 2 * S * padded, D);
  }
}

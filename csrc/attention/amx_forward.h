// Attention's forward pass by AMX, with products as in attention/amx_bfloat16.h or attention/amx_limbs.h. Included
// after attention/amx_rows.h.

// The weights of a block of queries and a block of keys, which are computed in slices of 64 keys of a query, while AMX
// multiplies.
template <class Products, bool kPrecise>
struct Weighing {
  const QueryBlock* q = nullptr;
  const float* logits = nullptr;   // [32][kKeyBlock]
  const float* rescale = nullptr;  // factors of the sums of weights before, or null where there are none
  char* to = nullptr;              // the left factor of the products with values
  int64_t keys = 0, slices = 0, at = 0;

  void advance(int64_t count) {
    const int64_t row_slices = divide_up(keys, kSliceKeys);
    for (; count > 0 && at < slices; --count, ++at) weigh(at / row_slices, at % row_slices);
  }

  __attribute__((noinline)) void weigh(int64_t row, int64_t slice) {
    constexpr int64_t kSliceBytes = kSliceKeys / Products::kDepth * Products::kPieces * kBlock * kRowBytes;
    const Vec maximum = spread(q->maximum[row]), factor = spread(q->factor[row]);
    const float* from = logits + row * kKeyBlock + slice * kSliceKeys;
    Vec weights[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      weights[j] = Products::template weight<kPrecise>((load(from + j * kLanes) - maximum) * factor);
    }
    const int64_t remaining = keys - slice * kSliceKeys;
    for (int j = 0; remaining < kSliceKeys && j < 4; ++j) {
      weights[j] = (Vec)_mm512_maskz_mov_ps(first_lanes(remaining - j * kLanes), (__m512)weights[j]);
    }
    float* sum = q->weight_sums + row * kLanes;
    Vec before = {};
    if (slice > 0) before = load(sum);
    else if (rescale != nullptr) before = load(sum) * spread(rescale[row]);
    store(sum, (before + (weights[0] + weights[1])) + (weights[2] + weights[3]));
    Products::store_weights(to + slice * kSliceBytes + row * kRowBytes, weights);
  }
};

// Takes the largest logits of a block of keys into the maxima. first: whether there are no keys before.
FD_HD void update_maxima(QueryBlock& q, const float* largest, bool first, float* rescale) {
  for (int64_t i = 0; i < q.count; ++i) {
    float maximum = _mm512_reduce_max_ps((__m512)load(largest + i * kLanes));
    if (!first) {
      if (!(maximum > q.maximum[i])) maximum = q.maximum[i];
      rescale[i] = (q.maximum[i] - maximum) * q.factor[i];
    }
    q.maximum[i] = maximum;
  }
  for (int64_t i = 0; !first && i < kBlock; i += kLanes) store(rescale + i, exp2_of<true>(load(rescale + i)));
}

// Adds the products with a panel of values to the sums. rescale: factors of the sums before, or null where there are
// none.
template <class Products>
FD_HD void add_products(const QueryBlock& q, const void* products, int64_t panel, int64_t tiles, const float* scales,
                        const float* rescale) {
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t column_tile = panel * Products::kColumns / kLanes + tile;
    float* sum = q.sums + column_tile * kBlock * kLanes;
    const Vec column_scales = scales == nullptr ? Vec{} : load(scales + column_tile * kLanes);
    for (int64_t i = 0; i < q.count; ++i, sum += kLanes) {
      const Vec product = Products::value_sum(products, i, tile, column_scales);
      store(sum, rescale == nullptr ? product : fma(load(sum), spread(rescale[i]), product));
    }
  }
}

// Writes the output of a block of queries, and the logsumexp where it is wanted.
template <class T>
FD_HD void finish_block(const AttentionArguments& g, int64_t head, const QueryBlock& q, float scale, float unit) {
  T* out = g.out.at<T>(head / g.heads, head % g.heads) + q.first * g.out.row;
  for (int64_t i = 0; i < q.count; ++i) {
    const float sum = _mm512_reduce_add_ps((__m512)load(q.weight_sums + i * kLanes)), inverse = unit / sum;
    if (g.logsumexp != nullptr) {
      g.logsumexp[head * g.positions + q.first + i] = q.maximum[i] * scale + std::log(sum);
    }
    for (int64_t at = 0; at < g.width; at += kLanes) {
      const Vec value = load(q.sums + (at * kBlock + i * kLanes)) * spread(inverse);
      T* to = out + i * g.out.row + at;
      if (g.width - at >= kLanes) store(to, value);
      else store(to, value, g.width - at);
    }
  }
}

// Items: groups of `group` blocks of queries, of all heads of the group of heads. Heads that `packed` refused are left
// out.
//
// A step is one block of queries and one block of keys. AMX works beside the vectors: while the weights of a step are
// computed, it multiplies the weights of the step before and the values, and the queries and keys of the next step.
template <class T, class Products, bool kPrecise>
void attend(const AttentionArguments& g, const PackedKeysValues& packed, int64_t group, int64_t begin, int64_t end) {
  load_shapes();
  const int64_t query_blocks = divide_up(g.positions, kBlock), groups = divide_up(query_blocks, group);
  const int64_t key_blocks = divide_up(g.keys, kKeyBlock), no_tap = 0;
  const int64_t left_bytes = Products::kPieces * kBlock * kRowBytes,
                queries_size = packed.width_chunks * left_bytes / 4;
  const int64_t sums_size = packed.tiles * kBlock * kLanes,
                weights_size = kKeyBlock / Products::kDepth * left_bytes / 4;
  ScratchArrays scratch(2 * (kBlock * kKeyBlock + Products::kSumFloats + weights_size) + kBlock * kLanes +
                        group * (queries_size + sums_size + kBlock * kLanes));
  float* logits[2] = {scratch.take(kBlock * kKeyBlock), scratch.take(kBlock * kKeyBlock)};
  float* products[2] = {scratch.take(Products::kSumFloats), scratch.take(Products::kSumFloats)};
  float* weights[2] = {scratch.take(weights_size), scratch.take(weights_size)};
  float* largest = scratch.take(kBlock * kLanes);
  float* queries = scratch.take(group * queries_size);
  float* sums = scratch.take(group * sums_size);
  float* weight_sums = scratch.take(group * kBlock * kLanes);
  QueryBlock blocks[kMaxQueryBlocks];
  Factors f{};
  f.row_step = kRowBytes, f.piece_step = kBlock * kRowBytes, f.chunk_step = left_bytes;
  f.taps = &no_tap, f.tap_count = 1;

  for (int64_t item = begin; item < end; ++item) {
    const int64_t head = packed.first + item / groups, first_block = item % groups * group;
    if (packed.refused(head)) continue;
    const int64_t count = std::min(group, query_blocks - first_block), steps = count * key_blocks;
    for (int64_t j = 0; j < count; ++j) {
      QueryBlock& q = blocks[j];
      q.first = (first_block + j) * kBlock, q.count = std::min(kBlock, g.positions - q.first);
      q.queries = reinterpret_cast<char*>(queries + j * queries_size);
      q.sums = sums + j * sums_size, q.weight_sums = weight_sums + j * kBlock * kLanes;
      memset(q.rescale, 0, sizeof(q.rescale));
      Products::pack_queries(rows_of<T>(g.q, head, g.positions, g), first_block + j, packed, g.scale, q);
    }
    const auto keys_of = [&](int64_t step) FD_INLINE { return std::min(kKeyBlock, g.keys - step / count * kKeyBlock); };
    const auto rescale_of = [&](int64_t step) FD_INLINE {
      return step < count ? nullptr : blocks[step % count].rescale[step / count & 1];
    };
    for (int64_t step = -1; step <= steps; ++step) {
      const int64_t next = step + 1, before = step - 1;
      const bool has_next = next < steps, has_before = before >= 0;
      const int64_t next_keys = has_next ? keys_of(next) : 0, keys_before = has_before ? keys_of(before) : 0;
      const int64_t key_panels = divide_up(next_keys, Products::kKeys);
      const int64_t key_chunks = divide_up(keys_before, Products::kDepth);
      const int64_t value_panels = has_before ? packed.value_panels : 0;
      Weighing<Products, kPrecise> weighing;
      if (step >= 0 && step < steps) {
        weighing.q = &blocks[step % count], weighing.logits = logits[step & 1], weighing.rescale = rescale_of(step);
        weighing.to = reinterpret_cast<char*>(weights[step & 1]), weighing.keys = keys_of(step);
        weighing.slices = weighing.q->count * divide_up(weighing.keys, kSliceKeys);
      }
      const int64_t calls = Products::kValuePasses * value_panels * key_chunks + key_panels * packed.width_chunks;
      const int64_t slices = divide_up(weighing.slices, std::max<int64_t>(calls, 1));
      const auto overlapped = [&]() FD_INLINE { weighing.advance(slices); };

      const auto finish_values = [&](int64_t panel) FD_INLINE {
        add_products<Products>(blocks[before % count], products[panel & 1], panel, packed.value_tiles(panel),
                               Products::value_scales(packed, head, before / count), rescale_of(before));
      };
      if (has_before) {
        const int64_t first_chunk = before / count * (kKeyBlock / Products::kDepth);
        f.left = reinterpret_cast<const char*>(weights[before & 1]), f.chunks = key_chunks;
        for (int64_t panel = 0; panel < value_panels; ++panel) {
          f.right = packed.value_panel(head, panel, first_chunk);
          Products::multiply_values(blocks[before % count].count, packed.value_tiles(panel), f, products[panel & 1],
                                    overlapped);
          if (panel > 0) finish_values(panel - 1);
        }
        finish_values(value_panels - 1);
      }

      QueryBlock& next_q = blocks[next % count];
      float* next_logits = logits[next & 1];
      const int64_t first_key = next / count * kKeyBlock;
      const auto finish_keys = [&](int64_t panel) FD_INLINE {
        const int64_t at = panel * Products::kKeys;
        Products::finish_keys(next_q.count, next_logits + at, products[panel & 1],
                              Products::key_scales(packed, head, first_key + at), next_keys - at, largest);
      };
      if (has_next) {
        for (int64_t i = 0; i < kBlock * kLanes; i += kLanes) store(largest + i, spread(-__builtin_inff()));
        f.left = next_q.queries, f.chunks = packed.width_chunks;
        for (int64_t panel = 0; panel < key_panels; ++panel) {
          f.right = packed.key_panel(head, first_key / Products::kKeys + panel);
          Products::multiply_keys(next_q.count, f, next_logits + panel * Products::kKeys, products[panel & 1],
                                  overlapped);
          if (panel > 0) finish_keys(panel - 1);
        }
        finish_keys(key_panels - 1);
      }
      weighing.advance(weighing.slices);
      if (has_next) update_maxima(next_q, largest, next < count, next_q.rescale[next / count & 1]);
    }
    for (int64_t j = 0; j < count; ++j) finish_block<T>(g, head, blocks[j], std::fabs(g.scale), Products::kWeightUnit);
  }
  _tile_release();
}

// linear_attention_ on one instruction set, for linear_attention/linear_attention.cpp.

#include "simd/exp.h"
#include "simd/gemm.h"

constexpr int64_t kRows = 96;  // positions whose keys and values, or queries, stay in the first cache

FD_HD float largest_lane(Vec value) {
#if FD_LANES == 16
  return _mm512_reduce_max_ps((__m512)value);
#else
  float largest = value[0];
  for (int i = 1; i < kLanes; ++i) largest = value[i] > largest ? value[i] : largest;
  return largest;
#endif
}

FD_HD float sum_of_lanes(Vec value) {
#if FD_LANES == 16
  return _mm512_reduce_add_ps((__m512)value);
#else
  float sum = value[0];
  for (int i = 1; i < kLanes; ++i) sum += value[i];
  return sum;
#endif
}

// e^(x - largest). The result is about 1e-38 at least, and NaN stays NaN.
template <class T>
FD_HD Vec exponential(Vec x, Vec largest) {
  return exp2_fast<T>(max_or_a((x - largest) * spread(kLog2E), spread(-126.0f)));
}

// `channels` numbers as float32, with zeros up to `step`.
template <class T>
FD_HD void widen(const T* from, int64_t channels, int64_t step, float* to) {
  for (int64_t c = 0; c < step; c += kLanes) {
    const int64_t lanes = channels - c;
    store(to + c, lanes >= kLanes ? load(from + c) : lanes > 0 ? load(from + c, lanes) : spread(0.0f));
  }
}

// Adds rows of keys [count, key_step] and values [count, value_step] to a summary. The keys become exponentials.
template <class T>
FD_HD void add_rows(const LinearAttention& args, float* keys, const float* values, int64_t count, bool first,
                    float* summary, float* factors) {
  const int64_t step = args.key_step(), width = args.value_step();
  float *largest = summary, *sums = summary + step, *products = summary + 2 * step;
  for (int64_t c = 0; c < step; c += kLanes) {
    Vec top = load(keys + c);
    for (int64_t row = 1; row < count; ++row) top = max_or_a(top, load(keys + row * step + c));
    top = max_or_a(top, spread(-3e38f));  // where all keys are -inf, the differences from them are not NaN
    Vec sum = spread(0.0f), factor = spread(0.0f);
    if (!first) {
      top = max_or_a(top, load(largest + c));
      factor = exponential<T>(load(largest + c), top);
      sum = load(sums + c) * factor;
    }
    for (int64_t row = 0; row < count; ++row) {
      const Vec weight = exponential<T>(load(keys + row * step + c), top);
      store(keys + row * step + c, weight);
      sum += weight;
    }
    store(largest + c, top);
    store(sums + c, sum);
    store(factors + c, factor);
  }
  const StridedRows channels{reinterpret_cast<const char*>(keys), 4, step * 4, count};
  multiply_panel<Float32>(channels, 0, step, values, width, width, [&](int64_t row, int64_t column, Vec sum) FD_INLINE {
    float* to = products + row * width + column;
    store(to, first ? sum : mul_add(load(to), spread(factors[row]), sum));
  });
}

template <class T>
void summarise(const LinearAttention& args, int64_t begin, int64_t end) {
  const int64_t parts = args.parts(), step = args.key_step(), width = args.value_step();
  ScratchArrays scratch(kRows * (step + width) + step);
  float *keys = scratch.take(kRows * step), *values = scratch.take(kRows * width), *factors = scratch.take(step);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t image = item / parts, part = item % parts;
    const int64_t sample = image / args.heads, head = image % args.heads;
    float* summary = args.summaries + item * args.summary_size();
    const bool memory = args.tokens > 0 && part == parts - 1;
    const int64_t start = memory ? 0 : part * kChunk;
    const int64_t stop = memory ? args.tokens : args.positions < start + kChunk ? args.positions : start + kChunk;
    for (int64_t row = start; row < stop; row += kRows) {
      const int64_t count = stop - row < kRows ? stop - row : kRows;
      if (memory) {
        for (int64_t i = 0; i < count; ++i) {
          for (int64_t c = 0; c < step; ++c) {
            const int64_t at = (head * args.key_channels + c) * args.tokens + row + i;
            keys[i * step + c] = c < args.key_channels ? args.memory_k[at] : 0.0f;
          }
          for (int64_t c = 0; c < width; ++c) {
            const int64_t at = (head * args.value_channels + c) * args.tokens + row + i;
            values[i * width + c] = c < args.value_channels ? args.memory_v[at] : 0.0f;
          }
        }
      } else {
        const T* k = static_cast<const T*>(args.k.data) + sample * args.k.sample + head * args.k.head;
        const T* v = static_cast<const T*>(args.v.data) + sample * args.v.sample + head * args.v.head;
        for (int64_t i = 0; i < count; ++i) {
          widen(k + (row + i) * args.k.position, args.key_channels, step, keys + i * step);
          widen(v + (row + i) * args.v.position, args.value_channels, width, values + i * width);
        }
      }
      add_rows<T>(args, keys, values, count, row == start, summary, factors);
    }
  }
}

// The sums of the parts, divided by the sums of the exponentials, in the place of the first part's products.
inline void combine(const LinearAttention& args, int64_t begin, int64_t end) {
  const int64_t parts = args.parts(), size = args.summary_size(), step = args.key_step(), width = args.value_step();
  for (int64_t image = begin; image < end; ++image) {
    float* summary = args.summaries + image * parts * size;
    for (int64_t c = 0; c < args.key_channels; ++c) {
      float top = summary[c];
      for (int64_t part = 1; part < parts; ++part) {
        const float other = summary[part * size + c];
        top = other > top ? other : top;
      }
      float sum = 0.0f;
      float* row = summary + 2 * step + c * width;
      for (int64_t part = 0; part < parts; ++part) {
        const float* other = summary + part * size;
        const float factor = exponential<float>(spread(other[c]), spread(top))[0];
        sum += other[step + c] * factor;
        for (int64_t e = 0; e < width; e += kLanes) {
          const Vec product = load(other + 2 * step + c * width + e) * spread(factor);
          store(row + e, part == 0 ? product : load(row + e) + product);
        }
      }
      const Vec last = spread(args.scale / sum);
      for (int64_t e = 0; e < width; e += kLanes) store(row + e, load(row + e) * last);
    }
  }
}

template <class T>
void attend(const LinearAttention& args, int64_t begin, int64_t end) {
  const int64_t step = args.key_step(), width = args.value_step(), channels = args.key_channels;
  const int64_t chunks = divide_up(args.positions, kChunk);
  ScratchArrays scratch(kRows * (step + 1));
  float *weights = scratch.take(kRows * step), *factors = scratch.take(kRows);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t sample = item / chunks, start = item % chunks * kChunk;
    const int64_t stop = args.positions < start + kChunk ? args.positions : start + kChunk;
    for (int64_t row = start; row < stop; row += kRows) {
      const int64_t count = stop - row < kRows ? stop - row : kRows;
      for (int64_t head = 0; head < args.heads; ++head) {
        const T* q = static_cast<const T*>(args.q.data) + sample * args.q.sample + head * args.q.head;
        for (int64_t i = 0; i < count; ++i) {
          const T* from = q + (row + i) * args.q.position;
          float* to = weights + i * step;
          widen(from, channels, step, to);
          for (int64_t c = channels; c < step; ++c) to[c] = -3e38f;  // its exponential is as good as 0
          Vec top = load(to);
          for (int64_t c = kLanes; c < step; c += kLanes) top = max_or_a(top, load(to + c));
          top = spread(largest_lane(top));
          Vec sum = spread(0.0f);
          for (int64_t c = 0; c < step; c += kLanes) {
            const Vec weight = exponential<T>(load(to + c), top);
            store(to + c, weight);
            sum += weight;
          }
          factors[i] = 1.0f / sum_of_lanes(sum);
        }
        const float* summary =
            args.summaries + (sample * args.heads + head) * args.parts() * args.summary_size() + 2 * step;
        T* out = static_cast<T*>(const_cast<void*>(args.out.data)) + sample * args.out.sample + head * args.out.head;
        const StridedRows rows{reinterpret_cast<const char*>(weights), step * 4, 4, channels};
        multiply_panel<Float32>(rows, 0, count, summary, width, width,
                                [&](int64_t i, int64_t column, Vec sum) FD_INLINE {
                                  const int64_t lanes = args.value_channels - column;
                                  T* to = out + (row + i) * args.out.position + column;
                                  const Vec y = sum * spread(factors[i]);
                                  if (lanes >= kLanes) store(to, y);
                                  else if (lanes > 0) store(to, y, lanes);
                                });
      }
    }
  }
}

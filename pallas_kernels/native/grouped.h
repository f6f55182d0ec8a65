// Products of small matrices on one core, and the threads that share them out.
//
// Every product is made of tiles of kRows x kColumns numbers that stay in registers:
//
//     tile[i][j] = sum over k of left[i][k] * panel[k][j]
//
// `left` is read where it lies, row by row, each number broadcast to a vector. `panel` is kColumns columns of the right
// operand, packed so that they are read one after the other. Which operand takes which part is chosen so that weights
// are read once and packed only where they are the right operand:
//
//     rows x weights      left: rows,           panels: columns of the weights
//     rows x weights^T    left: rows of weights, panels: the rows, transposed; the result comes out transposed
//     rows^T x rows       left: rows transposed, panels: columns of the other rows
//
// R rows, M rows of the left operand, K contracted, N columns of the right operand.

#ifndef PALLAS_KERNELS_NATIVE_GROUPED_H_
#define PALLAS_KERNELS_NATIVE_GROUPED_H_

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <utility>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace native {

#if defined(__AVX512F__)
constexpr int kLanes = 16, kRows = 12;  // 24 of 32 registers hold the tile
#elif defined(__AVX2__)
constexpr int kLanes = 8, kRows = 6;  // 12 of 16
#else
constexpr int kLanes = 4, kRows = 8;  // 16 of 32 on Arm
#endif
constexpr int kColumns = 2 * kLanes;

typedef float Vector __attribute__((vector_size(kLanes * sizeof(float)), aligned(sizeof(float)), may_alias));
typedef int32_t Integers __attribute__((vector_size(kLanes * sizeof(float)), aligned(sizeof(float)), may_alias));

inline Vector load(const float* from) { return *reinterpret_cast<const Vector*>(from); }
inline void store(float* to, Vector value) { *reinterpret_cast<Vector*>(to) = value; }
inline Vector all(float value) { return Vector{} + value; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Memory of one thread that grows and is kept, so that its pages are touched for the first time once.
template <int kWhich>
float* scratch(int64_t floats) {
  struct Free {
    void operator()(float* memory) const { std::free(memory); }
  };
  static thread_local std::unique_ptr<float, Free> memory;
  static thread_local int64_t held = 0;
  if (held < floats) {
    held = ceil_div(floats + floats / 4, 64) * 64;
    memory.reset(static_cast<float*>(std::aligned_alloc(64, held * sizeof(float))));
  }
  return memory.get();
}

// --- tiles ------------------------------------------------------------------------------------------------------

// Adds to the tile kM rows of `left`, `stride` apart, times the first kVectors of the two vectors of a panel's rows.
template <int kM, int kVectors = 2>
inline __attribute__((always_inline)) void multiply(const float* left, int64_t stride, const float* panel,
                                                    int64_t depth, Vector (&tile)[kM][2]) {
  // A base for every third row: the rows between are reached by the address modes of the processor.
  constexpr int kBases = (kM + 2) / 3;
  const float* base[kBases];
  for (int b = 0; b < kBases; ++b) base[b] = left + 3 * b * stride;
  for (int64_t k = 0; k < depth; ++k) {
    const Vector low = load(panel), high = kVectors == 2 ? load(panel + kLanes) : Vector{};
    panel += kColumns;
#pragma GCC unroll 16
    for (int i = 0; i < kM; ++i) {
      const float value = base[i / 3][(i % 3) * stride];
      tile[i][0] += value * low;
      if constexpr (kVectors == 2) tile[i][1] += value * high;
    }
#pragma GCC unroll 8
    for (int b = 0; b < kBases; ++b) ++base[b];
  }
}

// Calls `tile(row, count)` with count a constant, for blocks of kRows rows and what is left of them.
template <int kM, typename Tile>
inline void remainder(int64_t row, int64_t count, Tile& tile) {
  if (count == kM) {
    tile(row, std::integral_constant<int, kM>());
  } else if constexpr (kM > 1) {
    remainder<kM - 1>(row, count, tile);
  }
}

template <typename Tile>
inline void for_row_blocks(int64_t rows, Tile tile) {
  int64_t row = 0;
  for (; row + kRows <= rows; row += kRows) tile(row, std::integral_constant<int, kRows>());
  if (row < rows) remainder<kRows - 1>(row, rows - row, tile);
}

// Stores a vector that is not read again soon past the cache, which then does not read the line first.
inline void store_past_cache(float* to, Vector value) {
#if defined(__AVX512F__)
  _mm512_stream_ps(to, reinterpret_cast<const __m512&>(value));
#elif defined(__AVX2__)
  _mm256_stream_ps(to, reinterpret_cast<const __m256&>(value));
#else
  store(to, value);
#endif
}

// Orders what `store_past_cache` has stored before whatever tells other threads of it.
inline void fence() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

// --- packing ----------------------------------------------------------------------------------------------------

template <int kStep, int... kLane>
inline void exchange(Vector& a, Vector& b, std::integer_sequence<int, kLane...>) {
  const Vector first = __builtin_shufflevector(a, b, ((kLane & kStep) ? kLanes + kLane - kStep : kLane)...);
  b = __builtin_shufflevector(a, b, ((kLane & kStep) ? kLanes + kLane : kLane + kStep)...);
  a = first;
}

template <int kStep>
inline void exchange_all(Vector (&block)[kLanes]) {
  if constexpr (kStep < kLanes) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      if (!(i & kStep)) {
        exchange<kStep>(block[i], block[i + kStep], std::make_integer_sequence<int, kLanes>());
      }
    }
    exchange_all<2 * kStep>(block);
  }
}

inline Vector load_some(const float* from, int64_t count) {
  if (count >= kLanes) return load(from);
  alignas(64) float values[kLanes] = {};
  if (count > 0) std::memcpy(values, from, count * sizeof(float));
  return load(values);
}

inline void store_some(float* to, Vector value, int64_t count) {
  if (count >= kLanes) return store(to, value);
  alignas(64) float values[kLanes];
  store(values, value);
  if (count > 0) std::memcpy(to, values, count * sizeof(float));
}

// to[j][i] = from[i][j] for `rows` x `columns`; rows of `from` that are null are zero. `to` has room for `padded` >= rows
// in each of its rows, and what is past `rows` there becomes zero.
template <typename RowOf>
inline void transpose(RowOf row_of, int64_t rows, int64_t columns, float* to, int64_t to_stride, int64_t padded) {
  for (int64_t i = 0; i < padded; i += kLanes) {
    for (int64_t j = 0; j < columns; j += kLanes) {
      Vector block[kLanes];
#pragma GCC unroll 16
      for (int r = 0; r < kLanes; ++r) {
        const float* row = i + r < rows ? row_of(i + r) : nullptr;
        block[r] = row ? load_some(row + j, columns - j) : Vector{};
      }
      exchange_all<1>(block);
      const int64_t wide = std::min<int64_t>(kLanes, columns - j);
      for (int64_t c = 0; c < wide; ++c) store_some(to + (j + c) * to_stride + i, block[c], padded - i);
    }
  }
}

// Panels (N/kColumns, K, kColumns) of rows^T: column n of the product is row n of the R rows. N is R.
template <typename RowOf>
inline void pack_transposed(RowOf row_of, int64_t rows, int64_t depth, float* panels) {
  for (int64_t n = 0; n < rows; n += kColumns) {
    auto from = [&](int64_t i) { return row_of(n + i); };
    transpose(from, std::min<int64_t>(kColumns, rows - n), depth, panels, kColumns, kColumns);
    panels += depth * kColumns;
  }
}

// One panel (K, kColumns) of columns [first, first + count) of each of K rows; the rest is zero.
template <typename RowOf>
inline void pack_columns(RowOf row_of, int64_t depth, int64_t first, int64_t count, float* panel) {
  for (int64_t k = 0; k < depth; ++k, panel += kColumns) {
    const float* row = row_of(k) + first;
    if (count == kColumns) {
      store(panel, load(row));
      store(panel + kLanes, load(row + kLanes));
    } else {
      store(panel, load_some(row, count));
      store(panel + kLanes, load_some(row + kLanes, count - kLanes));
    }
  }
}

// --- products ---------------------------------------------------------------------------------------------------

// out (R, M) = rows (R, K) x weights (M, K)^T. `panels` is of pack_transposed; scratch 1 is used.
inline void product_transposed(const float* panels, int64_t rows, const float* weights, int64_t m, int64_t depth,
                               float* out, int64_t out_stride) {
  float* across = scratch<1>(m * kColumns);
  for (int64_t n = 0; n < rows; n += kColumns, panels += depth * kColumns) {
    const int64_t here = std::min<int64_t>(kColumns, rows - n);
    for_row_blocks(m, [&](int64_t row, auto count) {
      Vector tile[count.value][2] = {};
      if (here > kLanes) {
        multiply<count.value>(weights + row * depth, depth, panels, depth, tile);
      } else {
        multiply<count.value, 1>(weights + row * depth, depth, panels, depth, tile);
      }
      for (int i = 0; i < count.value; ++i) {
        store(across + (row + i) * kColumns, tile[i][0]);
        store(across + (row + i) * kColumns + kLanes, tile[i][1]);
      }
    });
    for (int64_t half = 0; half < here; half += kLanes) {
      auto from = [&](int64_t i) { return across + i * kColumns + half; };
      const int64_t wide = std::min<int64_t>(kLanes, here - half);
      for (int64_t i = 0; i < m; i += kLanes) {  // kLanes rows of `across` to kLanes numbers of each row of `out`
        Vector block[kLanes];
#pragma GCC unroll 16
        for (int r = 0; r < kLanes; ++r) block[r] = i + r < m ? load(from(i + r)) : Vector{};
        exchange_all<1>(block);
        for (int64_t c = 0; c < wide; ++c) store_some(out + (n + half + c) * out_stride + i, block[c], m - i);
      }
    }
  }
}

// out (R, N) = rows (R, K) x weights (K, N), row r of `rows` at rows + r * K. Scratch 1 is used. Several panels are packed
// together, so that memory is read in longer runs.
constexpr int kPanels = 4;

inline void product(const float* rows, int64_t num_rows, const float* weights, int64_t depth, int64_t columns,
                    float* out) {
  float* panels = scratch<1>(kPanels * depth * kColumns);
  for (int64_t first = 0; first < columns; first += kPanels * kColumns) {
    const int64_t count = std::min<int64_t>(kPanels, ceil_div(columns - first, kColumns));
    for (int64_t k = 0; k < depth; ++k) {
      for (int64_t p = 0; p < count; ++p) {
        const float* from = weights + k * columns + first + p * kColumns;
        const int64_t wide = columns - first - p * kColumns;
        float* to = panels + (p * depth + k) * kColumns;
        store(to, load_some(from, wide));
        store(to + kLanes, load_some(from + kLanes, wide - kLanes));
      }
    }
    for_row_blocks(num_rows, [&](int64_t row, auto block) {
      for (int64_t p = 0; p < count; ++p) {
        const int64_t wide = columns - first - p * kColumns;
        Vector tile[block.value][2] = {};
        multiply<block.value>(rows + row * depth, depth, panels + p * depth * kColumns, depth, tile);
        for (int i = 0; i < block.value; ++i) {
          float* to = out + (row + i) * columns + first + p * kColumns;
          store_some(to, tile[i][0], wide);
          store_some(to + kLanes, tile[i][1], wide - kLanes);
        }
      }
    });
  }
}

// Some rows of a weight gradient: out (M, N) = left (R, M)^T x right (R, N). Row r of `left` is at left_of(r), from the
// first of the M columns on, row r of `right` at right_of(r). Scratch 1 and 2 are used. The sum over R is taken in parts
// of kDepth, so that a part's panels stay in the cache. `past_cache`: the gradients of all experts do not.
constexpr int64_t kDepth = 128;

template <typename LeftOf, typename RightOf>
inline void outer_product(LeftOf left_of, RightOf right_of, int64_t rows, int64_t m, int64_t columns, bool past_cache,
                          float* out) {
  const bool streams =
      past_cache && columns % kColumns == 0 && reinterpret_cast<uintptr_t>(out) % sizeof(Vector) == 0;
  if (rows == 0) std::memset(out, 0, m * columns * sizeof(float));
  for (int64_t r = 0; r < rows; r += kDepth) {
    const int64_t depth = std::min(kDepth, rows - r);
    const int64_t stride = ceil_div(depth, kLanes) * kLanes;
    float* turned = scratch<2>(m * stride);
    transpose([&](int64_t i) { return left_of(r + i); }, depth, m, turned, stride, stride);
    const int64_t num_panels = ceil_div(columns, kColumns);
    float* panels = scratch<1>(num_panels * depth * kColumns);
    for (int64_t p = 0; p < num_panels; ++p) {
      const int64_t wide = std::min<int64_t>(kColumns, columns - p * kColumns);
      pack_columns([&](int64_t k) { return right_of(r + k); }, depth, p * kColumns, wide,
                   panels + p * depth * kColumns);
    }
    for_row_blocks(m, [&](int64_t row, auto block) {
      for (int64_t p = 0; p < num_panels; ++p) {
        const int64_t wide = std::min<int64_t>(kColumns, columns - p * kColumns);
        float* to = out + row * columns + p * kColumns;
        Vector tile[block.value][2] = {};
        if (r > 0) {
          for (int i = 0; i < block.value; ++i) {
            tile[i][0] = load_some(to + i * columns, wide);
            tile[i][1] = load_some(to + i * columns + kLanes, wide - kLanes);
          }
        }
        multiply<block.value>(turned + row * stride, stride, panels + p * depth * kColumns, depth, tile);
        if (streams && r + kDepth >= rows) {
          for (int i = 0; i < block.value; ++i) {
            store_past_cache(to + i * columns, tile[i][0]);
            store_past_cache(to + i * columns + kLanes, tile[i][1]);
          }
          continue;
        }
        for (int i = 0; i < block.value; ++i) {
          store_some(to + i * columns, tile[i][0], wide);
          store_some(to + i * columns + kLanes, tile[i][1], wide - kLanes);
        }
      }
    });
  }
}

// --- elementwise ------------------------------------------------------------------------------------------------

// exp by Cephes' polynomial, between the smallest and largest normal number.
inline Vector exponential(Vector x) {
  const Vector low = all(-87.3f), high = all(88.3f);
  const Integers below = x < low, above = x > high;
  Vector clipped = below ? low : x;
  clipped = above ? high : clipped;
  const Vector scaled = clipped * 1.44269504088896341f;
  const Vector shift = all(12582912.0f);  // 1.5 * 2^23: adding and subtracting it rounds to an integer
  const Vector rounded = (scaled + shift) - shift;
  const Vector rest = (clipped - rounded * 0.693359375f) + rounded * 2.12194440e-4f;
  Vector sum = rest * 1.9875691500e-4f + 1.3981999507e-3f;
  sum = sum * rest + 8.3334519073e-3f;
  sum = sum * rest + 4.1665795894e-2f;
  sum = sum * rest + 1.6666665459e-1f;
  sum = sum * rest + 5.0000001201e-1f;
  sum = sum * rest * rest + rest + 1.0f;
  const Integers power = (__builtin_convertvector(rounded, Integers) + 127) << 23;
  Vector result = sum * reinterpret_cast<const Vector&>(power);
  return x != x ? x : result;
}

inline Vector sigmoid(Vector x) { return 1.0f / (1.0f + exponential(-x)); }

// activation (F) = SiLU(gated) * up of a row of hidden (2F): the gate half, then the up half.
inline void swiglu(const float* hidden, int64_t f, float* activation) {
  for (int64_t j = 0; j < f; j += kLanes) {
    const Vector gated = load_some(hidden + j, f - j), up = load_some(hidden + f + j, f - j);
    store_some(activation + j, gated * sigmoid(gated) * up, f - j);
  }
}

// Of one row: from the gradient of the activation, not yet weighted by the gate, the gradient of hidden (2F), the
// weighted activation (F), and the gradient of the gate. `hidden_gradient` may be `hidden`.
inline float swiglu_gradient(const float* hidden, const float* gradient, float gate, int64_t f, float* hidden_gradient,
                             float* weighted) {
  Vector total = {};
  for (int64_t j = 0; j < f; j += kLanes) {
    const Vector gated = load_some(hidden + j, f - j), up = load_some(hidden + f + j, f - j);
    const Vector of_activation = load_some(gradient + j, f - j);
    const Vector share = sigmoid(gated), silu = gated * share, activation = silu * up;
    total += activation * of_activation;
    store_some(weighted + j, activation * gate, f - j);
    const Vector scaled = of_activation * gate;
    store_some(hidden_gradient + j, scaled * up * (share + silu * (1.0f - share)), f - j);
    store_some(hidden_gradient + f + j, scaled * silu, f - j);
  }
  float sum = 0;
  for (int lane = 0; lane < kLanes; ++lane) sum += total[lane];
  return sum;
}

// --- threads ----------------------------------------------------------------------------------------------------

// Calls task(0) .. task(count - 1), on the pool's threads and on this one, and returns when all have ended. A thread that
// the pool starts too late finds no task left, so nothing waits for it.
template <typename Pool, typename Task>
void parallel(Pool& pool, int64_t count, const Task& task) {
  struct Shared {
    std::atomic<int64_t> next{0}, ended{0};
    std::mutex mutex;
    std::condition_variable changed;
  };
  const int64_t helpers = std::min<int64_t>(pool.num_threads(), count) - 1;
  if (helpers < 1) {
    for (int64_t i = 0; i < count; ++i) task(i);
    fence();
    return;
  }
  auto shared = std::make_shared<Shared>();
  auto work = [shared, count, function = &task] {
    for (int64_t i; (i = shared->next.fetch_add(1)) < count;) {
      (*function)(i);
      fence();
      if (shared->ended.fetch_add(1) + 1 == count) {
        std::lock_guard<std::mutex> lock(shared->mutex);
        shared->changed.notify_all();
      }
    }
  };
  for (int64_t i = 0; i < helpers; ++i) pool.Schedule([work] { work(); });
  work();
  std::unique_lock<std::mutex> lock(shared->mutex);
  shared->changed.wait(lock, [&] { return shared->ended.load() == count; });
}

}  // namespace native

#endif  // PALLAS_KERNELS_NATIVE_GROUPED_H_

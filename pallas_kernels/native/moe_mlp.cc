// The routed SwiGLU MLP and the grouped products of backend `cpu_native`, as calls of XLA's foreign function interface.
//
// T tokens, K experts per token, N = T*K rows in the plan's order, E experts, D width, F hidden width. All float32.
// A task is some rows of one expert, or some rows of one expert's weight gradient: an expert with many rows is many
// tasks, so that threads end together whatever the routing.

#include <vector>

#include "grouped.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace native {
namespace {

using Floats = ffi::Buffer<ffi::F32>;
using Ints = ffi::Buffer<ffi::S32>;
using FloatsOut = ffi::Result<Floats>;

// Rows [first, first + rows) of the order, all of one expert.
struct Part {
  int64_t expert, first, rows;
};

std::vector<Part> parts_of(const int32_t* offsets, int64_t experts, int64_t threads) {
  const int64_t total = offsets[experts];
  const int64_t most = std::clamp<int64_t>(total / (8 * std::max<int64_t>(threads, 1)), 8 * kRows, 20 * kRows);
  std::vector<Part> parts;
  for (int64_t e = 0; e < experts; ++e) {
    const int64_t begin = offsets[e], size = offsets[e + 1] - begin;
    if (size <= 0) continue;
    const int64_t pieces = ceil_div(size, most);
    const int64_t rows = ceil_div(ceil_div(size, pieces), kRows) * kRows;
    for (int64_t r = 0; r < size; r += rows) parts.push_back({e, begin + r, std::min(rows, size - r)});
  }
  return parts;
}

// A slice of the rows of one expert's weight gradient.
struct Slice {
  int64_t expert, first, count;
};

std::vector<Slice> slices_of(const int32_t* offsets, int64_t experts, int64_t m, int64_t threads) {
  const int64_t total = std::max<int64_t>(offsets[experts], 1);
  std::vector<Slice> slices;
  for (int64_t e = 0; e < experts; ++e) {
    const int64_t size = offsets[e + 1] - offsets[e];
    const int64_t pieces = std::clamp<int64_t>(8 * threads * size / total, 1, ceil_div(m, 4 * kRows));
    const int64_t count = ceil_div(ceil_div(m, pieces), kRows) * kRows;
    for (int64_t first = 0; first < m; first += count) slices.push_back({e, first, std::min(count, m - first)});
  }
  return slices;
}

void clear_rows(float* rows, int64_t first, int64_t end, int64_t width) {
  if (first < end) std::memset(rows + first * width, 0, (end - first) * width * sizeof(float));
}

// Copies the rows' tokens one after the other: (R, D) in scratch 0.
float* gathered(const float* x, const int32_t* order, int64_t k, int64_t d, const Part& part) {
  float* rows = scratch<0>(part.rows * d);
  for (int64_t r = 0; r < part.rows; ++r) {
    std::memcpy(rows + r * d, x + order[part.first + r] / k * d, d * sizeof(float));
  }
  return rows;
}

// Sum over a token's rows of (N, D), each times its gate where there are gates.
void combine(ffi::ThreadPool& pool, const float* rows, const int32_t* inverse, const float* gate, int64_t routed,
             int64_t tokens, int64_t k, int64_t d, float* out) {
  constexpr int64_t kTokens = 64;
  parallel(pool, ceil_div(tokens, kTokens), [&](int64_t block) {
    for (int64_t t = block * kTokens; t < std::min(tokens, (block + 1) * kTokens); ++t) {
      float* to = out + t * d;
      std::memset(to, 0, d * sizeof(float));
      for (int64_t j = 0; j < k; ++j) {
        const int64_t row = inverse[t * k + j];
        if (row >= routed) continue;
        const float weight = gate ? gate[t * k + j] : 1.0f;
        const float* from = rows + row * d;
        for (int64_t i = 0; i < d; ++i) to[i] += weight * from[i];
      }
    }
  });
}

// hidden (R, 2F) of a part.
void up_product(const Floats& x, const Ints& order, int64_t k, const Floats& w_gate_up, const Part& part,
                float* hidden) {
  const int64_t d = w_gate_up.dimensions()[1], f2 = w_gate_up.dimensions()[2];
  const float* rows = gathered(x.typed_data(), order.typed_data(), k, d, part);
  product(rows, part.rows, w_gate_up.typed_data() + part.expert * d * f2, d, f2, hidden + part.first * f2);
}

ffi::Error Forward(ffi::ThreadPool pool, Floats x, Floats gate, Ints order, Ints inverse, Ints offsets,
                   Floats w_gate_up, Floats w_down, FloatsOut y, FloatsOut hidden, FloatsOut rows_out) {
  const int64_t experts = w_down.dimensions()[0], f = w_down.dimensions()[1], d = w_down.dimensions()[2];
  const int64_t tokens = inverse.dimensions()[0], k = inverse.dimensions()[1], n = tokens * k;
  const int32_t* ends = offsets.typed_data();
  const auto parts = parts_of(ends, experts, pool.num_threads());
  parallel(pool, parts.size(), [&](int64_t i) {
    const Part& part = parts[i];
    up_product(x, order, k, w_gate_up, part, hidden->typed_data());
    float* activation = scratch<3>(part.rows * f);
    for (int64_t r = 0; r < part.rows; ++r) {
      swiglu(hidden->typed_data() + (part.first + r) * 2 * f, f, activation + r * f);
    }
    product(activation, part.rows, w_down.typed_data() + part.expert * f * d, f, d,
            rows_out->typed_data() + part.first * d);
  });
  clear_rows(hidden->typed_data(), ends[experts], n, 2 * f);
  combine(pool, rows_out->typed_data(), inverse.typed_data(), gate.typed_data(), ends[experts], tokens, k, d,
          y->typed_data());
  return ffi::Error::Success();
}

ffi::Error Hidden(ffi::ThreadPool pool, Floats x, Ints order, Ints inverse, Ints offsets, Floats w_gate_up,
                  FloatsOut hidden) {
  const int64_t experts = w_gate_up.dimensions()[0], k = inverse.dimensions()[1];
  const int32_t* ends = offsets.typed_data();
  const auto parts = parts_of(ends, experts, pool.num_threads());
  parallel(pool, parts.size(),
           [&](int64_t i) { up_product(x, order, k, w_gate_up, parts[i], hidden->typed_data()); });
  clear_rows(hidden->typed_data(), ends[experts], order.dimensions()[0], w_gate_up.dimensions()[2]);
  return ffi::Error::Success();
}

ffi::Error Backward(ffi::ThreadPool pool, Floats x, Floats y_gradient, Floats gate, Ints order, Ints inverse,
                    Ints offsets, Floats hidden, Floats w_gate_up, Floats w_down, bool past_cache, FloatsOut x_gradient,
                    FloatsOut gate_gradient, FloatsOut w_gate_up_gradient, FloatsOut w_down_gradient,
                    FloatsOut hidden_gradient, FloatsOut weighted, FloatsOut x_rows) {
  const int64_t experts = w_down.dimensions()[0], f = w_down.dimensions()[1], d = w_down.dimensions()[2];
  const int64_t tokens = inverse.dimensions()[0], k = inverse.dimensions()[1], threads = pool.num_threads();
  const int32_t *ends = offsets.typed_data(), *assignment = order.typed_data();
  const auto parts = parts_of(ends, experts, threads);
  for (int64_t row = ends[experts]; row < tokens * k; ++row) gate_gradient->typed_data()[assignment[row]] = 0.0f;
  parallel(pool, parts.size(), [&](int64_t i) {
    const Part& part = parts[i];
    auto gradient_row = [&](int64_t r) {
      return y_gradient.typed_data() + assignment[part.first + r] / k * d;
    };
    const int64_t padded = ceil_div(part.rows, kColumns) * kColumns;
    float* panels = scratch<0>(padded * std::max(d, 2 * f));
    pack_transposed(gradient_row, part.rows, d, panels);
    float* of_activation = scratch<3>(part.rows * f);
    product_transposed(panels, part.rows, w_down.typed_data() + part.expert * f * d, f, d, of_activation, f);
    float* of_hidden = hidden_gradient->typed_data() + part.first * 2 * f;
    for (int64_t r = 0; r < part.rows; ++r) {
      const int64_t row = part.first + r;
      gate_gradient->typed_data()[assignment[row]] = swiglu_gradient(
          hidden.typed_data() + row * 2 * f, of_activation + r * f, gate.typed_data()[assignment[row]], f,
          of_hidden + r * 2 * f, weighted->typed_data() + row * f);
    }
    pack_transposed([&](int64_t r) { return of_hidden + r * 2 * f; }, part.rows, 2 * f, panels);
    product_transposed(panels, part.rows, w_gate_up.typed_data() + part.expert * d * 2 * f, d, 2 * f,
                       x_rows->typed_data() + part.first * d, d);
  });
  const auto up = slices_of(ends, experts, d, threads), down = slices_of(ends, experts, f, threads);
  const int64_t num_up = up.size();
  parallel(pool, num_up + down.size(), [&](int64_t i) {
    const bool is_up = i < num_up;
    const Slice& slice = is_up ? up[i] : down[i - num_up];
    const int64_t begin = ends[slice.expert], size = ends[slice.expert + 1] - begin;
    if (is_up) {
      const float* of_hidden = hidden_gradient->typed_data() + begin * 2 * f;
      outer_product([&](int64_t r) { return x.typed_data() + assignment[begin + r] / k * d + slice.first; },
                    [&](int64_t r) { return of_hidden + r * 2 * f; }, size, slice.count, 2 * f, past_cache,
                    w_gate_up_gradient->typed_data() + (slice.expert * d + slice.first) * 2 * f);
    } else {
      const float* activation = weighted->typed_data() + begin * f + slice.first;
      outer_product([&](int64_t r) { return activation + r * f; },
                    [&](int64_t r) { return y_gradient.typed_data() + assignment[begin + r] / k * d; }, size,
                    slice.count, d, past_cache, w_down_gradient->typed_data() + (slice.expert * f + slice.first) * d);
    }
  });
  combine(pool, x_rows->typed_data(), inverse.typed_data(), nullptr, ends[experts], tokens, k, d,
          x_gradient->typed_data());
  return ffi::Error::Success();
}

ffi::Error Product(ffi::ThreadPool pool, Floats rows, Floats weights, Ints offsets, bool transpose, FloatsOut out) {
  const int64_t experts = weights.dimensions()[0], depth = rows.dimensions()[1], columns = out->dimensions()[1];
  const int32_t* ends = offsets.typed_data();
  const auto parts = parts_of(ends, experts, pool.num_threads());
  parallel(pool, parts.size(), [&](int64_t i) {
    const Part& part = parts[i];
    const float* left = rows.typed_data() + part.first * depth;
    const float* matrix = weights.typed_data() + part.expert * depth * columns;
    float* to = out->typed_data() + part.first * columns;
    if (!transpose) return product(left, part.rows, matrix, depth, columns, to);
    float* panels = scratch<0>(ceil_div(part.rows, kColumns) * kColumns * depth);
    pack_transposed([&](int64_t r) { return left + r * depth; }, part.rows, depth, panels);
    product_transposed(panels, part.rows, matrix, columns, depth, to, columns);
  });
  clear_rows(out->typed_data(), ends[experts], rows.dimensions()[0], columns);
  return ffi::Error::Success();
}

ffi::Error WeightGradient(ffi::ThreadPool pool, Floats left, Floats right, Ints offsets, bool past_cache,
                          FloatsOut out) {
  const int64_t experts = out->dimensions()[0], m = out->dimensions()[1], columns = out->dimensions()[2];
  const int32_t* ends = offsets.typed_data();
  const auto slices = slices_of(ends, experts, m, pool.num_threads());
  parallel(pool, slices.size(), [&](int64_t i) {
    const Slice& slice = slices[i];
    const int64_t begin = ends[slice.expert];
    outer_product([&](int64_t r) { return left.typed_data() + (begin + r) * m + slice.first; },
                  [&](int64_t r) { return right.typed_data() + (begin + r) * columns; },
                  ends[slice.expert + 1] - begin, slice.count, columns, past_cache,
                  out->typed_data() + (slice.expert * m + slice.first) * columns);
  });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace native

XLA_FFI_DEFINE_HANDLER_SYMBOL(PallasKernelsForward, native::Forward,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<native::Floats>()
                                  .Arg<native::Floats>()
                                  .Arg<native::Ints>()
                                  .Arg<native::Ints>()
                                  .Arg<native::Ints>()
                                  .Arg<native::Floats>()
                                  .Arg<native::Floats>()
                                  .Ret<native::Floats>()
                                  .Ret<native::Floats>()
                                  .Ret<native::Floats>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(PallasKernelsHidden, native::Hidden,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<native::Floats>()
                                  .Arg<native::Ints>()
                                  .Arg<native::Ints>()
                                  .Arg<native::Ints>()
                                  .Arg<native::Floats>()
                                  .Ret<native::Floats>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(PallasKernelsBackward, native::Backward,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<native::Floats>()
                                  .Arg<native::Floats>()
                                  .Arg<native::Floats>()
                                  .Arg<native::Ints>()
                                  .Arg<native::Ints>()
                                  .Arg<native::Ints>()
                                  .Arg<native::Floats>()
                                  .Arg<native::Floats>()
                                  .Arg<native::Floats>()
                                  .Attr<bool>("past_cache")
                                  .Ret<native::Floats>()
                                  .Ret<native::Floats>()
                                  .Ret<native::Floats>()
                                  .Ret<native::Floats>()
                                  .Ret<native::Floats>()
                                  .Ret<native::Floats>()
                                  .Ret<native::Floats>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(PallasKernelsProduct, native::Product,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<native::Floats>()
                                  .Arg<native::Floats>()
                                  .Arg<native::Ints>()
                                  .Attr<bool>("transpose")
                                  .Ret<native::Floats>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(PallasKernelsWeightGradient, native::WeightGradient,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<native::Floats>()
                                  .Arg<native::Floats>()
                                  .Arg<native::Ints>()
                                  .Attr<bool>("past_cache")
                                  .Ret<native::Floats>());

// SPDX-License-Identifier: Apache-2.0
// Rows in and out of the type of the arithmetic, expert rows of a token, and sums along a row, for the loops of
// row_pass*.simd.cpp. Included behind simd_begin.hpp: the loops here are compiled for the level.

using namespace hotloop::moe;

constexpr std::int64_t kChunk = 1024;  // columns at a time: 4 KiB of float32
constexpr std::int64_t kLanes = 32;    // two or more sums side by side on every instruction set
constexpr std::int64_t kTogether = 4;  // expert rows added in one go

template <class R>
constexpr Dtype kDtype = DtypeOf<R>::value;

template <class R, class S>
inline R widened(S x) {
  return static_cast<R>(to_float(x));
}

// Columns [first, first + n) of row t, in place if they have the type R already.
template <class R>
const R* load(const Rows& a, std::int64_t t, std::int64_t first, std::int64_t n, R* buffer) {
  const std::int64_t at = t * a.stride + first;
  if (a.data == nullptr) {
    for (std::int64_t j = 0; j < n; ++j) buffer[j] = R(0);
    return buffer;
  }
  if (a.dtype == kDtype<R>) return static_cast<const R*>(a.data) + at;
  with_float(a.dtype, [&](auto storage) {
    const auto* from = static_cast<const decltype(storage)*>(a.data) + at;
#pragma GCC ivdep
    for (std::int64_t j = 0; j < n; ++j) buffer[j] = widened<R>(from[j]);
  });
  return buffer;
}

// Where the chunk may be written: into the matrix, or into a buffer that `store` converts from.
template <class R>
R* target(const RowsOut& a, std::int64_t t, std::int64_t first, R* buffer) {
  if (a.data == nullptr || a.dtype != kDtype<R>) return buffer;
  return static_cast<R*>(a.data) + t * a.stride + first;
}

template <class S, class R>
inline void put_narrow(S& out, R x) {
  if constexpr (std::is_same_v<S, double>) {
    out = static_cast<double>(x);
  } else {
    put(out, static_cast<float>(x));
  }
}

template <class R>
void store(const RowsOut& a, std::int64_t t, std::int64_t first, std::int64_t n, const R* from) {
  if (a.data == nullptr) return;
  const std::int64_t at = t * a.stride + first;
  if (a.dtype == kDtype<R>) {
    R* to = static_cast<R*>(a.data) + at;
    if (to == from) return;
#pragma GCC ivdep
    for (std::int64_t j = 0; j < n; ++j) to[j] = from[j];
    return;
  }
  with_float(a.dtype, [&](auto storage) {
    auto* to = static_cast<decltype(storage)*>(a.data) + at;
#pragma GCC ivdep
    for (std::int64_t j = 0; j < n; ++j) put_narrow(to[j], from[j]);
  });
}

template <class R>
R number_at(const Rows& a, std::int64_t t, std::int64_t j) {
  return with_float(a.dtype, [&](auto storage) {
    return widened<R>(static_cast<const decltype(storage)*>(a.data)[t * a.stride + j]);
  });
}

template <class R>
void put_number(const RowsOut& a, std::int64_t t, std::int64_t j, double x) {
  with_float(a.dtype, [&](auto storage) {
    put_narrow(static_cast<decltype(storage)*>(a.data)[t * a.stride + j], static_cast<R>(x));
  });
}

// z += w[0] * y[0] + ... + w[count - 1] * y[count - 1], one after the other.
template <int kCount, class S, class R>
void add_rows(const S* const* y, const R* w, std::int64_t n, R* z) {
  const S* from[kCount];
  R by[kCount];
  for (int i = 0; i < kCount; ++i) {
    from[i] = y[i];
    by[i] = w[i];
  }
#pragma GCC ivdep
  for (std::int64_t j = 0; j < n; ++j) {
    R sum = z[j];
    HOTLOOP_UNROLL
    for (int i = 0; i < kCount; ++i) sum += by[i] * widened<R>(from[i][j]);
    z[j] = sum;
  }
}

template <class S, class R>
bool gather(const Mixture& m, std::int64_t t, std::int64_t first, std::int64_t n, R* z) {
  const S* y[kTogether];
  R w[kTogether];
  const std::int64_t k = m.slots.k;
  bool agree = true;
  int held = 0;
  for (std::int64_t j = 0; j < n; ++j) z[j] = R(0);
  for (std::int64_t i = 0; i < k; ++i) {
    const std::int64_t slot = t * k + i, row = m.slots.row_of_slot[slot];
    if (row >= 0 || row < -1) {
      if (!m.slots.agree(slot, row)) {
        agree = false;
        continue;
      }
      y[held] = static_cast<const S*>(m.rows.data) + row * m.rows.stride + first;
      w[held++] = m.weights.data != nullptr ? number_at<R>(m.weights, t, i) : R(1);
    }
    if (held == kTogether) {
      add_rows<kTogether>(y, w, n, z);
      held = 0;
    }
  }
  for (int i = 0; i < held; ++i) add_rows<1>(y + i, w + i, n, z);
  return agree;
}

// The mixture of token t: its expert rows, or its row; then the shared row. `agree` is cleared where indices are wrong.
template <class R>
const R* mixture(const Mixture& m, std::int64_t t, std::int64_t first, std::int64_t n, R* buffer, R* other,
                 bool* agree) {
  const R* z = buffer;
  if (m.slots.k == 0) {
    z = load(m.rows, t, first, n, buffer);
  } else {
    with_float(m.rows.dtype, [&](auto storage) {
      if (!gather<decltype(storage)>(m, t, first, n, buffer)) *agree = false;
    });
  }
  if (m.shared.data == nullptr) return z;
  const R* more = load(m.shared, t, first, n, other);
#pragma GCC ivdep
  for (std::int64_t j = 0; j < n; ++j) buffer[j] = z[j] + more[j];
  return buffer;
}

// The sum of all lanes. Lane k takes lane k + 16, then k + 8 and so on: one order on every instruction set.
template <class R>
inline double sum_of(R* lane) {
  for (std::int64_t half = kLanes / 2; half > 0; half /= 2) {
    for (std::int64_t k = 0; k < half; ++k) lane[k] += lane[k + half];
  }
  return static_cast<double>(lane[0]);
}

template <class R>
double row_sum(const R* x, std::int64_t n) {
  R lane[kLanes] = {};
  std::int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) {
    for (std::int64_t k = 0; k < kLanes; ++k) lane[k] += x[j + k];
  }
  for (std::int64_t k = 0; j + k < n; ++k) lane[k] += x[j + k];
  return sum_of(lane);
}

// Sum of (x - mean)^2.
template <class R>
double row_squares(const R* x, std::int64_t n, R mean) {
  R lane[kLanes] = {};
  std::int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) {
    for (std::int64_t k = 0; k < kLanes; ++k) {
      const R gap = x[j + k] - mean;
      lane[k] += gap * gap;
    }
  }
  for (std::int64_t k = 0; j + k < n; ++k) {
    const R gap = x[j + k] - mean;
    lane[k] += gap * gap;
  }
  return sum_of(lane);
}

// lane[j % kLanes] += x[j] * y[j].
template <class S, class R>
void add_dot(const R* x, const S* y, std::int64_t n, R* lanes) {
  R lane[kLanes];
  for (std::int64_t k = 0; k < kLanes; ++k) lane[k] = lanes[k];
  std::int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) {
    for (std::int64_t k = 0; k < kLanes; ++k) lane[k] += x[j + k] * widened<R>(y[j + k]);
  }
  for (std::int64_t k = 0; j + k < n; ++k) lane[k] += x[j + k] * widened<R>(y[j + k]);
  for (std::int64_t k = 0; k < kLanes; ++k) lanes[k] = lane[k];
}

template <class S, class R>
double row_dot(const R* x, const S* y, std::int64_t n) {
  R lane[kLanes] = {};
  add_dot(x, y, n, lane);
  return sum_of(lane);
}

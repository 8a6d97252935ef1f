// SPDX-License-Identifier: Apache-2.0
// The CUDA pass over rows without a GPU: kernels/moe/rows*.cuh on an emulated one, against the CPU loops.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numeric>
#include <random>
#include <vector>

#include "check.hpp"
#include "emulated_gpu.hpp"
#include "kernels/moe/rows.cuh"
#include "kernels/moe/rows_backward.cuh"
#include "moe/row_pass.hpp"

using namespace hotloop;
using namespace hotloop::moe;

namespace {

using Random = std::mt19937_64;
std::int64_t up_to(Random& g, std::int64_t most) { return std::uniform_int_distribution<std::int64_t>(0, most)(g); }
bool one_in(Random& g, std::int64_t n) { return up_to(g, n - 1) == 0; }
std::size_t size_of(std::int64_t n) { return static_cast<std::size_t>(n); }

struct Emulated {
  Random& random;
  template <class Body>
  void operator()(const Body& body) const {
    test::run_blocks(body, random, 1 + static_cast<int>(up_to(random, 2)));
  }
};

// Numbers of some dtype, in rows with a gap or none, perhaps not at a multiple of 16 bytes.
class Grid {
 public:
  Grid(Random& g, Dtype dtype, std::int64_t rows, std::int64_t columns, bool gaps, double fill)
      : dtype_(dtype), rows_(rows), columns_(columns), stride_(columns + (gaps && one_in(g, 2) ? up_to(g, 9) : 0)) {
    const std::int64_t before = gaps && one_in(g, 3) ? up_to(g, 8) : 0;
    memory_.resize(size_of((before + rows * stride_ + 1) * item_size(dtype) / 16 + 1));
    data_ = reinterpret_cast<char*>(memory_.data()) + before * item_size(dtype);
    std::normal_distribution<double> normal;
    for (std::int64_t r = 0; r < rows; ++r) {
      for (std::int64_t c = 0; c < columns; ++c) set(r, c, std::isnan(fill) ? normal(g) : fill);
    }
  }
  Rows read() const { return {data_, dtype_, stride_}; }
  RowsOut write() const { return {data_, dtype_, stride_}; }
  double at(std::int64_t r, std::int64_t c) const {
    return with_float(dtype_, [&](auto s) {
      return static_cast<double>(to_float(static_cast<const decltype(s)*>(static_cast<void*>(data_))[r * stride_ + c]));
    });
  }
  void set(std::int64_t r, std::int64_t c, double x) {
    with_float(dtype_, [&](auto s) {
      using S = decltype(s);
      put(static_cast<S*>(static_cast<void*>(data_))[r * stride_ + c], static_cast<typename Accumulate<S>::type>(x));
    });
  }
  // Of sums over a row or over tokens, and of differences of numbers around 1, errors are measured by the largest.
  void check_close(const Grid& expected, double relative) const {
    double most = 1.0;
    for (std::int64_t r = 0; r < rows_; ++r) {
      for (std::int64_t c = 0; c < columns_; ++c) most = std::max(most, std::fabs(expected.at(r, c)));
    }
    const double rounded = item_size(dtype_) == 2 ? (dtype_ == Dtype::kBFloat16 ? 8e-3 : 1e-3) : 0.0;
    for (std::int64_t r = 0; r < rows_; ++r) {
      for (std::int64_t c = 0; c < columns_; ++c) {
        CHECK_CLOSE(at(r, c), expected.at(r, c), relative + rounded, relative * most);
      }
    }
  }

 private:
  struct alignas(16) Unit {
    std::uint64_t of[2] = {0xA5A5A5A5A5A5A5A5u, 0xA5A5A5A5A5A5A5A5u};
  };
  Dtype dtype_;
  std::int64_t rows_, columns_, stride_;
  std::vector<Unit> memory_;
  char* data_;
};

constexpr double kNormal = std::numeric_limits<double>::quiet_NaN();

struct Case {
  Random& g;
  bool wide;
  std::int64_t tokens, columns;
  std::vector<Grid> held;  // what rows point into

  Dtype dtype() {
    if (wide) return Dtype::kFloat64;
    constexpr Dtype kAll[] = {Dtype::kFloat32, Dtype::kBFloat16, Dtype::kFloat16};
    return kAll[up_to(g, 2)];
  }
  Grid& matrix(Dtype d, std::int64_t rows, std::int64_t width, bool gaps = true, double fill = kNormal) {
    return held.emplace_back(g, d, rows, width, gaps, fill);
  }
  // One of a pair of results that are to be the same.
  struct Pair {
    Grid *cpu, *gpu;
    double rounded;  // how far what they are computed from may be apart
  };
  std::vector<Pair> pairs;
  void result(RowsOut& cpu, RowsOut& gpu, Dtype d, std::int64_t rows, std::int64_t width, double rounded = 0.0) {
    Grid& a = matrix(d, rows, width, false, 7.0);
    Grid& b = matrix(d, rows, width, false, -7.0);
    cpu = a.write();
    gpu = b.write();
    pairs.push_back({&a, &b, rounded});
  }
  void check(double relative) const {
    for (const Pair& p : pairs) p.gpu->check_close(*p.cpu, std::max(relative, p.rounded));
  }
};

// Slots of tokens and rows of experts that name each other, some of them none.
struct Order {
  std::vector<std::int64_t> slot_of_row, row_of_slot;
  Order(Random& g, std::int64_t slots) : row_of_slot(size_of(slots), -1) {
    const std::int64_t rows = slots + up_to(g, 5);
    slot_of_row.assign(size_of(rows), -1);
    std::vector<std::int64_t> order(size_of(rows));
    std::iota(order.begin(), order.end(), std::int64_t{0});
    std::shuffle(order.begin(), order.end(), g);
    for (std::int64_t s = 0; s < slots; ++s) {
      if (one_in(g, 5)) continue;
      row_of_slot[size_of(s)] = order[size_of(s)];
      slot_of_row[size_of(order[size_of(s)])] = s;
    }
  }
};

constexpr int kStatesOf[] = {0, 0, 1, 3, 1, 1};

void one_case(Random& g, Depth rule, std::int64_t tokens, std::int64_t columns, bool wide) {
  Case c{g, wide, tokens, columns, {}, {}};
  c.held.reserve(128);
  const Dtype maths = wide ? Dtype::kFloat64 : Dtype::kFloat32, dtype = c.dtype();
  const int states = kStatesOf[static_cast<int>(rule)];
  const bool look = rule == Depth::kLookahead, combines = rule == Depth::kCombine;
  const std::int64_t k = look ? 0 : up_to(g, 6);
  const Order order(g, tokens * k);
  StepCall cpu;
  cpu.rule = rule;
  const double numbers[kMaxNumbers] = {0.7, 1.2, 0.3, 0.9, 0.1, 0.99, 0.01, 0.4, 1e-3};
  std::copy(std::begin(numbers), std::end(numbers), cpu.numbers);
  cpu.wide = wide;
  cpu.tokens = tokens;
  cpu.columns = columns;
  if (!combines) cpu.x = c.matrix(dtype, tokens, columns).read();
  for (int i = 0; i < states; ++i) {
    if (one_in(g, 4) && rule != Depth::kAdam) continue;
    Grid& s = c.matrix(one_in(g, 2) ? dtype : maths, tokens, columns);
    if (i == 1) {  // of Adam: squares
      for (std::int64_t t = 0; t < tokens; ++t) {
        for (std::int64_t j = 0; j < columns; ++j) s.set(t, j, std::fabs(s.at(t, j)));
      }
    }
    cpu.state[i] = s.read();
  }
  Mixture& m = cpu.mixture;
  if (k > 0) {
    m.slots = {k, static_cast<std::int64_t>(order.slot_of_row.size()), order.row_of_slot.data(),
               order.slot_of_row.data()};
    m.rows = c.matrix(c.dtype(), m.slots.rows, columns).read();
    if (!one_in(g, 5)) m.weights = c.matrix(one_in(g, 2) ? Dtype::kFloat32 : dtype, tokens, k).read();
  } else if (!look) {
    m.rows = c.matrix(c.dtype(), tokens, columns).read();
  }
  if (!look && one_in(g, 3)) m.shared = c.matrix(dtype, tokens, columns).read();
  int norm = look ? 1 + static_cast<int>(up_to(g, 1)) : static_cast<int>(up_to(g, 2));
  if (columns < 7 && norm == 1) norm = 2;  // the deviation of so few numbers may be next to none
  if (!combines) cpu.norm.kind = static_cast<NormKind>(norm);
  const bool norms = cpu.norm.kind != NormKind::kNone;
  cpu.norm.eps = 1e-5;
  if (one_in(g, 2)) cpu.norm.weight = c.matrix(one_in(g, 2) ? Dtype::kFloat32 : dtype, 1, columns).read();
  if (one_in(g, 2)) cpu.norm.bias = c.matrix(dtype, 1, columns, false).read();
  StepCall there = cpu;
  const Dtype of_out = combines && one_in(g, 3) ? Dtype::kFloat64 : dtype;
  if (!look) c.result(cpu.out, there.out, of_out, tokens, columns);
  for (int i = 0; i < states && !look; ++i) {
    const Dtype d = cpu.state[i].data != nullptr ? cpu.state[i].dtype : maths;
    c.result(cpu.out_state[i], there.out_state[i], d, tokens, columns);
  }
  if (norms) {
    if (!look && one_in(g, 4)) {
      cpu.normed = cpu.out;
      there.normed = there.out;
    } else {
      c.result(cpu.normed, there.normed, dtype, tokens, columns);
    }
    c.result(cpu.statistics, there.statistics, maths, tokens, 2, item_size(dtype) == 2 ? 1e-3 : 0.0);
  }
  const bool in_place = norms && cpu.normed.data == cpu.out.data;
  double live[kMaxNumbers];
  const int count = static_cast<int>(up_to(g, 1));
  std::copy(std::begin(numbers), std::end(numbers), live);
  if (count > 0) there.numbers[0] = 1e9;  // not read
  const gpu::Numbers gpu_numbers(there.numbers, live, count);
  const double close = wide ? 1e-12 : 1e-5;
  CHECK(step(cpu));
  gpu::step(there, gpu_numbers, Emulated{g});
  c.check(close);
  if (in_place) return;

  BackwardCall back;
  back.rule = rule;
  std::copy(std::begin(numbers), std::end(numbers), back.numbers);
  back.wide = wide;
  back.tokens = tokens;
  back.columns = columns;
  back.x = cpu.x;
  std::copy(std::begin(cpu.state), std::end(cpu.state), back.state);
  back.mixture = m;
  back.norm = cpu.norm;
  const auto reads = [](const RowsOut& a) { return Rows{a.data, a.dtype, a.stride}; };
  if (norms) {
    back.after = look ? cpu.x : reads(cpu.out);
    if (states > 0) back.after_state = look ? cpu.state[0] : reads(cpu.out_state[0]);
    back.statistics = reads(cpu.statistics);
    back.grad_normed = c.matrix(dtype, tokens, columns).read();
  }
  if (!norms || one_in(g, 2)) back.grad = c.matrix(of_out, tokens, columns).read();
  for (int i = 0; i < states; ++i) {
    const Dtype d = look || cpu.out_state[i].data == nullptr ? maths : cpu.out_state[i].dtype;
    if (one_in(g, 2)) back.grad_state[i] = c.matrix(d, tokens, columns).read();
  }
  c.pairs.clear();
  BackwardCall gpu_back = back;
  if (cpu.x.data != nullptr) c.result(back.slope_x, gpu_back.slope_x, dtype, tokens, columns);
  for (int i = 0; i < states; ++i) {
    if (cpu.state[i].data != nullptr) {
      c.result(back.slope_state[i], gpu_back.slope_state[i], cpu.state[i].dtype, tokens, columns);
    }
  }
  if (m.rows.data != nullptr && !one_in(g, 4)) {
    c.result(back.slope_rows, gpu_back.slope_rows, m.rows.dtype, k > 0 ? m.slots.rows : tokens, columns);
  }
  if (m.weights.data != nullptr) c.result(back.slope_weights, gpu_back.slope_weights, m.weights.dtype, tokens, k);
  if (m.shared.data != nullptr) c.result(back.slope_shared, gpu_back.slope_shared, dtype, tokens, columns);
  if (norms && cpu.norm.weight.data != nullptr) {
    c.result(back.slope_norm_weight, gpu_back.slope_norm_weight, cpu.norm.weight.dtype, 1, columns);
  }
  if (norms && one_in(g, 2)) c.result(back.slope_norm_bias, gpu_back.slope_norm_bias, maths, 1, columns);
  double slopes[kMaxSlopes] = {}, gpu_slopes[kMaxSlopes] = {-7.0, -7.0, -7.0};
  if (one_in(g, 2)) {
    back.slope_numbers = slopes;
    gpu_back.slope_numbers = gpu_slopes;
  }
  if (count > 0) gpu_back.numbers[0] = 1e9;
  step_backward(back);
  std::vector<double> workspace(size_of(gpu::step_backward_bytes(gpu_back) / 8 + 2), 7e77);
  void* const aligned = workspace.data() + (reinterpret_cast<std::uintptr_t>(workspace.data()) % 16 == 0 ? 0 : 1);
  // Now and then a block has several tokens.
  gpu::step_backward(gpu_back, gpu::Numbers(gpu_back.numbers, live, count), aligned, Emulated{g},
                     one_in(g, 2) ? 2 : gpu::kMostRuns);
  c.check(10 * close);
  const double scale = static_cast<double>(tokens * columns);
  for (int i = 0; back.slope_numbers != nullptr && i < kMaxSlopes; ++i) {
    CHECK_CLOSE(gpu_slopes[i], slopes[i], 10 * close, close * std::sqrt(scale) * 10);
  }
}

constexpr Depth kRules[] = {Depth::kCombine, Depth::kResidual, Depth::kMomentum,
                            Depth::kAdam,    Depth::kRobust,   Depth::kLookahead};

}  // namespace

TEST(the_pass_is_that_of_the_cpu) {
  Random g(1);
  for (const Depth rule : kRules) {
    for (const std::int64_t columns : {1, 7, 8, 64, 300, 1024}) {
      for (int i = 0; i < 6; ++i) one_case(g, rule, 1 + up_to(g, 5), columns, i == 5);
    }
    one_case(g, rule, 2, 2100, false);  // several strips of a thread
    one_case(g, rule, 2, 8300, false);  // more than shared memory keeps
    one_case(g, rule, 1030, 3, false);  // runs of two tokens
    one_case(g, rule, 1, 4200, true);
  }
}

TEST(permute_is_that_of_the_cpu) {
  Random g(2);
  for (const Dtype dtype : {Dtype::kFloat32, Dtype::kFloat64, Dtype::kBFloat16, Dtype::kFloat16}) {
    for (const std::int64_t columns : {1, 8, 13, 300}) {
      const std::int64_t tokens = 1 + up_to(g, 8), k = 1 + up_to(g, 3);
      const Order order(g, tokens * k);
      const Slots slots{k, static_cast<std::int64_t>(order.slot_of_row.size()), order.row_of_slot.data(),
                        order.slot_of_row.data()};
      const Grid x(g, dtype, tokens, columns, true, kNormal);
      const Grid expected(g, dtype, slots.rows, columns, false, 7.0), found(g, dtype, slots.rows, columns, false, -7.0);
      CHECK(permute(x.read(), tokens, columns, slots, expected.write()));
      gpu::permute(x.read(), tokens, columns, slots, found.write(), Emulated{g});
      found.check_close(expected, 0.0);
    }
  }
}

// Without a look at them, indices that are out of range read and write nothing outside.
TEST(indices_out_of_range_go_nowhere) {
  Random g(3);
  const std::int64_t far = std::int64_t{1} << 40;
  std::vector<std::int64_t> slot_of_row{far, 1, -5, 0}, row_of_slot{3, far, -9, 1};
  const Slots slots{2, 4, row_of_slot.data(), slot_of_row.data()};
  const Grid rows(g, Dtype::kFloat32, 4, 24, false, kNormal), out(g, Dtype::kFloat32, 2, 24, false, 7.0);
  StepCall call;
  call.rule = Depth::kCombine;
  call.tokens = 2;
  call.columns = 24;
  call.mixture.rows = rows.read();
  call.mixture.slots = slots;
  call.out = out.write();
  gpu::step(call, gpu::Numbers(call.numbers, nullptr, 0), Emulated{g});
  const Grid moved(g, Dtype::kFloat32, 4, 24, false, 7.0), slope(g, Dtype::kFloat32, 4, 24, false, 7.0);
  gpu::permute(out.read(), 2, 24, slots, moved.write(), Emulated{g});
  BackwardCall back;
  back.rule = Depth::kCombine;
  back.tokens = 2;
  back.columns = 24;
  back.mixture = call.mixture;
  back.grad = out.read();
  back.slope_rows = slope.write();
  gpu::step_backward(back, gpu::Numbers(back.numbers, nullptr, 0), nullptr, Emulated{g});
  for (std::int64_t j = 0; j < 24; ++j) {
    CHECK(out.at(0, j) == rows.at(3, j) && out.at(1, j) == 0.0);
    CHECK(moved.at(0, j) == 0.0 && moved.at(1, j) == 0.0 && moved.at(2, j) == 0.0 && moved.at(3, j) == out.at(0, j));
    CHECK(slope.at(0, j) == 0.0 && slope.at(1, j) == 0.0 && slope.at(3, j) == out.at(0, j));
  }
}

TEST_MAIN

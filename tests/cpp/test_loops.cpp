// The row loops and the pointwise loop on small problems with poisoned memory around them, at every level.
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "check.hpp"
#include "core/pointwise.hpp"
#include "core/simd.hpp"
#include "logprob/rows.hpp"

namespace {

using namespace hotloop;

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

View matrix(void* data, Dtype dtype, std::int64_t rows, std::int64_t cols, std::int64_t row_stride) {
  View view;
  view.data = data;
  view.dtype = dtype;
  view.rank = 2;
  view.shape = {rows, cols};
  view.stride = {row_stride, 1};
  return view;
}

double softplus(double x) { return std::fmax(x, 0.0) + std::log1p(std::exp(-std::fabs(x))); }

const pointwise::Entry& head_named(const std::string& name) {
  int first = 0;
  for (const pointwise::RoomInfo& room : pointwise::rooms()) {
    for (std::size_t k = 0; k < room.heads.size(); ++k) {
      if (name == room.heads[k].name) return pointwise::entry(first + static_cast<int>(k));
    }
    first += pointwise::kRoomStride;
  }
  throw std::runtime_error(name);
}

// Inputs exactly as long as they are (the sanitizer sees a read past them), outputs surrounded by NaN.
void pointwise_loop_of_dpo() {
  for (std::int64_t n : {0, 1, 7, 255, 256, 257, 10000}) {
    const auto size = static_cast<std::size_t>(n);
    std::vector<float> column[4];
    for (std::size_t k = 0; k < 4; ++k) {
      for (std::size_t i = 0; i < size; ++i) column[k].push_back(std::sin(static_cast<float>(i * (k + 3))) * 20.0f);
    }
    std::vector<float> loss(size + 1, kNan), grad0(size + 1, kNan), grad1(size + 1, kNan);
    double total = -1.0;
    const pointwise::Entry& dpo = head_named("dpo");
    pointwise::Call call;
    call.n = n;
    for (std::size_t k = 0; k < 4; ++k) call.inputs[k] = {column[k].data(), Dtype::kFloat32, 1};
    call.params[0] = 0.1;
    call.loss = {loss.data(), Dtype::kFloat32, 1};
    call.grads[0] = {grad0.data(), Dtype::kFloat32, 1};
    call.grads[1] = {grad1.data(), Dtype::kFloat32, 1};
    call.grad_scale = 2.0;
    call.total = &total;
    pointwise::loop(dpo, call);
    double expected_total = 0.0;
    for (std::size_t i = 0; i < size; ++i) {
      const double x = 0.1 * ((static_cast<double>(column[0][i]) - static_cast<double>(column[2][i])) -
                              (static_cast<double>(column[1][i]) - static_cast<double>(column[3][i])));
      const double slope = -0.2 / (1.0 + std::exp(x));
      expected_total += softplus(-x);
      CHECK_CLOSE(static_cast<double>(loss[i]), softplus(-x), 1e-5, 1e-6);
      CHECK_CLOSE(static_cast<double>(grad0[i]), slope, 1e-5, 1e-7);
      CHECK(grad0[i] == -grad1[i]);
    }
    CHECK_CLOSE(total, expected_total, 1e-6, 1e-9);
    CHECK(std::isnan(loss[size]) && std::isnan(grad0[size]) && std::isnan(grad1[size]));
  }
}

void row_statistics_over_tiles_of_any_width() {
  const std::int64_t n = 3, vocabulary = 2500, width = 2600;
  std::vector<float> logits(static_cast<std::size_t>(n * width), kNan);  // the padding of a row is NaN
  for (std::int64_t i = 0; i < n; ++i) {
    for (std::int64_t j = 0; j < vocabulary; ++j) {
      logits[static_cast<std::size_t>(i * width + j)] = 8.0f * std::sin(static_cast<float>(i * 977 + j * j));
    }
  }
  const std::int64_t labels[] = {0, 1300, 2499};
  for (std::int64_t tile : {1, 100, 1024, 1025, 2500}) {
    std::vector<float> statistics(static_cast<std::size_t>(logprob::kStatistics * n), 0.0f);
    std::int64_t argmax[] = {-1, -1, -1};
    for (std::int64_t i = 0; i < n; ++i) {
      statistics[static_cast<std::size_t>(logprob::kMax * n + i)] = -std::numeric_limits<float>::infinity();
      statistics[static_cast<std::size_t>(logprob::kLabelZ * n + i)] = kNan;
    }
    for (std::int64_t first = 0; first < vocabulary; first += tile) {
      const std::int64_t columns = std::min(tile, vocabulary - first);
      logprob::StatisticsCall call;
      call.tile = matrix(logits.data() + first, Dtype::kFloat32, n, columns, width);
      call.labels = labels;
      call.first_column = first;
      call.all = true;
      call.statistics = statistics.data();
      call.argmax = argmax;
      logprob::row_statistics(call);
    }
    for (std::int64_t i = 0; i < n; ++i) {
      double maximum = -1e30, sum = 0.0;
      std::int64_t largest = -1;
      for (std::int64_t j = 0; j < vocabulary; ++j) {
        const double z = static_cast<double>(logits[static_cast<std::size_t>(i * width + j)]);
        if (z > maximum) {
          maximum = z;
          largest = j;
        }
      }
      for (std::int64_t j = 0; j < vocabulary; ++j) {
        sum += std::exp(static_cast<double>(logits[static_cast<std::size_t>(i * width + j)]) - maximum);
      }
      const auto at = [&](int k) { return static_cast<double>(statistics[static_cast<std::size_t>(k * n + i)]); };
      CHECK_CLOSE(at(logprob::kMax), maximum, 0.0, 0.0);
      CHECK_CLOSE(at(logprob::kSumExp), sum, 1e-5, 0.0);
      CHECK_CLOSE(at(logprob::kLabelZ), static_cast<double>(logits[static_cast<std::size_t>(i * width + labels[i])]),
                  0.0, 0.0);
      CHECK(argmax[i] == largest);
    }
  }
}

void row_gradient_writes_the_tile_and_nothing_else() {
  const std::int64_t n = 2, columns = 1500, width = 1510;
  std::vector<float> tile(static_cast<std::size_t>(n * width), kNan);
  for (std::int64_t i = 0; i < n; ++i) {
    for (std::int64_t j = 0; j < columns; ++j)
      tile[static_cast<std::size_t>(i * width + j)] = std::cos(static_cast<float>(j + i));
  }
  const std::vector<float> before = tile;
  const std::int64_t labels[] = {1499, -100};
  // lse, a, b, c, d, e for d logp / dz with an upstream gradient of 1.
  std::vector<float> coefficients = {8.0f, 8.0f, -1.0f, -1.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 1.0f, 1.0f};
  logprob::GradientCall call;
  call.tile = matrix(tile.data(), Dtype::kFloat32, n, columns, width);
  call.labels = labels;
  call.coefficients = coefficients.data();
  logprob::row_gradient(call);
  for (std::int64_t i = 0; i < n; ++i) {
    for (std::int64_t j = 0; j < width; ++j) {
      const auto at = static_cast<std::size_t>(i * width + j);
      if (j >= columns) {
        CHECK(std::isnan(tile[at]));
        continue;
      }
      const double p = std::exp(static_cast<double>(before[at]) - 8.0);
      CHECK_CLOSE(static_cast<double>(tile[at]), (j == labels[i] ? 1.0 : 0.0) - p, 1e-5, 1e-9);
    }
  }
}

}  // namespace

int main() {
  for (const char* level : {"baseline", "avx2", "avx512"}) {
    try {
      force_simd_level(level);
    } catch (const std::invalid_argument&) {
      std::printf("%s: not runnable here\n", level);
      continue;
    }
    pointwise_loop_of_dpo();
    row_statistics_over_tiles_of_any_width();
    row_gradient_writes_the_tile_and_nothing_else();
  }
  return hotloop::test::finish("loops");
}

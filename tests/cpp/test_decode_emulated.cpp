// SPDX-License-Identifier: Apache-2.0
// The CUDA loops of decode without a GPU: the code that a block runs (kernels/decode) on an emulated one, against
// the CPU loops. Both must emit the same tokens for the same seeds.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "check.hpp"
#include "decode/loops.hpp"
#include "emulated_gpu.hpp"
#include "kernels/decode/requests.cuh"

using namespace hotloop;
using namespace hotloop::decode;
using namespace hotloop::decode::gpu;

namespace {

using Random = std::mt19937;
constexpr double kInf = std::numeric_limits<double>::infinity();

std::int64_t up_to(Random& g, std::int64_t most) { return std::uniform_int_distribution<std::int64_t>(0, most)(g); }
bool one_in(Random& g, std::int64_t n) { return up_to(g, n - 1) == 0; }
template <class T>
T any_of(Random& g, std::vector<T> values) {
  return values[static_cast<std::size_t>(up_to(g, static_cast<std::int64_t>(values.size()) - 1))];
}

// Numbers of any dtype in memory aligned to 16 bytes, from the `lead`-th on.
class Numbers {
 public:
  void resize(std::int64_t count, Dtype dtype) {
    dtype_ = dtype;
    memory_.assign(static_cast<std::size_t>((count * item_size(dtype) + 31) / 16), {});
  }
  void set(std::int64_t at, double x) {
    void* data = memory_.data();
    const auto i = static_cast<std::size_t>(at);
    if (dtype_ == Dtype::kFloat64) static_cast<double*>(data)[i] = x;
    if (dtype_ == Dtype::kFloat32) static_cast<float*>(data)[i] = static_cast<float>(x);
    if (dtype_ == Dtype::kFloat16) put(static_cast<Float16*>(data)[i], static_cast<float>(x));
    if (dtype_ == Dtype::kBFloat16) put(static_cast<BFloat16*>(data)[i], static_cast<float>(x));
  }
  const void* at(std::int64_t i) const { return reinterpret_cast<const char*>(memory_.data()) + i * item_size(dtype_); }

 private:
  struct alignas(16) Quad {
    char bytes[16];
  };
  std::vector<Quad> memory_;
  Dtype dtype_ = Dtype::kFloat32;
};

// A law over random rows, and the memory that it points to. Not to be moved.
struct AnyLaw {
  LawTable table;
  Numbers numbers, reference;
  std::vector<double> temperature, top_p, min_p;
  std::vector<std::int64_t> top_k, bias_ids;
  std::vector<float> bias;

  static RowTable rows(Random& g, Numbers& numbers, Dtype dtype, std::int64_t batch, std::int64_t rows_each,
                       std::int64_t vocabulary, std::vector<std::int64_t>& places) {
    const std::int64_t stride = vocabulary + (one_in(g, 2) ? 0 : up_to(g, 9)), lead = one_in(g, 2) ? 0 : up_to(g, 9);
    numbers.resize(lead + batch * rows_each * stride, dtype);
    places.clear();
    for (std::int64_t i = 0; i < batch * rows_each; ++i) places.push_back(lead + i * stride);
    return {numbers.at(lead), dtype, rows_each * stride, 0, stride, rows_each};
  }

  // `like`: logits (batch, rows, vocabulary) that this law is near to.
  void make(Random& g, const std::vector<double>& like, std::int64_t batch, std::int64_t rows_each,
            std::int64_t vocabulary, bool truncate) {
    const auto b = static_cast<std::size_t>(batch), n = static_cast<std::size_t>(vocabulary);
    const Dtype dtype = any_of<Dtype>(g, {Dtype::kFloat32, Dtype::kFloat64, Dtype::kFloat16, Dtype::kBFloat16});
    std::vector<std::int64_t> places;
    table.vocabulary = vocabulary;
    table.logits = !one_in(g, 3);
    table.rows = rows(g, numbers, dtype, batch, rows_each, vocabulary, places);
    std::normal_distribution<double> noise(0.0, any_of<double>(g, {0.0, 0.3, 2.0}));
    const double grain = any_of<double>(g, {0.0, 0.5});  // ties
    for (std::size_t r = 0; r < places.size(); ++r) {
      std::vector<double> z(n);
      double max = -kInf, total = 0.0;
      for (std::size_t v = 0; v < n; ++v) {
        z[v] = like[r * n + v] + noise(g);
        if (grain > 0.0) z[v] = std::round(z[v] / grain) * grain;
        max = std::max(max, z[v]);
      }
      for (double& x : z) total += std::exp(x - max);
      const bool broken = one_in(g, 12), removed = one_in(g, 25);
      for (std::size_t v = 0; v < n; ++v) {
        double x = table.logits ? z[v] : std::exp(z[v] - max) / total;
        if (broken && one_in(g, 10)) x = one_in(g, 2) ? std::nan("") : table.logits ? -kInf : -0.25;
        if (removed) x = table.logits ? -kInf : 0.0;
        numbers.set(places[r] + static_cast<std::int64_t>(v), x);
      }
      if (table.logits && one_in(g, 60)) numbers.set(places[r] + up_to(g, vocabulary - 1), kInf);
    }
    const auto each = [&](auto& parameter, auto& array, auto values) {
      parameter.value = any_of(g, values);
      if (!one_in(g, 2)) return;
      for (std::size_t i = 0; i < b; ++i) array.push_back(any_of(g, values));
      parameter.data = array.data();
    };
    if (table.logits) {
      each(table.temperature, temperature, std::vector<double>{0.0, 0.6, 1.0, 1.0, 1.9, 1e-320, 1e-39, 1e300});
      if (one_in(g, 3)) {
        table.mixture = 0.4;
        table.reference = rows(g, reference, dtype, batch, rows_each, vocabulary, places);
        for (std::size_t r = 0; r < places.size(); ++r) {
          for (std::size_t v = 0; v < n; ++v) {
            reference.set(places[r] + static_cast<std::int64_t>(v), like[r * n + v] + noise(g));
          }
        }
      }
      if (one_in(g, 3)) {
        table.biases = 1 + up_to(g, 7);
        for (std::int64_t i = 0; i < batch * table.biases; ++i) {
          bias_ids.push_back(up_to(g, vocabulary + 1) - 1);  // none, and past the end, too
          bias.push_back(one_in(g, 4) ? -std::numeric_limits<float>::infinity() : static_cast<float>(noise(g)));
        }
        table.bias_ids = bias_ids.data();
        table.bias = bias.data();
      }
    }
    if (!truncate) return;
    table.joint = one_in(g, 2);
    if (one_in(g, 2)) each(table.top_k, top_k, std::vector<std::int64_t>{-1, 0, 1, 3, 20, 1000});
    if (one_in(g, 2)) each(table.top_p, top_p, std::vector<double>{1e-9, 0.3, 0.8, 0.95, 1.0});
    if (one_in(g, 2)) each(table.min_p, min_p, std::vector<double>{0.0, 0.02, 0.5, 1.0});
  }
};

struct AnySeeds {
  std::vector<std::int64_t> seed, offset;
  Seeds make(Random& g, std::int64_t batch) {
    Seeds seeds;
    seeds.seed.value = static_cast<std::int64_t>(g()) << 31;
    seeds.offset.value = up_to(g, 1000);
    if (one_in(g, 2)) return seeds;
    for (std::int64_t b = 0; b < batch; ++b) seed.push_back(up_to(g, 1 << 20));
    for (std::int64_t b = 0; b < batch; ++b) offset.push_back(up_to(g, 1 << 20));
    seeds = {{seed.data(), 0}, {offset.data(), 0}, false};
    return seeds;
  }
};

// The workspace of one device: what lies before the bins is zeroed once, then handed from launch to launch whatever
// their sizes are; what lies behind holds garbage before each launch.
constexpr std::int64_t kDeviceBlocks = 8;
std::vector<std::uint64_t> workspace;

template <class Launch>
void place(Random& g, Launch& launch, std::int64_t requests, std::int64_t rows, std::int64_t width,
           std::int64_t biases) {
  launch.plan.blocks = any_of<std::int64_t>(g, {1, 1, 2, 3, 5});
  launch.plan.teams = 1 + up_to(g, std::min(requests, kDeviceBlocks / launch.plan.blocks) - 1);
  launch.plan.window = 1 + up_to(g, std::min<std::int64_t>(rows, kMostWindow) - 1);
  launch.places = layout_of(kDeviceBlocks, width, biases);
  const auto words = static_cast<std::size_t>(launch.places.bytes / 8) + 2;
  if (workspace.size() < words) workspace.resize(words, 0);
  const bool aligned = reinterpret_cast<std::uintptr_t>(workspace.data()) % 16 == 0;
  launch.workspace = reinterpret_cast<char*>(workspace.data() + (aligned ? 0 : 1));
  std::memset(launch.workspace + launch.places.bins, 0xa5,
              static_cast<std::size_t>(launch.places.bytes - launch.places.bins));
}

template <int kThreads, class Launch, class Kernel>
void run(Random& g, const Launch& launch, Kernel&& kernel) {
  using Memory = BlockMemory<kThreads>;
  const auto blocks = static_cast<int>(launch.plan.teams * launch.plan.blocks);
  struct alignas(16) Shared {
    unsigned char bytes[sizeof(Memory)];
  };
  std::vector<Shared> shared(static_cast<std::size_t>(blocks));
  for (Shared& s : shared) std::memset(s.bytes, 0xa5, sizeof s.bytes);  // poisoned
  test::gpu.launch(blocks, kThreads, g(), [&](int thread, int block) {
    kernel(*reinterpret_cast<Memory*>(shared[static_cast<std::size_t>(block)].bytes), launch, thread, block);
  });
}

// Outputs, poisoned before.
struct Outputs {
  std::vector<std::int64_t> ids, accepted, rows_read, nodes;
  std::vector<std::int32_t> short_ids;
  std::vector<float> logps;
  void attach(TreeCall& call, std::int64_t out_width) {
    const auto b = static_cast<std::size_t>(call.batch), n = static_cast<std::size_t>(out_width);
    ids.assign(b * n, 77777);
    short_ids.assign(b * n, 77777);
    accepted.assign(b, 77777);
    rows_read.assign(b, 77777);
    nodes.assign(b * static_cast<std::size_t>(call.depth), 77777);
    logps.assign(b * n, std::nanf(""));
    call.output = call.ids.dtype == Dtype::kInt32 ? static_cast<void*>(short_ids.data()) : ids.data();
    call.accepted = accepted.data();
    call.rows_read = rows_read.data();
    call.nodes = nodes.data();
    call.logps = logps.data();
  }
};

void same_logps(const std::vector<float>& a, const std::vector<float>& b) {
  for (std::size_t i = 0; i < a.size(); ++i) CHECK_CLOSE(a[i], b[i], 1e-5, 1e-6);
}

std::vector<double> random_logits(Random& g, std::int64_t count) {
  std::normal_distribution<double> normal(0.0, any_of<double>(g, {0.5, 3.0, 12.0}));
  std::vector<double> z(static_cast<std::size_t>(count));
  for (double& x : z) x = normal(g);
  return z;
}

// Below a pack; a pack; one more; several packs for a part; several stretches for a thread.
const std::vector<std::int64_t> kVocabularies = {1, 2, 7, 8, 9, 63, 100, 257, 1000, 2100, 6001};

// The sanitizers follow every change of fibers: a third of the cases take them as long as all take without.
#if defined(__SANITIZE_ADDRESS__)
constexpr std::uint32_t kEvery = 3;
#else
constexpr std::uint32_t kEvery = 1;
#endif

struct Tally {
  int accepted = 0, rejected = 0, sampled = 0, nothing = 0;
};

template <int kThreads>
void verify_once(std::uint32_t seed, Walk walk, Tally& tally) {
  Random g(seed);
  TreeCall call;
  call.batch = 1 + up_to(g, 4);
  call.width = walk == Walk::kTree ? up_to(g, 12) : up_to(g, 5);
  call.depth = walk == Walk::kTree ? up_to(g, call.width) : 0;
  call.replacement = one_in(g, 2);
  const std::int64_t vocabulary = any_of(g, kVocabularies), rows = call.width + 1;
  const std::vector<double> like = random_logits(g, call.batch * rows * vocabulary);
  AnyLaw target, draft;
  const bool truncate = one_in(g, 2);
  target.make(g, like, call.batch, rows, vocabulary, truncate);
  call.target = target.table;
  call.has_draft = !one_in(g, 3);
  if (call.has_draft) {
    draft.make(g, like, call.batch, rows, vocabulary, truncate && one_in(g, 2));
    call.draft = draft.table;
  }
  // Drafts that have a chance: often the most likely token, in places none at all.
  std::vector<std::int64_t> ids, parents, lengths;
  for (std::int64_t i = 0; i < call.batch * call.width; ++i) {
    const std::int64_t b = i / call.width, r = i % call.width;
    const auto row = like.begin() + (b * rows + r) * vocabulary;
    std::int64_t token = up_to(g, vocabulary - 1);
    if (!one_in(g, 3)) token = std::max_element(row, row + vocabulary) - row;
    if (one_in(g, 30)) token = one_in(g, 2) ? -1 : vocabulary + 3;
    ids.push_back(token);
    parents.push_back(one_in(g, 20) ? up_to(g, 20)
                                    : up_to(g, std::min<std::int64_t>(r, 3)) + r - std::min<std::int64_t>(r, 3) - 1);
  }
  const std::vector<std::int32_t> short_ids(ids.begin(), ids.end());
  call.ids =
      one_in(g, 2) ? Ids{ids.data(), Dtype::kInt64, call.width} : Ids{short_ids.data(), Dtype::kInt32, call.width};
  call.parents = parents.data();
  call.lengths.value = call.width;
  if (one_in(g, 2)) {
    for (std::int64_t b = 0; b < call.batch; ++b) lengths.push_back(up_to(g, call.width + 1));
    call.lengths.data = lengths.data();
  }
  AnySeeds seeds;
  call.seeds = seeds.make(g, call.batch);
  const std::int64_t out_width = (walk == Walk::kTree ? call.depth : call.width) + 1;

  Outputs cpu, gpu;
  cpu.attach(call, out_width);
  if (walk == Walk::kTree) {
    tree(call);
  } else {
    walk == Walk::kBlock ? block(call) : chain(call);
  }
  VerifyLaunch launch{};
  gpu.attach(call, out_width);
  launch.call = call;
  launch.walk = walk;
  place(g, launch, call.batch, walk == Walk::kTree ? 1 : rows, call.width,
        target.table.biases + (call.has_draft ? draft.table.biases : 0));
  run<kThreads>(g, launch,
                [](auto& memory, const auto& l, int thread, int index) { verify_block(memory, l, thread, index); });

  const int before = test::failures;
  CHECK(cpu.ids == gpu.ids);
  CHECK(cpu.short_ids == gpu.short_ids);
  CHECK(cpu.accepted == gpu.accepted);
  CHECK(cpu.rows_read == gpu.rows_read);
  CHECK(cpu.nodes == gpu.nodes);
  same_logps(cpu.logps, gpu.logps);
  if (test::failures != before) {
    std::fprintf(stderr, "  seed %u, walk %d, V %lld, draft %d, %lld blocks, %lld teams, window %lld\n", seed,
                 static_cast<int>(walk), static_cast<long long>(vocabulary), call.has_draft ? 1 : 0,
                 static_cast<long long>(launch.plan.blocks), static_cast<long long>(launch.plan.teams),
                 static_cast<long long>(launch.plan.window));
  }
  for (const std::int64_t n : gpu.accepted) ++(n > 0 ? tally.accepted : tally.rejected);
}

template <int kThreads>
void sample_once(std::uint32_t seed, Tally& tally) {
  Random g(seed);
  SampleCall call;
  call.batch = 1 + up_to(g, 3);
  call.rows = 1 + up_to(g, 2);
  const std::int64_t vocabulary = any_of(g, kVocabularies);
  AnyLaw law;
  law.make(g, random_logits(g, call.batch * call.rows * vocabulary), call.batch, call.rows, vocabulary, !one_in(g, 4));
  call.law = law.table;
  AnySeeds seeds;
  call.seeds = seeds.make(g, call.batch);
  const auto count = static_cast<std::size_t>(call.batch * call.rows);
  std::vector<std::int64_t> cpu(count, 77777), gpu(count, 77777);
  std::vector<float> cpu_logps(count, std::nanf("")), gpu_logps(count, std::nanf(""));
  call.output = cpu.data();
  call.logps = cpu_logps.data();
  sample(call);
  SampleLaunch launch{};
  call.output = gpu.data();
  call.logps = gpu_logps.data();
  launch.call = call;
  place(g, launch, call.batch * call.rows, 1, 0, law.table.biases);
  run<kThreads>(g, launch,
                [](auto& memory, const auto& l, int thread, int index) { sample_block(memory, l, thread, index); });
  const int before = test::failures;
  CHECK(cpu == gpu);
  same_logps(cpu_logps, gpu_logps);
  if (test::failures != before) {
    std::fprintf(stderr, "  seed %u, V %lld, %lld blocks, dtype %s, top_k %lld, top_p %g, min_p %g, joint %d\n", seed,
                 static_cast<long long>(vocabulary), static_cast<long long>(launch.plan.blocks),
                 dtype_name(law.table.rows.dtype), static_cast<long long>(law.table.top_k.value), law.table.top_p.value,
                 law.table.min_p.value, law.table.joint ? 1 : 0);
  }
  for (const std::int64_t token : gpu) ++(token >= 0 ? tally.sampled : tally.nothing);
}

}  // namespace

TEST(chains_as_on_the_cpu) {
  Tally tally;
  for (std::uint32_t seed = 0; seed < 300; seed += kEvery) verify_once<64>(seed, Walk::kChain, tally);
  for (std::uint32_t seed = 0; seed < 20; seed += kEvery) verify_once<256>(seed, Walk::kChain, tally);
  CHECK(tally.accepted > 50 && tally.rejected > 50);
}

TEST(blocks_as_on_the_cpu) {
  Tally tally;
  for (std::uint32_t seed = 1000; seed < 1300; seed += kEvery) verify_once<64>(seed, Walk::kBlock, tally);
  CHECK(tally.accepted > 50 && tally.rejected > 50);
}

TEST(trees_as_on_the_cpu) {
  Tally tally;
  for (std::uint32_t seed = 2000; seed < 2300; seed += kEvery) verify_once<64>(seed, Walk::kTree, tally);
  for (std::uint32_t seed = 2400; seed < 2420; seed += kEvery) verify_once<128>(seed, Walk::kTree, tally);
  CHECK(tally.accepted > 50 && tally.rejected > 50);
}

TEST(samples_as_on_the_cpu) {
  Tally tally;
  for (std::uint32_t seed = 3000; seed < 3600; seed += kEvery) sample_once<64>(seed, tally);
  for (std::uint32_t seed = 3600; seed < 3640; seed += kEvery) sample_once<256>(seed, tally);
  CHECK(tally.sampled > 300 && tally.nothing > 5);
}

TEST(order_keys_keep_the_order) {
  const std::vector<double> ascending = {-kInf, -1e308, -2.5, -1e-310, 0.0, 1e-310, 1.0, 3.0, 1e308, kInf};
  for (std::size_t i = 0; i < ascending.size(); ++i) {
    CHECK(of_order_key(order_key(ascending[i])) == ascending[i]);
    CHECK(i == 0 || order_key(ascending[i - 1]) < order_key(ascending[i]));
    const auto narrow = static_cast<float>(ascending[i]);
    CHECK(of_order_key(static_cast<std::uint32_t>(order_key(narrow))) == static_cast<double>(narrow));
  }
  CHECK(order_key(-0.0) == order_key(0.0));
  CHECK(order_key(-0.0f) == order_key(0.0f));
}

TEST(a_plan_fits_the_device) {
  for (const std::int64_t resident : {1, 2, 78, 132, 148}) {
    for (const std::int64_t batch : {1, 2, 7, 64, 132, 133, 5000}) {
      for (const std::int64_t vocabulary : {1, 2048, 32000, 128256, 1 << 21}) {
        for (const std::int64_t rows : {1, 5, 33}) {
          const Plan plan = plan_of(resident, batch, vocabulary, rows, 2 * vocabulary);
          CHECK(plan.blocks >= 1 && plan.blocks <= 64 && plan.teams >= 1 && plan.teams <= batch);
          CHECK(plan.blocks * plan.teams <= resident);
          CHECK(plan.window >= 1 && plan.window <= std::min<std::int64_t>(rows, kMostWindow));
          // Teams of two blocks or more have a set of bins each.
          CHECK(plan.blocks == 1 || plan.teams <= resident / 2);
          const Plan lone = apart(plan, resident, batch);
          CHECK(lone.blocks == 1 && lone.teams == std::min(resident, batch) && lone.window == plan.window);
        }
      }
    }
  }
}

TEST_MAIN

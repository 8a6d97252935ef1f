// A table in device memory, over a `Machine` that has memory, sorts, and runs warps: a CUDA device, or the emulated one
// of the tests, which runs every line of this file.
//
// Verbs that may insert read a few numbers back before they write: how many keys are unknown, and how full the fullest
// bucket would be. Growth thus happens before anything is written, and a call that throws has changed nothing.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "kernels/table/admission.hpp"
#include "kernels/table/buffers.cuh"
#include "kernels/table/calls.hpp"
#include "kernels/table/erasures.hpp"
#include "kernels/table/insert.cuh"
#include "kernels/table/plan.hpp"
#include "kernels/table/runs.cuh"
#include "kernels/table/scan.cuh"
#include "kernels/table/transfers.cuh"

namespace hotloop::table::gpu {

inline constexpr std::int64_t kScanned = std::int64_t{1} << 24;  // slots that expiry looks at in one go

template <class Machine>
class BasicTable : private Transfers<Machine> {
 public:
  BasicTable(const Settings& settings, Machine machine)
      : Transfers<Machine>(std::move(machine)),
        settings_(settings),
        plan_(plan_of(settings)),
        keep_(machine_, false),
        erasures_(settings.hash_seed) {
    shape_ = shape_of(settings);
    const std::int64_t states = shape_.states;
    const auto entered = machine_.enter();
    counters_ = keep_.template take<Counters>(1);
    machine_.fill(counters_.get(), 0, sizeof(Counters));
    initial_ = keep_.template take<float>(std::max<std::int64_t>(states, 1));
    if (states > 0) {
      machine_.upload(initial_.get(), settings.initial_state.data(), static_cast<std::size_t>(states) * 4);
    }
    shape_.initial_state = initial_.get();
    memory_ = make(plan_.first);
  }

  const Shape& shape() const { return shape_; }
  const Settings& settings() const { return settings_; }
  const Store& store() const { return memory_.store; }
  Machine& machine() { return machine_; }
  std::int64_t slots() const { return memory_.store.slots(); }
  std::int64_t bytes() const { return scratch_.bytes() + keep_.bytes(); }
  std::int64_t capacity() const {
    return evicts() ? static_cast<std::int64_t>(memory_.store.buckets) * most() : std::min(slots(), settings_.max_rows);
  }
  std::int64_t size() {
    const auto entered = machine_.enter();
    return static_cast<std::int64_t>(counters().size);
  }
  std::uint64_t tick() const { return tick_; }
  void set_tick(std::uint64_t tick) { tick_ = tick; }
  std::uint64_t generation() const { return generation_; }
  void set_generation(std::uint64_t g) { generation_ = g; }
  std::uint64_t mark() {
    if (generation_ >= 0xFFFFFFFEu) throw std::overflow_error("a table counts to 2^32 marks");
    return generation_++;
  }

  // found, scores, values: out, null where not wanted.
  void find(const std::uint64_t* keys, std::int64_t n, Rows values, std::uint8_t* found, std::uint64_t* scores) {
    const auto entered = machine_.enter();
    run(finder(keys, n, nullptr, matrix(values, shape_.value_bytes), found, scores, nullptr, nullptr));
  }
  void locate(const std::uint64_t* keys, std::int64_t n, std::uint32_t* rows) {
    const auto entered = machine_.enter();
    run(finder(keys, n, nullptr, {}, nullptr, nullptr, rows, nullptr));
  }

  void upsert(const UpsertCall& call) {
    const auto entered = machine_.enter();
    upsert_now(call, false);
  }

  void assign(const std::uint64_t* keys, std::int64_t n, Rows values, const Moment& moment, bool accumulate,
              std::uint8_t* found) {
    check_count(n);
    const auto entered = machine_.enter();
    if (n == 0) return;
    const auto rows = take<std::uint32_t>(n);
    run(finder(keys, n, nullptr, {}, found, nullptr, rows.get(), nullptr));
    WriteCall write = write_call(accumulate ? Write::kAccumulate : Write::kAssign, stamp(moment, false));
    write.values = matrix(values, shape_.value_bytes);
    write_rows(write, rows.get(), n);
  }

  void erase(const std::uint64_t* keys, std::int64_t n, std::uint8_t* found) {
    check_count(n);
    const auto entered = machine_.enter();
    if (n == 0) return;
    const auto rows = take<std::uint32_t>(n);
    run(finder(keys, n, nullptr, {}, nullptr, nullptr, rows.get(), nullptr));
    machine_.fill(found, 0, static_cast<std::size_t>(n));
    Sorted sorted = sort_by_slot(rows.get(), n);
    run(EraseRuns{memory_.store, sorted.runs, found, &counters_.get()->size});
    if (!settings_.versions) return;
    std::vector<std::uint64_t> k(static_cast<std::size_t>(n));
    std::vector<std::uint8_t> f(static_cast<std::size_t>(n));
    machine_.download(k.data(), keys, k.size() * 8);
    machine_.download(f.data(), found, f.size());
    std::size_t kept = 0;
    for (std::size_t i = 0; i < k.size(); ++i) {
      if (f[i] != 0) k[kept++] = k[i];
    }
    erasures_.note(generation_, k.data(), kept);
  }

  void clear() {
    const auto entered = machine_.enter();
    machine_.fill(memory_.store.digests, 0, static_cast<std::size_t>(slots()));
    machine_.fill(&counters_.get()->size, 0, 8);
    forget_erased(generation_);
  }

  void reserve(std::int64_t rows) {
    const auto entered = machine_.enter();
    const std::int64_t wanted = buckets_for(std::min(rows, settings_.max_rows));
    while (static_cast<std::int64_t>(memory_.store.buckets) < wanted && can_grow()) grow();
  }

  std::int64_t expire(std::uint32_t time) {
    const auto entered = machine_.enter();
    std::int64_t expired = 0;
    if (time == 0) return 0;
    for (std::int64_t begin = 0; begin < slots(); begin += kScanned) {
      const std::int64_t n = std::min(kScanned, slots() - begin);
      const auto flags = take<std::uint8_t>(n);
      const auto which = take<std::uint32_t>(n);
      run(FlagSlots{memory_.store, begin, n, 0, time, flags.get()});
      const std::int64_t m = select(flags.get(), n, which.get());
      if (m == 0) continue;
      const auto keys = take<std::uint64_t>(m);
      run(EraseSlots{memory_.store, begin, which.get(), m, keys.get()});
      add_size(-m);
      expired += m;
      if (settings_.versions) erasures_.note(generation_, host(keys.get(), m).data(), static_cast<std::size_t>(m));
    }
    return expired;
  }

  // Rows of slots [begin, end) whose version is above `since`, from the front of host arrays on; says how many.
  std::int64_t export_rows(std::int64_t begin, std::int64_t end, std::uint64_t since, const HostRows& out) {
    const auto entered = machine_.enter();
    const std::int64_t n = std::min(end, slots()) - begin;
    if (n <= 0 || since > 0xFFFFFFFFu) return 0;
    const auto flags = take<std::uint8_t>(n);
    const auto which = take<std::uint32_t>(n);
    run(FlagSlots{memory_.store, begin, n, static_cast<std::uint32_t>(since), 0, flags.get()});
    const std::int64_t m = select(flags.get(), n, which.get());
    if (m == 0) return 0;
    const auto keys = take<std::uint64_t>(m);
    const auto scores = take<std::uint64_t>(m);
    const auto times = take<std::uint32_t>(m);
    const auto values = take<char>(m * shape_.value_bytes);
    const auto state = take<char>(std::max<std::int64_t>(m * shape_.states * 4, 1));
    Gather gather{memory_.store, shape_, begin, which.get(), m, keys.get(), {}, {}, scores.get(), times.get()};
    if (out.values.data != nullptr) gather.values = matrix_of(values.get(), shape_.value_bytes, shape_.value_bytes);
    const bool with_state = out.state.data != nullptr && shape_.states > 0;
    if (with_state) gather.state = matrix_of(state.get(), shape_.states * 4, shape_.states * 4);
    run(gather);
    fetch(out.keys, keys.get(), m);
    fetch(out.scores, scores.get(), m);
    fetch(out.times, times.get(), m);
    if (out.values.data != nullptr) fetch_rows(out.values, values.get(), m, shape_.value_bytes);
    if (with_state) fetch_rows(out.state, state.get(), m, shape_.states * 4);
    return m;
  }

  // Puts rows back, from host arrays, as exported. beyond: of a replica; without a strategy there is no bound then.
  void import_rows(std::int64_t n, const HostRows& in, bool beyond = false) {
    check_count(n);
    const auto entered = machine_.enter();
    if (n == 0) return;
    const auto keys = sent(in.keys, n);
    const auto values = sent_rows(in.values, n, shape_.value_bytes);
    const bool with_state = in.state.data != nullptr && shape_.states > 0;
    const auto state = with_state ? sent_rows(in.state, n, shape_.states * 4) : Held<Machine, char>{};
    const bool exact = in.scores != nullptr && evicts();
    const auto scores = exact ? sent(in.scores, n) : Held<Machine, std::uint64_t>{};
    const auto times = in.times != nullptr ? sent(in.times, n) : Held<Machine, std::uint32_t>{};
    const auto rows = take<std::uint32_t>(n);
    UpsertCall call;
    call.keys = keys.get();
    call.n = n;
    call.values = {values.get(), shape_.value_bytes};
    call.moment.scores = scores.get();
    call.rows = rows.get();
    upsert_now(call, exact, beyond && !evicts());
    if (!with_state && times.get() == nullptr) return;
    Sorted sorted = sort_by_slot(rows.get(), n);
    run(RestoreRuns{memory_.store, shape_, sorted.runs,
                    with_state ? matrix_of(state.get(), shape_.states * 4, shape_.states * 4) : Matrix{}, times.get()});
  }

  // Keys and rows that left in the last upsert that kept them.
  std::int64_t evicted() const { return evicted_; }
  void take_evicted(std::uint64_t* keys, Rows values, std::uint64_t* scores) {
    const auto entered = machine_.enter();
    const auto m = static_cast<std::size_t>(evicted_);
    if (m == 0) return;
    machine_.copy(keys, gone_keys_.get(), m * 8);
    machine_.copy(scores, gone_scores_.get(), m * 8);
    machine_.copy(values.data, gone_values_.get(), m * static_cast<std::size_t>(shape_.value_bytes));
    drop_evicted();
  }

  // out: (count, dim), float32 or the type of the table.
  void pool(const BagCall& call, Rows out, bool wide, std::int64_t* sizes, std::int64_t* largest) {
    const auto entered = machine_.enter();
    const bool plain = call.offsets == nullptr && call.weights == nullptr && call.mode == Mode::kSum;
    if (plain && !(wide && shape_.dtype != Dtype::kFloat32)) {
      const Matrix values = matrix(out, shape_.value_bytes);
      Find find = finder(call.keys, call.n, call.rows, values, nullptr, nullptr, nullptr, nullptr);
      find.sizes = sizes;
      run(find);
      return;
    }
    with_storage(shape_.dtype, [&](auto storage) {
      using Storage = decltype(storage);
      if (wide)
        run(Pool<Storage, float>{memory_.store, shape_, bags(call), out.data, out.stride, sizes, largest});
      else
        run(Pool<Storage, Storage>{memory_.store, shape_, bags(call), out.data, out.stride, sizes, largest});
    });
  }

  void weight_gradient(const BagCall& call, Rows kept, const float* grad, std::int64_t grad_stride, float* out) {
    const auto entered = machine_.enter();
    with_storage(shape_.dtype, [&](auto storage) {
      run(WeightGradient<decltype(storage)>{shape_, bags(call), kept.data, kept.stride, grad, grad_stride, out});
    });
  }

  // Says how many positions have lost their row since they were given one.
  std::int64_t update(const BagCall& call, const UpdateCall& update) {
    check_count(call.n);
    const auto entered = machine_.enter();
    if (call.n == 0) return 0;
    const auto rows = take<std::uint32_t>(call.n);
    machine_.fill(&counters_.get()->missing, 0, 4);
    run(finder(call.keys, call.n, call.rows, {}, nullptr, nullptr, rows.get(), &counters_.get()->missing));
    Moment moment;
    moment.time = update.time;
    WriteCall write = write_call(Write::kUpdate, stamp(moment, false));
    write.spec = update.spec;
    write.bags = bags(call);
    write.grad = update.grad;
    write.grad_stride = update.grad_stride;
    write.sizes = update.sizes;
    write.largest = update.largest;
    write.seed = update.seed;
    write_rows(write, rows.get(), call.n);
    return update.counts ? counters().missing : 0;
  }

  std::vector<std::uint64_t> erased_since(std::uint64_t since) {
    std::vector<std::uint64_t> keys = erasures_.since(since);
    if (keys.empty()) return keys;
    const auto entered = machine_.enter();
    const auto n = static_cast<std::int64_t>(keys.size());
    const auto on_device = sent(keys.data(), n);
    const auto found = take<std::uint8_t>(n);
    run(finder(on_device.get(), n, nullptr, {}, found.get(), nullptr, nullptr, nullptr));
    const std::vector<std::uint8_t> there = host(found.get(), n);
    std::size_t kept = 0;
    for (std::size_t i = 0; i < keys.size(); ++i) {
      if (there[i] == 0) keys[kept++] = keys[i];
    }
    keys.resize(kept);
    return keys;
  }
  void forget_erased(std::uint64_t until) { erasures_.forget(until); }
  // Whether a row was written, used or erased after `since`.
  bool changed_since(std::uint64_t since) {
    bool is = erasures_.any_since(since);
    for (std::int64_t b = 0; !is && b < slots(); b += kScanned) is = export_rows(b, b + kScanned, since, {}) > 0;
    return is;
  }
  // Erases keys in host memory.
  void erase_host(const std::uint64_t* keys, std::int64_t n, std::uint8_t* found) {
    if (n == 0) return;
    const auto entered = machine_.enter();
    const auto k = sent(keys, n);
    const auto f = take<std::uint8_t>(n);
    erase(k.get(), n, f.get());
    machine_.download(found, f.get(), static_cast<std::size_t>(n));
  }

 private:
  using Transfers<Machine>::machine_, Transfers<Machine>::scratch_, Transfers<Machine>::host, Transfers<Machine>::fetch,
      Transfers<Machine>::fetch_rows, Transfers<Machine>::sent, Transfers<Machine>::sent_rows;

  template <class T>
  Held<Machine, T> take(std::int64_t n) {
    return scratch_.template take<T>(n);
  }

  struct Counters {
    std::uint64_t size;
    std::uint32_t missing, fullest, selected, unused;
  };
  struct Memory {
    Store store;
    Held<Machine, char> parts[6];
  };
  struct Sorted {
    Held<Machine, std::uint32_t> slots, positions;
    Runs runs;
  };
  // Room for the rows that an upsert evicts or refuses.
  struct Leaving {
    Held<Machine, std::uint8_t> flags;
    Held<Machine, std::uint64_t> keys, scores;
    Held<Machine, std::uint32_t> slots, fresh, which;
    Gone gone;
  };
  struct Unknown {
    Held<Machine, std::uint64_t> hashes;
    Held<Machine, std::uint32_t> positions, firsts;
    Misses misses;
  };

  bool evicts() const { return settings_.strategy != Strategy::kNone; }
  // Slots of a bucket that may be used: of a table that evicts so many that all buckets hold no more than max_rows.
  std::int64_t most() const {
    return evicts() ? std::clamp<std::int64_t>(settings_.max_rows / plan_.last, 1, kSlots) : kSlots;
  }
  std::int64_t buckets_for(std::int64_t rows) const {
    const std::int64_t each = evicts() ? std::min<std::int64_t>(kComfort, most()) : kComfort;
    return std::clamp<std::int64_t>(blocks_of(rows, each), 1, kMaxBuckets);
  }
  bool can_grow() const {
    const auto buckets = static_cast<std::int64_t>(memory_.store.buckets);
    return evicts() ? buckets < plan_.last : 2 * buckets <= kMaxBuckets;
  }
  Memory make(std::int64_t buckets) {
    Memory m;
    const std::int64_t n = buckets * kSlots;
    const auto part = [&](int i, bool used, std::int64_t each) -> char* {
      if (!used) return nullptr;
      m.parts[i] = keep_.template take<char>(n * each);
      return m.parts[i].get();
    };
    m.store.buckets = static_cast<std::uint64_t>(buckets);
    m.store.hash_seed = settings_.hash_seed;
    m.store.digests = reinterpret_cast<std::uint32_t*>(part(0, true, 1));
    m.store.keys = reinterpret_cast<std::uint64_t*>(part(1, true, 8));
    m.store.scores = reinterpret_cast<std::uint64_t*>(part(2, evicts(), 8));
    m.store.times = reinterpret_cast<std::uint32_t*>(part(3, settings_.times, 4));
    m.store.versions = reinterpret_cast<std::uint32_t*>(part(4, settings_.versions, 4));
    m.store.rows = part(5, true, shape_.stride);
    machine_.fill(m.store.digests, 0, static_cast<std::size_t>(n));
    return m;
  }

  // The old table is given back when all of the new one is there and the copy is enqueued.
  void grow() {
    Memory next = make(2 * static_cast<std::int64_t>(memory_.store.buckets));
    run(Split{memory_.store, next.store, shape_});
    std::swap(memory_, next);
  }

  template <class Body>
  void run(const Body& body) {
    machine_.run(body, Body::kScratch * shape_.dim, scratch_);
  }
  static Matrix matrix(Rows rows, std::int64_t bytes) {
    return rows.data == nullptr ? Matrix{} : matrix_of(rows.data, rows.stride, bytes);
  }
  Bags bags(const BagCall& c) const {
    return {c.keys, c.rows, c.offsets, c.weights, c.n, c.count, static_cast<PoolMode>(c.mode)};
  }
  Find finder(const std::uint64_t* keys, std::int64_t n, const std::uint32_t* given, Matrix values, std::uint8_t* found,
              std::uint64_t* scores, std::uint32_t* rows, std::uint32_t* missing) const {
    return {memory_.store, shape_, keys, given, n, values, found, scores, rows, nullptr, missing};
  }
  Stamp stamp(const Moment& moment, bool exact) {
    if (tick_ + 1 >= kMostTicks && settings_.strategy == Strategy::kEpochLru) {
      run(Renumber{memory_.store});
      tick_ = kMostTicks - kTicksTaken;
    }
    return {moment.scores, moment.epoch, ++tick_, moment.time, static_cast<std::uint32_t>(generation_), exact};
  }
  WriteCall write_call(Write write, const Stamp& stamp) const {
    WriteCall call{};
    call.store = memory_.store;
    call.shape = shape_;
    call.stamp = stamp;
    call.write = write;
    return call;
  }

  Counters counters() {
    Counters c{};
    machine_.download(&c, counters_.get(), sizeof c);
    return c;
  }
  void add_size(std::int64_t change) {
    Counters c = counters();
    c.size += static_cast<std::uint64_t>(change);
    machine_.upload(&counters_.get()->size, &c.size, 8);
  }
  std::int64_t select(const std::uint8_t* flags, std::int64_t n, std::uint32_t* which) {
    machine_.select(flags, n, which, &counters_.get()->selected, scratch_);
    return counters().selected;
  }
  Sorted sort_by_slot(const std::uint32_t* rows, std::int64_t n) {
    Sorted s{take<std::uint32_t>(n), take<std::uint32_t>(n), {}};
    int bits = 1;  // enough that no slot is all ones in them, as kNoRow is
    while ((slots() >> bits) != 0) ++bits;
    machine_.sort_slots(rows, n, bits, s.slots.get(), s.positions.get(), scratch_);
    s.runs = {s.slots.get(), s.positions.get(), n};
    return s;
  }
  void write_rows(WriteCall& call, const std::uint32_t* rows, std::int64_t n) {
    Sorted sorted = sort_by_slot(rows, n);
    call.runs = sorted.runs;
    const std::int64_t parts = 2 * sorted.runs.tiles();
    const auto part_rows = take<float>(call.sums() ? parts * shape_.dim : 1);
    const auto part_uses = take<std::uint64_t>(parts);
    call.part_rows = part_rows.get();
    call.part_uses = part_uses.get();
    with_storage(shape_.dtype, [&](auto storage) {
      using Storage = decltype(storage);
      run(WritePieces<Storage>{{call}});
      if (n > kTile) run(WriteSpans<Storage>{{call}});
    });
  }

  void upsert_now(const UpsertCall& call, bool exact, bool beyond = false) {
    check_count(call.n);
    drop_evicted();
    const Stamp now = stamp(call.moment, exact);
    if (call.n == 0) return;
    machine_.fill(&counters_.get()->missing, 0, 4);
    run(finder(call.keys, call.n, nullptr, {}, call.found, nullptr, call.rows, &counters_.get()->missing));
    Unknown unknown;
    if (const std::int64_t m = counters().missing; m > 0) {
      unknown = sorted_misses(call, m);
      if (call.ask != nullptr) ask(call, unknown);
      if (unknown.misses.d > 0 && make_room(unknown.misses, beyond)) {
        run(finder(call.keys, call.n, nullptr, {}, nullptr, nullptr, call.rows, nullptr));
      }
    }
    const Misses& misses = unknown.misses;
    // All memory before anything is written: a slot that is taken must get its row.
    const std::int64_t d = misses.d;
    const auto slot_of = take<std::uint32_t>(d);
    const bool keeps = d > 0 && evicts() && (call.keep_evicted || settings_.versions);
    Leaving leaving = keeps ? room_to_leave(d) : Leaving{};
    leaving.gone.refused = call.keep_evicted && call.values.data != nullptr;
    auto room = take<char>(keeps ? machine_.select_room(d) : 1);
    const Matrix values = matrix(call.values, shape_.value_bytes);

    write_known(call, now, values);
    if (d == 0) return;
    machine_.fill(slot_of.get(), 0xFF, static_cast<std::size_t>(d) * 4);
    if (keeps) machine_.fill(leaving.flags.get(), 0, static_cast<std::size_t>(d));
    run(Settle{memory_.store, shape_, misses, now, static_cast<std::uint32_t>(most()), slot_of.get(), leaving.gone,
               &counters_.get()->size});
    if (keeps) {
      room = {};
      keep_gone(misses, values, leaving);
    }
    with_storage(shape_.dtype, [&](auto storage) {
      run(FillRows<decltype(storage)>{memory_.store, shape_, misses, now, values, slot_of.get()});
    });
    run(PlaceRows{misses, slot_of.get(), call.rows, call.found});
    if (evicts()) run(ConfirmRows{memory_.store, call.keys, call.n, call.rows});
    if (!call.keep_evicted) drop_evicted();
  }

  void write_known(const UpsertCall& call, const Stamp& now, const Matrix& values) {
    const bool in_order = now.exact || counts_uses(shape_, now) || settings_.strategy == Strategy::kCustom;
    if (values.data != nullptr || in_order) {
      WriteCall write = write_call(values.data != nullptr ? Write::kAssign : Write::kTouch, now);
      write.values = values;
      write_rows(write, call.rows, call.n);
    } else if (evicts() || settings_.times) {
      run(TouchEach{memory_.store, shape_, now, call.rows, call.n});
    }
  }

  Unknown sorted_misses(const UpsertCall& call, std::int64_t m) {
    Unknown u{take<std::uint64_t>(m), take<std::uint32_t>(m), take<std::uint32_t>(m), {}};
    {
      const auto flags = take<std::uint8_t>(call.n);
      run(FlagMisses{call.rows, call.n, flags.get()});
      machine_.select(flags.get(), call.n, u.positions.get(), &counters_.get()->selected, scratch_);
      run(HashMisses{call.keys, u.positions.get(), m, u.hashes.get(), settings_.hash_seed});
      machine_.sort_hashes(u.hashes.get(), u.positions.get(), m, scratch_);
    }
    distinguish(call, u, m);
    return u;
  }
  void distinguish(const UpsertCall& call, Unknown& u, std::int64_t m) {
    u.misses = {call.keys, u.hashes.get(), u.positions.get(), u.firsts.get(), m, 0};
    if (m == 0) return;
    const auto flags = take<std::uint8_t>(m);
    run(FlagDistinct{u.hashes.get(), m, flags.get()});
    u.misses.d = select(flags.get(), m, u.firsts.get());
  }

  // Leaves those that are let in.
  void ask(const UpsertCall& call, Unknown& u) {
    const std::int64_t m = u.misses.m, d = u.misses.d;
    const auto distinct = take<std::uint64_t>(d);
    run(DistinctKeys{u.misses, distinct.get()});
    const Admitted admitted = admitted_of(*call.ask, host(distinct.get(), d), host(u.firsts.get(), d),
                                          host(u.hashes.get(), m), host(u.positions.get(), m));
    if (!admitted.hashes.empty()) {
      machine_.upload(u.hashes.get(), admitted.hashes.data(), admitted.hashes.size() * 8);
      machine_.upload(u.positions.get(), admitted.positions.data(), admitted.positions.size() * 4);
    }
    distinguish(call, u, static_cast<std::int64_t>(admitted.hashes.size()));
  }

  // Grows until every bucket takes its new keys, or cannot; says whether rows have moved.
  bool make_room(const Misses& misses, bool beyond) {
    if (evicts() && !can_grow()) return false;
    bool grew = false;
    for (;;) {
      machine_.fill(&counters_.get()->fullest, 0, 4);
      run(CountFill{memory_.store, misses, &counters_.get()->fullest});
      const Counters c = counters();
      const bool too_many = static_cast<std::int64_t>(c.size) + misses.d > settings_.max_rows;
      if (!evicts() && too_many && !beyond) throw Full();
      if (static_cast<std::int64_t>(c.fullest) <= most()) return grew;
      if (!can_grow()) {
        if (!evicts()) throw Full();
        return grew;
      }
      grow();
      grew = true;
    }
  }

  Leaving room_to_leave(std::int64_t d) {
    const auto longs = [&] { return take<std::uint64_t>(d); };
    const auto words = [&] { return take<std::uint32_t>(d); };
    Leaving l{take<std::uint8_t>(d), longs(), longs(), words(), words(), words(), {}};
    l.gone = {l.flags.get(), l.keys.get(), l.scores.get(), l.slots.get(), l.fresh.get()};
    gone_keys_ = take<std::uint64_t>(d);
    gone_scores_ = take<std::uint64_t>(d);
    gone_values_ = take<char>(d * shape_.value_bytes);
    return l;
  }
  void keep_gone(const Misses& misses, const Matrix& given, const Leaving& leaving) {
    evicted_ = select(leaving.gone.flags, misses.d, leaving.which.get());
    const Matrix values = matrix_of(gone_values_.get(), shape_.value_bytes, shape_.value_bytes);
    with_storage(shape_.dtype, [&](auto storage) {
      run(CopyGone<decltype(storage)>{memory_.store, shape_, misses, given, leaving.gone, leaving.which.get(), evicted_,
                                      gone_keys_.get(), gone_scores_.get(), values});
    });
    if (!settings_.versions) return;
    // Of refused keys nothing was there to erase: a replica that does erases nothing.
    const std::vector<std::uint64_t> keys = host(gone_keys_.get(), evicted_);
    erasures_.note(generation_, keys.data(), keys.size());
  }
  void drop_evicted() {
    evicted_ = 0;
    gone_keys_ = {};
    gone_scores_ = {};
    gone_values_ = {};
  }

  Settings settings_;
  BucketPlan plan_;
  Shape shape_;
  Buffers<Machine> keep_;  // the table itself
  Held<Machine, Counters> counters_;
  Held<Machine, float> initial_;
  Memory memory_;
  Held<Machine, std::uint64_t> gone_keys_, gone_scores_;
  Held<Machine, char> gone_values_;
  std::int64_t evicted_ = 0;
  std::uint64_t tick_ = 0, generation_ = 1;
  Erasures erasures_;
};

}  // namespace hotloop::table::gpu

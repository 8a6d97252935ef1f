// SPDX-License-Identifier: Apache-2.0
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
#include "kernels/table/insert.cuh"
#include "kernels/table/plan.hpp"
#include "kernels/table/runs.cuh"
#include "kernels/table/scan.cuh"
#include "kernels/table/transfers.cuh"
#include "table/store/erasures.hpp"

namespace hotloop::table::gpu {

inline constexpr std::int64_t kScanned = std::int64_t{1} << 24;  // slots that expiry looks at in one go

template <class Machine>
class BasicTable : public DeviceTable, private Transfers<Machine> {
 public:
  BasicTable(const Settings& settings, Machine machine)
      : DeviceTable(settings),
        Transfers<Machine>(std::move(machine)),
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
  const Store& store() const { return memory_.store; }
  void use(void* stream) override { machine_.use(stream); }
  std::int64_t row_bytes() const override { return shape_.stride; }
  std::int64_t slots() const override { return memory_.store.slots(); }
  std::int64_t bytes() const override { return scratch_.bytes() + keep_.bytes(); }
  std::int64_t capacity() const override {
    return evicts() ? static_cast<std::int64_t>(memory_.store.buckets) * most() : std::min(slots(), settings_.max_rows);
  }
  std::int64_t size() override {
    const auto entered = machine_.enter();
    return static_cast<std::int64_t>(counters().size);
  }
  void find(Keys keys, Values values, std::uint8_t* found, std::uint64_t* scores) override {
    const auto entered = machine_.enter();
    run(finder(keys, nullptr, matrix(values, shape_.value_bytes), found, scores, nullptr, nullptr));
  }
  void locate(Keys keys, std::uint32_t* rows) override {
    const auto entered = machine_.enter();
    run(finder(keys, nullptr, {}, nullptr, nullptr, rows, nullptr));
  }

  void upsert(const UpsertCall& call) override {
    const auto entered = machine_.enter();
    upsert_now(call, false);
  }

  void assign(Keys keys, Values values, const table::Stamp& given, bool accumulate, std::uint8_t* found) override {
    const std::int64_t n = keys.count;
    check_count(n);
    const auto entered = machine_.enter();
    if (n == 0) return;
    const auto rows = take<std::uint32_t>(n);
    run(finder(keys, nullptr, {}, found, nullptr, rows.get(), nullptr));
    WriteCall write = write_call(accumulate ? Write::kAccumulate : Write::kAssign, stamp(given, false));
    write.values = matrix(values, shape_.value_bytes);
    write_rows(write, rows.get(), n);
  }

  void erase(Keys keys, std::uint8_t* found) override {
    const std::int64_t n = keys.count;
    check_count(n);
    const auto entered = machine_.enter();
    if (n == 0) return;
    const auto rows = take<std::uint32_t>(n);
    run(finder(keys, nullptr, {}, nullptr, nullptr, rows.get(), nullptr));
    machine_.fill(found, 0, static_cast<std::size_t>(n));
    Sorted sorted = sort_by_slot(rows.get(), n);
    run(EraseRuns{memory_.store, sorted.runs, found, &counters_.get()->size});
    if (!settings_.versions) return;
    std::vector<std::uint64_t> k = host(keys.data, n);
    const std::vector<std::uint8_t> f = host(found, n);
    std::size_t kept = 0;
    for (std::size_t i = 0; i < k.size(); ++i) {
      if (f[i] != 0) k[kept++] = k[i];
    }
    erasures_.note(generation_, k.data(), kept);
  }

  void clear() override {
    const auto entered = machine_.enter();
    machine_.fill(memory_.store.digests, 0, static_cast<std::size_t>(slots()));
    machine_.fill(&counters_.get()->size, 0, 8);
    forget_erased(generation_);
  }

  void reserve(std::int64_t rows) override {
    const auto entered = machine_.enter();
    const std::int64_t wanted = buckets_for(std::min(rows, settings_.max_rows));
    while (static_cast<std::int64_t>(memory_.store.buckets) < wanted && can_grow()) grow();
  }

  std::int64_t expire(std::uint32_t time) override {
    const auto entered = machine_.enter();
    std::int64_t expired = 0;
    if (time == 0) return 0;
    for (std::int64_t begin = 0; begin < slots(); begin += kScanned) {
      const std::int64_t n = std::min(kScanned, slots() - begin);
      const auto flags = take<std::uint8_t>(n);
      const auto which = take<std::uint32_t>(n);
      run_each(n, FlagSlots{memory_.store, begin, 0, time, flags.get()});
      const std::int64_t m = select(flags.get(), n, which.get());
      if (m == 0) continue;
      const auto keys = take<std::uint64_t>(m);
      run_each(m, EraseSlots{memory_.store, begin, which.get(), keys.get()});
      add_size(-m);
      expired += m;
      if (settings_.versions) erasures_.note(generation_, host(keys.get(), m).data(), static_cast<std::size_t>(m));
    }
    return expired;
  }

  std::int64_t export_rows(std::int64_t begin, std::int64_t end, std::uint64_t since, const Export& out) override {
    const auto entered = machine_.enter();
    const std::int64_t n = std::min(end, slots()) - begin;
    if (n <= 0 || since > 0xFFFFFFFFu) return 0;
    const auto flags = take<std::uint8_t>(n);
    const auto which = take<std::uint32_t>(n);
    run_each(n, FlagSlots{memory_.store, begin, static_cast<std::uint32_t>(since), 0, flags.get()});
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

  void import_rows(Keys given, const Export& in, bool beyond) override {
    const std::int64_t n = given.count;
    check_count(n);
    const auto entered = machine_.enter();
    if (n == 0) return;
    const auto keys = sent(given.data, n);
    const auto values = sent_rows(in.values, n, shape_.value_bytes);
    const bool with_state = in.state.data != nullptr && shape_.states > 0;
    const auto state = with_state ? sent_rows(in.state, n, shape_.states * 4) : Held<Machine, char>{};
    const bool exact = in.scores != nullptr && evicts();
    const auto scores = exact ? sent(in.scores, n) : Held<Machine, std::uint64_t>{};
    const auto times = in.times != nullptr ? sent(in.times, n) : Held<Machine, std::uint32_t>{};
    const auto rows = take<std::uint32_t>(n);
    UpsertCall call;
    call.keys = {keys.get(), n};
    call.values = {values.get(), shape_.value_bytes};
    call.stamp.scores = scores.get();
    call.rows = rows.get();
    upsert_now(call, exact, beyond && !evicts());
    if (!with_state && times.get() == nullptr) return;
    Sorted sorted = sort_by_slot(rows.get(), n);
    run(RestoreRuns{memory_.store, shape_, sorted.runs,
                    with_state ? matrix_of(state.get(), shape_.states * 4, shape_.states * 4) : Matrix{}, times.get()});
  }

  void take_evicted(std::uint64_t* keys, Values values, std::uint64_t* scores) override {
    const auto entered = machine_.enter();
    const auto m = static_cast<std::size_t>(evicted_);
    if (m == 0) return;
    machine_.copy(keys, gone_keys_.get(), m * 8);
    machine_.copy(scores, gone_scores_.get(), m * 8);
    machine_.copy(values.data, gone_values_.get(), m * static_cast<std::size_t>(shape_.value_bytes));
    drop_evicted();
  }

  void pool(const table::Bags& bags, const Pooled& pooled) override {
    const auto entered = machine_.enter();
    const bool wide = pooled.dtype == Dtype::kFloat32;
    const bool plain = bags.offsets == nullptr && bags.weights == nullptr && bags.pool == table::Pool::kSum;
    if (plain && !(wide && shape_.dtype != Dtype::kFloat32)) {
      const Matrix values = matrix(pooled.out, shape_.value_bytes);
      Find find = finder(bags.keys, bags.rows, values, nullptr, nullptr, nullptr, nullptr);
      find.sizes = pooled.sizes;
      run(find);
      return;
    }
    with_row_type(shape_.dtype, [&](auto storage) {
      using Storage = decltype(storage);
      if (wide)
        run(gpu::Pool<Storage, float>{memory_.store, shape_, {bags}, pooled});
      else
        run(gpu::Pool<Storage, Storage>{memory_.store, shape_, {bags}, pooled});
    });
  }

  void weight_gradient(const table::Bags& bags, Values kept, const float* grad, std::int64_t grad_stride,
                       float* out) override {
    const auto entered = machine_.enter();
    with_row_type(shape_.dtype, [&](auto storage) {
      run(WeightGradient<decltype(storage)>{shape_, {bags}, kept, grad, grad_stride, out});
    });
  }

  std::int64_t update(const table::Bags& bags, const Update& update, bool counts) override {
    const std::int64_t n = bags.keys.count;
    check_count(n);
    const auto entered = machine_.enter();
    if (n == 0) return 0;
    const auto rows = take<std::uint32_t>(n);
    machine_.fill(&counters_.get()->missing, 0, 4);
    run(finder(bags.keys, bags.rows, {}, nullptr, nullptr, rows.get(), &counters_.get()->missing));
    WriteCall write = write_call(Write::kUpdate, stamp(update.stamp, false));
    write.update = update;
    write.bags = {bags};
    write_rows(write, rows.get(), n);
    return counts ? counters().missing : 0;
  }

  std::vector<std::uint64_t> erased_since(std::uint64_t since) override {
    const auto erased = erasures_.since(since);
    std::vector<std::uint64_t> keys(erased.begin(), erased.end());
    if (keys.empty()) return keys;
    const auto entered = machine_.enter();
    const auto n = static_cast<std::int64_t>(keys.size());
    const auto on_device = sent(keys.data(), n);
    const auto found = take<std::uint8_t>(n);
    run(finder({on_device.get(), n}, nullptr, {}, found.get(), nullptr, nullptr, nullptr));
    const std::vector<std::uint8_t> there = host(found.get(), n);
    std::size_t kept = 0;
    for (std::size_t i = 0; i < keys.size(); ++i) {
      if (there[i] == 0) keys[kept++] = keys[i];
    }
    keys.resize(kept);
    return keys;
  }
  void forget_erased(std::uint64_t until) override { erasures_.forget(until); }
  bool changed_since(std::uint64_t since) override {
    bool is = erasures_.any_since(since);
    for (std::int64_t b = 0; !is && b < slots(); b += kScanned) is = export_rows(b, b + kScanned, since, {}) > 0;
    return is;
  }
  void erase_host(Keys keys, std::uint8_t* found) override {
    const std::int64_t n = keys.count;
    if (n == 0) return;
    const auto entered = machine_.enter();
    const auto k = sent(keys.data, n);
    const auto f = take<std::uint8_t>(n);
    erase({k.get(), n}, f.get());
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
  template <class Item>
  void run_each(std::int64_t n, const Item& item) {
    run(EachLane<Item>{item, n});
  }
  static Matrix matrix(Values rows, std::int64_t bytes) {
    return rows.data == nullptr ? Matrix{} : matrix_of(rows.data, rows.stride, bytes);
  }
  Find finder(Keys keys, const std::uint32_t* given, Matrix values, std::uint8_t* found, std::uint64_t* scores,
              std::uint32_t* rows, std::uint32_t* missing) const {
    return {memory_.store, shape_, keys.data, given, keys.count, values, found, scores, rows, nullptr, missing};
  }
  Stamp stamp(const table::Stamp& given, bool exact) {
    if (tick_ + 1 >= kMostTicks && settings_.strategy == Strategy::kEpochLru) {
      run_each(slots(), Renumber{memory_.store});
      tick_ = kMostTicks - kTicksTaken;
    }
    return {given.scores, given.epoch, ++tick_, given.time, static_cast<std::uint32_t>(generation_), exact};
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
    with_row_type(shape_.dtype, [&](auto storage) {
      using Storage = decltype(storage);
      run(WritePieces<Storage>{{call}});
      if (n > kTile) run(WriteSpans<Storage>{{call}});
    });
  }

  void upsert_now(const UpsertCall& call, bool exact, bool beyond = false) {
    const std::int64_t n = call.keys.count;
    check_count(n);
    drop_evicted();
    const Stamp now = stamp(call.stamp, exact);
    if (n == 0) return;
    machine_.fill(&counters_.get()->missing, 0, 4);
    run(finder(call.keys, nullptr, {}, call.found, nullptr, call.rows, &counters_.get()->missing));
    Unknown unknown;
    if (const std::int64_t m = counters().missing; m > 0) {
      unknown = sorted_misses(call, m);
      if (call.ask != nullptr) ask(call, unknown);
      if (unknown.misses.d > 0 && make_room(unknown.misses, beyond)) {
        run(finder(call.keys, nullptr, {}, nullptr, nullptr, call.rows, nullptr));
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
    with_row_type(shape_.dtype, [&](auto storage) {
      run(FillRows<decltype(storage)>{memory_.store, shape_, misses, now, values, slot_of.get()});
    });
    run(PlaceRows{misses, slot_of.get(), call.rows, call.found});
    if (evicts()) run_each(n, ConfirmRows{memory_.store, call.keys.data, call.rows});
    if (!call.keep_evicted) drop_evicted();
  }

  void write_known(const UpsertCall& call, const Stamp& now, const Matrix& values) {
    const bool in_order = now.exact || counts_uses(shape_, now) || settings_.strategy == Strategy::kCustom;
    if (values.data != nullptr || in_order) {
      WriteCall write = write_call(values.data != nullptr ? Write::kAssign : Write::kTouch, now);
      write.values = values;
      write_rows(write, call.rows, call.keys.count);
    } else if (evicts() || settings_.times) {
      run_each(call.keys.count, TouchEach{memory_.store, shape_, now, call.rows});
    }
  }

  Unknown sorted_misses(const UpsertCall& call, std::int64_t m) {
    Unknown u{take<std::uint64_t>(m), take<std::uint32_t>(m), take<std::uint32_t>(m), {}};
    {
      const std::int64_t n = call.keys.count;
      const auto flags = take<std::uint8_t>(n);
      run_each(n, FlagMisses{call.rows, flags.get()});
      machine_.select(flags.get(), n, u.positions.get(), &counters_.get()->selected, scratch_);
      run_each(m, HashMisses{call.keys.data, u.positions.get(), u.hashes.get(), settings_.hash_seed});
      machine_.sort_hashes(u.hashes.get(), u.positions.get(), m, scratch_);
    }
    distinguish(call, u, m);
    return u;
  }
  void distinguish(const UpsertCall& call, Unknown& u, std::int64_t m) {
    u.misses = {call.keys.data, u.hashes.get(), u.positions.get(), u.firsts.get(), m, 0};
    if (m == 0) return;
    const auto flags = take<std::uint8_t>(m);
    run_each(m, FlagDistinct{u.hashes.get(), flags.get()});
    u.misses.d = select(flags.get(), m, u.firsts.get());
  }

  // Leaves those that are let in.
  void ask(const UpsertCall& call, Unknown& u) {
    const std::int64_t m = u.misses.m, d = u.misses.d;
    const auto distinct = take<std::uint64_t>(d);
    run_each(d, DistinctKeys{u.misses, distinct.get()});
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
      if (!evicts() && too_many && !beyond) throw TableFull();
      if (static_cast<std::int64_t>(c.fullest) <= most()) return grew;
      if (!can_grow()) {
        if (!evicts()) throw TableFull();
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
    with_row_type(shape_.dtype, [&](auto storage) {
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

  BucketPlan plan_;
  Shape shape_;
  Buffers<Machine> keep_;  // the table itself
  Held<Machine, Counters> counters_;
  Held<Machine, float> initial_;
  Memory memory_;
  Held<Machine, std::uint64_t> gone_keys_, gone_scores_;
  Held<Machine, char> gone_values_;
  Erasures erasures_;
};

}  // namespace hotloop::table::gpu

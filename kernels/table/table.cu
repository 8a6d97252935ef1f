// The table on a CUDA device: basic_table.cuh over machine.cuh, behind a class without CUDA in it.
#include "kernels/table/table_cuda.hpp"

#include "kernels/table/basic_table.cuh"
#include "kernels/table/machine.cuh"

namespace hotloop::table::gpu {

class CudaTable::Impl : public BasicTable<CudaMachine> {
 public:
  using BasicTable::BasicTable;
};

CudaTable::CudaTable(const Settings& settings, int device, void* stream)
    : impl_(std::make_unique<Impl>(settings, CudaMachine(device, static_cast<cudaStream_t>(stream)))) {}
CudaTable::~CudaTable() = default;

void CudaTable::use(void* stream) { impl_->machine().use(static_cast<cudaStream_t>(stream)); }

const Settings& CudaTable::settings() const { return impl_->settings(); }
std::int64_t CudaTable::row_bytes() const { return impl_->shape().stride; }
std::int64_t CudaTable::states() const { return impl_->shape().states; }
std::int64_t CudaTable::size() { return impl_->size(); }
std::int64_t CudaTable::capacity() const { return impl_->capacity(); }
std::int64_t CudaTable::slots() const { return impl_->slots(); }
std::int64_t CudaTable::bytes() const { return impl_->bytes(); }
std::uint64_t CudaTable::tick() const { return impl_->tick(); }
void CudaTable::set_tick(std::uint64_t tick) { impl_->set_tick(tick); }
std::uint64_t CudaTable::generation() const { return impl_->generation(); }
void CudaTable::set_generation(std::uint64_t g) { impl_->set_generation(g); }
std::uint64_t CudaTable::mark() { return impl_->mark(); }

void CudaTable::find(Keys keys, Rows values, std::uint8_t* found, std::uint64_t* scores) {
  impl_->find(keys.data, keys.count, values, found, scores);
}
void CudaTable::locate(Keys keys, std::uint32_t* rows) { impl_->locate(keys.data, keys.count, rows); }
void CudaTable::upsert(const UpsertCall& call) { impl_->upsert(call); }
void CudaTable::assign(Keys keys, Rows values, const Moment& moment, bool accumulate, std::uint8_t* found) {
  impl_->assign(keys.data, keys.count, values, moment, accumulate, found);
}
void CudaTable::erase(Keys keys, std::uint8_t* found) { impl_->erase(keys.data, keys.count, found); }
void CudaTable::erase_host(Keys keys, std::uint8_t* found) { impl_->erase_host(keys.data, keys.count, found); }
void CudaTable::clear() { impl_->clear(); }
void CudaTable::reserve(std::int64_t rows) { impl_->reserve(rows); }
std::int64_t CudaTable::expire(std::uint32_t time) { return impl_->expire(time); }
std::int64_t CudaTable::export_rows(std::int64_t begin, std::int64_t end, std::uint64_t since, const HostRows& out) {
  return impl_->export_rows(begin, end, since, out);
}
void CudaTable::import_rows(Keys keys, const HostRows& in, bool beyond) { impl_->import_rows(keys.count, in, beyond); }
std::int64_t CudaTable::evicted() const { return impl_->evicted(); }
void CudaTable::take_evicted(std::uint64_t* keys, Rows values, std::uint64_t* scores) {
  impl_->take_evicted(keys, values, scores);
}
void CudaTable::pool(const BagCall& call, Rows out, bool wide, std::int64_t* sizes, std::int64_t* largest) {
  impl_->pool(call, out, wide, sizes, largest);
}
void CudaTable::weight_gradient(const BagCall& call, Rows kept, const float* grad, std::int64_t grad_stride,
                                float* out) {
  impl_->weight_gradient(call, kept, grad, grad_stride, out);
}
std::int64_t CudaTable::update(const BagCall& call, const UpdateCall& update) { return impl_->update(call, update); }
std::vector<std::uint64_t> CudaTable::erased_since(std::uint64_t since) { return impl_->erased_since(since); }
void CudaTable::forget_erased(std::uint64_t until) { impl_->forget_erased(until); }
bool CudaTable::changed_since(std::uint64_t since) { return impl_->changed_since(since); }

}  // namespace hotloop::table::gpu

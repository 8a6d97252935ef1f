#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>

#include "bind/arguments.hpp"
#include "bind/decode_arguments.hpp"
#include "bind/register.hpp"
#include "kernels/decode/decode_cuda.hpp"

namespace hotloop::bind {

namespace {

using namespace hotloop::decode;

// workspace: a function of two numbers of bytes to a uint8 array of at least the first, of which the second, from the
// start on, were zeroed when it was allocated; `stream` is a cudaStream_t.
CudaTarget target_of(Arguments& a, const py::function& workspace, std::int64_t width, std::int64_t biases, int device,
                     std::uintptr_t stream) {
  const WorkspaceBytes wanted = decode_workspace_bytes(device, width, biases);
  const View& bytes = a.bytes(workspace(wanted.all, wanted.zeroed), "workspace");
  if (reinterpret_cast<std::uintptr_t>(bytes.data) % 256 != 0) a.fail("workspace", "expected a multiple of 256 bytes");
  return {bytes.data, bytes.shape[0], device, reinterpret_cast<void*>(stream)};
}
CudaTarget target_of(Arguments& a, const py::function& workspace, const VerifyCall& call, int device,
                     std::uintptr_t stream) {
  return target_of(a, workspace, call.width, call.target.biases + call.draft.biases, device, stream);
}

void run_chain(bool whole_block, std::int64_t batch, std::int64_t width, const py::object& ids, const py::tuple& target,
               const py::object& draft, const py::object& lengths, const py::object& seed, const py::object& offset,
               const py::tuple& outputs, const py::function& workspace, int device, std::uintptr_t stream) {
  Arguments a(whole_block ? "block_speculative_sampling" : "chain_speculative_sampling", kMostArrays, dlpack::kCuda);
  VerifyCall call;
  verify_arguments(a, call, ids, batch, width, width + 1, target, draft, width, lengths, seed, offset, outputs);
  const CudaTarget where = target_of(a, workspace, call, device, stream);
  py::gil_scoped_release release;
  whole_block ? block_cuda(call, where) : chain_cuda(call, where);
}

void run_tree(std::int64_t batch, std::int64_t width, std::int64_t depth, const py::object& ids,
              const py::object& parents, const py::tuple& target, const py::object& draft, bool replacement,
              const py::object& lengths, const py::object& seed, const py::object& offset, const py::tuple& outputs,
              const py::object& nodes, const py::function& workspace, int device, std::uintptr_t stream) {
  Arguments a("tree_speculative_verify", kMostArrays, dlpack::kCuda);
  TreeCall call;
  tree_arguments(a, call, batch, width, depth, ids, parents, target, draft, replacement, lengths, seed, offset, outputs,
                 nodes);
  const CudaTarget where = target_of(a, workspace, call, device, stream);
  py::gil_scoped_release release;
  tree_cuda(call, where);
}

void run_sample(std::int64_t batch, std::int64_t rows, const py::tuple& law, const py::object& seed,
                const py::object& offset, const py::object& ids, const py::object& logps, const py::function& workspace,
                int device, std::uintptr_t stream) {
  Arguments a("sample", kMostArrays, dlpack::kCuda);
  SampleCall call;
  sample_arguments(a, call, batch, rows, law, seed, offset, ids, logps);
  const CudaTarget where = target_of(a, workspace, 0, call.law.biases, device, stream);
  py::gil_scoped_release release;
  sample_cuda(call, where);
}

}  // namespace

HOTLOOP_BIND(decode) {
  def(m, "chain", &run_chain,
      "whole_block batch width ids target draft lengths seed offset outputs workspace device stream");
  def(m, "tree", &run_tree,
      "batch width depth ids parents target draft replacement lengths seed offset outputs nodes workspace device "
      "stream");
  def(m, "sample", &run_sample, "batch rows law seed offset ids logps workspace device stream");
}

}  // namespace hotloop::bind

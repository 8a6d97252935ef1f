// SPDX-License-Identifier: Apache-2.0
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

struct Cuda {
  static constexpr std::int32_t kDevice = dlpack::kCuda;
  static constexpr auto chain = &chain_cuda, block = &block_cuda;
  static constexpr auto tree = &tree_cuda;

  template <class Call>
  static void verify(Arguments& a, const Call& call, void (*loop)(const Call&, const CudaTarget&),
                     const py::function& workspace, int device, std::uintptr_t stream) {
    run(a, call, loop, call.width, call.target.biases + call.draft.biases, workspace, device, stream);
  }
  static void sample(Arguments& a, const SampleCall& call, const py::function& workspace, int device,
                     std::uintptr_t stream) {
    run(a, call, &sample_cuda, 0, call.law.biases, workspace, device, stream);
  }

 private:
  // workspace: a function of two numbers of bytes to a uint8 array of at least the first, of which the second, from the
  // start on, were zeroed when it was allocated; `stream` is a cudaStream_t.
  template <class Call>
  static void run(Arguments& a, const Call& call, void (*loop)(const Call&, const CudaTarget&), std::int64_t width,
                  std::int64_t biases, const py::function& workspace, int device, std::uintptr_t stream) {
    const WorkspaceBytes wanted = decode_workspace_bytes(device, width, biases);
    const View& bytes = a.bytes(workspace(wanted.all, wanted.zeroed), "workspace");
    if (reinterpret_cast<std::uintptr_t>(bytes.data) % 256 != 0) {
      a.fail("workspace", "expected a multiple of 256 bytes");
    }
    py::gil_scoped_release release;
    loop(call, {bytes.data, bytes.shape[0], device, reinterpret_cast<void*>(stream)});
  }
};

}  // namespace

HOTLOOP_BIND(decode) {
  DecodeLoops<Cuda, const py::function&, int, std::uintptr_t>::define(m, "workspace device stream");
}

}  // namespace hotloop::bind

// SPDX-License-Identifier: Apache-2.0
}  // namespace hotloop::HOTLOOP_SIMD_NAMESPACE

#if HOTLOOP_SIMD_LEVEL > 0 && defined(__clang__)
#pragma clang attribute pop
#endif

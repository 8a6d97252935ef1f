# SPDX-License-Identifier: Apache-2.0
"""hotloop inside other libraries. Each module needs its library; importing one replaces nothing outside it."""

# SPDX-License-Identifier: Apache-2.0
"""Benches of hotloop against the public rivals. ``python -m bench --help`` says how to run them."""

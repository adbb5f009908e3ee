# SPDX-License-Identifier: Apache-2.0
"""The model outside torch: its weights as ONNX files, and how to answer with them (docs/elsewhere.md)."""

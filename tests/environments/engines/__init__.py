# SPDX-License-Identifier: Apache-2.0
"""The page in headless Chromium, batches on Ray Data and quantization, with everything they need installed."""

# SPDX-License-Identifier: Apache-2.0
"""vLLM serving converted folders. The folder is not called `vllm`: it would hide the library."""

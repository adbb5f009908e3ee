# SPDX-License-Identifier: Apache-2.0
"""The page in the browser; `app.py` starts it. Nothing is fetched from the Hub, and nothing is reported to anyone."""

import os

# Before gradio and transformers are imported: both read these once.
os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_RUN_HISTORY": "False", "HF_HUB_OFFLINE": "1"}

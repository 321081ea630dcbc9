"""Set-up of every test: no network, and as many threads as tiny tensors can use."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported, so before any test
# Handing tiny tensors to a pool costs more than it saves, here and in what the tests start.
os.environ["OMP_NUM_THREADS"] = "1"

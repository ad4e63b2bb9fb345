"""One thread, no hub, the same in every process of the test run."""

import os

from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

# A busy machine is slow, not wrong: how long an example takes proves nothing.
settings.register_profile("rankwise", deadline=None)
settings.load_profile("rankwise")

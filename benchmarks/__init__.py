"""What genfuse costs, always beside what plain PyTorch and torch.compile cost in the same run."""

import os

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or else the profiler, the memory meter, writes lines for each call

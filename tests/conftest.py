"""One thread per test process: tiny models gain nothing from more, and runs side by side lose."""

import torch

torch.set_num_threads(1)

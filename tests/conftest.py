"""What every test file shares."""

import torch

torch.set_num_threads(1)  # small tables: more threads only wait for each other

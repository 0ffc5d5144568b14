"""Settings that every test shares."""

import os

# One thread each: on shared cores a second OpenMP thread costs more waiting than it computes, and
# results do not depend on how many cores the machine has.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

torch.set_num_threads(1)

"""Every test runs offline, on two threads, in plain torch."""

import os
import signal

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_WAIT_POLICY"] = "passive"
os.environ["HF_LOWRANK_KERNELS"] = "off"  # plugin and remote code are compared bit for bit; tests/kernels loads them
os.environ.setdefault(
    "TRITON_INTERPRET", "1"
)  # before anything imports Triton; 0 on a machine with a GPU lets the GPU compute
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch

torch.set_num_threads(2)
signal.signal(
    signal.SIGINT, signal.default_int_handler
)  # a shell's background jobs, and their children, are started deaf to it

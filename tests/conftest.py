"""Every test runs offline, on two threads, in plain torch."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_WAIT_POLICY"] = "passive"
os.environ["HF_LOWRANK_KERNELS"] = "off"  # plugin and remote code are compared bit for bit; tests/kernels loads them
os.environ.setdefault(
    "TRITON_INTERPRET", "1"
)  # before anything imports Triton; set it to 0 on a machine with a GPU, for the GPU to compute
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch

torch.set_num_threads(2)

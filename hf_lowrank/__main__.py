"""`python -m hf_lowrank` is `hf-lowrank`."""

from hf_lowrank_command import main

main()

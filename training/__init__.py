"""The command line in a checkout, `python -m training`; the code is in uasparse_kernels/training."""

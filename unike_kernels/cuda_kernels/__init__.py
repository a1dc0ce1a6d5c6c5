"""The launchers of csrc's kernels: one file per operator, beside the Triton ones, which take what these refuse."""

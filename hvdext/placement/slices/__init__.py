"""Slices: one layer's weights cut across ranks (tensor parallelism).

As in Megatron-LM (Shoeybi et al. 2019, arXiv:1909.08053). `operators` holds the exchanges and their
gradients, `layer` what all cut layers share, the files named after layers the layers; `rules` and `slicing`
turn a model into a cut one, `updates` tells optimizers about it, `saving` puts it together again.
"""

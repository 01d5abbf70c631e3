"""Training one SAE in many processes, each with a share of the latents (docs/scale.md).

Under torchrun each process holds ``d_sae / N`` latents: their columns of W_enc, rows of W_dec,
b_enc and Adam's state. All processes have ``b_dec`` and know which latents fired in a batch. Every
process sees the whole batch, and the result is the same as with one process.
"""

"""Training one SAE in many processes, each with a share of the latents (docs/scale.md).

Under torchrun each process holds ``d_sae / N`` latents: their columns of W_enc, rows of W_dec,
b_enc and Adam's state. ``b_dec`` and what fired in a batch are known to all. Every process sees
the whole batch, and what comes out is what one process would have computed.
"""

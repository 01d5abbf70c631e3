"""``sae-lens-auxk compare``: variants trained side by side on the same activations.

``plan`` says what is compared, ``sources`` what on, ``train`` trains it in lockstep, ``measure``
measures it, ``run`` does all of it pass by pass and keeps the results.
"""

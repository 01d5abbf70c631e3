"""``sae-lens-auxk compare``: variants trained side by side on the same activations.

``config`` has the fields of a comparison, ``cases`` turns them into SAE configs, and ``checks``
fills in defaults and checks values. ``sources`` provides the data, ``train`` trains in lockstep,
``measure`` measures, ``run`` does all this pass by pass and keeps the results, and ``report`` shows
them.
"""

"""``sae-lens-auxk compare``: variants trained side by side on the same activations.

``plan`` has the fields of a comparison, ``cases`` what they stand for, and ``resolve`` their
defaults and what is refused. ``sources`` says what on, ``train`` trains in lockstep, ``measure``
measures, ``run`` does all of it pass by pass and keeps the results, ``report`` shows them.
"""

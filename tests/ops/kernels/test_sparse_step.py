"""A training step that is made of kernels against SAELens's dense one."""

import pytest
import torch

from tests.helpers import assert_sparse_step_equals_dense

if torch.cuda.is_available():
    pytest.skip("test_cuda.py compares the steps of a GPU", allow_module_level=True)


# The interpreter takes a millisecond for each program of a kernel.
@pytest.mark.parametrize(
    ("architecture", "variant", "d_sae"),
    [
        ("auxk-topk", "auxk", 256),
        ("auxk-batchtopk", "auxk", 256),
        ("auxk-abstopk", "auxk", 256),
        ("auxk-abstopk", "pre_activation", 96),
        ("auxk-topk", "reanimation", 96),
        ("auxk-topk", "ghost_gradients", 96),
        ("auxk-topk", "pre_activation", 96),
        ("auxk-topk", "straight_through", 96),
    ],
)
def test_the_sparse_step_equals_the_dense_one(architecture: str, variant: str, d_sae: int) -> None:
    assert_sparse_step_equals_dense(architecture, variant, d_sae)

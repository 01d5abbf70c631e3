"""Adam in one kernel on a GPU.

From some 100,000 latents on, most of a training step is Adam. torch's default makes several passes
over weights and moments where its fused kernel makes one; both compute the same up to rounding.
SAELens's trainer asks for neither. A checkpoint stays as it is, so that it resumes anywhere.

The environment variable ``SAE_LENS_AUXK_FUSED=0`` turns this off.
"""

import os
from typing import Any

import torch


def fuse(optimizer: torch.optim.Optimizer) -> None:
    """Let an Adam that was not told how to compute use its fused kernel.

    It is set for the time of a step: loading a checkpoint replaces the groups, and what is saved
    should say what SAELens set. A group with ``foreach`` or ``fused`` set stays as it is.
    """
    if os.environ.get("SAE_LENS_AUXK_FUSED") == "0" or type(optimizer) is not torch.optim.Adam:
        return
    ours: list[dict[str, Any]] = []

    def give_back(*_: Any) -> None:
        for group in ours:
            group["fused"] = None
        ours.clear()

    def set_fused(*_: Any) -> None:
        give_back()  # where the last step raised an error
        for group in optimizer.param_groups:
            if group["fused"] is None and group["foreach"] is None:
                group["fused"] = True
                ours.append(group)
                for parameter in group["params"]:
                    if state := optimizer.state.get(parameter):
                        # The kernel reads float32, whatever the default was when it was made.
                        state["step"] = state["step"].to(parameter.device, torch.float32)

    def as_saelens_has_it(_: Any, saved: dict[str, Any]) -> None:
        for group in saved["param_groups"] if ours else ():  # where a step was interrupted
            group["fused"] = None
        for key, state in saved["state"].items():
            if "step" in state:
                saved["state"][key] = {**state, "step": state["step"].cpu()}

    optimizer.register_step_pre_hook(set_fused)
    optimizer.register_step_post_hook(give_back)
    optimizer.register_state_dict_post_hook(as_saelens_has_it)

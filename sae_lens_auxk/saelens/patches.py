"""The two methods of SAELens that importing this package changes.

Both are constructors, and both leave SAEs of other packages alone. SAELens offers no other place:
it tells an SAE nothing of the run that it is trained in, nor a trainer of the optimizer's step.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

from sae_lens import LanguageModelSAETrainingRunner, SAETrainer

from sae_lens_auxk.saelens.pretrained import sae_to_go_on_from
from sae_lens_auxk.saelens.resume import require_resumable


def patch_saelens(ours: type[Any], fit_to_run: Callable[[Any], None]) -> None:
    """Fit this package's SAEs to each new trainer; make runners use ``from_pretrained_path``.

    A runner also refuses a ``resume_from_checkpoint`` of another SAE.

    Args:
        ours: the class of this package's configs.
        fit_to_run: called with each new trainer whose SAE has such a config.
    """

    def new_trainer(init: Callable[..., None], self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        if isinstance(self.sae.cfg, ours):
            fit_to_run(self)

    def new_runner(init: Callable[..., None], self: Any, *args: Any, **kwargs: Any) -> None:
        given = inspect.signature(init).bind(self, *args, **kwargs)
        cfg, sae = given.arguments["cfg"], given.arguments.get("override_sae")
        if sae is None:
            given.arguments["override_sae"] = sae = sae_to_go_on_from(cfg, ours)
        sae_cfg = cfg.sae if sae is None else sae.cfg
        if isinstance(sae_cfg, ours):
            require_resumable(cfg, sae_cfg)
        init(*given.args, **given.kwargs)

    _wrap_once(SAETrainer, "__init__", new_trainer)
    _wrap_once(LanguageModelSAETrainingRunner, "__init__", new_runner)


def _wrap_once(owner: type[Any], name: str, wrapper: Callable[..., Any]) -> None:
    """Make ``owner.name(...)`` call ``wrapper(method, self, ...)`` with the original method.

    A method that is already wrapped is left alone, for example if the package is imported again.
    """
    method = getattr(owner, name)
    if hasattr(method, "wrapped_by_sae_lens_auxk"):
        return

    @functools.wraps(method)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        return wrapper(method, self, *args, **kwargs)

    wrapped.wrapped_by_sae_lens_auxk = True  # type: ignore[attr-defined]
    setattr(owner, name, wrapped)

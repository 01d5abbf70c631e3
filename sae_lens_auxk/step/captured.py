"""The sparse step as two CUDA graphs: one launch forward, one backward.

Up to some 50,000 latents Python needs longer to launch a step's hundred kernels than a GPU to run
them. A captured step is launched at once. Forward and backward are captured from the ordinary
step, which is a function of tensors, so there is no second version of anything.

- A step is captured where several times in a row the device was less than a step behind Python, so
  never where it is busy anyway. A new shape, setting or weight is another graph. So is another
  bound on the number of dead latents, unless the old one holds them with at most half of it to
  spare.
- Graphs of one thread share their memory (:class:`~sae_lens_auxk.step.arena.Arena`), so that they
  must not overlap: while the loss of another step waits for its backward pass, steps are ordinary.
  Gradients lie in that memory too. What a parameter still holds at the next step is copied first;
  if somebody else holds one, the step is ordinary. All else that a step returns is a copy
  (``hidden_pre``, which is as large as all gradients, when it is read).
- Where a capture fails, steps are ordinary from then on. It computes nothing, so nothing has to be
  restored. Other threads may use the device meanwhile. But torch raises an error in one that draws
  random numbers on it or waits for all of it.

The environment variable ``SAE_LENS_AUXK_GRAPH=0`` turns this off. It is read when an SAE is made.
"""

import gc
import os
import threading
import weakref
from abc import ABC
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import Any, Generic

import torch
from typing_extensions import override

from sae_lens_auxk.ops.encoder import SelectedActivations
from sae_lens_auxk.ops.matrices import refuse_second_derivative
from sae_lens_auxk.saelens.names import InterruptedException, TrainStepOutput, logger
from sae_lens_auxk.step.arena import Arena, Place, arena_of, capture, nothing_else_is_freed
from sae_lens_auxk.step.inputs import StepInput

CLOSE_STEPS = 5
"""So many times in a row the device must have been close behind before a step is captured."""

CALLED = (
    *("_step", "_sparse_forward", "_sparse_step", "_after_sparse_step", "_aux_loss", "_count"),
    *("_record", "_levels", "_encoder", "_decoder", "_access", "_select", "_activations"),
    *("_decode_levels", "firing_threshold", "nearness", "fire", "update_topk_threshold"),
)
"""Methods that a sparse step calls: set on an SAE, one may decide something in Python."""

_CAPTURES = threading.Lock()
"""One at a time: it begins by waiting for the device, which another capture forbids."""


class CapturedStep:
    """The graphs of one SAE, and whether it uses them."""

    def __init__(self) -> None:
        self._off = os.environ.get("SAE_LENS_AUXK_GRAPH") == "0"
        self._graphs: dict[Any, Graph] = {}
        self._setting: Any = None
        self._seen = set[Any]()
        self._n_close = 0
        self._began: torch.cuda.Event | None = None
        self._has_collected = False
        self._said: set[str] = set()

    def step(self, sae: Any, batch: StepInput) -> TrainStepOutput | None:
        """Take a step by a graph; None if it has to be an ordinary one."""
        if self._off:
            return None
        try:
            graph = self._graph_for(sae, batch)
        # Whatever it is, the run must go on, but for somebody who wants to end it.
        except Exception as error:
            if _is_interruption(error):
                raise
            self._off, self._graphs = True, {}
            said = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            logger.warning(f"Training steps are not captured as CUDA graphs: {said[:300]}")
            return None
        return None if graph is None else graph.replay(batch)

    def _graph_for(self, sae: Any, batch: StepInput) -> "Graph | None":
        bound, rows = batch.dead_bound, batch.aux_rows
        if bound is None or not self._can_be_captured(sae, batch):
            return None
        setting = _setting(sae)
        if setting != self._setting:
            self._graphs, self._setting, self._seen, self._n_close = {}, setting, set(), 0
        shape = batch.sae_in.shape, batch.sae_in.dtype, bound == 0, rows is None or len(rows)
        graph = self._graphs.get(shape)
        # With a larger bound it computes the same, from more columns than it needs.
        if graph is not None and not bound <= graph.bound <= 2 * bound:
            graph = None
            del self._graphs[shape]  # before the next one needs memory
        if graph is None:
            graph = self._new_graph(sae, batch, bound, (shape, bound))
            if graph is None:
                return None
            self._graphs[shape] = graph
        if not graph.arena.take_back():
            self._say_once("a gradient, or an output without its backward pass, is still held")
            return None
        return graph

    def _can_be_captured(self, sae: Any, batch: StepInput) -> bool:
        return (
            batch.counts
            and len(batch.leading) == 1
            and torch.is_grad_enabled()
            and sae.cfg.aux_loss.capturable
            and sae.cfg.resolved_dead_criterion != "steps"  # SAELens makes a new mask at each step
            and _is_known(type(sae))
            and not any(name in vars(sae) for name in CALLED)
            and sae.mse_loss_fn.__module__.startswith("sae_lens.")
            and "parametrizations" not in sae._modules
            and torch.cuda.get_allocator_backend() == "native"
            and torch._C._len_torch_dispatch_stack() == 0
            and not torch.is_anomaly_enabled()
            and not torch.cuda.is_current_stream_capturing()
            and not (torch.distributed.is_available() and torch.distributed.is_initialized())
            and sae._can_be_sparse(batch.sae_in)
        )

    def _new_graph(self, sae: Any, batch: StepInput, bound: int, key: Any) -> "Graph | None":
        """Capture the step if the device was close behind in the last steps.

        And if one like it was taken, since what is compiled or loaded at first use cannot be
        captured.
        """
        if self._n_close < CLOSE_STEPS or key not in self._seen:
            is_close = self._device_is_close(batch.sae_in.device)
            self._n_close = self._n_close + 1 if is_close else 0
            self._seen.add(key)
            return None
        with _CAPTURES:
            if not self._has_collected:  # graphs of deleted SAEs, which hold memory
                gc.collect()
                self._has_collected = True
            return Graph(sae, batch, bound, arena_of(batch.sae_in.device))

    def _device_is_close(self, device: torch.device) -> bool:
        """Whether it has reached the beginning of the step before, when this one begins.

        One that is busy all the time is two steps behind: the host waits for a count of that step.
        """
        before, self._began = self._began, torch.cuda.Event()
        self._began.record(torch.cuda.current_stream(device))
        return before is not None and before.query()

    def _say_once(self, why: str) -> None:
        if why not in self._said:
            self._said.add(why)
            logger.info(f"Training steps are not captured as CUDA graphs where {why}")

    def __reduce__(self) -> tuple[type["CapturedStep"], tuple[()]]:
        # A copied SAE, or one sent to another process, has its weights elsewhere.
        return CapturedStep, ()


@cache
def _is_known(cls: type[Any]) -> bool:
    """Whether a class is the package's or SAELens's: one of your own may decide in Python."""
    known = ("sae_lens", "sae_lens_auxk", "transformer_lens", "torch")
    # By themselves: a class that is made by a call has the module of ABC.
    bases = (base for base in cls.__mro__ if base not in (ABC, Generic, object))
    return all(base.__module__.split(".")[0] in known for base in bases)


def _is_interruption(error: BaseException | None) -> bool:
    """Whether an error, or one that it replaced, is Ctrl-C or SAELens's signal to end a run."""
    while error is not None:
        if isinstance(error, InterruptedException) or not isinstance(error, Exception):
            return True
        error = error.__context__
    return False


def _setting(sae: Any) -> tuple[Any, ...]:
    """All that a graph takes for granted, and that may change between two steps."""
    tensors = [*sae._parameters.values(), *sae._buffers.values()]  # parameters() is slow
    matmul = torch.backends.cuda.matmul
    # Copies, as a list may be changed in place.
    cfg = {name: [*x] if isinstance(x, list) else x for name, x in vars(sae.cfg).items()}
    metadata = cfg.pop("metadata", None)
    return (
        cfg,
        sae.cfg.aux_loss,
        getattr(metadata, "fitted", None),
        [
            (id(x), x.data_ptr(), x.dtype, x.shape, x.stride(), x.requires_grad)
            for x in tensors
            if x is not None
        ],
        threading.get_ident(),
        sae.run_time_activation_norm_fn_in,
        sae.run_time_activation_norm_fn_out,
        sae.mse_loss_fn,
        torch.is_autocast_enabled("cuda"),
        torch.get_autocast_dtype("cuda"),
        # The older question is an error where somebody has used the newer setting.
        getattr(matmul, "fp32_precision", None) or torch.get_float32_matmul_precision(),
        matmul.allow_bf16_reduced_precision_reduction,
        matmul.allow_fp16_reduced_precision_reduction,
        torch.are_deterministic_algorithms_enabled(),
        torch.cuda.current_stream(sae.W_dec.device),
    )


class Graph:
    """One captured step: for one shape of the batch, one bound, one setting of the SAE."""

    def __init__(self, sae: Any, batch: StepInput, bound: int, arena: Arena):
        self.arena, self.bound, device = arena, bound, batch.sae_in.device
        self.parameters = [p for p in sae._parameters.values() if p is not None and p.requires_grad]
        self.inputs = {
            name: arena.input_like(name, value)
            for name in ("sae_in", "aux_rows")
            if (value := getattr(batch, name)) is not None
        }
        coefficient = torch.zeros((), dtype=torch.promote_types(sae.dtype, torch.float32))
        self.coefficient = arena.input_like("coefficient", coefficient.to(device))
        self.grad_loss = arena.input_like("grad_loss", self.coefficient)
        # Whoever holds their memory holds these two, not the weights.
        self.graphs = self.forward, self.backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        inputs = replace(batch, **self.inputs, coefficient=self.coefficient)
        autocast = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
        with torch.cuda.device(device), nothing_else_is_freed(), _stand_ins(sae) as leaves:
            with (
                capture(self.forward, arena),
                # A cached cast would outlive the graph.
                torch.autocast("cuda", autocast[1], autocast[0], cache_enabled=False),
            ):
                output = sae._step(inputs)
                self._keep(output)
            _refuse_other_leaves(output.loss, leaves)
            # As where the ordinary step's backward pass runs.
            with capture(self.backward, arena), torch.autocast("cuda", enabled=False):
                seed = self.grad_loss.to(output.loss.dtype)
                grads = torch.autograd.grad(output.loss, leaves, seed, allow_unused=True)
            self.grads = [None if grad is None else Place(grad) for grad in grads]

    def _keep(self, output: TrainStepOutput) -> None:
        """Note where the output lies; numbers of one dtype in one tensor, so that one copy does."""
        self.loss = output.loss.detach()
        numbers = {("losses", name): value for name, value in output.losses.items()}
        numbers |= {("metrics", name): value for name, value in output.metrics.items()}
        self.constants = {key: x for key, x in numbers.items() if not isinstance(x, torch.Tensor)}
        tensors = {key: x for key, x in numbers.items() if isinstance(x, torch.Tensor)}
        kinds = dict.fromkeys((x.dtype, x.requires_grad) for x in tensors.values())
        self.names = [
            [key for key, x in tensors.items() if (x.dtype, x.requires_grad) == kind]
            for kind in kinds
        ]
        self.numbers = [torch.stack([tensors[key].detach() for key in keys]) for keys in self.names]
        acts = output.feature_acts.detach()
        self.acts_shape = acts.shape
        self.acts = [acts] if not acts.is_sparse else [*acts._indices(), acts._values()]
        self.rows = [Place(output.sae_in), Place(output.sae_out)]
        self.hidden_pre = Place(output.hidden_pre)
        has_graph = [has for _, has in kinds]
        has_graph += [x.requires_grad for x in (output.sae_in, output.sae_out, output.feature_acts)]
        self.without_graph = [i for i, has in enumerate(has_graph) if not has]

    def replay(self, batch: StepInput) -> TrainStepOutput:
        """The step of ``batch``."""
        for name, static in self.inputs.items():
            static.copy_(getattr(batch, name))
        self.coefficient.fill_(batch.coefficient)
        loss, *others = _Replay.apply(self, *self.parameters)
        *numbers, sae_in, sae_out, feature_acts = others
        values: dict[Any, Any] = self.constants | {
            key: value
            for keys, same in zip(self.names, numbers, strict=True)
            for key, value in zip(keys, same.unbind(), strict=True)
        }
        output = _Output(
            sae_in=sae_in,
            sae_out=sae_out,
            feature_acts=feature_acts,
            hidden_pre=sae_out,  # the property gives another
            loss=loss,
            losses={name: x for (kind, name), x in values.items() if kind == "losses"},
            metrics={name: x for (kind, name), x in values.items() if kind == "metrics"},
        )
        output.graph, output.n_forwards = self, self.arena.n_forwards
        returned = (sae_in, sae_out, feature_acts, *output.losses.values())
        loss.grad_fn.returned = [weakref.ref(x) for x in returned]
        return output

    def outputs(self) -> list[torch.Tensor]:
        """Copies of what the forward pass has computed: the loss, numbers, tensors of all rows."""
        first, *others = [part.clone() for part in self.acts]
        if others:
            latents, values = others
            first = SelectedActivations.of(first, latents, values, self.acts_shape)
        rows = [place.tensor(self.graphs)[0] for place in self.rows]
        return [x.clone() for x in (self.loss, *self.numbers, *rows)] + [first]

    def gradients(self) -> list[torch.Tensor | None]:
        """What the backward pass has computed, lent to whoever takes it."""
        return [
            None if place is None else self.arena.lend(parameter, place, self.graphs)
            for parameter, place in zip(self.parameters, self.grads, strict=True)
        ]


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, graph: Graph, *parameters: torch.Tensor) -> Any:
        graph.forward.replay()
        ctx.graph, ctx.turn = graph, graph.arena.forward_was_run(ctx)
        ctx.versions = [parameter._version for parameter in parameters]
        ctx.set_materialize_grads(False)
        loss, *others = graph.outputs()
        ctx.mark_non_differentiable(*[others[i] for i in graph.without_graph])
        return loss, *others

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> Any:
        refuse_second_derivative()
        graph, arena = ctx.graph, ctx.graph.arena
        grad_loss, *others = grads
        alive = [x for reference in ctx.returned if (x := reference()) is not None]
        if (
            grad_loss is None
            or any(grad is not None for grad in others)
            or any(x._backward_hooks or x.retains_grad for x in alive)
        ):
            raise _refusal("only the step's loss has a gradient, not what it was computed from")
        if arena.turn != ctx.turn:
            raise _refusal("its backward pass must come once, before the next captured step")
        if ctx.versions != [parameter._version for parameter in graph.parameters]:
            raise _refusal("a weight was changed between its forward and its backward pass")
        arena.backward_was_run()
        graph.grad_loss.copy_(grad_loss)
        graph.backward.replay()
        return None, *graph.gradients()


class _Output(TrainStepOutput):
    """A captured step's output. ``hidden_pre`` is copied when it is read."""

    graph: Graph | None = None
    n_forwards: int = 0
    _given: torch.Tensor
    __repr__ = object.__repr__  # which reads nothing

    @property
    def hidden_pre(self) -> torch.Tensor:
        """(B, d_sae), readable until the next captured step in this thread."""
        if self.graph is None:
            return self._given
        if self.graph.arena.n_forwards != self.n_forwards:
            raise _refusal("its hidden_pre can be read until the next step only")
        copy = self.graph.hidden_pre.tensor(self.graph.graphs)[0].clone()
        return _Refused.apply(copy, *self.graph.parameters)  # type: ignore[no-any-return]

    @hidden_pre.setter
    def hidden_pre(self, value: Any) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        self._given, self.graph = value, None


class _Refused(torch.autograd.Function):
    @staticmethod
    @override
    def forward(ctx: Any, x: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:  # noqa: ARG004
        return x.view_as(x)

    @staticmethod
    @override
    def backward(ctx: Any, *grads: torch.Tensor | None) -> Any:
        raise _refusal("only the step's loss has a gradient, not its hidden_pre")


def _refusal(why: str) -> RuntimeError:
    return RuntimeError(
        f"this training step was captured as a CUDA graph, and {why}; set the environment variable "
        "SAE_LENS_AUXK_GRAPH=0 for ordinary steps"
    )


def _refuse_other_leaves(loss: torch.Tensor, leaves: list[torch.nn.Parameter]) -> None:
    """Raise an error if the loss has a gradient to something that is no parameter of the SAE."""
    known, seen, waiting = {id(leaf) for leaf in leaves}, set[Any](), [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None and id(leaf) not in known:
            raise RuntimeError("the loss has a gradient to a tensor that the SAE does not have")
        waiting += [following for following, _ in node.next_functions]


@contextmanager
def _stand_ins(sae: Any) -> Generator[list[torch.nn.Parameter]]:
    """Give an SAE new parameters on the same memory; those that need a gradient.

    As long as somebody holds the output of an earlier step, autograd ties the old ones to that
    step's stream, which a capture must not touch.
    """
    own = dict(sae._parameters)
    new = {
        name: torch.nn.Parameter(p.detach(), p.requires_grad)
        for name, p in own.items()
        if p is not None
    }
    sae._parameters.update(new)
    try:
        yield [p for p in new.values() if p.requires_grad]
    finally:
        sae._parameters.update(own)

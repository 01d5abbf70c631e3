"""The sparse step as two CUDA graphs: one launch forward, one backward.

Up to some 50,000 latents Python needs longer to launch a step's hundred kernels than a GPU to run
them. A captured step is launched at once. Forward and backward are captured from the ordinary
step, which is a function of tensors, so there is no second version of anything.

- A step is captured where the device has waited for Python several times in a row, so never where
  it is busy anyway. A new shape, setting or weight is another graph. So is another bound on the
  number of dead latents, unless the old one holds them with at most half of it to spare.
- Graphs of one thread share their memory, so that they must not overlap: :class:`Arena` counts
  turns, and a backward pass whose forward pass is not the last one raises an error. Gradients lie
  in that memory too. What a parameter still holds at the next step is copied first; if somebody
  else holds one, the step is ordinary. All else that a step returns is a copy (``hidden_pre``,
  which is as large as all gradients, when it is read).
- Where a capture fails, steps are ordinary from then on. It computes nothing, so nothing has to be
  restored.

The environment variable ``SAE_LENS_AUXK_GRAPH=0`` turns this off. It is read when an SAE is made.
"""

import gc
import os
import threading
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from typing_extensions import override

from sae_lens_auxk.ops.encoder import SelectedActivations
from sae_lens_auxk.ops.matrices import refuse_second_derivative
from sae_lens_auxk.saelens.names import TrainStepOutput, logger
from sae_lens_auxk.step.arena import Arena, Place, arena_of, capture, nothing_else_is_freed
from sae_lens_auxk.step.inputs import StepInput

IDLE_STEPS = 5
"""So many times in a row the device must have waited before a step is captured."""

_CAPTURES = threading.Lock()
"""One at a time: it begins by waiting for the device, which another capture forbids."""


class CapturedStep:
    """The graphs of one SAE, and whether it uses them."""

    def __init__(self) -> None:
        self._off = os.environ.get("SAE_LENS_AUXK_GRAPH") == "0"
        self._graphs: dict[Any, Graph] = {}
        self._setting: Any = None
        self._key: Any = None
        self._is_idle = False
        self._n_idle = 0
        self._said: set[str] = set()

    def step(self, sae: Any, batch: StepInput) -> TrainStepOutput | None:
        """Take a step by a graph; None if it has to be an ordinary one."""
        bound, rows = batch.dead_bound, batch.aux_rows
        if bound is None or self._off or not self._can_be_captured(sae, batch):
            return None
        setting = _setting(sae)
        if setting != self._setting:
            self._graphs, self._setting, self._n_idle = {}, setting, 0
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
            self._say_once("a gradient of an earlier step is still held")
            return None
        return graph.replay(batch)

    def _can_be_captured(self, sae: Any, batch: StepInput) -> bool:
        return (
            batch.counts
            and len(batch.leading) == 1
            and torch.is_grad_enabled()
            and sae.cfg.aux_loss.capturable
            and "parametrizations" not in sae._modules
            and not torch.is_anomaly_enabled()
            and not torch.cuda.is_current_stream_capturing()
            and not (torch.distributed.is_available() and torch.distributed.is_initialized())
            and sae._can_be_sparse(batch.sae_in)
        )

    def after_forward(self, device: torch.device) -> None:
        """Note whether the device had nothing to do when the step began, or has nothing now."""
        waits = self._is_idle or _is_idle(device)
        self._n_idle = self._n_idle + 1 if waits else 0

    def _new_graph(self, sae: Any, batch: StepInput, bound: int, key: Any) -> "Graph | None":
        """Capture the step if the device has waited for Python in the last steps like this."""
        if key != self._key:
            self._key, self._n_idle = key, 0
        if self._n_idle < IDLE_STEPS:
            self._is_idle = _is_idle(batch.sae_in.device)
            return None
        try:
            with _CAPTURES:
                gc.collect()  # of the graphs of deleted SAEs, whose memory would go with them
                return Graph(sae, batch, bound, arena_of(batch.sae_in.device))
        # Whatever it is, the run must go on.
        except Exception as error:
            self._off = True
            said = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            logger.warning(f"Training steps are not captured as CUDA graphs: {said[:300]}")
            return None

    def _say_once(self, why: str) -> None:
        if why not in self._said:
            self._said.add(why)
            logger.info(f"Training steps are not captured as CUDA graphs where {why}")

    def __reduce__(self) -> tuple[type["CapturedStep"], tuple[()]]:
        # A copied SAE, or one sent to another process, has its weights elsewhere.
        return CapturedStep, ()


def _is_idle(device: torch.device) -> bool:
    # What Python has launched last takes the device a few microseconds.
    return torch.cuda.current_stream(device).query()


def _setting(sae: Any) -> tuple[Any, ...]:
    """All that a graph takes for granted, and that may change between two steps."""
    tensors = [*sae._parameters.values(), *sae._buffers.values()]  # parameters() is slow
    matmul = torch.backends.cuda.matmul
    cfg = {**vars(sae.cfg)}
    metadata = cfg.pop("metadata", None)
    return (
        cfg,
        getattr(metadata, "fitted", None),
        [(tensor.data_ptr(), tensor.dtype, tensor.requires_grad) for tensor in tensors],
        sae.run_time_activation_norm_fn_in,
        sae.run_time_activation_norm_fn_out,
        sae.mse_loss_fn,
        torch.is_autocast_enabled("cuda"),
        torch.get_autocast_dtype("cuda"),
        torch.get_float32_matmul_precision(),
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
        self.forward, self.backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
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
        output.graph, output.turn = self, self.arena.turn
        return output

    def outputs(self) -> list[torch.Tensor]:
        """Copies of what the forward pass has computed: the loss, numbers, tensors of all rows."""
        first, *others = [part.clone() for part in self.acts]
        if others:
            latents, values = others
            first = SelectedActivations.of(first, latents, values, self.acts_shape)
        rows = [place.tensor(self)[0] for place in self.rows]
        return [x.clone() for x in (self.loss, *self.numbers, *rows)] + [first]

    def gradients(self) -> list[torch.Tensor | None]:
        """What the backward pass has computed, lent to whoever takes it."""
        return [
            None if place is None else self.arena.lend(parameter, place, self)
            for parameter, place in zip(self.parameters, self.grads, strict=True)
        ]


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, graph: Graph, *_: torch.Tensor) -> Any:
        graph.forward.replay()
        graph.arena.turn += 1
        ctx.graph, ctx.turn = graph, graph.arena.turn
        ctx.set_materialize_grads(False)
        loss, *others = graph.outputs()
        ctx.mark_non_differentiable(*[others[i] for i in graph.without_graph])
        return loss, *others

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> Any:
        refuse_second_derivative()
        graph, arena = ctx.graph, ctx.graph.arena
        grad_loss, *others = grads
        if grad_loss is None or any(grad is not None for grad in others):
            raise _refusal("only the step's loss has a gradient, not what it was computed from")
        if arena.turn != ctx.turn:
            raise _refusal(
                "its backward pass must come once, before the next step of an SAE in this thread"
            )
        arena.turn += 1
        graph.grad_loss.copy_(grad_loss)
        graph.backward.replay()
        return None, *graph.gradients()


class _Output(TrainStepOutput):
    """A captured step's output. ``hidden_pre`` is copied when it is read."""

    graph: Graph
    turn: int

    @property
    def hidden_pre(self) -> torch.Tensor:
        """(B, d_sae), readable until the next step of an SAE in this thread."""
        if self.graph.arena.turn > self.turn + 1:  # its own backward pass is one
            raise _refusal("its hidden_pre can be read until the next step only")
        copy = self.graph.hidden_pre.tensor(self.graph)[0].clone()
        return _Refused.apply(copy, *self.graph.parameters)  # type: ignore[no-any-return]

    @hidden_pre.setter
    def hidden_pre(self, value: Any) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        pass


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

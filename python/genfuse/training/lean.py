"""Steps in few calls: of optimizers, and whole ones as CUDA graphs."""

from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from torch.optim import Adam, AdamW, Optimizer, RMSprop
from torch.optim.rmsprop import rmsprop

from genfuse.data import Batch
from genfuse.nn import Together, flatten

OTHERWISE = ("amsgrad", "momentum", "centered", "capturable", "differentiable")  # options that leave a step as it is


def lean(optimizer: Optimizer) -> Optimizer:
    """Make the steps of an optimizer take few calls, as the trainer does; returns it.

    The parameters of each group are laid side by side in memory by `genfuse.nn.flatten`, so that a moving average of
    `genfuse.nn.EMA` and the weight clipping of `wgan` are one call each. The step of a fused Adam or AdamW takes a
    third of its Python, and that of RMSprop makes five calls in place of five for each parameter: to the same numbers,
    but for rounding. ``state``, ``param_groups``, ``state_dict`` and hooks are as of any optimizer, and learning rates
    are scheduled as ever. Left to the optimizer itself is a step in which a parameter has no gradient or a sparse one,
    and every step with other options, such as momentum, or of another optimizer.

    Call it once the parameters are on their device, and before anything else remembers where they are in memory.
    """
    for group in optimizer.param_groups:
        flatten(group["params"])
    if type(optimizer) in UPDATES:
        step = Optimizer.profile_hook_step(_Lean(optimizer).step)  # which calls the hooks
        optimizer.step = MethodType(step, optimizer)  # type: ignore[method-assign]
        optimizer.zero_grad = MethodType(_zero_grad, optimizer)  # type: ignore[method-assign]
    return optimizer


def _zero_grad(optimizer: Optimizer, set_to_none: bool = True) -> None:
    if not set_to_none:
        type(optimizer).zero_grad(optimizer, set_to_none)
    for group in optimizer.param_groups if set_to_none else ():
        for weight in group["params"]:
            weight.grad = None


class _Lean:
    """Steps of one optimizer. Lists of weights and states are made once, and again after a state was loaded."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.cls = type(optimizer)
        self.own: Callable = self.cls.step.__wrapped__  # type: ignore[attr-defined]  # without hooks
        self.updates: list[Callable[[list[Tensor]], None]] = []  # of each group, by its gradients
        self.states: list[Any] = []  # of the first weight of each group, when they were made

    def step(self, optimizer: Optimizer, closure: Callable | None = None) -> Any:
        groups = optimizer.param_groups
        gradients = [[weight.grad for weight in group["params"]] for group in groups]
        if (
            closure is not None
            or any(gradient is None or gradient.is_sparse for each in gradients for gradient in each)
            or any(group.get(option) for group in groups for option in OTHERWISE)
            or not all(group["params"] and group.get("fused", self.cls is RMSprop) for group in groups)
            or getattr(optimizer, "found_inf", None) is not None  # of a scaler, which lets fused ones unscale
            or not self._found(optimizer)
        ):
            return self.own(optimizer, closure)
        with torch.no_grad():
            for update, each in zip(self.updates, gradients, strict=True):
                update(each)
        return None

    def _found(self, optimizer: Optimizer) -> bool:
        groups = optimizer.param_groups
        states = [optimizer.state.get(group["params"][0]) for group in groups]
        if [*map(id, states)] != [*map(id, self.states)]:
            if not all(weight in optimizer.state for group in groups for weight in group["params"]):
                return False  # as before the first step
            self.updates = [UPDATES[self.cls](group, optimizer.state) for group in groups]
            self.states = states
        return True


def _adam(update: Callable, group: dict[str, Any], state: Any) -> Callable:
    weights = group["params"]
    means, squares, steps = ([state[weight][key] for weight in weights] for key in ("exp_avg", "exp_avg_sq", "step"))
    flatten(steps)
    counts = Together(steps)

    def step(gradients: list[Tensor]) -> None:
        torch._foreach_add_(counts.merged(), 1)
        beta1, beta2 = group["betas"]
        options = {key: group[key] for key in ("lr", "weight_decay", "eps", "maximize")}
        update(weights, gradients, means, squares, [], steps, beta1=beta1, beta2=beta2, amsgrad=False, **options)

    return step


def _rmsprop(group: dict[str, Any], state: Any) -> Callable:
    weights = group["params"]
    squares, steps = ([state[weight][key] for weight in weights] for key in ("square_avg", "step"))
    copies = [torch.zeros_like(weight) for weight in weights]  # of the gradients
    for each in (copies, squares, steps):
        flatten(each)
    parts = [Together(each) for each in (weights, copies, squares, steps)]

    def step(gradients: list[Tensor]) -> None:
        lists = [part.merged() for part in parts]
        if all(len(each) == 1 for each in lists):
            torch._foreach_copy_(copies, gradients)
        else:
            lists = [weights, gradients, squares, steps]
        of_weights, of_gradients, of_squares, of_steps = lists
        options: dict[str, Any] = {key: group[key] for key in ("lr", "alpha", "eps", "weight_decay", "maximize")}
        rmsprop(of_weights, of_gradients, of_squares, [], [], of_steps, momentum=0, centered=False, **options)

    return step


UPDATES: dict[type, Callable] = {
    Adam: partial(_adam, torch._fused_adam_),
    AdamW: partial(_adam, torch._fused_adamw_),
    RMSprop: _rmsprop,
}


class Graphed:
    """A step on a batch as a CUDA graph, replayed on the examples of each batch of ``rows``. The first `WARM` steps run
    as ever, so that all memory is there, and so does each on a batch of another size, as the last of an epoch is.

    ``step`` must wait for nothing, and give tensors. What it does in Python besides is done once, when it is recorded.
    """

    WARM = 3

    def __init__(self, step: Callable[[Batch], dict[str, Tensor]], rows: int) -> None:
        self.step, self.rows, self.calls = step, rows, 0
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        self.calls += 1
        if self.calls <= self.WARM or len(batch.x) != self.rows:
            return self.step(batch)
        if self.graph is None:
            self.batch = Batch(*(None if each is None else each.clone() for each in batch))  # type: ignore[arg-type]
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):  # which records, and runs nothing
                self.terms = self.step(self.batch)
        for mine, each in zip(self.batch, batch, strict=True):
            if mine is not None and each is not None:
                mine.copy_(each)
        self.graph.replay()
        return {name: term.clone() for name, term in self.terms.items()}

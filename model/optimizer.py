"""AdamW, or Muon for the blocks' matrices with AdamW for the rest; and the schedule of their learning rates.

    optimizer = build_optimizer(model, config, total_steps=1000, precision=torch.bfloat16)
    optimizer.step(step)                    # sets the learning rates of that step first
    state = optimizer.state_dict()          # by parameter name, whole, whatever the number of ranks

Muon (Keller Jordan, 2024) replaces each matrix's momentum by the nearest orthogonal matrix, so that every direction
of the update is equally large. Matrices of one shape go through it together, and each rank does its part of them.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from model.config import OptimizerConfig
from model.gpt import GPT


def schedule(config: OptimizerConfig, step: int, total_steps: float) -> float:
    """Return the share of its peak that a learning rate has at `step`, counted from 0."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.schedule == "cosine":
        progress = (step - config.warmup_steps) / max(total_steps - config.warmup_steps, 1)
        falling = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    else:
        decay_steps = config.decay_fraction * total_steps
        falling = min(1.0, max(total_steps - step, 0) / decay_steps) if decay_steps else 1.0
    return config.final_ratio + (1 - config.final_ratio) * falling


def momentum_at(config: OptimizerConfig, step: int) -> float:
    progress = min(1.0, step / config.momentum_warmup_steps) if config.momentum_warmup_steps else 1.0
    return config.momentum_start + (config.momentum - config.momentum_start) * progress


class Optimizer:
    """AdamW over its groups, and Muon over the matrices if the config says so, as one object."""

    def __init__(
        self, model: GPT, config: OptimizerConfig, total_steps: int, precision: torch.dtype = torch.float32
    ) -> None:
        self.config = config
        self.total_steps: float = total_steps  # may change as the training goes
        self.step_taken = -1
        # A tied head counts once, as the embedding. What is frozen, as all but an adapter is, gets no step.
        self.parameters = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        self.muon: Muon | None = None
        matrices = {name: (weight, sections) for name, weight, sections in model.matrices()}
        if config.kind == "muon":
            self.muon = Muon(matrices, precision)
            rest = {name: p for name, p in self.parameters.items() if name not in matrices}
        else:
            rest = self.parameters
        groups: dict[str, list[nn.Parameter]] = defaultdict(list)
        for name, parameter in rest.items():
            groups[self._group_of(name, parameter, tied=model.config.tie_embeddings)].append(parameter)
        on = next(iter(rest.values())).device.type
        self.adamw = torch.optim.AdamW(
            [
                {
                    "name": name,
                    "params": parameters,
                    "peak": self._peak(name),
                    "weight_decay": config.weight_decay if config.kind == "adamw" and name != "scalars" else 0.0,
                }
                for name, parameters in groups.items()
            ],
            lr=0.0,
            betas=(config.beta1, config.beta2),
            eps=config.epsilon,
            fused=on in ("cuda", "cpu"),  # one kernel over all parameters instead of a dozen for each
            capturable=on == "cuda",  # a recorded step may have it
        )

    def _group_of(self, name: str, parameter: nn.Parameter, tied: bool) -> str:
        if parameter.ndim < 2:
            return "scalars"
        if self.config.kind == "adamw":
            return "matrices"
        return "head" if name == "head.weight" or (tied and name == "embedding.weight") else "embeddings"

    def _peak(self, group: str) -> float:
        config = self.config
        if config.kind == "adamw":
            return config.learning_rate
        return {
            "embeddings": config.embedding_learning_rate,
            "head": config.head_learning_rate,
            "scalars": config.scalar_learning_rate,
        }[group]

    def learning_rates(self, step: int | None = None) -> dict[str, float]:
        """Return each group's learning rate at a step, or at the last step that was taken."""
        share = schedule(self.config, max(self.step_taken, 0) if step is None else step, self.total_steps)
        rates = {group["name"]: group["peak"] * share for group in self.adamw.param_groups}
        if self.muon is not None:
            rates["matrices"] = self.config.muon_learning_rate * share
        return rates

    def step(self, step: int) -> None:
        """Apply the gradients with the learning rates of `step`, counted from 0."""
        self.update(self.begin(step))

    def begin(self, step: int) -> dict[str, float]:
        """Take `step` as the one to be done; returns the numbers that `update` wants for it."""
        self.step_taken = step
        numbers = self.learning_rates()
        if self.muon is not None:
            remaining = 1 - step / self.total_steps if self.config.weight_decay_to_zero else 1.0
            numbers["momentum"] = momentum_at(self.config, step)
            numbers["weight_decay"] = self.config.weight_decay * max(remaining, 0.0)
        return numbers

    @torch.no_grad()
    def update(self, numbers: Mapping[str, float] | Mapping[str, Tensor]) -> None:
        """Apply the gradients. A recorded update reads its numbers from tensors, which may change between replays."""
        for group in self.adamw.param_groups:
            group["lr"] = numbers[group["name"]]
        if self.muon is not None:
            self.muon.step(numbers["matrices"], numbers["momentum"], numbers["weight_decay"])
        self.adamw.step()

    def tensors(self) -> list[Tensor]:
        """Return all that a step writes: the weights, and the moments that there are by now."""
        written: list[Tensor] = [*self.parameters.values()]
        for state in self.adamw.state.values():
            written += state.values()
        if self.muon is not None:
            written += [group.momentum for group in self.muon.groups.values() if group.momentum is not None]
        return written

    def zero_grad(self) -> None:
        for parameter in self.parameters.values():
            parameter.grad = None

    def state_dict(self) -> dict[str, Any]:
        """Copy every moment to the CPU, gathered from all ranks, by its parameter's name.

        Of a sharded model all ranks must call this together.
        """
        names = {id(parameter): name for name, parameter in self.parameters.items()}
        moments: dict[str, dict[str, Tensor]] = {}
        for parameter, state in self.adamw.state.items():
            moments[names[id(parameter)]] = {key: _copy(value) for key, value in state.items()}
        momenta = {} if self.muon is None else self.muon.state_dict()
        return {"kind": self.config.kind, "step_taken": self.step_taken, "adamw": moments, "muon": momenta}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state["kind"] != self.config.kind:
            raise ValueError(
                f"The checkpoint was trained with optimizer.kind={state['kind']}, not {self.config.kind};"
                " start a new run to change it."
            )
        self.step_taken = state["step_taken"]
        self.adamw.state.clear()
        for name, moments in state["adamw"].items():
            parameter = self.parameters[name]
            self.adamw.state[parameter] = {
                # Fused kernels need the step count on the device of the weights.
                key: value.to(parameter.device, copy=True) if key == "step" else _placed(value, parameter)
                for key, value in moments.items()
            }
        if self.muon is not None:
            self.muon.load_state_dict(state["muon"])


def build_optimizer(
    model: GPT, config: OptimizerConfig, total_steps: int, precision: torch.dtype = torch.float32
) -> Optimizer:
    """Build the optimizer of the model's own parameters, once they are on their device and FSDP2 has sharded them.

    Weights, moments and momenta are float32; `precision` is that of the training's products, Muon's among them.
    """
    return Optimizer(model, config, total_steps, precision)


@dataclass
class ShapeGroup:
    """All matrices of one shape, which are multiplied as one batch."""

    names: list[str] = field(default_factory=list)  # parameter and section, such as `blocks.0.attention.qkv.weight/1`
    sources: list[tuple[nn.Parameter, slice]] = field(default_factory=list)
    momentum: Tensor | None = None  # [n, rows, columns]


class Muon:
    """Updates each matrix by its momentum, orthogonalised; each section of a fused weight is a matrix of its own."""

    def __init__(
        self, matrices: Mapping[str, tuple[nn.Parameter, tuple[int, ...]]], precision: torch.dtype = torch.float32
    ) -> None:
        self.precision = precision
        self.is_shared = True  # each rank orthogonalises some of the matrices, and all gather them
        self.groups: dict[tuple[int, int], ShapeGroup] = {}
        for name, (parameter, sections) in matrices.items():
            start = 0
            for number, height in enumerate(sections):
                group = self.groups.setdefault((height, parameter.shape[1]), ShapeGroup())
                group.names.append(f"{name}/{number}")
                group.sources.append((parameter, slice(start, start + height)))
                start += height

    def step(self, learning_rate: float | Tensor, momentum: float | Tensor, weight_decay: float | Tensor) -> None:
        pending = []
        for shape, group in self.groups.items():
            gradients = _stack_gradients(group.sources)
            if group.momentum is None:
                group.momentum = torch.zeros_like(gradients)
            group.momentum.lerp_(gradients, 1 - momentum)
            directions = gradients.lerp_(group.momentum, momentum)  # Nesterov: look one step ahead
            directions = directions.to(_orthogonalisation_dtype(directions.device, self.precision))
            done = _orthogonalise_shared(directions) if self.is_shared else (orthogonalise_on(directions), None)
            pending.append((shape, group, *done))
        for (rows, columns), group, updates, gathering in pending:
            if gathering is not None:
                gathering.wait()
            # An orthogonal matrix that is taller than wide moves each of its outputs less; this makes up for it.
            rate = learning_rate * max(1.0, rows / columns) ** 0.5
            _apply(group.sources, updates[: len(group.sources)], rate, 1 - learning_rate * weight_decay)

    def state_dict(self) -> dict[str, Tensor]:
        return {
            name: _copy(momentum)
            for group in self.groups.values()
            if group.momentum is not None
            for name, momentum in zip(group.names, group.momentum, strict=True)
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        for group in self.groups.values():
            held = [state[name] for name in group.names if name in state]
            if held:
                group.momentum = torch.stack(held).to(group.sources[0][0].device)


def _stack_gradients(sources: Iterable[tuple[nn.Parameter, slice]]) -> Tensor:
    whole: dict[int, Tensor] = {}
    parts = []
    for parameter, rows in sources:
        if id(parameter) not in whole:
            assert parameter.grad is not None, "Muon steps after a backward pass"
            whole[id(parameter)] = _whole(parameter.grad)
        parts.append(whole[id(parameter)][rows])
    return torch.stack(parts).float()


def _orthogonalise_shared(directions: Tensor) -> tuple[Tensor, "dist.Work | None"]:
    """Orthogonalise [n, rows, columns] in its own precision; each rank does a part of the n, and all gather them."""
    world_size = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if world_size == 1:
        return orthogonalise_on(directions), None
    share = math.ceil(len(directions) / world_size)
    mine = directions[dist.get_rank() * share :][:share]
    part = directions.new_zeros((share, *directions.shape[1:]))
    if len(mine):
        part[: len(mine)] = orthogonalise_on(mine)
    gathered = part.new_empty((share * world_size, *part.shape[1:]))
    # Before torch 2.13 the function had another name, which is deprecated now.
    all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    # The parts travel while those of the next shape are computed.
    return gathered, all_gather(gathered, part, async_op=True)


# Coefficients of five quintic iterations (Polar Express, Amsel et al. 2025, as printed in nanochat): the steepest
# polynomials that bring every singular value above about 1e-3 close to 1, with a margin for bfloat16.
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


def orthogonalise(matrices: Tensor) -> Tensor:
    """Bring all singular values of each matrix of [n, rows, columns] near 1, with matrix products only."""
    x = matrices.mT if matrices.shape[-2] > matrices.shape[-1] else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) * 1.02 + 1e-7)  # the largest singular value is below 1
    for a, b, c in POLAR_EXPRESS:
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if matrices.shape[-2] > matrices.shape[-1] else x


def _orthogonalisation_dtype(device: torch.device, precision: torch.dtype) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else precision


def orthogonalise_on(matrices: Tensor) -> Tensor:
    """Orthogonalise, compiled where that is faster."""
    return (compiled_orthogonalise() if matrices.is_cuda else orthogonalise)(matrices)


@cache
def compiled_orthogonalise() -> Any:
    """Return the compiled function; a process has one, which compiles itself once for each shape."""
    return torch.compile(orthogonalise, dynamic=False)


def _apply(
    sources: list[tuple[nn.Parameter, slice]], updates: Tensor, learning_rate: float | Tensor, keep: float | Tensor
) -> None:
    """Set weight = keep x weight - learning_rate x update, on each rank for its own part of the weights."""
    if isinstance(sources[0][0].data, DTensor):
        targets, steps = _local_parts(sources, updates)
    else:
        targets = [parameter.data[rows] for parameter, rows in sources]
        steps = [update.to(target.dtype) for update, target in zip(updates, targets, strict=True)]
    if not targets:
        return
    if isinstance(keep, Tensor) or keep != 1.0:
        torch._foreach_mul_(targets, keep)
    if isinstance(learning_rate, Tensor):
        steps, learning_rate = list(torch._foreach_mul(steps, learning_rate)), 1.0
    torch._foreach_add_(targets, steps, alpha=-learning_rate)


def _local_parts(sources: list[tuple[nn.Parameter, slice]], updates: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Return this rank's rows of each update, beside its rows of the weights: FSDP2 shards by rows."""
    targets, steps = [], []
    for (parameter, rows), update in zip(sources, updates, strict=True):
        local, first = _local_rows(parameter.data)
        start, stop = max(rows.start, first), min(rows.stop, first + len(local))
        if start < stop:
            targets.append(local[start - first : stop - first])
            steps.append(update[start - rows.start : stop - rows.start].to(local.dtype))
    return targets, steps


def _local_rows(weight: Tensor) -> tuple[Tensor, int]:
    """Return this rank's rows of a sharded weight, and the number of the first of them."""
    assert isinstance(weight, DTensor)
    local = weight.to_local()
    share = math.ceil(weight.shape[0] / weight.device_mesh.size())  # FSDP2 splits as torch.chunk does
    return local, min(share * weight.device_mesh.get_local_rank(), weight.shape[0])


def _whole(tensor: Tensor) -> Tensor:
    """Gather what FSDP2 has sharded; a whole tensor is returned as it is or copied."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _copy(tensor: Tensor) -> Tensor:
    return _whole(tensor).detach().to("cpu", copy=True)


def _placed(value: Tensor, parameter: nn.Parameter) -> Tensor:
    """Move a whole tensor to its parameter's device, sharded as the parameter is."""
    value = value.to(parameter.device, copy=True)
    if isinstance(parameter.data, DTensor):
        return distribute_tensor(value, parameter.data.device_mesh, parameter.data.placements)
    return value

r"""Many ranks that share one copy of the weights (`trainer=fsdp`); under `trainer=ddp` each has its
own.

A rank keeps one part in N of every tensor: of the weights, their gradients, the optimizer's moments
and the average of the weights. A *unit* of the network is whole for as long as it computes: its
weights are gathered before it, forward and backward, and its gradients are averaged over the ranks
into their parts right after. Units are the entries of every `nn.ModuleList` (the stages of a U-Net,
the blocks of a ladder, the networks of an MHVAE); what lies outside of them is whole during a step.

What follows is as with whole weights. Steps of the optimizer and of the average are taken number by
number, on parts alone; the norm of all gradients is that of all parts together. Gathering is left
out of evaluation, where ranks have different numbers of batches: before a validation the weights
that are reported are put together on every rank; the whole copy is dropped afterwards, and the
parts were never changed. A checkpoint is put together on the first rank, the same file that one
process writes. After training the weights are whole.

So a rank must hold, beside its parts: in training the largest unit; in a validation the weights
once, at the beginning and after training twice (with their average).

References:
    PyTorch FSDP: Experiences on Scaling Fully Sharded Data Parallel, Zhao et al., 2023,
        https://arxiv.org/abs/2304.11277
    (here in its second form, torch.distributed.fsdp.fully_shard)
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.optim import Optimizer

from genfw.model import LatentModel
from genfw.train.errors import GenfwError
from genfw.train.module import LatentModule


class FSDP2(DDPStrategy):
    """Lightning's DDP, processes, logs and files included, but for who holds which weights.

    Raises:
        GenfwError: when training begins, of what cannot be divided: parameters of the objective,
            parameters that are single numbers without an axis.
    """

    step: Step | None = None
    """The training step of weights in parts; None where they are whole."""

    def model_to_device(self) -> None:
        """What is to be divided goes there part by part."""
        if self._trainer.state.fn != TrainerFn.FITTING:
            super().model_to_device()

    def configure_ddp(self) -> None:
        module = self._module
        divisible(module)
        mesh = init_device_mesh(self.root_device.type, (self.world_size,))
        self.outline = outline(module.model)
        if module.average is not None:
            divide(module.average, mesh)
        self.step = Step(module.model, module.training_step)
        shard(self.step, mesh)
        super().model_to_device()  # what is left

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        assert self.step is not None
        with self.precision_plugin.train_step_context():
            return self.step(*args, **kwargs)

    def on_validation_start(self) -> None:
        """For the time of a validation, the weights that are reported are a whole copy."""
        if self.step is not None:
            module = self._module
            self.reported = "model" if module.average is None else "average"
            self.parts = getattr(module, self.reported)
            made = together(self.outline, self.parts).requires_grad_(False).eval()
            setattr(module, self.reported, made)

    def on_validation_end(self) -> None:
        if self.step is not None:
            setattr(self._module, self.reported, self.parts)

    def teardown(self) -> None:
        """After training the weights are whole; not after an error, which ranks meet alone."""
        if self.step is None:
            super().teardown()
        elif self._trainer.state.status == TrainerStatus.RUNNING:
            module, self.step, self.optimizers = self._module, None, []
            module.model = together(self.outline, module.model)
            if module.average is not None:
                average = together(self.outline, module.average)
                module.average = average.requires_grad_(False).eval()
            super().teardown()

    def lightning_module_state_dict(self) -> dict[str, Any]:
        return self._kept(super().lightning_module_state_dict())

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        return self._kept(super().optimizer_state(optimizer))

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        states = zip(self.optimizers, checkpoint["optimizer_states"], strict=True)
        divided = [divided_state(optimizer, state) for optimizer, state in states]
        super().load_optimizer_state_dict({**checkpoint, "optimizer_states": divided})

    def _kept(self, value: Any) -> Any:
        """A state with all tensors whole, one after the other, in the memory of the first rank's
        processor; the other ranks only send."""
        if isinstance(value, DTensor):
            made = whole(value)
            return made.cpu() if self.is_global_zero else None
        return {k: self._kept(v) for k, v in value.items()} if isinstance(value, dict) else value

    @classmethod
    def register_strategies(cls, strategy_registry: Any = StrategyRegistry) -> None:
        """Makes it known to Lightning's Trainer by its name."""
        strategy_registry.register("fsdp2", cls, description=cls.__doc__, override=True)

    @property
    def _module(self) -> LatentModule:
        module = self.lightning_module
        if not isinstance(module, LatentModule):
            raise GenfwError(
                "trainer.strategy=fsdp2 divides the weights of a latent-variable model, and this "
                f"is a {type(module).__name__}: use trainer=ddp"
            )
        return module

    @property
    def _trainer(self) -> L.Trainer:
        return self._module.trainer


class Step(nn.Module):
    """One training step, of which torch knows when it begins and ends.

    Args:
        model: whose weights it uses.
        take: (*args) -> loss.
    """

    def __init__(self, model: LatentModel, take: Callable[..., Tensor]):
        super().__init__()
        self.model, self.take = model, take

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.take(*args, **kwargs)


def divisible(module: LatentModule) -> None:
    """Raises a GenfwError where it is not."""
    if any(True for _ in module.objective.parameters()):
        raise GenfwError(
            "trainer.strategy=fsdp2 divides the weights of the model, and the objective "
            f"{type(module.objective).__name__} has some of its own: use trainer=ddp"
        )
    for name, p in module.model.named_parameters():
        if p.ndim == 0:
            raise GenfwError(
                f"trainer.strategy=fsdp2 cannot divide {name}, a number without an axis: give it "
                "the shape (1,), or use trainer=ddp"
            )


def shard(step: Step, mesh: DeviceMesh) -> None:
    """Divides a model's weights, in place: parameters become `DTensor`s, cut along their first
    axis."""
    for unit in units(step.model):
        fully_shard(unit, mesh=mesh)
    fully_shard(step, mesh=mesh)


def units(model: nn.Module) -> Iterator[nn.Module]:
    """The entries of its lists that have parameters, inner ones first."""
    containers = (nn.ModuleList, nn.ModuleDict)
    for each in reversed([*model.modules()]):
        if isinstance(each, nn.ModuleList):
            for unit in each:
                if not isinstance(unit, containers) and any(True for _ in unit.parameters()):
                    yield unit


def divide(module: nn.Module, mesh: DeviceMesh) -> None:
    """As `shard`, of a module that is not called: its parameters, in place."""
    for owner in module.modules():
        for name, p in [*owner.named_parameters(recurse=False)]:
            part = cut(p.detach(), mesh)
            setattr(owner, name, nn.Parameter(part, requires_grad=p.requires_grad))


def cut(tensor: Tensor, mesh: DeviceMesh) -> DTensor:
    """This rank's part of a tensor that all ranks have."""
    return distribute_tensor(tensor, mesh, [Shard(0)], src_data_rank=None)


def local(tensor: Tensor) -> Tensor:
    """This rank's part; a tensor that is not divided, itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All parts together. Where it is divided, every rank must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def outline(model: LatentModel) -> LatentModel:
    """A copy of a whole model, its parameters without their numbers."""
    empty = {
        id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in model.parameters()
    }
    return copy.deepcopy(model, empty)


def together(outline: LatentModel, parts: LatentModel) -> LatentModel:
    """A whole model with the weights of `parts`. Every rank must ask."""
    made = copy.deepcopy(outline)
    state = {name: whole(tensor) for name, tensor in parts.state_dict().items()}
    made.load_state_dict(state, assign=True)
    return made


def divided_state(optimizer: Optimizer, state: Mapping[str, Any]) -> dict[str, Any]:
    """An optimizer's whole state as that of this rank's parts: what has the shape of a parameter is
    cut as it is."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def part(value: Any, p: Tensor) -> Any:
        if isinstance(value, Tensor) and isinstance(p, DTensor) and value.shape == p.shape:
            return cut(value, p.device_mesh)
        return value

    moments = {
        i: {key: part(value, parameters[i]) for key, value in kept.items()}
        for i, kept in state["state"].items()
    }
    return {**state, "state": moments}

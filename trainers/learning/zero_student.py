"""The student whose optimizer DeepSpeed shards: ZeRO stages 1 and 2, through Accelerate's plugin.

Each rank holds all weights, the AdamW moments of its part of them alone, and a second copy of that part to update. For
a drafter this saves little; it is for jobs that run on DeepSpeed anyway. Takes the same updates as `Student` and saves
the same state, so a run may change from one to the other. Tried on CPUs with gloo; not yet with NCCL.
"""

from __future__ import annotations

import math
import os
import warnings

import torch
import torch.distributed as dist
from accelerate import Accelerator, DeepSpeedPlugin
from accelerate.utils import InitProcessGroupKwargs
from torch import Tensor, nn

from dvi.distributed import SOLO, Peers, Pieces, wait
from dvi.records import LossWeights, ReplayBatch
from dvi.settings import LearningSettings
from dvi.software import install_extra
from trainers.learning.losses import BatchTotals, RewardBaseline
from trainers.learning.student import Student
from trainers.learning.versions import State

STAGES = (1, 2)
MOMENTS = ("exp_avg", "exp_avg_sq")


def build_student(split: object, drafter: nn.Module, config: LearningSettings, *, peers: Peers = SOLO) -> Student:
    """The student that `accelerate launch` asks for with a DeepSpeed config, else the one of `train.strategy`.

    Raises ValueError for a DeepSpeed config that does not suit a drafter, ImportError where DeepSpeed is missing.
    """
    if is_launched_with_deepspeed():
        return ZeroStudent(split, drafter, config, peers=peers)
    if config.strategy != "ddp":
        return ZeroStudent(split, drafter, config, peers=peers, stage=int(config.strategy[-1]))
    return Student(split, drafter, config, peers=peers)


def is_launched_with_deepspeed() -> bool:
    """Whether `accelerate launch` started this process with a DeepSpeed config."""
    # Of its variables the one that an Accelerator never sets by itself.
    return "ACCELERATE_CONFIG_DS_FIELDS" in os.environ


class ZeroStudent(Student):
    """A student with a `DeepSpeedEngine`. The ranks' losses are parts of one sum, so their gradients are summed.

    The gradient is gathered locally, slice by slice, and handed to the engine once per step: one exchange between the
    ranks, in which a rank without data takes part with zeros. Stage 2 thus differs from stage 1 only within it.
    The engine clips and updates. Whatever changes weights or moments, or reads them whole, all ranks must call in the
    same order: `restart_from`, `trim`, `is_finite`, the gradient's methods, `update`, `state_dict`, `load_state_dict`.
    """

    def __init__(
        self, split: object, drafter: nn.Module, config: LearningSettings, *, peers: Peers = SOLO,
        stage: int | None = None,
    ) -> None:
        """stage: of ZeRO, 1 or 2; None is what the launch says, or 2. Raises as `build_student`."""
        self._stage = stage
        super().__init__(split, drafter, config, peers=peers)

    def _accelerate(self) -> Accelerator:
        plugin = _plugin(self._stage, self._split.device)
        if not dist.is_initialized():
            # Alone; DeepSpeed wants a process group all the same.
            dist.init_process_group(_backend(), store=dist.HashStore(), rank=0, world_size=1)
            os.environ.setdefault("LOCAL_RANK", "0")
        return Accelerator(
            mixed_precision="no", deepspeed_plugin=plugin,
            # Left to itself Accelerate finds no backend without a GPU, and calls every rank the only one.
            kwargs_handlers=[] if torch.cuda.is_available() else [InitProcessGroupKwargs(backend="gloo")],
        )

    def _prepare(self, drafter: nn.Module) -> None:
        """A fresh engine around the drafter, with an optimizer that knows nothing yet."""
        self._accelerator.free_memory()
        config = self._config
        engine_config = self._accelerator.state.deepspeed_plugin.deepspeed_config
        engine_config |= {
            "train_micro_batch_size_per_gpu": 1,  # asked for, and used for its own counts alone
            "gradient_accumulation_steps": 1,
            "gradient_allreduce_op": "sum",
            "gradient_clipping": config.clip_norm,
            "communication_data_type": "bf16" if config.compress_gradient else "fp32",
        }
        # By default a buffer of 2 GB, for gradients of a few MB.
        engine_config["zero_optimization"]["reduce_bucket_size"] = sum(p.numel() for p in drafter.parameters())
        with self._peers.in_library():
            self._engine, self.optimizer = self._accelerator.prepare(drafter, self._plain_optimizer(drafter))
        self._model = drafter

    @property
    def drafter(self) -> nn.Module:
        return self._model

    def _plain_optimizer(self, drafter: nn.Module) -> torch.optim.AdamW:
        return torch.optim.AdamW(drafter.parameters(), lr=self._config.lr, weight_decay=self._config.weight_decay)

    # Weights

    def restart_from(self, state: State) -> None:
        """Takes these weights, with an optimizer that has forgotten how it came to others."""
        self.drafter.load_state_dict(state)
        self._engine.optimizer.refresh_fp32_params()
        for moments in self.optimizer.state.values():
            for moment in moments.values():
                moment.zero_()  # not dropped: the engine holds views of it

    def is_finite(self) -> bool:
        """Whether the weights and all ranks' moments are."""
        num_broken = torch.tensor([not super().is_finite()], dtype=torch.float64)
        return wait(self._peers.total(num_broken)).item() == 0

    # Learning

    def clear_gradient(self) -> None:
        self._gradients = [torch.zeros_like(parameter) for parameter in self.drafter.parameters()]

    def add_gradient(
        self, batch: ReplayBatch, *, totals: BatchTotals, weights: LossWeights, baseline: RewardBaseline, is_last: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Adds the gradient of the batch's part in the loss over `totals`; that part and its terms, detached."""
        total, values = self._loss(batch, totals=totals, weights=weights, baseline=baseline)
        # Not backward: the engine's hooks would send every slice to the other ranks.
        parts = torch.autograd.grad(total, list(self.drafter.parameters()), allow_unused=True, materialize_grads=True)
        torch._foreach_add_(self._gradients, parts)
        return total.detach(), values

    def sum_gradient(self) -> Pieces[None]:
        """Waits for all ranks: the engine's own exchange holds the process up, so it begins when all are there."""
        yield from self._peers.total(torch.zeros(1))

    def clip_gradient(self) -> float:
        """Takes the sum of all ranks' gradients for its own; its norm, inf where not finite. `update` clips it."""
        # The function whose gradient is what was gathered: the engine takes gradients from its own backward pass only.
        products = [(p * g).sum() for p, g in zip(self.drafter.parameters(), self._gradients, strict=True)]
        with self._peers.in_library():
            self._engine.backward(torch.stack(products).sum())
            norm = float(self._engine.optimizer.scaled_global_norm())
        return norm if norm >= 0 else math.inf  # DeepSpeed's -1 is what we call not finite

    def update(self) -> None:
        """One step of the optimizer along the gradient, scaled down to clip_norm."""
        with self._peers.in_library():
            self._engine.step()

    # Saving

    def state_dict(self) -> dict[str, object]:
        """As of `Student`: the moments are gathered from all ranks, and any number of them can go on."""
        from deepspeed.utils import safe_get_full_optimizer_state

        plain = self._plain_optimizer(self.drafter)
        for shard in self.optimizer.state.values():  # one, or none before the first step
            for parameter in self.drafter.parameters():
                with self._peers.in_library():
                    moments = {name: safe_get_full_optimizer_state(parameter, name) for name in MOMENTS}
                plain.state[parameter] = {"step": shard["step"].clone()} | moments
        return {"drafter": self.copy_state(), "optimizer": plain.state_dict()}

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Takes what `state_dict` gave, of any student; raises when the head is trimmed otherwise."""
        from deepspeed.utils import safe_set_full_optimizer_state

        self.restart_from(state["drafter"])
        plain = self._plain_optimizer(self.drafter)
        plain.load_state_dict(state["optimizer"])
        if not plain.state:
            return
        sharded = self._engine.optimizer
        for group in sharded.optimizer.param_groups if not sharded.state else ():
            for shard in group["params"]:
                sharded.state[shard] = {"step": torch.zeros(())} | {name: torch.zeros_like(shard) for name in MOMENTS}
            sharded._lazy_init_hp_params_optimizer_state()  # what its first step does, so that there is a place to set
        for parameter, moments in plain.state.items():
            for name in MOMENTS:
                safe_set_full_optimizer_state(parameter, moments[name], name)
        for shard in sharded.state.values():
            shard["step"].copy_(moments["step"])


def _plugin(stage: int | None, device: torch.device) -> DeepSpeedPlugin:
    """ZeRO of this stage, or as the launch says. Raises ValueError where it does not suit a drafter that serves."""
    if device.type == "cpu":
        if torch.cuda.is_available():
            raise ValueError(
                "DeepSpeed takes the CUDA device where there is one, got model.device=cpu; hide it with "
                "CUDA_VISIBLE_DEVICES= to run on the CPU"
            )
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # found anyway, with a warning
    try:
        import deepspeed.ops
    except ImportError as error:
        raise ValueError(f"ZeRO needs DeepSpeed: {install_extra('deepspeed')}, or set train.strategy=ddp") from error

    # Else DeepSpeed compiles C++ for messages through shared memory when it starts on a CPU, and fails without a
    # compiler. Nothing else reads this table.
    deepspeed.ops.__compatible_ops__ = {}
    # Its collectives go by names that newer torch calls old; nobody here can change that.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    if stage is None and is_launched_with_deepspeed():
        plugin = DeepSpeedPlugin()
    else:
        plugin = DeepSpeedPlugin(hf_ds_config={"zero_optimization": {"stage": stage or STAGES[-1]}})
    if plugin.zero_stage not in STAGES:
        raise ValueError(
            f"ZeRO's stage must be 1 or 2 where the model serves, got {plugin.zero_stage}: stage 3 takes the weights "
            "apart, and every token would fetch them from all ranks; try configs/accelerate/deepspeed_zero2.yaml"
        )
    for precision in ("fp16", "bf16"):
        if plugin.deepspeed_config.get(precision, {}).get("enabled", False) is True:
            raise ValueError(f"a drafter learns in float32, got {precision} in DeepSpeed's config; leave it out there")
    return plugin


def _backend() -> str:
    return "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"

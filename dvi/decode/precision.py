"""What dtype "auto" is, and how fast plain decoding is in the two that CPUs decode in.

Knows the rules, a clock and the split model; drafts nothing. What was measured is kept by machine, libraries, threads
and model shape (`dvi.measured`), so that one model is measured once.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import logging
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from dvi.config import setting_of_run
from dvi.decode.batch import DecodingBatch
from dvi.decode.sequence import Sequence
from dvi.decode.verification import StrictRule
from dvi.draft.length_policies import FixedLength
from dvi.hardware import describe_machine
from dvi.measured import cache_folder, measured_path
from dvi.model.adapter_store import read_manifest
from dvi.model.devices import is_gpu, num_processes
from dvi.model.drafter import DrafterConfig, build_drafter
from dvi.model.exact import may_be_exact
from dvi.model.gguf import find_gguf
from dvi.model.native.library import kernels_version
from dvi.model.pretrained import read_config, read_weights, why_no_blocks
from dvi.model.split import SplitModel
from dvi.model.starting_drafter import settle_adapter
from dvi.progress import doing
from dvi.records import SamplingParams
from dvi.settings import ModelSettings, ServeConfig, TrainConfig, WarmupConfig
from dvi.whole_files import write_whole

Config = TypeVar("Config", bound=TrainConfig | ServeConfig | WarmupConfig)

KIND = "plain_speeds"
BUDGET_S, MIN_REPEATS, MAX_REPEATS = 1.0, 2, 25
# Cached positions behind the race, as many as a chat has: in bfloat16 attention slows down with them (SmolLM2-135M on
# an EPYC with AVX-512: 32 tokens/s at 128 positions and 26 at 300), in float32 it does not (30 at both).
CONTEXT = 256
# Below, a step is a few milliseconds of small calls whatever the dtype, and float32 keeps its exactness for nothing.
MEASURED_PARAMETERS = 50_000_000
BYTES_TO_MEASURE = 12  # of a parameter: in float32 and in bfloat16, and both again as the lean path packs them
MEMORY_SHARE = 0.5
# Medians of a second differ by so much from one time to the next. Of two that are alike bfloat16 serves drafts better:
# verifying 5 positions takes 1.1 plain rounds in it, 1.7 in float32 (SmolLM2-135M, EPYC with AVX-512, 2 threads).
ALIKE = 0.95
# What does not change the work of a step.
_IRRELEVANT = ("_name_or_path", "name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PlainSpeeds:
    """Tokens per second that one row decodes plainly with, in each dtype: medians of interleaved steps.

    Rounds behind few cached positions: for ratios between the two, not for comparison with a run.
    """

    float32: float
    bfloat16: float

    def __post_init__(self) -> None:
        if not (self.float32 > 0 and self.bfloat16 > 0):
            raise ValueError(f"speeds must be positive, got {self.float32} and {self.bfloat16}")

    @property
    def preferred(self) -> str:
        """Name of the faster dtype; bfloat16 where they are alike, since it verifies drafts at less cost."""
        return "bfloat16" if self.bfloat16 >= ALIKE * self.float32 else "float32"

    def lead_over(self, dtype: str) -> float:
        """How many times as fast as in this dtype plain decoding is in the faster one: 1 or more.

        A speed-up measured over plain decoding in `dtype`, divided by it, is one over the faster plain.
        """
        return max(self.float32, self.bfloat16) / getattr(self, dtype)


def choose_dtype(
    name_or_path: str | Path, config: PretrainedConfig | None = None, *, adapter: str | Path | None = None,
    device: str = ModelSettings.device, placement: str = ModelSettings.placement, mode: str = ModelSettings.mode,
    path: str = ModelSettings.path_kind, weights: str = ModelSettings.weights, **source: object,
) -> str:
    """The name of the dtype that "auto" is: the first of these that applies.

    the adapter's, where one is given
    bfloat16 on a GPU, float32 in exact mode
    float32 where nothing is to be weighed: several processes (which must all choose alike) or devices, less than
        MEASURED_PARAMETERS parameters, a model that cannot be split in bfloat16, or not decoded exactly in it where
        that is asked for
    bfloat16 for a GGUF file that can be decoded from its blocks, of any size, unless weights are to be "dense"
    bfloat16 for a model that this machine's memory would not hold in both
    whichever decodes plainly faster, bfloat16 where they are alike: see `obtain_plain_speeds`

    config: the model's, if it has been read. source: other arguments of `from_pretrained`.
    """
    ruled = _ruled_dtype(adapter=adapter, device=device, placement=placement, mode=mode)
    if ruled is not None:
        return ruled
    config = config or read_config(name_or_path, **source)
    if weights != "dense" and why_no_blocks(name_or_path, config, path=path) is None:
        return "bfloat16"
    model = _shape_of(config, source)
    num_parameters = _count_parameters(model)
    if num_parameters < MEASURED_PARAMETERS or not _suits_bfloat16(model, mode, path):
        return "float32"
    if not _can_be_raced(num_parameters):
        return "bfloat16"
    speeds = obtain_plain_speeds(name_or_path, config, path=path, **source)
    return "float32" if speeds is None else speeds.preferred


def choose_weights(
    name_or_path: str | Path, config: PretrainedConfig | None = None, *, weights: str, dtype: str,
    device: str = ModelSettings.device, placement: str = ModelSettings.placement, path: str = ModelSettings.path_kind,
) -> str:
    """"blocks" or "dense": what weights of "auto" are of a GGUF file in this dtype, which is settled.

    Blocks wherever they can be: in SmolLM2-135M (Q4_1, EPYC with AVX-512 bf16, two threads) a plain step takes half of
    what dense bfloat16 takes, and a pass over 16 rows less too. Raises ValueError for blocks that cannot be.
    """
    if weights == "dense":
        return weights
    is_on_gpu = torch.cuda.is_available() if device == "auto" else torch.device(device).type != "cpu"
    if dtype != "bfloat16":
        reason = f"they are multiplied with bfloat16, and dtype is {dtype}"
    elif is_on_gpu or placement != "single":
        reason = f"they are for one CPU, and device is {device}, placement {placement}"
    else:
        reason = why_no_blocks(name_or_path, config or read_config(name_or_path), path=path)
    if reason is not None and weights == "blocks":
        raise ValueError(f"weights must be 'auto' or 'dense' for {name_or_path}, got 'blocks': {reason}")
    return "blocks" if reason is None else "dense"


def settle_dtype(config: Config, *, earlier: str | None = None, earlier_weights: str | None = None) -> Config:
    """The settings with the adapter, which has a say in it, and the dtype and, of a GGUF file, weights that "auto" is.

    earlier, earlier_weights: of the run which is gone on with, if there is one. Where it does not name its weights,
    they were dense.
    """
    config = settle_adapter(config, dtype=earlier)
    model = config.model
    is_file = find_gguf(model.path) is not None
    if is_file and model.weights == "auto" and earlier is not None:
        model = dataclasses.replace(model, weights=earlier_weights or "dense")
    if model.dtype == "auto":
        if model.num_threads:
            torch.set_num_threads(model.num_threads)  # what is measured is to be what will run
        trust = isinstance(config, ServeConfig) and config.serve.trust_remote_code
        dtype = earlier or choose_dtype(
            model.path, adapter=config.drafter.adapter, device=model.device, placement=model.placement,
            mode=model.mode, path=model.path_kind, weights=model.weights, trust_remote_code=trust,
        )
        model = dataclasses.replace(model, dtype=dtype)
    if is_file:
        weights = choose_weights(
            model.path, weights=model.weights, dtype=model.dtype, device=model.device, placement=model.placement,
            path=model.path_kind,
        )
        model = dataclasses.replace(model, weights=weights)
    return config if model is config.model else dataclasses.replace(config, model=model)


def weights_of_run(folder: str | Path) -> str | None:
    """The weights in the config.yaml that a run left in its folder; None where it does not name them."""
    weights = setting_of_run(folder, "model", "weights")
    return None if weights == "auto" else weights


def dtype_of_run(folder: str | Path) -> str | None:
    """The dtype in the config.yaml that a run left in its folder; None where it left none, or did not settle it."""
    dtype = setting_of_run(folder, "model", "dtype")
    return None if dtype == "auto" else dtype


def known_dtype(
    name_or_path: str | Path, settings: TrainConfig | ServeConfig, model_config: PretrainedConfig
) -> str | None:
    """The settings' dtype, as far as it is known without measuring anything."""
    model = settings.model
    if model.dtype != "auto":
        return model.dtype
    ruled = _ruled_dtype(
        adapter=settings.drafter.adapter, device=model.device, placement=model.placement, mode=model.mode
    )
    is_open = ruled is None and model.weights != "dense"
    if is_open and why_no_blocks(name_or_path, model_config, path=model.path_kind) is None:
        return "bfloat16"
    if ruled is None and not _suits_bfloat16(_shape_of(model_config, {}), model.mode, model.path_kind):
        ruled = "float32"
    speeds = None if ruled else _read(_path_of(fingerprint_of(model_config, path=model.path_kind)))
    return ruled or (speeds and speeds.preferred)


def plain_lead(settings: ModelSettings, model_config: PretrainedConfig) -> float:
    """`PlainSpeeds.lead_over` the settings' dtype, measured now where it is not kept.

    1 where there is nothing to weigh, as in `choose_dtype`, and for blocks, which are faster than both.
    """
    ruled = _ruled_dtype(adapter=None, device=settings.device, placement=settings.placement, mode=settings.mode)
    if ruled is not None or settings.dtype not in ("float32", "bfloat16") or settings.weights == "blocks":
        return 1.0
    model = _shape_of(model_config, {})
    if not (_can_be_raced(_count_parameters(model)) and _suits_bfloat16(model, settings.mode, settings.path_kind)):
        return 1.0
    speeds = obtain_plain_speeds(settings.path, model_config, path=settings.path_kind)
    return 1.0 if speeds is None else speeds.lead_over(settings.dtype)


def _ruled_dtype(*, adapter: str | Path | None, device: str, placement: str, mode: str) -> str | None:
    """The dtype where neither the model nor a clock is asked; None where they are."""
    if adapter is not None:
        return read_manifest(adapter).dtype
    if is_gpu(device):
        return "float32" if mode == "exact" else "bfloat16"
    return "float32" if placement != "single" or num_processes() > 1 else None


def _suits_bfloat16(model: nn.Module, mode: str, path: str) -> bool:
    """Whether a model of this shape can do on a CPU in bfloat16 what the mode asks for."""
    return mode != "exact" or may_be_exact(model, torch.bfloat16, device="cpu", path=path)


# Measuring


def obtain_plain_speeds(
    name_or_path: str | Path, config: PretrainedConfig | None = None, *, path: str = ModelSettings.path_kind,
    remeasure: bool = False,
    **source: object,
) -> PlainSpeeds | None:
    """What this machine decodes the model plainly with, on as many threads as are set: as kept, else measured now.

    Measuring loads the model in float32, copies it, and takes about BUDGET_S more. None, with a warning, when it cannot
    be split in bfloat16. path: of `SplitModel`. Raises ValueError when the model cannot be split.
    """
    config = config or read_config(name_or_path, **source)
    kept = _path_of(fingerprint_of(config, path=path))
    speeds = None if remeasure else _read(kept)
    if speeds is not None:
        return speeds
    with doing(f"measuring {name_or_path} in float32 and bfloat16"):
        wide = read_weights(name_or_path, dtype=torch.float32, **source)
        narrow = _in_bfloat16(wide)
        splits = {"float32": SplitModel(wide, split_layer=0, path=path)}
        try:
            splits["bfloat16"] = SplitModel(narrow, split_layer=0, path=path)
        except ValueError as error:
            log.warning("%s is decoded in float32: %s", name_or_path, error)
            return None
        speeds = _race({dtype: _plain_rounds(split) for dtype, split in splits.items()})
    try:
        found = {"fingerprint": fingerprint_of(config, path=path), **dataclasses.asdict(speeds)}
        write_whole(kept, json.dumps(found, indent=1))
    except OSError as error:
        log.warning("the speeds of float32 and bfloat16 are not kept: %s", error)
    return speeds


def fingerprint_of(config: PretrainedConfig, *, path: str) -> dict[str, object]:
    """What plain speeds depend on: the machine, its libraries and threads, the model's shape, how layers are called."""
    machine = describe_machine()
    shape = {key: value for key, value in config.to_dict().items() if key not in _IRRELEVANT}
    names = ("cpu", "cores", "threads", "capability", "torch", "transformers")
    digest = hashlib.sha256(json.dumps(shape, sort_keys=True, default=str).encode()).hexdigest()[:16]
    return {name: machine[name] for name in names} | {"kernels": kernels_version(), "model": digest, "path": path}


def _plain_rounds(split: SplitModel) -> Callable[[], object]:
    """The rounds of one row that decodes plainly, to be called one by one."""
    drafter = build_drafter(split, DrafterConfig(kind="lora_head", lora_rank=1))  # never asked
    drafter.publish(drafter, version=0)
    batch = DecodingBatch(
        split, drafter, max_rows=1, capacity=0, policy=FixedLength(0), rule=StrictRule(), wants_transitions=False
    )
    limit = getattr(split.model.config, "max_position_embeddings", None) or CONTEXT
    prompt_ids, new = [0] * min(CONTEXT, limit // 2), MAX_REPEATS + 1
    batch.admit(Sequence(0, prompt_ids, SamplingParams(max_new_tokens=new), lambda token_id: None, new))
    return batch.round


def _race(rounds: dict[str, Callable[[], object]], *, clock: Callable[[], float] = time.perf_counter) -> PlainSpeeds:
    """Rounds of the two in turn, so that a busy moment does not fall on one alone, for about BUDGET_S."""
    seconds: dict[str, list[float]] = {dtype: [] for dtype in rounds}
    for run in rounds.values():
        run()  # the warm-up
    start_s = clock()
    for repeat in range(MAX_REPEATS):
        if repeat >= MIN_REPEATS and clock() - start_s > BUDGET_S:
            break
        for dtype, run in rounds.items():
            begun_s = clock()
            run()
            seconds[dtype].append(clock() - begun_s)
    return PlainSpeeds(**{dtype: 1 / statistics.median(times) for dtype, times in seconds.items()})


def _in_bfloat16(model: PreTrainedModel) -> PreTrainedModel:
    """A copy whose parameters alone are bfloat16, as loading in it makes them: rotary frequencies stay float32."""
    model = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    return model


def _can_be_raced(num_parameters: int) -> bool:
    """Whether it matters, and this machine's memory holds the model in both dtypes."""
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return MEASURED_PARAMETERS <= num_parameters <= MEMORY_SHARE * memory_bytes / BYTES_TO_MEASURE


def _shape_of(config: PretrainedConfig, source: dict[str, object]) -> nn.Module:
    """The model without its weights."""
    with torch.device("meta"):
        trust = bool(source.get("trust_remote_code", False))
        return AutoModelForCausalLM.from_config(config, trust_remote_code=trust)


def _count_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _path_of(fingerprint: dict[str, object]) -> Path:
    return measured_path(cache_folder(KIND), fingerprint)


def _read(path: Path) -> PlainSpeeds | None:
    """What is kept; None where nothing is, or, with a warning, where it is damaged."""
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        return PlainSpeeds(float(kept["float32"]), float(kept["bfloat16"]))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("%s holds no plain speeds (%s: %s); they are measured anew", path, type(error).__name__, error)
        return None

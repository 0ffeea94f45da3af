"""The words that a setting may be, and the bounds of its numbers: each list stands here and nowhere else."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from annotated_types import Ge, Gt, Le, Lt

Count = Annotated[int, Ge(0)]
PositiveCount = Annotated[int, Ge(1)]
Positive = Annotated[float, Gt(0)]
NonNegative = Annotated[float, Ge(0)]
Share = Annotated[float, Ge(0), Le(1)]
Seed = Annotated[int, Ge(0), Lt(2**62)]
Port = Annotated[int, Ge(0), Le(65535)]

Dtype = Literal["auto", "float32", "bfloat16", "float16", "float64"]
Weights = Literal["auto", "blocks", "dense"]
Placement = Literal["single", "device_map", "tensor", "zero3"]
Mode = Literal["auto", "exact", "fast"]
PathKind = Literal["auto", "native", "direct", "views"]
DrafterKind = Literal["anchored", "lora_head", "recurrent"]
SourceName = Literal["drafter", "lookup"]
PolicyName = Literal["auto", "fixed", "confidence", "goodput", "companion"]
CompanionName = Literal["self", "exit", "older", "ema", "model"]
MeasuredPolicy = Literal["confidence", "goodput", "companion"]  # measured beside plain decoding and the fixed length
# Older versions of the drafter need one that learns, and where policies are measured it is frozen.
FrozenCompanion = Literal["self", "exit", "model"]
RuleName = Literal["strict", "margin", "typical"]
Split = Literal["traffic", "eval"]
TrafficTemplate = Literal["auto", "vicuna"]
Schedule = Literal["kl_only", "kl_pg", "pg_only", "ce_only", "kl_ce", "kl_rl", "lk"]
SwitchBy = Literal["steps", "acceptance"]
Strategy = Literal["ddp", "zero1", "zero2"]
LearnerRole = Literal["shared", "dedicated"]
TextSource = Literal["answers", "texts"]
BenchMode = Literal["frozen", "online", "online_untrained"]
BenchTemplate = Literal["auto", "vicuna", "chat"]
RivalDtype = Literal["bfloat16", "float16", "float32"]
Rival = Literal["hf_generate", "hf_early_exit", "hf_prompt_lookup", "hf_assistant", "medusa", "eagle"]

MODES: tuple[str, ...] = get_args(Mode)
POLICIES: tuple[str, ...] = get_args(PolicyName)
MEASURED_POLICIES: tuple[MeasuredPolicy, ...] = get_args(MeasuredPolicy)
SOURCES: tuple[str, ...] = get_args(SourceName)
COMPANIONS: tuple[str, ...] = get_args(CompanionName)
SWITCHES: tuple[str, ...] = get_args(SwitchBy)
BENCH_MODES: tuple[str, ...] = get_args(BenchMode)
RIVALS: tuple[str, ...] = get_args(Rival)

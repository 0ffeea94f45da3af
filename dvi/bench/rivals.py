"""Other people's decoders as arms of a benchmark: the same model object, in the same process, under the same limits.

Knows transformers' `generate`; knows nothing of questions and clocks. `generate` reads part of its settings from the
model, so an arm lends the model its own for the time of one answer: what the model says otherwise does not count here,
and stays as it is. Whatever cannot run here is a plan with the reason.
"""
# B rows, S positions of the longest prompt.

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from dvi.bench.arms import ArmOptions, checked_names
from dvi.bench.records import ArmAnswer, ArmPlan
from dvi.model.end_tokens import end_token_ids
from dvi.model.views_path import dissect

RIVAL_ARMS = ("hf_generate", "hf_early_exit", "hf_prompt_lookup", "hf_assistant", "medusa", "eagle")

# As Spec-Bench runs prompt lookup: copying costs nothing, so it drafts more than a model would.
LOOKUP_TOKENS = 10
LOOKUP_NGRAM = 3
PROBE = list(range(3, 11))  # a prompt of any token ids
PROBE_NEW_TOKENS = 12

NOT_RUN = (
    "{} is not run: no checkpoint for this model was given, and transformers has no decoder for one; "
    "Spec-Bench's own checkout has"
)


class StepRecorder(StoppingCriteria):
    """Never stops; remembers the length after each of the target's forwards, of which assisted decoding tells alone.

    first_s: clock at the end of the first.
    """

    def __init__(self) -> None:
        self.lengths: list[int] = []
        self.first_s: float | None = None

    def __call__(self, input_ids: Tensor, scores: object, **_: object) -> Tensor:
        if self.first_s is None:
            self.first_s = time.perf_counter()
        self.lengths.append(input_ids.shape[1])
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


class HuggingFaceArm:
    """`generate` of the shared model with some way of assistance, or none."""

    def __init__(
        self, model: PreTrainedModel, settings: GenerationConfig, options: ArmOptions, **assistance: object
    ) -> None:
        self._model, self._settings, self._options, self._assistance = model, settings, options, assistance

    def answer(self, prompts: list[list[int]], *, seed: int) -> list[ArmAnswer]:
        """See `Arm.answer`. Shorter prompts are padded on the left; sampled rows of a batch share one generator."""
        device, options = self._model.device, self._options
        context = getattr(self._model.config, "max_position_embeddings", None) or 2**31
        limits = [min(options.max_new_tokens, context - len(prompt)) for prompt in prompts]
        width, pad_id = max(map(len, prompts)), self._settings.pad_token_id
        padded = [[pad_id] * (width - len(prompt)) + prompt for prompt in prompts]
        mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        recorder = StepRecorder()
        is_recorded = options.tells_decode_s or bool(self._assistance)
        with _lent(self._model, self._settings), _seeded(seed if options.temperature else None, device):
            output_BS = self._model.generate(
                torch.tensor(padded, device=device), attention_mask=torch.tensor(mask, device=device),
                max_new_tokens=max(limits), **self._assistance,
                # Counting costs a call a step: without assistance every step gives one token anyway.
                stopping_criteria=StoppingCriteriaList([recorder] if is_recorded else []),
            )
            rows = output_BS[:, width:].tolist()
            decode_s = time.perf_counter() - recorder.first_s if options.tells_decode_s else None
        answers = [self._cut(row[:limit]) for row, limit in zip(rows, limits, strict=True)]
        if not self._assistance:
            return [ArmAnswer(token_ids, [1] * len(token_ids), decode_s=decode_s) for token_ids in answers]
        steps = [width, *recorder.lengths]
        return [ArmAnswer(ids, _accept_lengths(steps, len(ids)), decode_s=decode_s) for ids in answers]

    def _cut(self, token_ids: list[int]) -> list[int]:
        """Up to the first end token, which is kept: what follows is padding, or was accepted beyond the end."""
        ends = (i for i, token_id in enumerate(token_ids) if token_id in (self._settings.eos_token_id or ()))
        return token_ids[: next(ends, len(token_ids)) + 1]


def _accept_lengths(lengths: list[int], num_tokens: int) -> list[int]:
    """Tokens of each step, those beyond num_tokens left out."""
    kept = [min(length - lengths[0], num_tokens) for length in lengths]
    return [after - before for before, after in itertools.pairwise(kept) if after > before]


@contextlib.contextmanager
def _lent(model: PreTrainedModel, settings: GenerationConfig) -> Iterator[None]:
    """The model generates by these settings only, and afterwards is as it was, whatever happened."""
    # Not as arguments of `generate`: num_assistant_tokens and the confidence threshold are read from the model alone.
    own, config = model.generation_config, model.config.get_text_config()
    num_layers = config.num_hidden_layers
    model.generation_config = settings
    try:
        yield
    finally:
        model.generation_config = own
        config.num_hidden_layers = num_layers  # early exit leaves it changed when a draft raises


@contextlib.contextmanager
def _seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    """torch's global generators begin with seed inside, and go on outside as if nothing had been drawn."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def rival_plans(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, options: ArmOptions, *, split_layer: int,
    draft_checkpoint: str | Path | None = None, names: Iterable[str] = RIVAL_ARMS,
) -> list[ArmPlan]:
    """Plans of the named rivals, in the order named, over the model object that our arms use.

    split_layer       ours: early exit drafts with as many layers, at least one.
    draft_checkpoint  folder of a draft model with the same vocabulary, for `hf_assistant`.
    Runs the model over a few tokens when early exit is asked for. Raises ValueError for unknown names and for a draft
    checkpoint that is missing or has another vocabulary.
    """
    settings = _settings(model, tokenizer, options)

    def plan(name: str, title: str, *, facts: dict[str, object] | None = None, **assistance: object) -> ArmPlan:
        return ArmPlan(
            name, title, lambda: HuggingFaceArm(model, settings, options, **assistance),
            batch_one=bool(assistance), facts=facts or {},
        )

    def early_exit() -> ArmPlan:
        layer = max(split_layer, 1)
        found = plan(
            "hf_early_exit", f"transformers early exit after layer {layer}, T = {options.num_draft_tokens}",
            facts={"early_exit_layer": layer}, assistant_early_exit=layer,
        )
        probe = HuggingFaceArm(
            model, settings, dataclasses.replace(options, max_new_tokens=PROBE_NEW_TOKENS), assistant_early_exit=layer
        )
        return _checked_early_exit(found, model, probe)

    def assistant() -> ArmPlan:
        title = f"transformers with a draft model, T = {options.num_draft_tokens}"
        if draft_checkpoint is None:
            reason = "no draft checkpoint given; give --draft-checkpoint, made by dvi export --standalone"
            return ArmPlan("hf_assistant", title, None, na_reason=reason, batch_one=True)
        draft_model = _load_draft_model(draft_checkpoint, model)
        draft_model.generation_config = settings
        return plan(
            "hf_assistant", title, facts={"draft_checkpoint": str(draft_checkpoint)}, assistant_model=draft_model
        )

    makers: dict[str, Callable[[], ArmPlan]] = {
        "hf_generate": lambda: plan("hf_generate", "transformers generate"),
        "hf_early_exit": early_exit,
        "hf_prompt_lookup": lambda: plan(
            "hf_prompt_lookup", f"transformers prompt lookup, {LOOKUP_TOKENS} tokens",
            facts={"prompt_lookup_num_tokens": LOOKUP_TOKENS, "max_matching_ngram_size": LOOKUP_NGRAM},
            prompt_lookup_num_tokens=LOOKUP_TOKENS, max_matching_ngram_size=LOOKUP_NGRAM,
        ),
        "hf_assistant": assistant,
        "medusa": lambda: ArmPlan("medusa", "Medusa", None, na_reason=NOT_RUN.format("Medusa")),
        "eagle": lambda: ArmPlan("eagle", "EAGLE", None, na_reason=NOT_RUN.format("EAGLE")),
    }
    return [makers[name]() for name in checked_names(names, RIVAL_ARMS)]


def _settings(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, options: ArmOptions
) -> GenerationConfig:
    """Every setting that would otherwise come from the model; a text ends where ours does."""
    eos_ids = None if options.ignore_eos else end_token_ids(model, tokenizer) or None
    pad_id = None if tokenizer is None else tokenizer.pad_token_id
    sampling = {"temperature": options.temperature, "top_k": 0, "top_p": 1.0} if options.temperature else {}
    return GenerationConfig(
        do_sample=bool(sampling), **sampling, eos_token_id=eos_ids, num_assistant_tokens=options.num_draft_tokens,
        # Padding is masked and cut off, so any id serves; without one transformers warns at every call.
        pad_token_id=(eos_ids or [0])[0] if pad_id is None else pad_id,
        num_assistant_tokens_schedule="constant", assistant_confidence_threshold=0.0,
    )


def _load_draft_model(folder: str | Path, model: PreTrainedModel) -> PreTrainedModel:
    if not Path(folder).is_dir():
        raise ValueError(f"draft checkpoint must be a folder, got {folder}; write one with dvi export --standalone")
    draft_model = AutoModelForCausalLM.from_pretrained(folder, dtype=model.dtype).to(model.device).eval()
    sizes = [m.config.get_text_config().vocab_size for m in (draft_model, model)]
    if sizes[0] != sizes[1]:
        raise ValueError(f"{folder} must have the model's vocabulary of {sizes[1]} tokens, got {sizes[0]}")
    return draft_model


def _checked_early_exit(plan: ArmPlan, model: PreTrainedModel, probe: HuggingFaceArm) -> ArmPlan:
    """The plan with its layer counts, or n/a where more than the first layers ran for the drafts."""
    answers: list[ArmAnswer] = []
    try:
        counts = layer_calls(model, lambda: answers.extend(probe.answer([PROBE], seed=0)))
    except Exception as error:  # whatever stops a foreign decoder is the reason why it cannot run here
        return dataclasses.replace(plan, build=None, na_reason=f"early exit raised {type(error).__name__}: {error}")
    layer, num_steps = plan.facts["early_exit_layer"], len(answers[0].accept_lengths)
    facts = plan.facts | {"layer_calls": counts, "target_forwards": num_steps}
    if set(counts[layer:]) == {num_steps} and min(counts[:layer]) > num_steps:
        return dataclasses.replace(plan, facts=facts)
    reason = (
        f"early exit does not leave after layer {layer}: in {num_steps} target forwards and their drafts the layers "
        f"ran {counts} times"
    )
    return dataclasses.replace(plan, build=None, na_reason=reason, facts=facts)


def layer_calls(model: PreTrainedModel, run: Callable[[], object]) -> list[int]:
    """How often each layer's forward is called by run()."""
    layers = dissect(model).layers
    counts = [0] * len(layers)

    def counter(index: int) -> Callable[..., None]:
        def hook(*_: object) -> None:
            counts[index] += 1

        return hook

    with contextlib.ExitStack() as hooks:
        for index, layer in enumerate(layers):
            hooks.callback(layer.register_forward_hook(counter(index)).remove)
        run()
    return counts

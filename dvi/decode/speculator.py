"""SelfSpeculator: one frozen model that drafts for itself. Text in, text out, whatever the drafter has learnt so far.

Ties model, tokenizer, split, drafter and rounds together; sees training only as a `Learner` that is passed in.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import logging
from collections.abc import Callable, Generator, Iterable, Iterator
from pathlib import Path

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from dvi.decode.batch import PREFILL_CHUNK, DecodingBatch
from dvi.decode.precision import choose_dtype, settle_dtype
from dvi.decode.sequence import Sequence
from dvi.decode.text import TextStream, check_token_ids
from dvi.decode.verification import StrictRule, VerifyRule, make_rule
from dvi.draft.companion_length import CompanionLength
from dvi.draft.companion_model import ModelCompanion, load_companion
from dvi.draft.companions import Companion, EmaCompanion, ExitCompanion, OlderCompanion, SelfCompanion
from dvi.draft.costs import CostTable
from dvi.draft.length_policies import ConfidenceStop, FixedLength, GoodputLength, LengthPolicy
from dvi.draft.measure_costs import measure_costs
from dvi.learner import Learner
from dvi.model.adapter_store import load_drafter, read_manifest, save_drafter
from dvi.model.chat_templates import VICUNA_TEMPLATE, render_chat
from dvi.model.context import max_positions_of, why_shorter
from dvi.model.devices import (
    NOT_TIMED,
    TIMED_POLICIES,
    check_ranks_agree,
    check_settings,
    is_tensor_parallel,
    load_model,
)
from dvi.model.drafter import DrafterConfig, build_drafter
from dvi.model.end_tokens import end_token_ids
from dvi.model.exact import ExactSplit
from dvi.model.pretrained import read_config, read_tokenizer
from dvi.model.split import SplitModel
from dvi.progress import shown_as
from dvi.records import GenerationResult, SamplingParams
from dvi.seeds import AnswerSeeds, Seeds, prompt_seed
from dvi.settings import (
    COMPANIONS,
    MODES,
    POLICIES,
    DrafterSettings,
    DraftSettings,
    LearningSettings,
    ModelSettings,
    ServeConfig,
    TrainConfig,
    WarmupConfig,
    check_companion,
)
from dvi.traffic import Messages, as_text, why_no_text

_LOG = logging.getLogger(__name__)

Prompt = str | list[int] | list[dict[str, str]]

GOODPUT_BUCKETS = (1, 2, 3, 4, 6, 8)
# 12: GOODPUT_BUCKETS[-1] + 1, room for the longest draft of every policy, and up to a multiple of 4. With 9 rows some
# float64 matrix products on CPUs treat the last row differently from the others, and the self-check refuses.
EXACT_WIDTH = 12
PLAIN = FixedLength(0)


class SelfSpeculator:
    """A causal language model cut at split_layer, its drafter, and the loop that decodes with them.

    Attributes: model, tokenizer, split, drafter, policy (a name of POLICIES), companion (of COMPANIONS),
    num_draft_tokens, rule, mode; passes, the split model that decoding runs on: `split` itself, or its exact form.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None,
        *,
        split_layer: int | None = None,
        drafter: DrafterConfig | None = None,
        adapter: str | Path | None = None,
        mode: str = ModelSettings.mode,
        path: str = ModelSettings.path_kind,
        policy: str = DraftSettings.policy,
        num_draft_tokens: int = DraftSettings.num_draft_tokens,
        confidence_threshold: float = DraftSettings.confidence_threshold,
        companion: str = DraftSettings.companion,
        companion_model: str | Path | None = None,
        rule: VerifyRule | None = None,
        seed: int = LearningSettings.seed,
    ) -> None:
        """See `from_pretrained`. A tokenizer of None serves token ids only (no text, no stop strings)."""
        if mode not in MODES:
            raise ValueError(f"mode must be {' or '.join(map(repr, MODES))}, got {mode!r}")
        if policy not in POLICIES:
            raise ValueError(f"policy must be one of {', '.join(POLICIES)}, got {policy!r}")
        if companion not in COMPANIONS:
            raise ValueError(f"companion must be one of {', '.join(COMPANIONS)}, got {companion!r}")
        check_companion(companion, companion_model)
        if not 0 <= num_draft_tokens <= GOODPUT_BUCKETS[-1]:
            raise ValueError(f"num_draft_tokens must be in 0..{GOODPUT_BUCKETS[-1]}, got {num_draft_tokens}; try 4")
        self._is_lock_step = is_tensor_parallel(model)
        if self._is_lock_step and policy in TIMED_POLICIES:
            raise ValueError(f"{NOT_TIMED}; try policy='fixed'")
        self.model, self.tokenizer, self.mode = model, tokenizer, mode
        if split_layer is None:
            split_layer = choose_split_layer(model.config, adapter)
        self.split = SplitModel(model, split_layer=split_layer, path=path)
        self.passes = ExactSplit(self.split, width=EXACT_WIDTH) if mode == "exact" else self.split
        self.drafter = make_drafter(self.split, drafter, adapter=adapter, seed=seed)
        if self._is_lock_step:
            self.check_lock_step()
        self.policy, self.num_draft_tokens = policy, num_draft_tokens
        self.confidence_threshold, self.companion = confidence_threshold, companion
        self._companion_split: SplitModel | None = None
        if companion_model is not None:
            self._companion_split = load_companion(
                companion_model, split=self.split, tokenizer=tokenizer, max_positions=self.max_positions
            )
        self.rule: VerifyRule = rule or StrictRule()
        self._policies: dict[tuple[str, int], LengthPolicy] = {}  # those that learn, by batch size
        self._request_ids = itertools.count()

    def __repr__(self) -> str:
        name = Path(self.model.config.name_or_path or type(self.model).__name__).name
        split, drafter = self.split, self.drafter
        dtype = str(split.dtype).removeprefix("torch.")
        lossy = "" if self.rule.is_lossless else f", {self.rule.name} rule"
        return (
            f"SelfSpeculator({name}, {split.split_layer} of {split.num_layers} layers draft, {dtype} on "
            f"{split.device}, {drafter.config.kind} drafter v{drafter.version}, {self.policy} policy, at most "
            f"{self.num_draft_tokens} drafts, {self.mode} mode{lossy})"
        )

    @classmethod
    @shown_as(lambda cls, name_or_path, **_: f"loading {name_or_path}")
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        split_layer: int | None = None,
        drafter: str | DrafterConfig = DrafterSettings.kind,
        lora_rank: int = DrafterSettings.lora_rank,
        dtype: str | torch.dtype = ModelSettings.dtype,
        device: str = ModelSettings.device,
        placement: str = ModelSettings.placement,
        adapter: str | Path | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
        **options: object,
    ) -> SelfSpeculator:
        """A speculator from a Hugging Face model folder or hub id.

        split_layer   layers 0 .. split_layer - 1 draft; default the adapter's, or one in sixteen (0: the embedding).
        drafter       a kind of `DrafterSettings`, or a whole DrafterConfig; ignored with an adapter.
        dtype         "auto" is the adapter's; without one bfloat16 on GPUs, and on CPUs whichever of float32 and
                      bfloat16 decodes plainly faster here, see `dvi.decode.precision`.
        device        "auto" takes a CUDA device when there is one; only that goes with another placement than "single".
        placement     "single", "device_map" or "tensor", see `dvi.model.devices`.
        adapter       folder written by `save_drafter`.
        options       mode, and path, a path_kind of `dvi.settings.ModelSettings`; policy, num_draft_tokens,
                      confidence_threshold, companion and companion_model of `DraftSettings`; rule; seed.
        Raises ValueError for anything that does not fit together, with the reason.
        """
        if placement != "single" and device != "auto":
            raise ValueError(
                f"device must be 'auto' with placement {placement!r}, which finds its devices itself, got {device!r}; "
                "CUDA_VISIBLE_DEVICES limits them"
            )
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        source = {"revision": revision, "trust_remote_code": trust_remote_code}
        config = read_config(name_or_path, **source)
        if dtype == "auto":
            dtype = choose_dtype(
                name_or_path, config, adapter=adapter, device=device, placement=placement,
                mode=options.get("mode", ModelSettings.mode), path=options.get("path", ModelSettings.path_kind),
                **source,
            )
        if isinstance(dtype, str):
            dtype = getattr(torch, dtype)
        model = load_model(name_or_path, config, placement=placement, device=device, dtype=dtype, **source)
        tokenizer = read_tokenizer(name_or_path, **source)
        if isinstance(drafter, str):
            drafter = DrafterConfig(kind=drafter, lora_rank=lora_rank, lora_alpha=float(lora_rank))
        return cls(
            model, tokenizer, split_layer=split_layer, drafter=drafter, adapter=adapter,
            **options,
        )

    def afresh(self, *, rule: VerifyRule) -> SelfSpeculator:
        """The same model and drafter by this rule, with length rules that have learnt nothing yet."""
        other = copy.copy(self)
        other.rule, other._policies = rule, {}
        return other

    def encode(self, prompt: Prompt, *, max_tokens: int | None = None) -> list[int]:
        """Token ids of a prompt: text as it is, chat messages through the model's own template, ids unchanged.

        max_tokens: a longer prompt loses its beginning; by default it is refused when it fills the model's context.
        """
        if isinstance(prompt, str):
            _check_characters(prompt, "the text")
            ids = self._need_tokenizer("text prompts")(prompt)["input_ids"]
        elif prompt and isinstance(prompt[0], dict):
            tokenizer = self._need_tokenizer("chat messages")
            if tokenizer.chat_template is None:
                raise ValueError("this model has no chat template; give the prompt as text")
            for index, message in enumerate(prompt):
                _check_characters(message.get("content"), f"messages[{index}].content")
            text = render_chat(tokenizer, prompt)
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        else:
            ids = list(prompt)
        limit = self.max_positions
        if not ids:
            raise ValueError("a prompt must hold at least 1 token, got an empty one")
        check_token_ids(ids, num_known=self.split.num_input_ids, tokenizer=self.tokenizer)
        if max_tokens is not None:
            ids = ids[-max_tokens:]
        if len(ids) >= limit:
            reason = why_shorter(self.model.config.get_text_config())
            because = "" if reason is None else f": {reason}"
            raise ValueError(
                f"a prompt must be shorter than the model's context of {limit} tokens, got {len(ids)}{because}"
            )
        return ids

    def encode_request(self, messages: Messages, *, max_new_tokens: int) -> tuple[list[int], bool]:
        """Token ids of chat messages with room for an answer, and whether they lost their beginning for it.

        Without a chat template the messages' bare text. Raises ValueError when the answer alone fills the context.
        """
        room = self.max_positions - max_new_tokens - 1
        if room < 1:
            raise ValueError(
                f"max_new_tokens, of answers and of eval, must be at most {self.max_positions - 2} for the model's "
                f"context of {self.max_positions}, got {max_new_tokens}; try {self.max_positions // 2}"
            )
        prompt = messages if self._need_tokenizer("chat messages").chat_template is not None else as_text(messages)
        ids = self.encode(prompt, max_tokens=room + 1)  # one more tells a longer prompt from one that fits
        return ids[-room:], len(ids) > room

    @property
    def level(self) -> str:
        """What is promised of the tokens: "exact", "fast", or "lossy" whatever the mode."""
        return self.mode if self.rule.is_lossless else "lossy"

    @property
    def max_positions(self) -> int:
        """The model's context, prompt and answer together; less where `dvi.model.context` says why."""
        return max_positions_of(self.model.config.get_text_config())

    def _need_tokenizer(self, what: str) -> PreTrainedTokenizerBase:
        if self.tokenizer is None:
            raise ValueError(f"{what} need a tokenizer; give token ids")
        return self.tokenizer

    def generate(
        self,
        prompts: Prompt | Iterable[Prompt],
        params: SamplingParams | list[SamplingParams] | None = None,
        *,
        batch_size: int = 8,
        learner: Learner | None = None,
        policy: LengthPolicy | None = None,
        keep_transitions: bool = True,
        seeds: Seeds | None = None,
    ) -> Iterator[GenerationResult]:
        """Results in the order they finish, each with its prompt's index.

        prompts           one prompt or many (an iterable is consumed as rows become free); see `encode`.
        params            for all prompts, or one per prompt (then prompts must be a list of that length). Draws are
                          keyed by seed and prompt, so the place in the list changes nothing. Given once, a prompt that
                          comes again draws as its next answer: requests that shared their draws would be no longer
                          independent of what a learner has seen.
        batch_size        rows that decode together; a finished row is replaced by the next prompt at once.
        learner           observes every round's transitions and may step and publish between rounds.
        policy            draft-length rule for this call; `PLAIN` decodes without drafts. Default: the speculator's.
        keep_transitions  also collect each request's transitions in its result (only without a learner).
        seeds             gives each prompt's seed, instead of its params' own.
        A request whose prompt and max_new_tokens exceed the model's context ends at the context, reason "length".
        What goes wrong with one request ends it alone, reason "error"; the result says what. Of a list all prompts are
        checked before anything runs. Raises ValueError for one that cannot be decoded, naming its place.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be >= 1, got {batch_size}")
        if _is_one_prompt(prompts):
            prompts = [prompts]
        if isinstance(params, list):
            if not hasattr(prompts, "__len__") or len(prompts) != len(params):
                raise ValueError(f"a list of {len(params)} params needs a list of as many prompts")
            pairs = zip(prompts, params, strict=True)
            representative = params
        else:
            shared = params or SamplingParams()
            representative = [shared]
            pairs = ((prompt, shared) for prompt in prompts)
            seeds = seeds or AnswerSeeds(shared.seed)
        if any(one.stop_strings for one in representative):
            self._need_tokenizer("stop strings")
        if isinstance(prompts, list):
            pairs = list(zip(self._encode_all(prompts), [one for _, one in pairs], strict=True))
        batch = DecodingBatch(
            self.passes, self.drafter, max_rows=batch_size, capacity=0, rule=self.rule,
            policy=policy or self._choose_policy(representative, batch_size),
            wants_transitions=learner is not None or keep_transitions,
            prefill_chunk=EXACT_WIDTH if self.mode == "exact" else PREFILL_CHUNK,
        )
        return self._run(batch, pairs, learner, seeds)

    def _run(
        self, batch: DecodingBatch, pairs: Iterable[tuple[Prompt, SamplingParams]], learner: Learner | None,
        seeds: Seeds | None,
    ) -> Iterator[GenerationResult]:
        waiting = enumerate(pairs)
        running: dict[int, tuple[int, TextStream | None, list]] = {}
        is_exhausted = False
        while True:
            while batch.has_room and not is_exhausted:
                item = next(waiting, None)
                if item is None:
                    is_exhausted = True
                    break
                index, (prompt, params) = item
                sequence = None
                try:
                    prompt_ids = self.encode(prompt)
                    if seeds is not None:
                        params = dataclasses.replace(params, seed=seeds(index, prompt_ids))
                    sequence, stream = self.new_sequence(prompt_ids, params)
                    experience = batch.admit(sequence)
                except Exception as error:
                    yield self._failed(error, index, sequence, batch)
                    continue
                running[sequence.request_id] = (index, stream, [])
                self._teach(experience, learner, running)
            if not batch.sequences:
                return
            try:
                transitions = batch.round()
            except Exception as error:
                if self._is_lock_step:  # the other ranks have computed it, or wait
                    raise
                batch.newest.fail(error)
            else:
                self._teach(transitions, learner, running)
            if learner is not None:
                learner.step_if_due()
            for sequence in batch.take_finished():
                yield self._result(sequence, *running.pop(sequence.request_id))

    def _encode_all(self, prompts: list[Prompt]) -> Iterator[list[int]]:
        for index, prompt in enumerate(prompts):
            try:
                yield self.encode(prompt)
            except ValueError as error:
                where = getattr(prompt, "where", "") or (f"prompts[{index}]" if len(prompts) > 1 else "")
                raise ValueError(f"{where}: {error}" if where else str(error)) from error

    def _failed(
        self, error: Exception, index: int, sequence: Sequence | None, batch: DecodingBatch
    ) -> GenerationResult:
        """The result of a request that did not come to decode. In lock-step the error itself: all ranks have it."""
        if self._is_lock_step:
            raise error
        if sequence is None:
            sequence = Sequence(next(self._request_ids), [], SamplingParams(), lambda _: None, 0)
        sequence.fail(error)
        if sequence in batch.prefilling:
            batch.remove(sequence)
        return self._result(sequence, index, None, [])

    def _teach(self, transitions: list, learner: Learner | None, running: dict) -> None:
        if learner is not None:
            learner.observe(transitions)
        else:
            for stretch in transitions:
                running[stretch.request_id][2].append(stretch)

    def new_sequence(
        self, prompt_ids: list[int], params: SamplingParams, *, request_id: int | None = None, **options: object
    ) -> tuple[Sequence, TextStream | None]:
        """A sequence that ends where the params, the model's own end tokens or its context say, and its text.

        It draws with `prompt_seed`, a function of the params' seed and the prompt, wherever it is decoded.
        options: other fields of `Sequence`. Raises ValueError for stop strings without a tokenizer.
        """
        if params.stop_strings:
            self._need_tokenizer("stop strings")
        stream = None
        if self.tokenizer is not None:
            stream = TextStream(self.tokenizer, stop_strings=params.stop_strings)
        stop_ids = set(params.stop_token_ids) | (set() if params.ignore_eos else self.eos_token_ids)

        def accept_token(token_id: int) -> str | None:
            if token_id in stop_ids:
                return "stop"
            return "stop" if stream is not None and stream.push(token_id) else None

        max_new_tokens = min(params.max_new_tokens, self.max_positions - len(prompt_ids))
        params = dataclasses.replace(params, seed=prompt_seed(params.seed, prompt_ids))
        request_id = next(self._request_ids) if request_id is None else request_id
        return Sequence(request_id, prompt_ids, params, accept_token, max_new_tokens, **options), stream

    @property
    def eos_token_ids(self) -> set[int]:
        """The ids that end a text, see `dvi.model.end_tokens`."""
        return set(end_token_ids(self.model, self.tokenizer))

    def _result(self, sequence: Sequence, index: int, stream: TextStream | None, kept: list) -> GenerationResult:
        if sequence.error is not None:
            _LOG.error("request %d failed: %s", index, sequence.error, exc_info=sequence.error)
        elif stream is not None:
            stream.close()
        return GenerationResult(
            index=index, request_id=sequence.request_id, text="" if stream is None else stream.text,
            token_ids=sequence.token_ids, finish_reason=sequence.finish_reason, stats=sequence.stats,
            drafter_version=self.drafter.version, level=self.level,
            accept_lengths=sequence.kept_per_round, transitions=kept,
            error=None if sequence.error is None else str(sequence.error) or type(sequence.error).__name__,
        )

    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, *, learner: Learner | None = None
    ) -> Generator[str, None, GenerationResult]:
        """Pieces of one answer's text as rounds finish; never half a character, never part of a stop string.

        The generator's return value, as of `result = yield from speculator.stream(...)`, is the whole result.
        """
        params = params or SamplingParams()
        sequence, text = self.new_sequence(self.encode(prompt), params)
        self._need_tokenizer("streamed text")
        batch = DecodingBatch(
            self.passes, self.drafter, max_rows=1, capacity=0, policy=self._choose_policy([params], 1), rule=self.rule,
            wants_transitions=learner is not None,
            prefill_chunk=EXACT_WIDTH if self.mode == "exact" else PREFILL_CHUNK,
        )

        def pieces() -> Generator[str, None, GenerationResult]:
            experience = batch.admit(sequence)
            while True:
                if learner is not None:
                    learner.observe(experience)
                    learner.step_if_due()
                if sequence.finish_reason is not None:
                    break
                experience = batch.round()
                if piece := text.read():
                    yield piece
            text.close()
            if piece := text.read(is_final=True):
                yield piece
            batch.take_finished()
            return self._result(sequence, 0, text, [])

        return pieces()

    def _choose_policy(self, params: list[SamplingParams], batch_size: int) -> LengthPolicy:
        """The draft-length rule. "auto" is the goodput rule only where tokens cannot depend on the lengths it picks:
        a seeded sample should not change with the machine's speed, and ranks in lock-step must pick the same."""
        name = self.policy if self.num_draft_tokens else "fixed"
        if name == "auto":
            does_length_matter = any(not p.is_greedy and p.coupling == "rejection" for p in params)
            name = "fixed" if does_length_matter or self._is_lock_step else "goodput"

        def costs() -> CostTable:
            rows = (*(r for r in (1, 2, 4, 8, 16) if r < batch_size), batch_size)  # a batch that drains has fewer
            return measure_costs(self.passes, self.drafter, buckets=goodput_buckets(self.num_draft_tokens), rows=rows)

        if name not in TIMED_POLICIES:
            return self.new_policy(name, self.num_draft_tokens, costs=costs)
        if (name, batch_size) not in self._policies:
            self._policies[name, batch_size] = self.new_policy(name, self.num_draft_tokens, costs=costs)
        return self._policies[name, batch_size]

    def new_policy(self, name: str, num_draft_tokens: int, *, costs: Callable[[], CostTable]) -> LengthPolicy:
        """A draft-length rule by its name, which has learnt nothing yet.

        name: of POLICIES; "auto" is goodput here: whoever knows better does not ask for it.
        costs: of a round's parts on this machine, asked for by the rules that weigh them, goodput and companion.
        """
        buckets = goodput_buckets(num_draft_tokens)
        makers: dict[str, Callable[[], LengthPolicy]] = {
            "fixed": lambda: FixedLength(num_draft_tokens),
            "confidence": lambda: ConfidenceStop(num_draft_tokens, threshold=self.confidence_threshold),
            "goodput": lambda: GoodputLength(buckets, costs()),
            "companion": lambda: CompanionLength(
                buckets, costs(), self.new_companion(), is_on_cpu=self.split.device.type == "cpu",
                can_pack=self.passes.can_pack,
            ),
        }
        makers["auto"] = makers["goodput"]
        return makers[name if num_draft_tokens else "fixed"]()

    def new_companion(self, name: str | None = None) -> Companion:
        """A companion by its name, of COMPANIONS; default the speculator's own choice. One serves one policy.

        Raises ValueError for "model" when the speculator was made without a companion_model.
        """
        name = name or self.companion
        if name == "model" and self._companion_split is None:
            check_companion(name, None)
        makers: dict[str, Callable[[], Companion]] = {
            "self": SelfCompanion,
            "exit": lambda: ExitCompanion(self.split.final_norm),
            "older": OlderCompanion,
            "ema": EmaCompanion,
            "model": lambda: ModelCompanion(self._companion_split),
        }
        return makers[name]()

    @torch.no_grad()
    def check_lock_step(self) -> None:
        """For a tensor-parallel model: raises RuntimeError when the ranks' drafters or results differ in any bit.

        They decide each for itself, so that one other bit may become another token, and ranks that wait for each other
        for ever. All ranks must call it together.
        """
        split, width = self.split, 8
        ids_1Q = torch.arange(width, device=split.device)[None] % split.vocab_size
        cache = split.make_cache(1, width)
        placement = cache.place(offset=0, width=width)
        hidden_1QD = split.shallow(ids_1Q, cache, placement)
        final_1QD = split.deep(hidden_1QD, ids_1Q, cache, placement)
        drafted_1V = self.drafter.step(hidden_1QD[:, 0], self.drafter.begin(final_1QD[:, 0]), 0)
        logits_1QV = split.head(final_1QD)
        results = {"hidden states": hidden_1QD, "the verifier's logits": logits_1QV, "draft logits": drafted_1V}
        check_ranks_agree(results | self.drafter.state_dict())

    def save_drafter(self, folder: str | Path, *, metrics: dict | None = None, config: dict | None = None) -> None:
        """Writes the drafter as it serves now: PEFT layout, extra tensors, manifest; see `dvi.model.adapter_store`."""
        save_drafter(
            folder, self.drafter, self.split, base_model=self.model.config.name_or_path, metrics=metrics, config=config
        )


def build_speculator(
    config: TrainConfig | ServeConfig | WarmupConfig, *, kind: type[SelfSpeculator] = SelfSpeculator
) -> SelfSpeculator:
    """The speculator of a run's settings, its drafter untrained or as drafter.adapter has it."""
    check_settings(config)
    config = settle_dtype(config)
    model, drafter, draft = config.model, config.drafter, config.draft
    if model.num_threads:
        torch.set_num_threads(model.num_threads)
    shape = {field.name: getattr(drafter, field.name) for field in dataclasses.fields(DrafterConfig)}
    speculator = kind.from_pretrained(
        model.path, split_layer=model.split_layer, drafter=DrafterConfig(**shape), dtype=model.dtype,
        device=model.device, placement=model.placement, adapter=drafter.adapter, mode=model.mode, path=model.path_kind,
        policy=draft.policy, num_draft_tokens=draft.num_draft_tokens, confidence_threshold=draft.confidence_threshold,
        companion=draft.companion, companion_model=draft.companion_model,
        seed=config.train.seed, rule=None if isinstance(config, WarmupConfig) else make_rule(config.verify),
        trust_remote_code=isinstance(config, ServeConfig) and config.serve.trust_remote_code,
    )
    if not isinstance(config, ServeConfig) and config.data.template == "vicuna":
        speculator.tokenizer.chat_template = VICUNA_TEMPLATE
    return speculator


def make_drafter(
    split: SplitModel, config: DrafterConfig | None = None, *, adapter: str | Path | None = None,
    seed: int = LearningSettings.seed,
) -> nn.Module:
    """A drafter that serves: the adapter's, else an untrained one. Raises ValueError as `load_drafter` does."""
    if adapter is not None:
        drafter = load_drafter(adapter, split)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            drafter = build_drafter(split, config or DrafterConfig())
        drafter.publish(drafter, version=0)
    return drafter.requires_grad_(False)


def choose_split_layer(config: PretrainedConfig, adapter: str | Path | None) -> int:
    """Where to cut a model if nobody says: where the adapter was trained, else by `default_split_layer`."""
    if adapter is not None:
        return read_manifest(adapter).split_layer
    return default_split_layer(config.get_text_config().num_hidden_layers)


def default_split_layer(num_layers: int) -> int:
    """One layer in sixteen. An anchored drafter gains little acceptance from more, and every shallow layer is paid for
    at every drafted token: measured on the bundled model, docs/benchmarks.md; two of 32 layers is the paper's cut."""
    return num_layers // 16


def goodput_buckets(num_draft_tokens: int) -> tuple[int, ...]:
    """The draft lengths that rules which weigh costs choose from."""
    return tuple(t for t in GOODPUT_BUCKETS if t <= num_draft_tokens)


def _check_characters(text: object, name: str) -> None:
    """Raises ValueError for what a tokenizer does not take: it would say that it got no string."""
    if isinstance(text, str) and (reason := why_no_text(text)) is not None:
        raise ValueError(f"{name} {reason}")


def _is_one_prompt(prompts: object) -> bool:
    if isinstance(prompts, str):
        return True
    return isinstance(prompts, list) and bool(prompts) and isinstance(prompts[0], (int, dict))

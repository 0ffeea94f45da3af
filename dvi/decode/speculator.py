"""SelfSpeculator: one frozen model that drafts for itself. Text in, text out, whatever the drafter has learnt so far.

Ties model, tokenizer, split, drafter and rounds together; sees training only as a `Learner` that is passed in.
One file though it is long: the arguments of the one public class are explained here, and what it does is elsewhere.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Callable, Generator, Iterable, Iterator
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dvi.decode.batch import PREFILL_CHUNK, DecodingBatch
from dvi.decode.generation import Begun, Generation
from dvi.decode.precision import choose_dtype, choose_weights
from dvi.decode.prompts import Prompt, PromptEncoder, is_one_prompt
from dvi.decode.sequence import Sequence
from dvi.decode.text import TextStream
from dvi.decode.verification import StrictRule, VerifyRule
from dvi.draft.catalogue import GOODPUT_BUCKETS, buckets_of, make_companion, make_policy
from dvi.draft.companion_model import load_companion
from dvi.draft.companions import Companion
from dvi.draft.costs import CostTable
from dvi.draft.length_policies import FixedLength, LengthPolicy
from dvi.draft.measure_costs import measure_costs
from dvi.draft.node_budget import NodeBudget
from dvi.learner import Learner
from dvi.model.adapter_store import save_drafter
from dvi.model.devices import NOT_TIMED, TIMED_POLICIES, check_lock_step, is_tensor_parallel, load_model
from dvi.model.drafter import DrafterConfig
from dvi.model.end_tokens import end_token_ids
from dvi.model.exact import passes_for
from dvi.model.pretrained import read_config, read_tokenizer
from dvi.model.split import SplitModel
from dvi.model.starting_drafter import choose_split_layer, make_drafter
from dvi.progress import shown_as
from dvi.records import GenerationResult, SamplingParams
from dvi.seeds import AnswerSeeds, Seeds, prompt_seed
from dvi.settings import (
    COMPANIONS,
    MODES,
    POLICIES,
    SOURCES,
    DrafterSettings,
    DraftSettings,
    LearningSettings,
    ModelSettings,
    check_companion,
    check_source,
)
from dvi.traffic import Messages

PLAIN = FixedLength(0)


class SelfSpeculator:
    """A causal language model cut at split_layer, its drafter, and the loop that decodes with them.

    Attributes: model, tokenizer, split, drafter, policy (a name of POLICIES), companion (of COMPANIONS),
    num_draft_tokens, rule; passes, the split model that decoding runs on: `split` itself, or its padded form; mode,
    "exact" or "fast": what is promised of its tokens.
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
        source: str = DraftSettings.source,
        max_nodes: int = DraftSettings.max_nodes,
        policy: str = DraftSettings.policy,
        num_draft_tokens: int = DraftSettings.num_draft_tokens,
        confidence_threshold: float = DraftSettings.confidence_threshold,
        companion: str = DraftSettings.companion,
        companion_model: str | Path | None = None,
        rule: VerifyRule | None = None,
        seed: int = LearningSettings.seed,
    ) -> None:
        """See `from_pretrained`. A tokenizer of None serves token ids only (no text, no stop strings)."""
        for name, value, choices in (
            ("mode", mode, MODES), ("source", source, SOURCES), ("policy", policy, POLICIES),
            ("companion", companion, COMPANIONS),
        ):  # fmt: skip
            if value not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
        check_source(source, policy)
        check_companion(companion, companion_model)
        if not 0 <= num_draft_tokens <= GOODPUT_BUCKETS[-1]:
            raise ValueError(f"num_draft_tokens must be in 0..{GOODPUT_BUCKETS[-1]}, got {num_draft_tokens}; try 4")
        if source == "lookup" and rule is not None and not rule.is_lossless:
            raise ValueError(f"source 'lookup' goes with the strict rule alone, got {rule.name!r}; try 'drafter'")
        self._is_lock_step = is_tensor_parallel(model)
        if self._is_lock_step and policy in TIMED_POLICIES:
            raise ValueError(f"{NOT_TIMED}; try policy='fixed'")
        self.model, self.tokenizer = model, tokenizer
        if split_layer is None:
            split_layer = choose_split_layer(model.config, adapter)
        self.split = SplitModel(model, split_layer=split_layer, path=path)
        self.passes, self.mode = passes_for(self.split, mode)
        self.drafter = make_drafter(self.split, drafter, adapter=adapter, seed=seed)
        if self._is_lock_step:
            self.check_lock_step()
        self.source, self.max_nodes = source, max_nodes
        self.policy, self.num_draft_tokens = policy, num_draft_tokens
        self.confidence_threshold, self.companion = confidence_threshold, companion
        self._companion_split: SplitModel | None = None
        if companion_model is not None:
            self._companion_split = load_companion(
                companion_model, split=self.split, tokenizer=tokenizer, max_positions=self.max_positions
            )
        self.rule: VerifyRule = rule or StrictRule()
        self._policies: dict[tuple[str, int], LengthPolicy | NodeBudget] = {}  # those that learn, by batch size
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
        weights: str = ModelSettings.weights,
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
        weights       of a GGUF file: "blocks", "dense" or "auto", see `ModelSettings`.
        device        "auto" takes a CUDA device when there is one; only that goes with another placement than "single".
        placement     "single", "device_map" or "tensor", see `dvi.model.devices`.
        adapter       folder written by `save_drafter`.
        options       mode, and path, a path_kind of `dvi.settings.ModelSettings`; policy, num_draft_tokens,
                      confidence_threshold, source, max_nodes, companion and companion_model of `DraftSettings`;
                      rule; seed.
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
                weights=weights, **source,
            )
        weights = choose_weights(
            name_or_path, config, weights=weights, dtype=str(dtype).removeprefix("torch."), device=device,
            placement=placement, path=options.get("path", ModelSettings.path_kind),
        )
        if isinstance(dtype, str):
            dtype = getattr(torch, dtype)
        model = load_model(
            name_or_path, config, placement=placement, device=device, dtype=dtype, with_blocks=weights == "blocks",
            **source,
        )
        tokenizer = read_tokenizer(name_or_path, **source)
        if isinstance(drafter, str):
            drafter = DrafterConfig(kind=drafter, lora_rank=lora_rank, lora_alpha=float(lora_rank))
        speculator = cls(model, tokenizer, split_layer=split_layer, drafter=drafter, adapter=adapter, **options)
        speculator.split.give_up_weights()
        return speculator

    def afresh(self, **changed: object) -> SelfSpeculator:
        """The same with other attributes, and with length rules that have learnt nothing yet.

        The model and its split are shared: a second SplitModel would hold the weights a second time.
        """
        other = copy.copy(self)
        other._policies = {}
        for name, value in changed.items():
            setattr(other, name, value)
        return other

    def encode(self, prompt: Prompt, *, max_tokens: int | None = None) -> list[int]:
        """Token ids of a prompt: text as it is, chat messages through the model's own template, ids unchanged.

        max_tokens: a longer prompt loses its beginning; by default it is refused when it fills the model's context.
        """
        return self._prompts.encode(prompt, max_tokens=max_tokens)

    def encode_request(self, messages: Messages, *, max_new_tokens: int) -> tuple[list[int], bool]:
        """Token ids of chat messages with room for an answer, and whether they lost their beginning for it.

        Without a chat template the messages' bare text. Raises ValueError when the answer alone fills the context.
        """
        return self._prompts.encode_request(messages, max_new_tokens=max_new_tokens)

    @property
    def _prompts(self) -> PromptEncoder:
        return PromptEncoder(self.tokenizer, self.model.config.get_text_config(), self.split.num_input_ids)

    @property
    def level(self) -> str:
        """What is promised of the tokens: "exact", "fast", or "lossy" whatever the mode."""
        return self.mode if self.rule.is_lossless else "lossy"

    @property
    def max_positions(self) -> int:
        """The model's context, prompt and answer together; less where `dvi.model.context` says why."""
        return self._prompts.max_positions

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
        if is_one_prompt(prompts):
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
            self._prompts.need_tokenizer("stop strings")
        if isinstance(prompts, list):
            pairs = list(zip(self._prompts.encode_all(prompts), [one for _, one in pairs], strict=True))
        batch = self.open_batch(
            max_rows=batch_size, policy=policy or self.choose_policy(representative, batch_size),
            wants_transitions=learner is not None or keep_transitions,
        )

        def begin(request_id: int, index: int, pair: tuple[Prompt, SamplingParams]) -> Begun:
            prompt, params = pair
            prompt_ids = self.encode(prompt)
            if seeds is not None:
                params = dataclasses.replace(params, seed=seeds(index, prompt_ids))
            return self.new_sequence(prompt_ids, params, request_id=request_id)

        return self._generation(batch, learner).results(pairs, begin)

    def open_batch(
        self, *, max_rows: int, policy: LengthPolicy, wants_transitions: bool, drafter: nn.Module | None = None,
        capacity: int = 0,
    ) -> DecodingBatch:
        """An empty batch that decodes in this speculator's mode and by its rule; the arguments are `DecodingBatch`'s.

        drafter: another one than the speculator's own.
        """
        return DecodingBatch(
            self.passes, self.drafter if drafter is None else drafter, max_rows=max_rows, capacity=capacity,
            policy=policy, rule=self.rule, wants_transitions=wants_transitions, prefill_chunk=self.prefill_chunk,
        )

    @property
    def prefill_chunk(self) -> int:
        """Positions of one prefill pass."""
        return self.passes.fixed_width or PREFILL_CHUNK

    def _generation(self, batch: DecodingBatch, learner: Learner | None) -> Generation:
        return Generation(
            batch, request_ids=self._request_ids, learner=learner, level=self.level, is_lock_step=self._is_lock_step
        )

    def new_sequence(
        self, prompt_ids: list[int], params: SamplingParams, *, request_id: int | None = None, **options: object
    ) -> Begun:
        """A sequence that ends where the params, the model's own end tokens or its context say, and its text.

        It draws with `prompt_seed`, a function of the params' seed and the prompt, wherever it is decoded.
        options: other fields of `Sequence`. Raises ValueError for stop strings without a tokenizer.
        """
        if params.stop_strings:
            self._prompts.need_tokenizer("stop strings")
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

    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, *, learner: Learner | None = None
    ) -> Generator[str, None, GenerationResult]:
        """Pieces of one answer's text as rounds finish; never half a character, never part of a stop string.

        The generator's return value, as of `result = yield from speculator.stream(...)`, is the whole result.
        """
        params = params or SamplingParams()
        sequence, text = self.new_sequence(self.encode(prompt), params)
        self._prompts.need_tokenizer("streamed text")
        batch = self.open_batch(
            max_rows=1, policy=self.choose_policy([params], 1), wants_transitions=learner is not None
        )
        return self._generation(batch, learner).pieces(sequence, text)

    def choose_policy(self, params: list[SamplingParams], batch_size: int) -> LengthPolicy | NodeBudget:
        """The draft-length rule, or a source with its budget of nodes. "auto" is the goodput rule only where tokens
        cannot depend on the lengths it picks: a seeded sample should not change with the machine's speed, and ranks in
        lock-step must pick the same."""
        name = self.policy if self.num_draft_tokens else "fixed"
        if name == "auto":
            does_length_matter = any(not p.is_greedy and p.coupling == "rejection" for p in params)
            name = "fixed" if does_length_matter or self._is_lock_step else "goodput"
        buckets = buckets_of(self.source, self.num_draft_tokens)

        def costs() -> CostTable:
            rows = (*(r for r in (1, 2, 4, 8, 16) if r < batch_size), batch_size)  # a batch that drains has fewer
            return measure_costs(self.passes, self.drafter, buckets=buckets, rows=rows)

        if name not in TIMED_POLICIES:
            return self.new_policy(name, self.num_draft_tokens, costs=costs)
        if (name, batch_size) not in self._policies:
            self._policies[name, batch_size] = self.new_policy(name, self.num_draft_tokens, costs=costs)
        return self._policies[name, batch_size]

    def new_policy(
        self, name: str, num_draft_tokens: int, *, costs: Callable[[], CostTable]
    ) -> LengthPolicy | NodeBudget:
        """A draft-length rule by its name, which has learnt nothing yet; see `dvi.draft.catalogue.make_policy`."""
        return make_policy(
            name, num_draft_tokens, source=self.source, max_nodes=self.max_nodes,
            confidence_threshold=self.confidence_threshold, costs=costs, companion=self.new_companion,
            is_on_cpu=self.split.device.type == "cpu", can_pack=self.passes.can_pack,
        )

    def new_companion(self, name: str | None = None) -> Companion:
        """A companion by its name, of COMPANIONS; default the speculator's own choice. One serves one policy.

        Raises ValueError for "model" when the speculator was made without a companion_model.
        """
        return make_companion(name or self.companion, split=self.split, companion_split=self._companion_split)

    def check_lock_step(self) -> None:
        """Raises RuntimeError where ranks in lock-step would part; see `dvi.model.devices.check_lock_step`."""
        check_lock_step(self.split, self.drafter)

    def save_drafter(self, folder: str | Path, *, metrics: dict | None = None, config: dict | None = None) -> None:
        """Writes the drafter as it serves now: PEFT layout, extra tensors, manifest; see `dvi.model.adapter_store`."""
        save_drafter(
            folder, self.drafter, self.split, base_model=self.model.config.name_or_path, metrics=metrics, config=config
        )

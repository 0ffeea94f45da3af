"""Faults to plant, each a wrong line that somebody could write, and the tests that must notice it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutation:
    """`old`, which occurs once in `file`, becomes `new`; `tests` is what pytest runs, the cheapest that should fail."""

    name: str
    file: str
    old: str
    new: str
    tests: str


ROUND, VERIFICATION, SAMPLING = "dvi/decode/round.py", "dvi/decode/verification.py", "dvi/decode/sampling.py"
BATCH, EXPERIENCE = "dvi/decode/batch.py", "dvi/decode/experience.py"
CACHE, DIRECT, DRAFTER = "dvi/model/kv_cache.py", "dvi/model/llama_path.py", "dvi/model/drafter.py"
ONLINE, REPLAY = "trainers/learning/online.py", "trainers/learning/replay.py"
GATE, TICK = "trainers/learning/publish_gate.py", "trainers/learning/tick.py"

ENGINE = "dvi/serving/engine.py"
TEST_BATCH, TEST_EXPERIENCE = "tests/decode/test_batch.py", "tests/decode/test_experience.py"
TEST_ENGINE = "tests/serving/test_engine.py"
TEST_PACKED = "tests/model/test_ragged.py"
TEST_TREE = "tests/decode/test_tree_round.py"
TEST_LAW = "tests/laws/test_sampling_law_engine.py"
STUDENT, TEST_RANKS = "trainers/learning/student.py", "tests/learning/test_data_parallel.py"
TEST_ONLINE, TEST_FAULTS = "tests/learning/test_online.py", "tests/learning/test_learner_faults.py"

MUTATIONS = [
    # Verdicts
    Mutation(
        "accept_with_less_or_equal", VERIFICATION,
        "accept_uniform_BT * draft_BT.double() < target_BT.double()",
        "accept_uniform_BT * draft_BT.double() <= target_BT.double()",
        "tests/decode/test_verification.py",
    ),
    Mutation(
        "residual_not_normalised", VERIFICATION,
        "torch.where(total > 0, excess / total, target_probs)", "torch.where(total > 0, excess, target_probs)",
        "tests/decode/test_verification.py",
    ),
    Mutation(
        "recovered_from_the_target", VERIFICATION,
        "torch.where(is_rejected_B1, residual_probs(draft_row_BV, next_probs_BV), next_probs_BV)", "next_probs_BV",
        "tests/laws/test_lossless_law.py",
    ),
    Mutation(
        "bonus_from_the_draft", VERIFICATION,
        "torch.where(is_rejected_B1, residual_probs(draft_row_BV, next_probs_BV), next_probs_BV)",
        "torch.where(is_rejected_B1, residual_probs(draft_row_BV, next_probs_BV), draft_row_BV)",
        "tests/laws/test_lossless_law.py",
    ),
    Mutation(
        "tokens_past_a_length_stop_accepted", VERIFICATION,
        "count_leading(is_drafted_BT & is_honest_BT)", "count_leading(is_honest_BT)",
        "tests/decode/test_verification.py",
    ),
    Mutation(
        "ties_go_to_the_last", SAMPLING,
        "return likeliest(self._penalise(logits_BQV, seen) if self.has_penalties else logits_BQV)",
        "return self.vocab_size - 1 - likeliest(self._penalise(logits_BQV, seen).flip(-1))",
        "tests/decode/test_sampling.py",
    ),
    Mutation(
        "penalty_per_block", SAMPLING,
        "is_before_UT = depth_T < torch.arange(num_drafts + 1, device=token_ids_BT.device)[:, None]",
        "is_before_UT = depth_T < 0 * torch.arange(num_drafts + 1, device=token_ids_BT.device)[:, None]",
        "tests/decode/test_sampling.py",
    ),
    # The round
    Mutation(
        "draft_probs_recorded_before_temperature", ROUND,
        "uniform(sampling.seed_B, lengths_B, depth, Role.DRAFT)), probs_B1V[:, 0]",
        "uniform(sampling.seed_B, lengths_B, depth, Role.DRAFT)), full_B1V[:, 0].softmax(-1)",
        TEST_LAW,
    ),
    Mutation("accept_with_the_drafts_draw", ROUND, "Role.ACCEPT", "Role.DRAFT", TEST_LAW),
    Mutation(
        "draft_draw_reused_at_every_depth", ROUND,
        "uniform(sampling.seed_B, lengths_B, depth, Role.DRAFT)", "uniform(sampling.seed_B, lengths_B, 0, Role.DRAFT)",
        TEST_LAW,
    ),
    Mutation(
        "accept_draw_reused_at_every_depth", ROUND,
        "accept_uniform_BT = uniform(sampling.seed_B[:, None], lengths_B[:, None], depth_U[:-1], Role.ACCEPT)",
        "accept_uniform_BT = uniform(sampling.seed_B[:, None], lengths_B[:, None], 0 * depth_U[:-1], Role.ACCEPT)",
        TEST_LAW,
    ),
    Mutation(
        "gumbel_noise_keyed_by_the_round", ROUND,
        "noise_BUV = hash_gumbel(sampling.seed_B, lengths_B[:, None] + depth_U + 1, sampling.vocab_size)",
        "noise_BUV = hash_gumbel(sampling.seed_B, lengths_B[:, None] + 0 * depth_U + 1, sampling.vocab_size)",
        TEST_LAW,
    ),
    Mutation(
        "requests_share_a_seed", "dvi/seeds.py", "self._times[key] += 1", "self._times[key] = 1", TEST_LAW,
    ),
    Mutation(
        "stale_hidden_state_of_the_last_draft", ROUND,
        "hidden.append(shallow(token_B, num_draft_tokens))", "hidden.append(hidden[-1])", TEST_EXPERIENCE,
    ),
    Mutation(
        "shallow_position_off_by_one", ROUND,
        "cache.place(offset=depth, width=1, rows=state.rows)",
        "cache.place(offset=max(depth - 1, 0), width=1, rows=state.rows)",
        TEST_EXPERIENCE,
    ),
    Mutation(
        "cache_commit_off_by_one", BATCH,
        "cache.commit([host_row.num_accepted + 1 for host_row in host_rows]",
        "cache.commit([host_row.num_accepted for host_row in host_rows]",
        TEST_BATCH,
    ),
    Mutation(
        "correction_token_dropped", "dvi/decode/host_row.py",
        "return [*self.draft_ids[: self.num_accepted], self.next_token]",
        "return self.draft_ids[: self.num_accepted] or [self.next_token]",
        TEST_BATCH,
    ),
    Mutation(
        "anchor_of_the_last_committed_token", ROUND,
        "verified.final_BUD[row, host_row.num_accepted]", "verified.final_BUD[row, 0]", TEST_EXPERIENCE,
    ),
    Mutation(
        "draft_accepted_that_does_not_count", "dvi/decode/host_row.py",
        "while num_accepted < num_drafted and", "while num_accepted < len(draft_ids) and",
        "tests/decode/test_host_row.py",
    ),
    Mutation("anchor_of_the_request_before", BATCH, "self._anchor_BD[row] = 0", "pass", TEST_BATCH),
    Mutation(
        "end_of_text_inside_a_block_missed", "dvi/decode/sequence.py",
        "            if self.finish_reason is not None:\n                return count",
        "            if self.finish_reason is not None and count == len(committed):\n                return count",
        TEST_BATCH,
    ),
    Mutation(
        "moved_row_keeps_the_gaps_cache", BATCH,
        "self.cache.copy_row(source=source, target=target)", "self.cache.copy_row(source=target, target=target)",
        TEST_BATCH,
    ),
    Mutation(
        "moved_row_keeps_the_gaps_anchor", BATCH,
        "self._anchor_BD[target] = self._anchor_BD[source]", "pass", TEST_BATCH,
    ),
    Mutation(
        "version_read_after_the_swap", ROUND,
        "drafter_version=drafter.version,", "drafter_version=drafter.version + 1,", TEST_EXPERIENCE,
    ),
    Mutation(
        "reward_column_shifted", EXPERIENCE,
        "draft_token_ids_W=self._draft_ids_BU[row, :width]",
        "draft_token_ids_W=self._draft_ids_BU[row].roll(1)[:width]",
        TEST_EXPERIENCE,
    ),
    Mutation(
        "lossy_acceptance_called_honest", EXPERIENCE, "num_waived=outcome.num_waived, tenant=sequence.tenant,",
        "tenant=sequence.tenant,", TEST_EXPERIENCE,
    ),
    Mutation(
        "wait_inside_drafting", ROUND,
        "    for depth in range(num_draft_tokens):\n",
        "    for depth in range(num_draft_tokens):\n        token_B.max().item()\n",
        "tests/decode/test_waits.py",
    ),
    Mutation(
        "stop_counts_what_nobody_saw", BATCH,
        "num_accepted = min(host_row.num_accepted, num_kept)",
        "num_accepted = host_row.num_accepted\n            num_kept = num_accepted + 1",
        TEST_BATCH,
    ),
    # The cache and the paths
    Mutation(
        "mask_shows_the_next_slot", CACHE, "mask = distance_BQS >= 0", "mask = distance_BQS >= -1",
        "tests/model/test_llama_path.py",
    ),
    Mutation(
        "window_one_too_wide", CACHE, "(distance_BQS < window)", "(distance_BQS <= window)",
        "tests/model/test_llama_path.py",
    ),
    Mutation(
        "places_left_out_repeat_another_row", "dvi/model/ragged.py",
        "(first_B1 + torch.minimum(column_U, count_B1 - 1)).flatten()",
        "torch.where(column_U < count_B1, first_B1 + column_U, 0).flatten()",
        TEST_PACKED,
    ),
    Mutation(
        "packed_rows_rotated_as_the_first_places", DIRECT,
        "positions_M = positions_M[packing.kept_M]", "positions_M = positions_M[: len(packing.kept_M)]", TEST_PACKED,
    ),
    Mutation(
        "rows_that_stopped_still_count", ROUND,
        "sum(num_drafted_B.tolist())", "len(token_B) * len(tokens)", TEST_PACKED,
    ),
    Mutation("padded_rounds_pack", "dvi/model/padded.py", "can_pack = False", "can_pack = True", TEST_PACKED),
    Mutation(
        "copied_row_misses_its_last_slot", CACHE,
        "buffer[target, :, :length] = buffer[source, :, :length]",
        "buffer[target, :, : length - 1] = buffer[source, :, : length - 1]",
        "tests/model/test_kv_cache.py",
    ),
    Mutation(
        "learned_positions_past_the_context", "dvi/model/views_path.py",
        "positions_BQ = positions_BQ.clamp(max=self._last_position)", "pass", TEST_BATCH,
    ),
    Mutation(
        "exact_capacity_follows_the_draft_length", BATCH,
        "num_ahead = 2 * (MAX_DEPTH + 1)", "num_ahead = 2 * (max(self.policy.buckets) + 1)",
        "tests/model/test_padded.py",
    ),
    Mutation(
        "self_check_of_one_width", "dvi/model/exact.py",
        "WIDTHS = ((1, 9, 16, 32), (33, 17, 5, 2, 1))", "WIDTHS = ((58,), (58,))", "tests/model/test_exact.py",
    ),
    Mutation(
        "auto_pads_passes_unasked", "dvi/model/exact.py",
        'mode == "auto" and split.path != "native"', 'mode == "never"', "tests/model/test_exact.py",
    ),
    Mutation(
        "self_check_of_two_indices", "dvi/model/padded.py",
        "for index in range(1, width):", "for index in range(1, 2):", "tests/model/test_padded.py",
    ),
    # Drafters
    Mutation("every_depth_has_the_first_bias", DRAFTER, "state[depth]", "state[0]", "tests/model/test_drafter.py"),
    Mutation(
        "correction_published_unscaled", DRAFTER,
        "self.lora_A.detach()) * self.scaling", "self.lora_A.detach())", "tests/model/test_drafter.py",
    ),
    Mutation(
        "learner_shares_the_models_norm", DRAFTER,
        "copied = copy.deepcopy(norm).float().requires_grad_(True)", "copied = norm.float().requires_grad_(True)",
        "tests/laws/test_structure_law.py",
    ),
    # Learning
    Mutation(
        "policy_gradient_with_the_sign_inverted", "trainers/learning/losses.py",
        "return -ratio_M.clamp(low, high)", "return ratio_M.clamp(low, high)",
        "tests/learning/test_policy_gradient_learns.py",
    ),
    Mutation(
        "bad_weights_not_undone", ONLINE,
        "            self.num_skipped += 1\n            self._gate.return_to_best()\n",
        "            self.num_skipped += 1\n",
        TEST_ONLINE,
    ),
    Mutation(
        "canary_the_wrong_way_round", GATE,
        "candidate < best * (1 - config.canary_tolerance)", "candidate > best * (1 - config.canary_tolerance)",
        TEST_ONLINE,
    ),
    Mutation("budget_not_charged", "trainers/learning/budget.py", "self._credit_s -= seconds", "pass", TEST_ONLINE),
    Mutation(
        "gaps_not_preferred", "trainers/learning/budget.py",
        "CREDIT_CAP_S / 2 if now_s - self._gap_s < GAP_MEMORY_S else 0.0", "0.0", "tests/learning/test_budget.py",
    ),
    Mutation(
        "slices_averaged_over_themselves", "trainers/learning/losses.py", "totals or BatchTotals.of(batch)",
        "BatchTotals.of(batch)", TEST_ONLINE,
    ),
    Mutation(
        "finite_before_the_canary_only", ONLINE, "if not student.is_finite():", "if False:", TEST_FAULTS,
    ),
    Mutation(
        "moments_not_looked_at", "trainers/learning/student.py",
        "tensors = [*self.drafter.parameters(), *moments]", "tensors = [*self.drafter.parameters()]", TEST_FAULTS,
    ),
    Mutation(
        "rollback_that_the_next_canary_undoes", GATE, "        self.history.best = snapshot\n        self.return",
        "        self.return", "tests/learning/test_versions.py",
    ),
    Mutation(
        "noop_published", GATE,
        "if is_turn and self.serves(snapshot.state):", "if False:", "tests/learning/test_versions.py",
    ),
    Mutation(
        "forgotten_in_the_replay_but_not_in_the_batch", ONLINE,
        "            self._tick.drop()\n        self.finish_tick()\n        self._batch = None\n", "            pass\n",
        TEST_ONLINE,
    ),
    # Ranks
    Mutation(
        "gradients_averaged_over_ranks", STUDENT, "gradient_P.copy_(message_P)",
        "gradient_P.copy_(message_P / self._peers.num_ranks)", TEST_RANKS,
    ),
    Mutation("gradient_of_every_slice_sent", STUDENT, "is_kept = not is_last and", "is_kept = False and", TEST_RANKS),
    Mutation(
        "means_over_a_rank_s_own_positions", TICK,
        "BatchTotals(to_device(message[rank_report.SIZE :], totals.values_K.device))", "totals", TEST_RANKS,
    ),
    Mutation(
        "step_of_a_rank_without_time", TICK, "is_piece = (has_waited and", "is_piece = (False and", TEST_RANKS,
    ),
    Mutation(
        "trim_by_a_rank_s_own_counts", ONLINE, "yield from self._peers.total(self.token_counts_V.clone())",
        "self.token_counts_V", TEST_RANKS,
    ),
    Mutation(
        "remnants_of_the_forgotten", "trainers/learning/segments.py",
        "field.masked_fill_(is_empty_R.view(-1, *[1] * (field.dim() - 1)), 0)", "pass", "tests/learning/test_replay.py",
    ),
    Mutation(
        "share_of_a_tenant_without_cap", "dvi/tenancy.py",
        "total=num_draws, most=most)", "total=num_draws, most=num_draws)", "tests/learning/test_replay.py",
    ),
    Mutation(
        "reward_for_the_first_rejection", REPLAY,
        "int(column < stretch.num_accepted)", "int(column <= stretch.num_accepted)",
        "tests/learning/test_replay.py",
    ),
    Mutation(
        "replayed_anchor_one_late", REPLAY,
        'fields["target_hidden"][(row_N - 1).clamp_min(0)]', 'fields["target_hidden"][row_N]',
        "tests/learning/test_replay.py",
    ),
    # Serving
    Mutation(
        "joined_row_keeps_anothers_anchor", BATCH,
        "self._anchor_BD[row], self._anchor_BD[target] = swapped_2D", "pass", TEST_BATCH,
    ),
    Mutation(
        "resumed_text_without_its_answer", BATCH,
        "done, text_ids = self.cache.lengths[row], sequence.text_ids",
        "done, text_ids = self.cache.lengths[row], sequence.prompt_ids", TEST_ENGINE,
    ),
    Mutation(
        "sick_row_not_wiped", BATCH, "            self.cache.wipe_row(row)\n", "            pass\n", TEST_ENGINE,
    ),
    Mutation(
        "logprobs_one_position_late", BATCH,
        "verified.logits_BUV[row, :num_kept]", "verified.logits_BUV[row, -num_kept:]", TEST_ENGINE,
    ),
    Mutation(
        "prefix_without_salt", "dvi/serving/prefix_cache.py",
        'hashlib.sha256(len(tenant.encode()).to_bytes(8, "little") + tenant.encode())', "hashlib.sha256()", TEST_ENGINE,
    ),
    Mutation(
        "opt_out_forgotten", ENGINE, "teaches=request.may_train, ", "", TEST_ENGINE,
    ),
    Mutation(
        "failed_round_takes_the_oldest", ENGINE,
        "lane.by_sequence[batch.newest.request_id]", "lane.by_sequence[batch.sequences[0].request_id]",
        TEST_ENGINE,
    ),
    Mutation(
        "learner_that_dies_takes_the_loop", "dvi/serving/loop.py",
        "        try:\n            action()\n        except Exception as error:\n            self.learner_error",
        "        try:\n            action()\n        except OSError as error:\n            self.learner_error",
        "tests/serving/test_loop.py",
    ),
    Mutation(
        "pin_without_effect", "dvi/serving/loop.py",
        "return not self.is_pinned or self.learner.has_peers", "return True",
        "tests/serving/test_loop.py",
    ),
    Mutation(
        "n_choices_taken_in_part", "dvi/serving/loop.py",
        "sum(map(len, self._inbox)) + len(requests) > scheduler", "sum(map(len, self._inbox)) + 1 > scheduler",
        "tests/serving/test_loop.py",
    ),
    # Draft lengths and their costs
    Mutation(
        "ratio_of_the_drawn_token_told_under_sampling", "dvi/draft/companions.py",
        "return self._token_ratios if self._may_tell_drawn else self._token_ratios[:-1]", "return self._token_ratios",
        "tests/decode/test_round.py",
    ),
    Mutation(
        "costs_compared_across_loads", "dvi/draft/costs.py",
        "samples.append(relative / self.pace)", "samples.append(relative)", "tests/draft/test_costs.py",
    ),
    Mutation(
        "a_borrowed_cost_unscaled", "dvi/draft/costs.py",
        "known[near, length] * (statistics.median(shared) if shared else 1.0)", "known[near, length]",
        "tests/draft/test_costs.py",
    ),
    Mutation(
        "probes_eat_the_reserve_for_news", "dvi/draft/length_policies.py",
        "price if self._is_burst else BURST_ROUNDS + price", "price", "tests/draft/test_length_policies.py",
    ),
    Mutation(
        "one_length_for_every_batch", "dvi/draft/length_policies.py",
        "self._standings.setdefault(info.num_rows", "self._standings.setdefault(0",
        "tests/draft/test_length_policies.py",
    ),
    # Trees and lookups
    Mutation(
        "walk_to_any_node_of_the_token", "dvi/decode/tree_round.py",
        "is_next_BN = (parents_BN == at_B[:, None]) & (ids_BN", "is_next_BN = (ids_BN", TEST_TREE,
    ),
    Mutation(
        "walk_into_the_padding", "dvi/decode/tree_round.py",
        "counts_BN = (node_N > 0) & (node_N <= num_nodes_B[:, None])", "counts_BN = (node_N > 0).expand_as(ids_BN)",
        TEST_TREE,
    ),
    Mutation(
        "penalties_of_the_wrong_branch", SAMPLING,
        "is_above_BNN = (ancestors_BN[..., None] >> node_N & 1).bool()",
        "is_above_BNN = torch.ones_like(ancestors_BN[..., None] >> node_N).bool().tril(-1)",
        TEST_TREE,
    ),
    Mutation(
        "accepted_nodes_left_where_they_lay", CACHE,
        "buffer[row, :, start:stop] = buffer[row].index_select(1, slots.to(buffer.device))", "pass", TEST_TREE,
    ),
    Mutation(
        "nodes_that_see_their_siblings", "dvi/model/tree.py",
        "return (node_BS < 0)[:, None] | is_ancestor_BQS.bool()",
        "return (node_BS < 0)[:, None] | (is_ancestor_BQS >= 0)", "tests/model/test_tree.py",
    ),
    Mutation(
        "a_tree_grown_by_estimates_alone", "dvi/draft/tree.py",
        "offer(place.then(token_id), len(nodes) - 1, depth + 1, -falling)",
        "offer(place.then(token_id), len(nodes) - 1, depth + 1, 1.0)", "tests/draft/test_tree.py",
    ),
    Mutation(
        "siblings_that_are_twins", "dvi/draft/lookup.py",
        "sorted([*weights][num_known:],", "sorted([*weights],", "tests/draft/test_lookup.py",
    ),
    Mutation(
        "own_text_counted_twice", "dvi/draft/lookup.py",
        "if token_id != GAP and not (mine and place // SLOT_LEN in mine):", "if token_id != GAP:",
        "tests/draft/test_lookup.py",
    ),
    Mutation(
        "measured_requests_learnt", "dvi/draft/lookup.py",
        "if self._source.is_frozen or not self._teaches:", "if not self._teaches:", "tests/draft/test_lookup.py",
    ),
    Mutation(
        "silent_requests_learnt", "dvi/draft/lookup.py",
        "if self._source.is_frozen or not self._teaches:", "if self._source.is_frozen:", "tests/draft/test_lookup.py",
    ),
    Mutation(
        "acceptance_of_all_kinds_thrown_together", "dvi/draft/lookup.py",
        "kind = length if chosen else MAX_MATCH + 1 + length", "kind = length", "tests/draft/test_lookup.py",
    ),
    Mutation(
        "a_calibration_that_never_forgets", "dvi/draft/calibration.py",
        "self._samples[place] /= 2", "self._samples[place] /= 1", "tests/draft/test_calibration.py",
    ),
    Mutation(
        "tenants_that_share_unasked", "dvi/draft/traffic_store.py",
        "return EVERYBODY if self.shares_tenants else tenant", "return EVERYBODY", "tests/draft/test_traffic_store.py",
    ),
    Mutation(
        "a_dropped_slot_still_found", "dvi/draft/traffic_store.py",
        "self.num_bytes -= places.discard(end)", "pass", "tests/draft/test_traffic_store.py",
    ),
    Mutation(
        "a_token_written_into_a_lost_slot", "dvi/draft/traffic_store.py",
        "if text.end is not None and text.end // SLOT_LEN == slot:", "if False:", "tests/draft/test_traffic_store.py",
    ),
    Mutation(
        "the_oldest_places_kept", "dvi/draft/places.py",
        "(place, *held[: MAX_PLACES - 1])", "(place, *held)[-MAX_PLACES:]", "tests/draft/test_places.py",
    ),
    # Text
    Mutation(
        "beginning_of_a_stop_string_shown", "dvi/decode/text.py",
        "range(min(len(stop) - 1, len(text)), 0, -1)", "range(min(len(stop) - 2, len(text)), 0, -1)",
        "tests/decode/test_text.py",
    ),
]

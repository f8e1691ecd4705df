"""Safeguards, and what takes each of them out. `make mutants` shows that each is missed.

One more is three lines: a name, the file with the text to replace and what to put there, and what
notices it: arguments for pytest, or `chaos STORE FAULT SEED`.
"""

from __future__ import annotations

from dataclasses import dataclass

LUA = "coordinator/holdoff_coordinator/lua"
COORDINATOR = "coordinator/holdoff_coordinator"
CUSTODY = f"{COORDINATOR}/custody"
CLIENT = "clients/python/holdoff"
TESTS = "tests/integration"


@dataclass(frozen=True, slots=True)
class Mutant:
    """One safeguard that is missing."""

    name: str
    file: str
    before: str
    after: str
    noticed_by: str


MUTANTS = [
    Mutant(
        "a lease's secret is compared before it is renewed or released",
        *(f"{LUA}/leases.lua", "if secret_hash and record.secret_hash ~=", "if false and nil ~="),
        f"{TESTS}/test_leases.py::test_only_the_secret_proves_ownership",
    ),
    Mutant(
        "a lost lease begins a cooldown",
        f"{LUA}/leases.lua",
        "'BROKEN' or 'EXPIRED', expired, expired)",
        "'BROKEN' or 'EXPIRED', expired, nil)",
        f"{TESTS}/test_interval.py::test_a_lost_lease_counts_as_refreshed_at_its_expiry",
    ),
    Mutant(
        "the cooldown is kept on a break",
        *(
            f"{LUA}/leases.lua",
            "  if refreshed then\n",
            "  if refreshed and state ~= 'BROKEN' then\n",
        ),
        f"{TESTS}/test_leases.py::test_a_holder_confirms_a_break_by_its_release",
    ),
    Mutant(
        "a lease that is broken is not renewed",
        *(f"{LUA}/renew.lua", "if lease.break_reason then return", "if false then return"),
        f"{TESTS}/test_leases.py::test_break_forbids_renewal_and_ends_nothing_early",
    ),
    Mutant(
        "a grant needs a waiter that is live",
        *(f"{LUA}/acquire.lua", " or heard_age > LIVE_FOR", ""),
        f"{TESTS}/test_leases.py::test_an_offer_to_a_waiter_not_heard_from_is_not_made",
    ),
    Mutant(
        "an offer that lapses begins no cooldown",
        f"{LUA}/leases.lua",
        "    if lease.state == 'OFFERED' then\n      withdraw_offer(id, token, lease, true)",
        "    if false then\n      withdraw_offer(id, token, lease, true)",
        f"{TESTS}/test_leases.py::test_an_offer_not_accepted_is_withdrawn_without_a_cooldown",
    ),
    Mutant(
        "callers take turns",
        f"{COORDINATOR}/limits.py",
        "if self._working[caller] < self._most_each:",
        "if caller:",
        "tests/unit/test_limits.py::test_callers_take_turns",
    ),
    Mutant(
        "a renewal is no call that is limited",
        *(f"{COORDINATOR}/limits.py", "if kind in _OF_LEASES:", "if False:"),
        "tests/unit/test_limits.py::test_renewals_wait_for_no_other_call",
    ),
    Mutant(
        "what a caller has at once is limited",
        *(f"{COORDINATOR}/limits.py", "if used[account] >= self.values[name]:", "if False:"),
        f"{TESTS}/test_limits.py::test_watches_of_a_viewer_are_limited",
    ),
    Mutant(
        "a watcher looks at apps that it may see only",
        *(f"{COORDINATOR}/looks.py", "self._known and self._knows(app):", "self._known:"),
        f"{TESTS}/test_limits.py::test_a_watcher_costs_only_what_it_may_see",
    ),
    Mutant(
        "scopes of all waiters of a token are limited",
        *(
            f"{LUA}/acquire.lua",
            "if declared > number(ARGV[18])",
            "if false",
        ),
        f"{TESTS}/test_limits.py::test_scopes_of_all_waiters_are_limited",
    ),
    Mutant(
        "reservations of a caller are limited",
        *(f"{LUA}/reserve.lua", "if redis.call('ZCARD', account) >=", "if false and 0 >="),
        f"{TESTS}/test_limits.py::test_reservations_of_a_caller_are_limited",
    ),
    Mutant(
        "a connection that says nothing is closed",
        *(f"{COORDINATOR}/server.py", '    ("grpc.server_handshake_timeout_ms", 10_000),\n', ""),
        f"{TESTS}/test_limits.py::test_a_connection_that_says_nothing_is_closed",
    ),
    Mutant(
        "a limit is no reason to run without a lease",
        f"{CLIENT}/cli/_running.py",
        "if not break_glass or isinstance(error, LimitReached):",
        "if not break_glass:",
        f"{TESTS}/test_limits.py::test_the_glass_is_not_broken_by_a_limit",
    ),
    Mutant(
        "a request id asked again gives the same lease",
        *(f"{LUA}/acquire.lua", "if request.lease then return", "if false then return"),
        f"{TESTS}/test_leases.py::test_a_lost_reply_gives_the_same_lease",
    ),
    Mutant(
        "a request id is bound to what came with it",
        *(f"{LUA}/acquire.lua", "if request.fingerprint and not", "if false and not"),
        f"{TESTS}/test_leases.py::test_a_request_id_is_bound_to_its_parameters",
    ),
    Mutant(
        "fencing numbers rise after a loss: they follow the clock",
        *(
            f"{LUA}/acquire.lua",
            "math.max(number(token.fencing) + 1, now)",
            "number(token.fencing) + 1",
        ),
        f"{TESTS}/test_leases.py::test_fencing_tokens_rise_over_data_loss",
    ),
    Mutant(
        "fencing numbers rise whatever the clock says",
        *(f"{LUA}/acquire.lua", "math.max(number(token.fencing) + 1, now)", "now"),
        f"{TESTS}/test_leases.py::test_the_store_raises_to_the_fencing_token_a_client_knows",
    ),
    Mutant(
        "a cooldown is never shortened",
        f"{LUA}/leases.lua",
        "not_before_us = math.max(number(token.not_before_us), refreshed + interval),",
        "not_before_us = refreshed + interval,",
        f"{TESTS}/test_interval.py",
    ),
    Mutant(
        "the last refresh outlives the lease",
        *(
            f"{LUA}/leases.lua",
            "if cools(token) then return 'COOLING' end",
            "",
        ),
        f"{TESTS}/test_interval.py::test_a_cooldown_outlives_the_lease_and_an_update",
    ),
    Mutant(
        "a position in the queue is kept for a minute",
        *(f"{LUA}/leases.lua", "PLACE_KEPT_FOR = 60 * SECOND", "PLACE_KEPT_FOR = 1 * SECOND"),
        f"{TESTS}/test_untested.py::test_half_a_minute_of_silence_keeps_the_position",
    ),
    Mutant(
        "after an outage waiters may return first",
        *(f"{LUA}/common.lua", "RECOVERY = 5 * SECOND", "RECOVERY = 0"),
        f"{TESTS}/test_quarantine.py::test_after_an_outage_waiters_may_return_to_their_places",
    ),
    Mutant(
        "another epoch starts the quarantine",
        f"{LUA}/common.lua",
        "if ARGV[2] ~= '' and ARGV[2] ~= epoch then quarantine",
        "if false then quarantine",
        f"{TESTS}/test_quarantine.py::test_a_changed_epoch_is_quarantined",
    ),
    Mutant(
        "an app that is gone starts the quarantine when it is made again",
        *(f"{LUA}/common.lua", "  if ARGV[2] ~= '' then quarantine", "  if false then quarantine"),
        f"{TESTS}/test_quarantine.py::test_a_store_that_lost_its_data_is_quarantined",
    ),
    Mutant(
        "a failover starts the quarantine",
        *(f"{LUA}/common.lua", "if shard.history and not moved", "if false and not moved"),
        f"{TESTS}/test_failover.py -k watched-dies",
    ),
    Mutant(
        "a clock that went back starts the quarantine",
        f"{LUA}/common.lua",
        "if now < number(shard.high_water_us) - CLOCK_TOLERANCE then",
        "if false then",
        f"{TESTS}/test_untested.py::test_a_clock_that_went_back_before_a_coordinator_came",
    ),
    Mutant(
        "a clock that jumped is seen by the coordinator",
        *(f"{COORDINATOR}/clock.py", "if gain_us - self._declared_us > TOLERANCE_US:", "if False:"),
        f"{TESTS}/test_quarantine.py -k jumped_forward",
    ),
    Mutant(
        "a script whose clock is in doubt grants nothing",
        *(
            f"{LUA}/common.lua",
            "local clock_in_doubt = ESTIMATE and",
            "local clock_in_doubt = false and",
        ),
        f"{TESTS}/test_quarantine.py -k jumped",
    ),
    Mutant(
        "quarantine lasts for a TTL and an interval",
        f"{LUA}/common.lua",
        "return math.max(number(shard.hold_us), number(shard.hold_before_us)) end",
        "return 0 end",
        f"{TESTS}/test_regressions.py::test_quarantine_lasts_for_a_ttl_and_an_interval",
    ),
    Mutant(
        "the sweeper settles what nobody looks at",
        *(f"{LUA}/sweep.lua", "if not settle(id) then", "if false then"),
        f"{TESTS}/test_redis_lock.py::test_a_blocked_user_is_woken_when_a_lease_expires",
    ),
    Mutant(
        "the lock outlasts the lease by the interval",
        f"{LUA}/leases.lua",
        "until_us = until_us + math.max(number(lease.interval_us), number(token.interval_us))",
        "until_us = until_us + 0",
        f"{TESTS}/test_regressions.py -k library_user_gets_in_between",
    ),
    Mutant(
        "a lock of python-redis-lock keeps leases away",
        *(
            f"{LUA}/leases.lua",
            "local foreign = owner and owner",
            "local foreign = false and owner",
        ),
        f"{TESTS}/test_redis_lock.py::test_the_lock_keeps_a_lease_from_being_granted",
    ),
    Mutant(
        "an event counts once",
        *(f"{LUA}/budgets.lua", "redis.call('ZADD', IDS, us(now + kept), event)", ""),
        f"{TESTS}/test_budgets.py::test_an_event_counts_once",
    ),
    Mutant(
        "a reservation that expires counts",
        *(f"{LUA}/budgets.lua", "count_once(id, expired, count, specs) or {}", "{}"),
        f"{TESTS}/test_budgets.py::test_an_expired_reservation_counts",
    ),
    Mutant(
        "what is reserved takes room",
        f"{LUA}/budgets.lua",
        "number(budget.used) - number(budget.reserved)\n",
        "number(budget.used)\n",
        f"{TESTS}/test_budgets.py::test_reservations_never_exceed_a_limit",
    ),
    Mutant(
        "after a back-off one probe goes first",
        *(f"{LUA}/backoffs.lua", "elseif one.state == 'PROBING' and", "elseif false and"),
        f"{TESTS}/test_back_offs.py::test_a_block_quiets_all_holders_and_they_follow_one_by_one",
    ),
    Mutant(
        "a holder fences itself",
        *(f"{CLIENT}/_core.py", "if now_ns >= self.deadline_ns:", "if False:"),
        "tests/unit/test_core.py",
    ),
    Mutant(
        "a deadline counts from when the renewal was sent",
        *(
            f"{CLIENT}/_core.py",
            "self._granted(renewal.sent_ns)",
            "self._granted(renewal.sent_ns + SECOND)",
        ),
        "tests/unit/test_core.py::test_a_deadline_counts_from_when_the_renewal_was_sent",
    ),
    Mutant(
        "the guard ends a command at its own deadline",
        f"{CLIENT}/_guard.py",
        "plan(now, self._fence_ns, self._grace_ns)",
        "plan(now, self._fence_ns + 3600 * _NS, self._grace_ns)",
        "tests/e2e/test_guard.py::test_fence",
    ),
    Mutant(
        "the guard ends a command whose wrapper was killed",
        f"{CLIENT}/_guard.py",
        "_platform.signal_at_parents_death(_PARENT_DEATH_SIGNAL)",
        "pass",
        "tests/e2e/test_guard.py::test_wrapper_killed_while_its_pipe_is_held",
    ),
    # One token and the others of its app -----------------------------------------------------
    Mutant(
        "a token leaves scopes of its app to others",
        f"{LUA}/budgets.lua",
        "if in_share(mine, all, BUDGETS_MOST, SHARE) then",
        "if true then",
        f"{TESTS}/test_isolation.py::test_what_has_no_room_counts_in_the_division_then_in_the_token",
    ),
    Mutant(
        "what counts coarser does so for a whole window",
        f"{LUA}/budgets.lua",
        "if not wanted and redis.call('ZSCORE', COARSE, one.id) then",
        "if false then",
        f"{TESTS}/test_isolation.py::test_what_counts_coarser_does_so_until_nothing_is_left_of_it",
    ),
    Mutant(
        "a token leaves ids of its app to others",
        f"{LUA}/budgets.lua",
        "in_share(ids_of(who), all, IDS_MOST, 2 * SHARE)",
        "all < IDS_MOST",
        f"{TESTS}/test_isolation.py::test_a_token_with_too_many_events_is_refused_alone",
    ),
    Mutant(
        "a token leaves back-offs of its app to others",
        f"{LUA}/backoffs.lua",
        "in_share(mine, all, BACK_OFFS_MOST, SHARE)",
        "all < BACK_OFFS_MOST",
        f"{TESTS}/test_isolation.py::test_back_offs_of_one_token_leave_room_for_others",
    ),
    Mutant(
        "a reporter of one token stops no other",
        f"{LUA}/budgets.lua",
        "if told.token ~= '' or told.for_app then",
        "if true then",
        f"{TESTS}/test_isolation.py::test_a_reporter_of_a_token_blocks_that_token_alone",
    ),
    Mutant(
        "a holder of one token stops others for minutes",
        f"{LUA}/budgets.lua",
        "claim and math.min(told.most_us, UNCONFIRMED) or told.most_us",
        "told.most_us",
        f"{TESTS}/test_isolation.py::test_a_holder_blocks_the_app_for_minutes",
    ),
    Mutant(
        "a holder of one token stops others once",
        f"{LUA}/budgets.lua",
        "if claim ~= told.by then",
        "if true then",
        f"{TESTS}/test_isolation.py::test_a_holder_alone_blocks_the_app_once",
    ),
    Mutant(
        "errors of one token say nothing of the probe of another",
        f"{LUA}/backoffs.lua",
        "at >= number(one.probe_us) and token_of(one.probe) == token",
        "at >= number(one.probe_us)",
        f"{TESTS}/test_isolation.py::test_errors_of_one_token_say_nothing_of_the_probe_of_another",
    ),
    Mutant(
        "a probe that errs and errs gives way",
        f"{LUA}/backoffs.lua",
        "elseif now - number(one.probe_us) >= 3 * PROBE_FOR then",
        "elseif false then",
        f"{TESTS}/test_isolation.py::test_a_probe_that_errs_for_three_minutes_gives_way",
    ),
    Mutant(
        "a claim that is over confirms nothing",
        f"{LUA}/budgets.lua",
        "claim ~= '' and at <= number(one.claim_until_us)",
        "claim ~= ''",
        f"{TESTS}/test_isolation.py::test_a_claim_that_is_over_confirms_nothing",
    ),
    Mutant(
        "a holder proves its lease",
        f"{COORDINATOR}/budgets.py",
        "is_holder = secret_hash and",
        "is_holder = secret_hash or",
        f"{TESTS}/test_isolation.py::test_a_proof_belongs_to_one_event_and_a_live_lease",
    ),
    Mutant(
        "a resume token is encrypted",
        f"{COORDINATOR}/resuming.py",
        "sealed = self._cipher.encrypt(text.encode(), [_FORMAT])",
        "sealed = text.encode()",
        f"{TESTS}/test_watch.py::test_a_resume_token_can_be_read_by_no_caller",
    ),
    Mutant(
        "who caused a shared back-off is shown to those that see its token",
        f"{COORDINATOR}/records.py",
        'cause == "OPERATOR" or sees("from")',
        "True",
        f"{TESTS}/test_rights.py::test_no_answer_names_what_a_caller_has_no_role_on",
    ),
    Mutant(
        "a shared scope is shown to those that use it",
        f"{COORDINATOR}/records.py",
        "seen = _sees(caller, app, record(entry[1]))",
        "seen = True",
        f"{TESTS}/test_isolation.py::test_a_shared_scope_is_shown_to_those_that_use_it",
    ),
    # Clocks ---------------------------------------------------------------------------------
    Mutant(
        "a lease is over by both clocks",
        *(
            f"{LUA}/leases.lua",
            "sure >= number(lease.expires_us)",
            "now >= number(lease.expires_us)",
        ),
        f"{TESTS}/test_clocks.py::test_small_steps_shorten_no_lease",
    ),
    Mutant(
        "a cooldown is over by both clocks",
        *(f"{LUA}/leases.lua", "return sure < number(token.not", "return now < number(token.not"),
        f"{TESTS}/test_clocks.py::test_small_steps_shorten_no_cooldown",
    ),
    Mutant(
        "events leave their window by both clocks",
        *(
            f"{LUA}/budgets.lua",
            "us(sure - number(budget.window_us))",
            "us(now - number(budget.window_us))",
        ),
        f"{TESTS}/test_clocks.py::test_small_steps_shorten_no_window",
    ),
    Mutant(
        "small steps add up to a jump",
        f"{COORDINATOR}/clock.py",
        "gain_us = max(0, offset.low_us - self._since(received_us - self._alert_us).high_us)",
        "gain_us = max(0, offset.low_us - known.high_us) if known else 0",
        f"{TESTS}/test_clocks.py::test_small_steps_add_up_to_a_quarantine",
    ),
    Mutant(
        "a new replica is told what the clock gained",
        *(f"{LUA}/common.lua", "  if seen > gain + GAIN_STEP then", "  if false then"),
        f"{TESTS}/test_clocks.py::test_a_new_replica_knows_what_was_gained_before",
    ),
    Mutant(
        "every replica looks at every clock each second",
        f"{COORDINATOR}/store_watch.py",
        "answers = await asyncio.gather(*map(self._look_at_clock, nodes))",
        "answers = [bool(nodes)]",
        f"{TESTS}/test_clocks.py::test_a_replica_that_never_met_an_app_sees_its_clock_jump",
    ),
    Mutant(
        "a quarantine from the future is cut short",
        *(f"{LUA}/common.lua", "    go_back()\n", ""),
        f"{TESTS}/test_clocks.py -k forward_and_back",
    ),
    Mutant(
        "a lease from the future lasts its TTL",
        *(f"{LUA}/leases.lua", "  stay_in_the_past(id, token, lease)\n", ""),
        f"{TESTS}/test_clocks.py::test_a_lease_from_the_future_lasts_its_ttl",
    ),
    Mutant(
        "counts from the future leave their window",
        f"{LUA}/budgets.lua",
        "redis.call('ZADD', log_key(id), us(latest), entry)",
        "redis.call('ZCARD', log_key(id))",
        f"{TESTS}/test_clocks.py::test_counts_from_the_future_leave_their_window",
    ),
    Mutant(
        "a high fencing number is known again",
        *(
            f"{LUA}/acquire.lua",
            "math.max(number(token.fencing), now + 366",
            "math.max(0, now + 366",
        ),
        f"{TESTS}/test_clocks.py::test_a_high_fencing_number_of_the_future_is_known_again",
    ),
    Mutant(
        "what was counted before a step is moved along",
        *(
            f"{LUA}/budgets.lua",
            "redis.call('ZINCRBY', log_key(id), us(by), entry)",
            "local _ = entry",
        ),
        f"{TESTS}/test_clocks.py::test_a_step_frees_no_room_after_the_quarantine",
    ),
    Mutant(
        "a back-off from before a step lasts as long",
        *(f"{LUA}/backoffs.lua", "until_us = number(one.until_us) + by", "until_us = one.until_us"),
        f"{TESTS}/test_clocks.py::test_a_step_ends_no_back_off_early",
    ),
    Mutant(
        "what the clock gained matters for one hold",
        *(f"{LUA}/common.lua", "now + tonumber(GAIN_FOR),", "now + number(ARGV[4]),"),
        f"{TESTS}/test_clocks.py::test_a_gain_is_noted_once",
    ),
    # Loss -----------------------------------------------------------------------------------
    Mutant(
        "what is unknown counts as spent",
        *(f"{LUA}/reserve.lua", "if known_at > 0 then return", "if false then return"),
        f"{TESTS}/test_clocks.py::test_what_is_unknown_counts_as_spent",
    ),
    Mutant(
        "a failover is seen whose history nobody knows",
        f"{LUA}/common.lua",
        "info:find('master_replid2:%x*[1-9a-f]') then",
        "info:find('master_replid2:' .. shard.history, 1, true) then",
        f"{TESTS}/test_clocks.py::test_two_failovers_between_two_looks",
    ),
    Mutant(
        "a move to another shard is no failover",
        *(f"{LUA}/common.lua", "local moved = shard.home and", "local moved = false and"),
        f"{TESTS}/test_clocks.py -k once_promoted",
    ),
    Mutant(
        "the epoch is compared before a token is made",
        *(f"{COORDINATOR}/tokens.py", "        await self._compare_epoch()\n", ""),
        f"{TESTS}/test_clocks.py -k flushed_store",
    ),
    Mutant(
        "an app whose records are gone is noticed",
        f"{COORDINATOR}/tokens.py",
        "            self._scripts.records_are_lost(app)",
        "            return",
        f"{TESTS}/test_clocks.py -k flushed_node",
    ),
    Mutant(
        "the epoch is compared each second",
        *(f"{COORDINATOR}/store_watch.py", "                    await self.compare_epoch()\n", ""),
        f"{TESTS}/test_clocks.py::test_a_lost_epoch_quarantines_apps_that_are_there",
    ),
    Mutant(
        "a loss is remembered until all apps are held back",
        f"{COORDINATOR}/store_watch.py",
        "data_is_lost()\n            held =",
        "data_is_lost()\n            await self.open()\n            held =",
        f"{TESTS}/test_clocks.py::test_a_loss_is_remembered_until_all_apps_are_held_back",
    ),
    Mutant(
        "apps that fail keep no other from being held back",
        *(f"{COORDINATOR}/store_watch.py", "self._due[app] = self._due.pop(app)", "pass"),
        f"{TESTS}/test_clocks.py::test_apps_that_fail_keep_no_other_from_being_held_back",
    ),
    Mutant(
        "an app has met a new server when a script ran",
        f"{COORDINATOR}/scripts.py",
        "                else:\n                    self._unmet.discard(app)",
        "                self._unmet.discard(app)",
        f"{TESTS}/test_clocks.py::test_a_new_server_is_met_by_an_app_that_failed_at_first",
    ),
    Mutant(
        "a script settles only some reservations",
        *(f"{LUA}/budgets.lua", "due[1], due[2], 'LIMIT', 0, 100", "due[1], due[2]"),
        f"{TESTS}/test_budgets.py::test_reservations_that_expire_together_hold_up_no_call",
    ),
    Mutant(
        "announcements that come together are followed together",
        f"{COORDINATOR}/hub.py",
        "            if app not in self._looking:\n"
        "                self._looking[app] = asyncio.create_task(self._look(app))",
        "            for look in self._on_announcement:\n                await look(app)",
        f"{TESTS}/test_limits.py -k announcements_that_come_together",
    ),
    Mutant(
        "a token whose call erred lets others go first",
        *(f"{LUA}/reserve.lua", "one.went_in_vain == ARGV[13]", "false"),
        f"{TESTS}/test_isolation.py::test_a_call_that_erred_lets_those_of_others_go_first",
    ),
    Mutant(
        "an append-only file that is cut off is noticed",
        f"{COORDINATOR}/embedded.py",
        '"--appendfsync", "always", "--aof-load-truncated", "no"',
        '"--appendfsync", "always"',
        f"{TESTS}/test_embedded.py -k cut_off",
    ),
    Mutant(
        "only accepted leases lengthen a quarantine",
        f"{LUA}/acquire.lua",
        "local lease_id = us(fencing)\n",
        "local lease_id = us(fencing)\nnote_hold(ttl)\n",
        f"{TESTS}/test_clocks.py::test_an_offer_that_nobody_accepted_lengthens_no_quarantine",
    ),
    Mutant(
        "a long hold is forgotten",
        *(f"{LUA}/common.lua", "  if sure >= number(shard.hold_until_us) then", "  if false then"),
        f"{TESTS}/test_clocks.py::test_a_long_hold_is_forgotten_after_it_cannot_matter",
    ),
    Mutant(
        "a policy caps the TTL",
        *(f"{COORDINATOR}/places.py", "if ttl_us / 1e6 > policy.longest_ttl:", "if False:"),
        f"{TESTS}/test_clocks.py::test_a_policy_caps_the_ttl",
    ),
    Mutant(
        "what a failover lost is counted again",
        *(f"{COORDINATOR}/replays.py", "        scripts.on_new_life = self._due.add\n", ""),
        f"{TESTS}/test_replays.py::test_what_a_failover_lost_counts_again",
    ),
    Mutant(
        "the end of a quarantine is audited",
        f"{LUA}/quarantine_end.lua",
        "audit('QUARANTINE_ENDED', '', {reason = ARGV[7], user = ARGV[8]}, true)\n",
        "",
        f"{TESTS}/test_quarantine.py::test_an_operator_ends_a_quarantine",
    ),
    # Room and copies ------------------------------------------------------------------------
    Mutant(
        "full memory deletes no audit trail",
        *(
            f"{LUA}/common.lua",
            "      error(id)\n",
            "      redis.call('DEL', key)\n      error(id)\n",
        ),
        f"{TESTS}/test_full_memory.py -k only_what_is_not_ours",
    ),
    Mutant(
        "full memory ends no lease",
        *(f"{COORDINATOR}/scripts.py", 'else " flags=allow-oom"', 'else ""'),
        f"{TESTS}/test_full_memory.py::test_leases_go_on_and_end",
    ),
    Mutant(
        "a grant without its copies is withheld",
        f"{COORDINATOR}/durability.py",
        "return bool(local >= self.fsync and replicas >= self.replicas)",
        "return True",
        f"{TESTS}/test_durability.py::test_a_grant_is_withheld_and_undone",
    ),
    Mutant(
        "a grant that is withheld is undone",
        *(f"{COORDINATOR}/leases.py", "if accepted_us == reply.now_us:", "if False:"),
        f"{TESTS}/test_durability.py::test_a_grant_is_withheld_and_undone",
    ),
    # Callers ------------------------------------------------------------------------------
    Mutant(
        "a caller has one share of an app, with all of its tokens",
        *(f"{LUA}/budgets.lua", "CALLER and size(scopes_key(CALLER)) or 0", "0"),
        f"{TESTS}/test_isolation.py::test_a_caller_fills_no_app_with_several_tokens",
    ),
    Mutant(
        "a stream is judged by what was read at its start",
        *(
            f"{COORDINATOR}/service.py",
            "self._admit(request, context, origin)\n                        shown",
            "self._admit(request, context)\n                        shown",
        ),
        f"{TESTS}/test_gate.py::test_a_stream_is_asked_once_where_it_comes_from",
    ),
    Mutant(
        "a watcher that reaches a change reads the whole app again",
        *(f"{COORDINATOR}/watches.py", "if moved or (app.at and", "if (app.at and"),
        f"{TESTS}/test_watch.py::test_a_change_of_a_token_hides_none_of_its_app",
    ),
    Mutant(
        "machines push nothing out of the audit trail that an operator did",
        f"{LUA}/common.lua",
        "local stream = (SECURITY[kind] or facts.cause == 'OPERATOR') and OPERATORS or MACHINES",
        "local stream = MACHINES",
        f"{TESTS}/test_audit.py::test_machines_push_no_operator_out",
    ),
    Mutant(
        "what one caller repeats is one entry of the audit trail",
        *(f"{LUA}/common.lua", "if number_of > stream.most then", "if false then"),
        f"{TESTS}/test_audit.py::test_machines_push_no_operator_out",
    ),
    Mutant(
        "refusals of one caller are added up",
        *(f"{COORDINATOR}/audit.py", "if this not in repeated.known and", "if"),
        f"{TESTS}/test_audit.py::test_a_wrong_secret_is_a_refusal",
    ),
    Mutant(
        "different refusals of one caller are added up too",
        *(f"{COORDINATOR}/audit.py", " and len(repeated.known) < MOST_DIFFERENT", ""),
        "tests/e2e/test_access.py::test_a_refusal_is_in_the_audit_trail_once_a_minute",
    ),
    Mutant(
        "lists, maps and texts of requests are bounded",
        f"{COORDINATOR}/requests.py",
        '            raise invalid(path, f"must be at most {most}")\n',
        "            pass\n",
        f"{TESTS}/test_bad_input.py -k too_long",
    ),
    Mutant(
        "a damaged request is judged after its caller is known",
        f"{COORDINATOR}/gate.py",
        "identity = await self._identity(origin)\n",
        "identity = check_request(request) and await self._identity(origin)\n",
        f"{TESTS}/test_gate.py::test_damaged_requests_are_refused_after_authentication",
    ),
    Mutant(
        "a name in a certificate is not that of a credential",
        *(f"{COORDINATOR}/gate.py", 'return f"{kind}:{names[0]', 'return f"credential:{names[0]'),
        f"{TESTS}/test_gate.py::test_a_certificate_says_who_calls",
    ),
    Mutant(
        "a certificate with two names says nothing",
        *(f"{COORDINATOR}/gate.py", "if len(names) > 1:", "if False:"),
        f"{TESTS}/test_gate.py::test_a_certificate_says_who_calls",
    ),
    Mutant(
        "a call has one credential",
        *(f"{COORDINATOR}/gate.py", "if len(self.authorizations) > 1:", "if False:"),
        f"{TESTS}/test_gate.py::test_two_credentials_in_one_call",
    ),
    Mutant(
        "an access file that is gone admits nobody",
        *(
            f"{COORDINATOR}/gate.py",
            'if self.problem == "missing":\n            raise',
            "if False:\n            raise",
        ),
        f"{TESTS}/test_gate.py::test_an_access_file_that_is_gone_admits_nobody",
    ),
    Mutant(
        "a stream ends with its credential",
        *(
            f"{COORDINATOR}/gate.py",
            "                    gone.add(credential)\n",
            "                    pass\n",
        ),
        f"{TESTS}/test_gate.py::test_streams_end_with_their_credential",
    ),
    Mutant(
        "a stream ends with its grant",
        *(f"{COORDINATOR}/gate.py", "if known != changes:", "if False:"),
        f"{TESTS}/test_gate.py::test_a_stream_ends_with_its_grant",
    ),
    Mutant(
        "what a coordinator says is harmless on a terminal",
        f"{CLIENT}/cli/output.py",
        "return Text(printable(value), style=",
        "return Text(value, style=",
        "tests/unit/test_cli_hostile.py",
    ),
    Mutant(
        "a command cannot look into its guard",
        *(f"{CLIENT}/_guard.py", "_platform.allow_inspection(allowed=False)", "pass"),
        "tests/e2e/test_guard.py::test_a_command_cannot_look_into_its_guard",
    ),
    Mutant(
        "a marker in the output needs the key of the run",
        *(
            f"{CLIENT}/_recognise.py",
            "        return self._trust_output\n",
            "        return True\n",
        ),
        "tests/unit/test_recognise.py::test_data_that_a_job_prints_is_no_marker",
    ),
    Mutant(
        "a marker begins its line",
        *(f"{CLIENT}/_recognise.py", "_MARKER.match(line)", "_MARKER.search(line)"),
        "tests/unit/test_recognise.py::test_what_only_looks_like_a_marker",
    ),
    Mutant(
        "dots of a path are followed before a key is cut",
        f"{CLIENT}/_places.py",
        '_KEY.split("/".join(_segments(path)), maxsplit=1)[0]',
        "_KEY.split(path, maxsplit=1)[0]",
        "tests/unit/test_places.py::test_a_call_is_placed",
    ),
    Mutant(
        "a path is decoded once",
        *(f"{CLIENT}/_places.py", ' and one != "%"', ""),
        "tests/unit/test_places.py::test_a_normal_form_stays",
    ),
    Mutant(
        "each token has spellings of its own",
        *(f"{LUA}/backoffs.lua", "':spellings:' .. token, endpoint", "':spellings:', endpoint"),
        f"{TESTS}/test_spellings.py::test_a_tokens_spelling_says_nothing_of_another",
    ),
    Mutant(
        "what the store compares has no case",
        *(f"{COORDINATOR}/places.py", "folded(self.spelled)", "self.spelled"),
        f"{TESTS}/test_spellings.py",
    ),
    Mutant(
        "endpoints are compared without case",
        *(f"{CLIENT}/_places.py", "return endpoint.casefold()", "return endpoint"),
        f"{TESTS}/test_budgets.py::test_one_endpoint_has_one_budget",
    ),
    Mutant(
        "an error that two streams show counts once",
        *(
            f"{CLIENT}/cli/_conduct.py",
            "if not self._duplicates.is_new(source, one, now):",
            "if 0:",
        ),
        "tests/e2e/test_conduct.py::test_of_two_streams_one_is_counted",
    ),
    Mutant(
        "two equal errors of one stream are two",
        *(f"{CLIENT}/_recognise.py", "source not in one.sources\n                and", ""),
        "tests/unit/test_recognise.py::test_streams_that_show_the_same_error",
    ),
    Mutant(
        "an endpoint is a path without its host",
        *(f"{CLIENT}/_recognise.py", "text = without_host(text)", "pass"),
        "tests/unit/test_recognise.py::test_an_endpoint_is_its_path_alone",
    ),
    Mutant(
        "few lines of a stack trace are passed over",
        f"{CLIENT}/_recognise.py",
        "and _FRAME.match(text):\n                    self._frames_left -= 1",
        "and _FRAME.match(text):\n                    pass",
        "tests/unit/test_recognise.py::test_a_url_may_follow_a_stack_trace",
    ),
    Mutant(
        "an exception that a logger names after its message is another error",
        *(f"{CLIENT}/_recognise.py", "if thrown is None or", "if True or"),
        "tests/corpus",
    ),
    Mutant(
        "a link to help is no error",
        f"{CLIENT}/policies/exact-online.toml",
        r"(?:^|[^\w'%/=.-])(?P<code>itgen(?:(?:oda|eor|clr)\d{3}|exl150))(?:[^\w'%/=-]|$)",
        r"\b(?P<code>itgen(?:(?:oda|eor|clr)\d{3}|exl150))\b",
        "tests/corpus/test_readings.py -k link",
    ),
    Mutant(
        "a search for fields begins at a word",
        *(f"{CLIENT}/_recognise.py", "(?<!\\w)(\\w++)=", "(\\w+)="),
        "tests/unit/test_patterns.py -k ours_are_linear",
    ),
    Mutant(
        "the body of an answer says how long it throttles",
        *(f"{CLIENT}/_recognise.py", 'found.get("retry_after", "")', '""'),
        "tests/unit/test_presets.py::test_a_throttle_is_recognised_from_its_documented_answer",
    ),
    Mutant(
        "a policy that is printed as a file commands no terminal",
        *(f"{CLIENT}/policies/writing.py", "one if one.isprintable() else", "one if one else"),
        "tests/unit/test_cli_hostile.py -k policy",
    ),
    Mutant(
        "an access token is not renewed before the interval has passed",
        *(f"{CLIENT}/policies/__init__.py", "> self.access_token_life:", "> 1e12:"),
        "tests/unit/test_policies.py::test_mistakes",
    ),
    Mutant(
        "a pattern of a policy is not too large",
        *(f"{CLIENT}/_patterns.py", "compiled.programsize > _MOST_PROGRAM", "False"),
        "tests/unit/test_patterns.py::test_what_a_pattern_costs_is_bounded",
    ),
    Mutant(
        "what is sealed belongs to one record and generation",
        f"{COORDINATOR}/custody/sealing.py",
        "(_FORMAT, key_id, kind, binding)",
        "(_FORMAT, key_id, kind)",
        "tests/unit/test_sealing.py::test_each_part_of_the_binding_counts",
    ),
    Mutant(
        "what is sealed as one kind does not open as another",
        f"{COORDINATOR}/custody/sealing.py",
        "(_FORMAT, key_id, kind, binding)",
        "(_FORMAT, key_id, binding)",
        "tests/unit/test_sealing.py::test_one_kind_does_not_open_as_another",
    ),
    Mutant(
        "an error of the encoder takes no secret along",
        f"{COORDINATOR}/custody/sealing.py",
        "with contextlib.suppress(UnicodeEncodeError):",
        "with contextlib.nullcontext():",
        "tests/unit/test_sealing.py::test_errors_show_no_secret",
    ),
    Mutant(
        "a key becomes primary when every replica has it",
        f"{COORDINATOR}/custody/sealing.py",
        "if wanted in everywhere:",
        "if wanted in own:",
        "tests/unit/test_sealing.py::test_a_new_primary_key_is_everywhere",
    ),
    Mutant(
        "keys of one id are compared",
        f"{COORDINATOR}/custody/sealing.py",
        "set(own.items()).intersection(*(keys.items() for keys in announced))",
        "{(k, own[k]) for k in set(own).intersection(*announced)}",
        "tests/unit/test_sealing.py::test_the_primary_key",
    ),
    Mutant(
        "others cannot read a key that is used",
        f"{COORDINATOR}/custody/key_files.py",
        "if found.st_mode & (0o037 if found.st_uid == 0 else 0o077):",
        "if False:",
        "tests/unit/test_key_files.py::test_only_the_owner_reads_a_key",
    ),
    Mutant(
        "a key is never overwritten",
        f"{COORDINATOR}/custody/key_files.py",
        "path.hardlink_to(draft)",
        "draft.replace(path)",
        "tests/unit/test_key_files.py::test_nothing_is_overwritten",
    ),
    Mutant(
        "an id keeps its key while it is in use",
        f"{COORDINATOR}/custody/key_files.py",
        "if keys[key_id].secret != self._keys[key_id].secret:",
        "if False:",
        "tests/unit/test_key_files.py::test_an_id_keeps_its_key",
    ),
    Mutant(
        "a token with a lease is not taken into custody",
        *(f"{LUA}/custody/put_grant.lua", "if lease then return wait", "if false then return wait"),
        f"{TESTS}/test_grants.py::test_a_lease_keeps_a_token_out_of_custody",
    ),
    Mutant(
        "a token that cools down is not taken into custody",
        *(f"{LUA}/custody/put_grant.lua", "if not kept and cools(token)", "if false"),
        f"{TESTS}/test_grants.py::test_a_cooldown_keeps_a_token_out_of_custody",
    ),
    Mutant(
        "a grant that is replaced is the one that was meant",
        *(f"{LUA}/custody/put_grant.lua", "if ask.etag_chain and not (kept", "if false and (kept"),
        f"{TESTS}/test_grants.py::test_a_grant_is_replaced_only_on_purpose",
    ),
    Mutant(
        "a request that is sent again puts nothing",
        *(f"{LUA}/custody/put_grant.lua", "if kept and grant.chain ==", "if false and nil =="),
        f"{TESTS}/test_grants.py::test_a_request_that_is_sent_again",
    ),
    Mutant(
        "a put begins a cooldown",
        f"{LUA}/custody/put_grant.lua",
        "cool_down(id, token, refreshed, number(token.interval_us))",
        "note_hold(0)",
        f"{TESTS}/test_grants.py::test_an_unknown_last_refresh_begins_a_cooldown",
    ),
    Mutant(
        "secrets are stored only for the generation that they were sealed for",
        f"{LUA}/custody/put_grant.lua",
        "if ask.generation ~= generation then",
        "if false then",
        f"{TESTS}/test_grant_records.py::test_secrets_are_sealed_for_the_generation_that_they_get",
    ),
    Mutant(
        "a request without a known result counts, also after a deletion",
        *(f"{LUA}/custody/delete_grant.lua", "if lost_at(grant) > 0 then", "if false then"),
        f"{TESTS}/test_grant_records.py"
        "::test_a_request_whose_result_is_unknown_counts_at_its_last_possible_moment",
    ),
    Mutant(
        "a request without proof counts at the end of its right",
        f"{CUSTODY}/results.py",
        "return standing.not_before_us <= times.now_us",
        "return True",
        f"{TESTS}/test_refreshing.py -k test_no_proof",
    ),
    Mutant(
        "an old token that revokes the grant is not sent after a loss",
        *(
            f"{LUA}/custody/begin_refresh.lua",
            "(ask.fears == 'WRITES' and may_be_behind(grant))",
            "false",
        ),
        f"{TESTS}/test_refreshing.py -k test_a_failover_that_may_have_lost_an_answer",
    ),
    Mutant(
        "a grant from a backup is not sent",
        f"{LUA}/custody/begin_refresh.lua",
        "local is_doubtful = ask.fears ~= ''",
        "local is_doubtful = false",
        f"{TESTS}/test_restored_grants.py::test_a_grant_from_a_backup",
    ),
    Mutant(
        "after a restore the same generation is no evidence",
        f"{LUA}/custody/end_refresh.lua",
        "grant.condition == 'STALE' and not may_be_restored(grant)",
        "grant.condition == 'STALE'",
        f"{TESTS}/test_restored_grants.py::test_a_grant_from_a_backup",
    ),
    Mutant(
        "replicas that report a restore late do not undo the word of an operator",
        *(f"{LUA}/common.lua", "now - number(shard.restored_us) > 2 * safe)", "true)"),
        f"{TESTS}/test_restored_grants.py::test_a_grant_from_a_backup",
    ),
    Mutant(
        "a replica without the key of a grant takes no right to refresh it",
        f"{CUSTODY}/refreshing.py",
        "if held.record.public.key_id not in ring.keys:",
        "if False:",
        f"{TESTS}/test_key_rotation.py::test_the_right_is_for_replicas_with_the_key",
    ),
    Mutant(
        "not more runs than the policy allows have a shared lease",
        f"{LUA}/leases.lua",
        "token.running >= number(token.most_runs) and 'FULL' or ''",
        "false and 'FULL' or ''",
        f"{TESTS}/test_shared_leases.py::test_as_many_as_the_policy_allows",
    ),
    Mutant(
        "a waiter with an offer does not delay those behind it",
        f"{LUA}/leases.lua",
        "if not wait and not (is_shared and request.state == 'offered') then",
        "if not wait then",
        f"{TESTS}/test_shared_leases.py::test_offers_are_made_at_once",
    ),
    Mutant(
        "the release of a shared lease begins no cooldown",
        f"{LUA}/release.lua",
        "if token.custody_us then refreshed = nil end",
        "",
        f"{TESTS}/test_shared_leases.py::test_no_end_begins_a_cooldown",
    ),
    Mutant(
        "the TTL of a shared lease lengthens no quarantine",
        f"{LUA}/renew.lua",
        "else\n  note_hold(",
        "end\ndo\n  note_hold(",
        f"{TESTS}/test_shared_leases.py::test_no_end_begins_a_cooldown",
    ),
    Mutant(
        "a clock that went back keeps no dead shared lease",
        f"{LUA}/leases.lua",
        "if shard.went_back_us ~= token.went_back_us then",
        "if false then",
        f"{TESTS}/test_shared_leases.py::test_a_clock_that_went_back_keeps_no_dead_lease",
    ),
    Mutant(
        "back-offs of token requests hold no shared lease",
        f"{LUA}/leases.lua",
        "if not shared[id] then return subject end",
        "if true then return subject end",
        f"{TESTS}/test_shared_leases.py::test_back_offs_of_token_requests_hold_no_run",
    ),
    Mutant(
        "a quarantine holds no run of a token that was in custody before",
        f"{LUA}/leases.lua",
        "(in_quarantine() and not was_in_custody)",
        "in_quarantine()",
        f"{TESTS}/test_shared_leases.py::test_a_quarantine_holds_up_no_run",
    ),
    Mutant(
        "a grant is not deleted while a shared lease lives",
        f"{LUA}/custody/delete_grant.lua",
        "if (token.running or 0) > 0 then",
        "if false then",
        f"{TESTS}/test_shared_leases.py::test_the_way_changes_when_no_lease_lives",
    ),
    Mutant(
        "the lock of python-redis-lock is held in custody",
        f"{LUA}/leases.lua",
        "redis.call('SET', lock_key(id), shared.LOCK)",
        "",
        f"{TESTS}/test_shared_leases.py::test_python_redis_lock_is_kept_out",
    ),
    Mutant(
        "a key encrypts only if every live replica has it",
        f"{CUSTODY}/seals.py",
        "others = await self._notices.exchange() if self._notices else ()",
        "others = ()",
        f"{TESTS}/test_key_rotation.py::test_rotation",
    ),
    Mutant(
        "a key that is missing does not end the rotation",
        f"{CUSTODY}/key_rotation.py",
        "            except SealError as error:\n                page",
        "            except UnsealableError as error:\n                page",
        f"{TESTS}/test_key_rotation.py::test_a_missing_key_stops_its_tokens_only",
    ),
    Mutant(
        "the notice of a replica that was killed ends",
        *(f"{CUSTODY}/key_notices.py", "if ends <= now or ends > now + kept then", "if false then"),
        f"{TESTS}/test_key_rotation.py::test_a_notice_ends",
    ),
    Mutant(
        "a grant has one name, also across apps",
        f"{CUSTODY}/owners.py",
        "if other and await self._has(other, fingerprint):",
        "if False:",
        f"{TESTS}/test_owners.py::test_a_put_that_crashed",
    ),
    Mutant(
        "a claim counts while its put may be under way",
        *(f"{CUSTODY}/owners.py", "if 0 <= age_us < PENDING_US:", "if False:"),
        f"{TESTS}/test_owners.py::test_a_put_that_crashed",
    ),
    Mutant(
        "a claim is looked at again after the put",
        f"{CUSTODY}/grants.py",
        "if await self._owners.held(fingerprint, name):",
        "if True:",
        f"{TESTS}/test_owners.py::test_a_replica_that_was_stopped",
    ),
    Mutant(
        "a claim goes with the grant",
        f"{CUSTODY}/grants.py",
        "        await self._release(fingerprint, name, claim)\n        return custody",
        "        return custody",
        f"{TESTS}/test_owners.py::test_a_claim_goes_with_the_grant",
    ),
    Mutant(
        "a pause of a refresh token outlives its grant",
        *(f"{LUA}/custody/put_grant.lua", "is_same and grant.not_before_us or 0", "0"),
        f"{TESTS}/test_grant_records.py::test_a_pause_of_a_refresh_token_outlives_its_grant",
    ),
    Mutant(
        "a token that is made again has the cooldown that custody knows",
        *(f"{LUA}/create_token.lua", "if refreshed > 0 then", "if false then"),
        f"{TESTS}/test_grant_records.py::test_a_token_that_is_made_again_still_waits",
    ),
    Mutant(
        "without the primary key the key of a grant seals it again",
        *(
            f"{CUSTODY}/seals.py",
            "            return Keyring(keys, None), None",
            "            raise",
        ),
        f"{TESTS}/test_key_rotation.py::test_a_missing_primary_key_stops_its_tokens_only",
    ),
    Mutant(
        "a key of the same id that is another one opens nothing",
        *(f"{CUSTODY}/seals.py", "keys.keys() - {key_id_of(sealed)}", "keys"),
        f"{TESTS}/test_key_rotation.py::test_a_missing_primary_key_stops_its_tokens_only",
    ),
    Mutant(
        "a coordinator with keys leaves no dump",
        *(f"{CUSTODY}/memory.py", "_PR_SET_DUMPABLE, 0, 0, 0, 0)", "_PR_SET_DUMPABLE, 1, 0, 0, 0)"),
        "tests/custody/test_memory.py::test_no_dump",
    ),
    Mutant(
        "an authorization begins only when the token does not cool down",
        *(
            f"{LUA}/custody/begin_authorization.lua",
            "if reason then return wait",
            "if false then return wait",
        ),
        f"{TESTS}/test_authorizing.py::test_a_new_grant_replaces_the_old_one",
    ),
    Mutant(
        "an authorization holds leases and refreshes",
        f"{LUA}/custody/grants.lua",
        "math.max(changes.not_before_us, changes.until_us), cooling",
        "changes.not_before_us, cooling",
        f"{TESTS}/test_authorizing.py::test_nothing_else_is_requested_meanwhile",
    ),
    Mutant(
        "an authorization that is given up frees the token",
        f"{LUA}/custody/end_authorization.lua",
        "  put(token_key(id), token, {not_before_us = token.not_before_us})\n",
        "",
        f"{TESTS}/test_authorizing.py::test_a_first_grant",
    ),
    Mutant(
        "a code that got no answer counts at the last possible moment",
        f"{LUA}/custody/end_authorization.lua",
        "if ask.result == 'UNPROVEN' then",
        "if false then",
        f"{TESTS}/test_authorizing.py::test_the_old_grant_stays",
    ),
    Mutant(
        "an access token without a refresh token counts for the interval",
        f"{CUSTODY}/authorizing.py",
        '"no refresh token was issued", outcome',
        '"no refresh token was issued"',
        f"{TESTS}/test_authorizing.py::test_the_old_grant_stays",
    ),
    Mutant(
        "the state of an authorization is compared",
        f"{CUSTODY}/authorizing.py",
        "if not hmac.compare_digest(_hash(state), authorization.state_hash):",
        "if False:",
        f"{TESTS}/test_authorizing.py::test_only_the_last_one_can_be_completed",
    ),
    Mutant(
        "an authorization ends after ten minutes",
        *(
            f"{LUA}/custody/intend_authorization.lua",
            "if sure >= authorization.valid_us then",
            "if false then",
        ),
        f"{TESTS}/test_authorizing.py::test_it_expires",
    ),
    Mutant(
        "the answer to a code is adopted after a crash",
        f"{CUSTODY}/refreshing.py",
        "await self.adopt_authorization(name, attempt_id, found)",
        "pass",
        "tests/e2e/test_authorizing.py::test_a_kill_during_the_exchange_loses_nothing",
    ),
    Mutant(
        "a late answer to a code does not replace a grant that moved since",
        *(f"{LUA}/custody/put_grant.lua", "(moved and not exchange_until(authorization))", "false"),
        f"{TESTS}/test_authorization_records.py"
        "::test_a_grant_that_moved_since_is_not_replaced_by_a_late_answer",
    ),
    Mutant(
        "a clock that goes back lengthens no hold of an authorization",
        *(f"{LUA}/leases.lua", "math.max(last, held) - now", "last - now"),
        f"{TESTS}/test_authorization_records.py::test_a_clock_that_goes_back_lengthens_no_hold",
    ),
    Mutant(
        "an exchange without an answer holds python-redis-lock's key",
        f"{LUA}/custody/end_authorization.lua",
        "math.max(number(token.not_before_us), authorization.until_us)",
        "number(token.not_before_us)",
        f"{TESTS}/test_authorizing.py::test_a_lock_user_waits_for_a_code_without_an_answer",
    ),
    Mutant(
        "an error that repeats a secret is not shown",
        *(f"{CUSTODY}/results.py", "if any(part in text for part in parts):", "if False:"),
        "tests/custody/test_results.py::test_an_error_that_repeats_a_secret",
    ),
    Mutant(
        "an answer in the spool that cannot be stored holds up no other",
        *(f"{CUSTODY}/refreshing.py", 'if failure.reason.startswith("STORE_"):', "if True:"),
        f"{TESTS}/test_refreshing.py::test_one_answer_does_not_hold_up_the_others",
    ),
    Mutant(
        "the command takes only what belongs to its authorization",
        f"{CLIENT}/cli/_authorizing.py",
        'if not hmac.compare_digest(found.get("state", "").encode("utf-8", "replace"), '
        "state.encode()):",
        "if False:",
        f"{TESTS}/test_authorizing.py::test_the_command_serves_the_redirect",
    ),
    Mutant(
        "a request without proof counts once",
        *(f"{LUA}/custody/end_refresh.lua", " or not (has_secrets or is_under_way) then", " then"),
        f"{TESTS}/test_grant_records.py::test_a_request_without_proof_counts_once",
    ),
    Mutant(
        "the interval after a late answer holds, also where a refused probe was the last request",
        f"{LUA}/custody/end_refresh.lua",
        "local not_before = math.max(pause_us, now + ask.not_before_in_us)",
        "local not_before = now + (is_only_refused(grant) and 0 or ask.not_before_in_us)",
        f"{TESTS}/test_refreshing.py::test_a_late_answer_after_a_refused_probe",
    ),
    Mutant(
        "a replica that was stopped before its intent sends nothing",
        f"{CUSTODY}/refreshing.py",
        "if self._now_us() > work.anchor.asked_us + INTENT_US:",
        "if False:",
        f"{TESTS}/test_refreshing.py::test_a_replica_that_was_stopped_before_its_intent",
    ),
    Mutant(
        "a repeat within a grace period is not made after it",
        *(f"{CUSTODY}/rules.py", "if now_us >= first_us + rules.grace_us:", "if False:"),
        "tests/custody/test_rules.py::test_a_repeat_that_missed_the_grace_period",
    ),
    Mutant(
        "a deletion takes the secrets",
        *(f"{LUA}/custody/delete_grant.lua", "sealed_access = '', facts = '',", "facts = '',"),
        f"{TESTS}/test_grant_records.py::test_a_grant_that_is_put_again_still_waits",
    ),
    Mutant(
        "whose refresh token it is, is told to those who see that token",
        f"{COORDINATOR}/custody/grants.py",
        "if caller.sees(of.app, of.token) else",
        "if True or caller else",
        f"{TESTS}/test_grants.py::test_a_custodian_of_one_token_hears_nothing_of_another",
    ),
    Mutant(
        "all coordinators of a store seal with one key",
        f"{COORDINATOR}/custody/seals.py",
        "ring = Keyring(keys, primary)",
        "ring = Keyring(keys, max(keys))",
        f"{TESTS}/test_grants.py::test_a_coordinator_with_other_keys",
    ),
    Mutant(
        "a grant goes only where the policy says",
        f"{COORDINATOR}/custody/grants.py",
        "not set(wanted) <= set(known)",
        "False",
        f"{TESTS}/test_grants.py::test_what_the_policy_does_not_allow",
    ),
    Mutant(
        "secrets are not sent over http",
        f"{COORDINATOR}/custody/grants.py",
        'startswith("http:") and not self._terms.loopback_http',
        'startswith("http:") and False',
        f"{TESTS}/test_grants.py::test_http_is_for_simulators",
    ),
    Mutant(
        "nobody changes custody who is not known, from the network",
        *(f"{COORDINATOR}/custody/grants.py", "if not self.is_closed:", "if False:"),
        f"{TESTS}/test_grants.py::test_an_open_coordinator_changes_nothing",
    ),
    Mutant(
        "a coordinator with a port on the network asks who changes custody",
        f"{COORDINATOR}/commands.py",
        "is_closed=bool(files.access) or is_loopback(settings.listen)",
        "is_closed=settings.insecure",
        "tests/custody/test_terms.py::test_without_an_access_file_on_loopback_only",
    ),
    Mutant(
        "a dead refresh token is tried once an hour",
        f"{COORDINATOR}/custody/rules.py",
        "        waited = max(waited, times.now_us + _probe_us(rules))",
        "        pass",
        "tests/custody/test_rules.py::test_no_two_requests_within_an_interval",
    ),
    Mutant(
        "a report that fails again and again is set aside",
        *(f"{CLIENT}/_reporting.py", "failed[0].failures >= _MOST_FAILURES", "False"),
        "tests/unit/test_spool.py::test_a_report_that_fails_again_and_again_is_set_aside",
    ),
    Mutant(
        "a coordinator that is away fails no report",
        *(f"{CLIENT}/_reporting.py", "        if alone:  #", "        if False:  #"),
        "tests/unit/test_spool.py::test_a_coordinator_that_is_away_fails_no_report",
    ),
    Mutant(
        "a request to a token URL leaves before its deadline",
        *(f"{CUSTODY}/sender.py", "if sent_us >= deadline_us:", "if False:"),
        "tests/integration/test_sending.py::test_too_late",
    ),
    Mutant(
        "a sender that is stopped just before the write does not write later",
        *(f"{CUSTODY}/sender.py", "setitimer(signal.ITIMER_REAL, left_us", "setitimer(2, left_us"),
        "tests/integration/test_sending.py::test_frozen_between_clock_and_write",
    ),
    Mutant(
        "the answer to a request that was sent outlives the coordinator",
        *(f"{CUSTODY}/sender.py", "        _prctl(_PR_SET_PDEATHSIG, 0)\n", ""),
        "tests/e2e/test_sending.py -k killed_after_the_request",
    ),
    Mutant(
        "an answer lies in the spool before it is reported",
        f"{CUSTODY}/sender.py",
        "        spooled = False\n",
        "        _tell(self._channel, {'outcome': document(outcome), 'spooled': True})\n"
        "        if received is not None:\n"
        "            _send_frame(self._channel, received.body)\n"
        "        spooled = False\n",
        "tests/integration/test_sending.py::test_spooled_before_it_is_reported",
    ),
    Mutant(
        "nothing is sent without the right to send",
        *(
            f"{CUSTODY}/sender.py",
            "        deadline_us = attempt.wait_for_right()\n",
            "        deadline_us = boottime_us() + 10**9\n",
        ),
        "tests/integration/test_sending.py::test_abandoned",
    ),
    Mutant(
        "others of the user cannot look into a sender",
        *(f"{CUSTODY}/sender.py", "    _prctl(_PR_SET_DUMPABLE, 0)\n", ""),
        "tests/e2e/test_sending.py::test_the_sender_shows_nothing",
    ),
    Mutant(
        "the coordinator keeps no secret that it handed to a sender",
        *(
            f"{CUSTODY}/sending.py",
            "            secret[:] = bytes(len(secret))\n",
            "            pass\n",
        ),
        "tests/e2e/test_sending.py::test_the_coordinator_keeps_nothing",
    ),
    Mutant(
        "the address that was checked is the one that is connected to",
        *(f"{CUSTODY}/sender.py", "        if not refused:\n", "        if True:\n"),
        "tests/integration/test_sending.py::test_a_private_address",
    ),
    Mutant(
        "of half an answer what came is kept",
        *(
            f"{CUSTODY}/sender.py",
            "            if received is None:\n",
            "            if not isinstance(outcome, Answered):\n",
        ),
        "tests/integration/test_sending.py::test_half_an_answer_is_kept",
    ),
    Mutant(
        "a connection that the provider ended is not written to",
        *(
            f"{CUSTODY}/sender.py",
            "                self._connection.expect_silence()\n",
            "                pass\n",
        ),
        "tests/integration/test_sending.py::test_the_provider_ends_the_connection_first",
    ),
    Mutant(
        "no access token is handed out within its margin",
        *(f"{CUSTODY}/handout.py", "- held.now_us - margin_us", "- held.now_us"),
        "tests/custody/test_handout.py::test_no_token_is_handed_out_within_its_margin",
    ),
    Mutant(
        "a store whose clock goes back makes no access token younger",
        *(
            f"{CUSTODY}/handout.py",
            "min(usable_until_us, before.usable_until_us)",
            "usable_until_us",
        ),
        "tests/custody/test_handout.py::test_a_clock_of_the_store_that_goes_back_makes_no_token_younger",
    ),
    Mutant(
        "only a gateway gets access tokens",
        f"{COORDINATOR}/access.py",
        "GetAccessTokenRequest: (Role.GATEWAY,",
        "GetAccessTokenRequest: (Role.VIEWER,",
        f"{TESTS}/test_hand_out.py::test_only_a_gateway_gets_tokens_until_its_role_ends",
    ),
    Mutant(
        "only a custodian has grants checked",
        f"{COORDINATOR}/access.py",
        "CheckGrantRequest: (Role.CUSTODIAN,",
        "CheckGrantRequest: (Role.VIEWER,",
        "tests/e2e/test_access.py::test_every_role_may_do_its_own",
    ),
    Mutant(
        "a check connects only where a refresh would",
        f"{CUSTODY}/checking.py",
        "Sending(request, reach=self._reach, limits=limits)",
        "Sending(request, reach=type(self._reach)(plain_http=True), limits=limits)",
        f"{TESTS}/test_observing.py::test_a_check_says_what_is_wrong",
    ),
    Mutant(
        "checks in a row connect once",
        f"{CUSTODY}/checking.py",
        "if name not in self._answers:",
        "if True:",
        f"{TESTS}/test_observing.py::test_an_answer_is_given_again_for_a_few_seconds",
    ),
    Mutant(
        "the series of grants have a bound",
        *(f"{CUSTODY}/measuring.py", "min(self._most, MOST - others)", "1_000_000"),
        f"{TESTS}/test_observing.py::test_grants_beyond_the_limit_are_counted",
    ),
    Mutant(
        "the trail says what came of a refresh",
        f"{COORDINATOR}/lua/custody/end_refresh.lua",
        "result = ask.result, ",
        "",
        f"{TESTS}/test_observing.py::test_the_trail_has_each_refresh",
    ),
    Mutant(
        "an access token that was delayed seems no younger",
        f"{CLIENT}/custody/access.py",
        "min(self.clock(), self._opened_ns + age_ns + round(age_ns * _DRIFT))",
        "self.clock()",
        "tests/unit/test_access_token.py::test_a_delayed_response_counts_from_when_it_was_sent",
    ),
    Mutant(
        "an access token that is withdrawn is not used",
        *(f"{CLIENT}/custody/access.py", "elif not response.has_access_token:", "elif False:"),
        "tests/unit/test_access_token.py::test_a_state_alone_leaves_the_token",
    ),
    Mutant(
        "two coordinators never share a spool",
        *(f"{CUSTODY}/spool_folder.py", "        _lock(folder, lock)\n", ""),
        "tests/unit/test_spool_folder.py::test_a_second_coordinator_is_refused",
    ),
    Mutant(
        "a drain finishes a request to a token URL",
        f"{CUSTODY}/duty.py",
        "_ended(self._refresher.requests, TAKEOVER_US / SECOND)",
        "_ended(self._refresher.requests, 0)",
        f"{TESTS}/test_duty.py::test_a_drain_finishes_a_request",
    ),
    Mutant(
        "a drain begins no request",
        *(f"{CUSTODY}/refreshing.py", "        self._starts_none = True\n", "        pass\n"),
        f"{TESTS}/test_duty.py::test_a_drain_finishes_a_request",
    ),
    Mutant(
        "a grant that changed is looked at by what refreshes it",
        *(f"{CUSTODY}/handout.py", "self._users.look(served.name)", "pass"),
        f"{TESTS}/test_duty.py::test_what_ends_a_wait_is_followed_at_once",
    ),
    Mutant(
        "the end of a back-off is followed by what refreshes",
        *(f"{CUSTODY}/handout.py", "        hub.on_announcement(self._announced)\n", ""),
        f"{TESTS}/test_duty.py::test_what_ends_a_wait_is_followed_at_once",
    ),
    Mutant(
        "so it is where a token is held that still has an access token",
        *(f"{CUSTODY}/duty.py", "            if name.app == app:\n", "            if False:\n"),
        f"{TESTS}/test_duty.py::test_the_end_of_what_held_a_token_is_followed",
    ),
    Mutant(
        "what a token URL answers becomes a back-off, and is counted",
        *(f"{CUSTODY}/refreshing.py", "await self.record(work.name, events, outcome)", "pass"),
        f"{TESTS}/test_duty.py::test_the_provider_s_word_becomes_a_back_off",
    ),
    Mutant(
        "a refresh in custody does not wait for the probe of a back-off",
        *(
            f"{LUA}/custody/grants.lua",
            "    if one.state == 'QUIET' then pause",
            "    if true then pause",
        ),
        f"{TESTS}/test_duty.py::test_the_provider_s_word_becomes_a_back_off",
    ),
    Mutant(
        "an answer with an access token is not searched",
        *(
            f"{CUSTODY}/reports.py",
            "if received is None or isinstance(verdict, Issued):",
            "if received is None:",
        ),
        "tests/custody/test_reports.py::test_a_token_that_was_issued_is_not_searched",
    ),
    Mutant(
        "a right that a replaced server may have given is no evidence",
        *(
            f"{CUSTODY}/rules.py",
            "quarantine.seen_us + STALE_PRIMARY_US <= interval_over_us",
            "True",
        ),
        f"{TESTS}/test_custody_quarantine.py::test_an_intent_that_may_be_lost_is_waited_for",
    ),
    Mutant(
        "in quarantine the interval is measured on the replica's own clock",
        *(f"{CUSTODY}/rules.py", "is_last and interval_over_us <= now_us", "is_last"),
        f"{TESTS}/test_custody_quarantine.py::test_our_own_answer_is_evidence",
    ),
    Mutant(
        "copies on other servers are no evidence after a restore",
        *(
            f"{CUSTODY}/rules.py",
            "if is_copied and quarantine.loss is Loss.WRITES:",
            "if is_copied:",
        ),
        f"{TESTS}/test_custody_quarantine.py::test_copies_are_evidence_after_a_failover",
    ),
    Mutant(
        "evidence is of the quarantine that holds",
        *(f"{LUA}/custody/grants.lua", "ask.quarantine == this_quarantine()", "true"),
        f"{TESTS}/test_custody_quarantine.py::test_evidence_is_of_one_quarantine",
    ),
    Mutant(
        "replicas keep copies of what they read",
        *(
            f"{CUSTODY}/refreshing.py",
            "            self._keep(name, copy_of(held, asked_us))\n",
            "",
        ),
        f"{TESTS}/test_refreshing.py::test_a_failover_that_lost_an_answer_of_a_replica_that_is_gone",
    ),
    Mutant(
        "a copy is opened before it is presented",
        *(
            f"{CUSTODY}/refreshing.py",
            "not copy.is_ours and not self._is_sound(name, copy)",
            "False",
        ),
        f"{TESTS}/test_refreshing.py::test_a_failover_that_lost_an_answer_of_a_replica_that_is_gone",
    ),
    Mutant(
        "what is read in quarantine is no copy",
        *(f"{CUSTODY}/copies.py", 'held.reason == "QUARANTINED" or ', ""),
        "tests/custody/test_copies.py::test_what_may_be_out_of_date_is_not_kept",
    ),
    Mutant(
        "private networks are for token URLs of operators who allow them",
        f"{COORDINATOR}/server.py",
        "        terms.networks,\n",
        '        ("127.0.0.0/8",),\n',
        f"{TESTS}/test_duty.py::test_private_token_urls_with_an_authority_of_their_own",
    ),
    Mutant(
        "a client's copy is taken where an old refresh token does no harm only",
        *(f"{CUSTODY}/refreshing.py", "request.generation and not revokes", "request.generation"),
        f"{TESTS}/test_duty.py::test_a_client_s_copy_where_an_old_token_revokes_the_grant",
    ),
    Mutant(
        "a client's copy confirms nothing",
        *(f"{CUSTODY}/copies.py", "msgspec.structs.replace(later, confirms=False)", "later"),
        f"{TESTS}/test_duty.py::test_a_client_s_copy_where_an_old_token_revokes_the_grant",
    ),
    Mutant(
        "a client's copy is for its own token",
        *(f"{CUSTODY}/copies.py", 'Binding(str(name), ""', 'Binding("", ""'),
        "tests/custody/test_copies.py::test_a_copy_that_clients_keep",
    ),
    Mutant(
        "a guard removes the access token of a run that was killed",
        *(f"{CLIENT}/_guard.py", "        if path is not None:\n", "        if False:\n"),
        "tests/e2e/test_run_access_token.py::test_no_file_outlives_the_run",
    ),
    Mutant(
        "an access token that is too old is in no file",
        f"{CLIENT}/custody/files.py",
        "            self.remove()\n            return\n",
        "            return\n",
        "tests/e2e/test_run_access_token.py::test_the_file_is_replaced_and_never_too_old",
    ),
    Mutant(
        "an adapter sends an access token over https, or within this host",
        *(f"{CLIENT}/auth/_rules.py", "and not _is_loopback(self.host)", "and False"),
        "tests/integration/test_auth.py::test_where_an_access_token_may_go",
    ),
    Mutant(
        "a redirect to another host has no access token",
        f"{CLIENT}/auth/_requests.py",
        "    if not response.is_redirect:\n",
        "    if response.is_redirect or not response.is_redirect:\n",
        "tests/integration/test_auth.py::test_no_other_host_gets_the_token",
    ),
    Mutant(
        "a call is not repeated with the access token that the provider refused",
        f"{CLIENT}/custody/access.py",
        "last is None or last.generation <= newer_than",
        "last is None",
        "tests/integration/test_auth.py::test_a_dead_token_is_replaced_once",
    ),
]

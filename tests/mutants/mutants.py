"""Safeguards, and what takes each of them out. `make mutants` shows that each is missed.

One more is three lines: a name, the file with the text to replace and what to put there, and what
notices it: arguments for pytest, or `chaos STORE FAULT SEED`.
"""

from __future__ import annotations

from dataclasses import dataclass

LUA = "coordinator/holdoff_coordinator/lua"
COORDINATOR = "coordinator/holdoff_coordinator"
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
            "if now < number(token.not_before_us) then return 'COOLING' end",
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
        *(f"{LUA}/common.lua", "if shard.history and info:find", "if false and info:find"),
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
        *(f"{COORDINATOR}/clock.py", "return jump if abs(jump) > TOLERANCE_US else 0", "return 0"),
        f"{TESTS}/test_quarantine.py -k jumped_forward",
    ),
    Mutant(
        "a script whose clock is in doubt grants nothing",
        *(
            f"{LUA}/common.lua",
            "local clock_in_doubt = ARGV[1] ~= '' and",
            "local clock_in_doubt = false and",
        ),
        f"{TESTS}/test_quarantine.py -k jumped",
    ),
    Mutant(
        "quarantine lasts for a TTL and an interval",
        f"{LUA}/common.lua",
        "return number(shard.longest_ttl_us) + number(shard.longest_interval_us) end",
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
]

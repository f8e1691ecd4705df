"""From the store's records to the API's messages."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from google.protobuf import duration_pb2, timestamp_pb2

from holdoff.names import AppName, BackOffName, BudgetName, LeaseName, TokenName
from holdoff.v1 import audit_pb2, budget_pb2, grant_pb2, lease_pb2, token_pb2
from holdoff_coordinator.caller import ANYONE, NOBODY
from holdoff_coordinator.failures import Failure
from holdoff_coordinator.scripts import lock_name

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from holdoff_coordinator.caller import Caller
    from holdoff_coordinator.scripts import Reply, Scripts

Record = dict[str, bytes]

_LIVE = (
    lease_pb2.LEASE_STATE_OFFERED,
    lease_pb2.LEASE_STATE_ACTIVE,
    lease_pb2.LEASE_STATE_BREAKING,
)

_WAIT_REASONS = {
    "": lease_pb2.WAIT_REASON_UNSPECIFIED,
    "HELD": lease_pb2.WAIT_REASON_HELD,
    "FULL": lease_pb2.WAIT_REASON_HELD,
    "COOLING": lease_pb2.WAIT_REASON_COOLING,
    "QUARANTINED": lease_pb2.WAIT_REASON_QUARANTINED,
    "BACKING_OFF": lease_pb2.WAIT_REASON_BACKING_OFF,
    "QUEUED": lease_pb2.WAIT_REASON_QUEUED,
}

_WAIT_WORDS = {
    "": "the token is free, and this waiter was not heard from",
    "HELD": "its lock is held by a python-redis-lock user",
    "FULL": "as many runs as its policy allows at once have a lease",
    "COOLING": "cooling down after the last refresh",
    "QUARANTINED": "quarantined: the store may have forgotten something",
    "QUEUED": "another waiter comes first",
}

_FAILURE_REASONS = {
    "HELD": "LEASE_HELD",
    "FULL": "LEASE_HELD",
    "COOLING": "TOKEN_COOLING",
    "QUARANTINED": "QUARANTINED",
    "BACKING_OFF": "BACKING_OFF",
    "QUEUED": "TOKEN_QUEUED",
}


def record(flat: Sequence[bytes]) -> Record:
    """Read HGETALL's answer as scripts pass it on."""
    return {flat[i].decode(): flat[i + 1] for i in range(0, len(flat), 2)}


def duration(microseconds: int) -> duration_pb2.Duration:
    """Microseconds as a Duration."""
    message = duration_pb2.Duration()
    message.FromMicroseconds(microseconds)
    return message


def timestamp(record: Mapping[str, bytes], field: str) -> timestamp_pb2.Timestamp | None:
    """A field in µs as a Timestamp; None if the record lacks it."""
    if field not in record:
        return None
    message = timestamp_pb2.Timestamp()
    message.FromMicroseconds(int(record[field]))
    return message


def lease_message(token: TokenName, lease_id: str, lease: Record, now_us: int) -> lease_pb2.Lease:
    """A lease as the API shows it: everything but the proof of ownership."""
    state = lease_pb2.LeaseState.Value(f"LEASE_STATE_{lease['state'].decode()}")
    if state == lease_pb2.LEASE_STATE_ACTIVE and "break_reason" in lease:
        state = lease_pb2.LEASE_STATE_BREAKING
    remaining = max(0, int(lease["expires_us"]) - now_us) if state in _LIVE else None
    activity, why = lease_pb2.HOLDER_ACTIVITY_UNSPECIFIED, ""
    if state == lease_pb2.LEASE_STATE_ACTIVE:
        activity, why = _activity(token.app, lease, now_us)
    return lease_pb2.Lease(
        name=str(LeaseName(token.app, token.token, lease_id)),
        state=state,
        mode=lease_pb2.LeaseMode.Value(
            f"LEASE_MODE_{lease.get('mode', b'EXCLUSIVE').decode()}"  # which older releases omit
        ),
        holder=lease_pb2.Holder.FromString(lease["holder"]),
        fencing_token=int(lease["fencing"]),
        ttl=duration(int(lease["ttl_us"])),
        create_time=timestamp(lease, "created_us"),
        accept_time=timestamp(lease, "accepted_us"),
        command_start_time=timestamp(lease, "started_us"),
        expire_time=timestamp(lease, "expires_us"),
        remaining=None if remaining is None else duration(remaining),
        end_time=timestamp(lease, "ended_us"),
        break_reason=lease.get("break_reason", b"").decode(),
        activity=activity,
        activity_message=why,
        go_on_time=timestamp(lease, "go_on_us") if activity != _RUNNING else None,
    )


_RUNNING = lease_pb2.HOLDER_ACTIVITY_RUNNING


def _activity(
    app: str, lease: Record, now_us: int
) -> tuple[lease_pb2.HolderActivity.ValueType, str]:
    """What the holder of an active lease does, and why; a late renewal has no reason."""
    if int(lease["expires_us"]) - now_us < int(lease["ttl_us"]) / 2:
        return lease_pb2.HOLDER_ACTIVITY_RENEWAL_LATE, ""
    why = ""
    if "back_off" in lease:
        facts = {key: value.encode() for key, value in json.loads(lease["back_off"]).items()}
        why = back_off_sentence(back_off_message(app, facts, now_us, ANYONE))
    if lease.get("paused") == b"1":
        return lease_pb2.HOLDER_ACTIVITY_PAUSED, why
    return (lease_pb2.HOLDER_ACTIVITY_BACKING_OFF if why else _RUNNING), why


def token_message(token: TokenName, found: Sequence[Any], now_us: int) -> token_pb2.Token:
    """A token as the API shows it, from an entry of `read.lua`."""
    _, flat, lease_id, _, queue_length, reason, *_, running = found
    rec = record(flat)
    own_refresh_at = rec["own_refresh_at"].decode()
    own_interval = rec["own_interval_us"]
    cooldown_us = int(rec.get("not_before_us", b"0")) - now_us
    return token_pb2.Token(
        name=str(token),
        policy=rec["policy"].decode(),
        refresh_interval=duration(int(own_interval)) if own_interval else None,
        refresh_at=refresh_at_value(own_refresh_at),
        rules=token_pb2.TokenRules(
            refresh_interval=duration(int(rec["interval_us"])),
            refresh_at=refresh_at_value(rec["refresh_at"].decode()),
            access_token_life=duration(int(rec["access_token_life_us"])),
        ),
        lock_name=lock_name(token.app, token.token),
        wait_reason=_WAIT_REASONS[reason.decode()],
        cooldown=duration(cooldown_us) if cooldown_us > 0 else None,
        not_before_time=timestamp(rec, "not_before_us"),
        last_refresh_time=timestamp(rec, "last_refresh_us"),
        fencing_token=int(rec["fencing"]),
        lease=str(LeaseName(token.app, token.token, lease_id.decode())) if lease_id else "",
        shared_lease_count=int(running),
        queue_length=int(queue_length),
        create_time=timestamp(rec, "created_us"),
        update_time=timestamp(rec, "updated_us"),
    )


def status_message(token: TokenName, found: Sequence[Any], now_us: int) -> lease_pb2.TokenStatus:
    """How a token stands, from an entry of `read.lua`."""
    _, flat, lease_id, lease, queue_length, reason, *_, running = found
    facts = {**record(flat), "shared": running}
    return _status(token, facts, lease_id, record(lease), queue_length, reason, now_us)


def change_message(app: str, change: Record) -> lease_pb2.Change:
    """A change as the API shows it, from an entry of the app's changes."""
    token = TokenName(app, change["token"].decode())
    lease = {
        field.removeprefix("lease."): value
        for field, value in change.items()
        if field.startswith("lease.")
    }
    return lease_pb2.Change(
        kind=lease_pb2.ChangeKind.Value(f"CHANGE_KIND_{change['kind'].decode()}"),
        time=timestamp(change, "at_us"),
        status=_status(
            token,
            change,
            change["lease"],
            lease,
            change["queue_length"],
            change["reason"],
            int(change["at_us"]),
        ),
    )


def _status(  # noqa: PLR0913, PLR0917 - the facts, as both sources have them
    token: TokenName,
    facts: Record,
    lease_id: bytes,
    lease: Record,
    queue_length: bytes,
    reason: bytes,
    now_us: int,
) -> lease_pb2.TokenStatus:
    not_before_us = int(facts.get("not_before_us", b"0"))
    return lease_pb2.TokenStatus(
        token=str(token),
        wait_reason=_WAIT_REASONS[reason.decode()],
        lease=lease_message(token, lease_id.decode(), lease, now_us) if lease_id else None,
        cooldown=duration(not_before_us - now_us) if not_before_us > now_us else None,
        not_before_time=timestamp(facts, "not_before_us") if not_before_us else None,
        queue_length=int(queue_length),
        shared_lease_count=int(facts.get("shared", b"0")),
    )


def waiter_message(place: int, request: Record, now_us: int) -> lease_pb2.Waiter:
    """A waiter as the API shows it: everything but its request id."""
    return lease_pb2.Waiter(
        place=place,
        holder=lease_pb2.Holder.FromString(request["holder"]),
        queue_time=timestamp(request, "queued_us"),
        waited=duration(max(0, now_us - int(request["queued_us"]))),
        heard_age=duration(max(0, now_us - int(request["heard_us"]))),
        offered=request["state"] == b"offered",
    )


def budget_message(app: str, found: Sequence[Any], now_us: int) -> budget_pb2.Budget:
    """A budget as the API shows it, from an entry of `read_budgets.lua`."""
    budget_id, flat, room_us = found[0].decode(), record(found[1]), int(found[2])
    most, margin = int(flat["most"]), int(flat["margin"])
    used, reserved = int(flat.get("used", b"0")), int(flat.get("reserved", b"0"))
    room = max(0, most - margin - used - reserved)
    state = budget_pb2.BUDGET_STATE_OPEN
    if not room:
        state = budget_pb2.BUDGET_STATE_SPENT
    elif room <= margin:
        state = budget_pb2.BUDGET_STATE_LOW
    return budget_pb2.Budget(
        name=str(BudgetName(app, budget_id)),
        limit=flat["limit"].decode(),
        kind=budget_pb2.EventKind.Value(f"EVENT_KIND_{flat['kind'].decode()}"),
        scope=_scope(app, flat),
        state=state,
        used=used,
        reserved=reserved,
        most=most,
        margin=margin,
        room=room,
        window=duration(int(flat["window_us"])),
        room_in=None if room else duration(max(0, room_us - now_us)),
        room_time=None if room else timestamp({"room": b"%d" % room_us}, "room"),
        last_event_time=timestamp(flat, "last_us"),
        reset_time=timestamp(flat, "reset_us"),
        reset_reason=flat.get("reset_reason", b"").decode(),
        reset_by=flat.get("reset_by", b"").decode(),
    )


def read_budgets(
    scripts: Scripts, app: str, reply: Reply, caller: Caller = NOBODY
) -> list[budget_pb2.Budget]:
    """The budgets that `read_budgets.lua` found and a caller may see, without damaged ones."""

    def read(entry: Any) -> budget_pb2.Budget | None:
        seen = _sees(caller, app, record(entry[1]))
        return budget_message(app, entry, reply.now_us) if seen else None

    return [one for one in scripts.readable(app, "budgets", reply.values[0], read) if one]


def read_back_offs(
    scripts: Scripts, app: str, reply: Reply, caller: Caller = NOBODY, *, concerned: bool = False
) -> list[budget_pb2.BackOff]:
    """The back-offs that `read_back_offs.lua` found and a caller may see, without damaged ones.

    With `concerned` the caller may see all of them: they concern one of its scopes.
    """

    def read(flat: Any) -> budget_pb2.BackOff | None:
        facts = record(flat)
        seen = concerned or _sees(caller, app, facts)
        return back_off_message(app, facts, reply.now_us, caller) if seen else None

    return [one for one in scripts.readable(app, "backOffs", reply.values[0], read) if one]


def _sees(caller: Caller, app: str, facts: Record) -> bool:
    """Whether a caller may know of the scope of a budget or a back-off."""
    return caller.sees_scope(
        app,
        facts["token"].decode(),
        is_whole=not (facts["division"] or facts["endpoint"]),
        users=facts.get("users", b"").decode().split(),
    )


def back_off_message(app: str, back_off: Record, now_us: int, caller: Caller) -> budget_pb2.BackOff:
    """A back-off as the API shows it, from its record; one that is over has no state.

    Who caused it, and who probes, is shown only to callers that may see their token.
    """
    cause, budget_id = back_off["cause"].decode(), back_off["id"].decode()
    state, until_us = back_off["state"].decode(), int(back_off["until_us"])

    def sees(field: str) -> bool:
        return bool(back_off["token"]) or caller.sees(app, back_off.get(field, b"").decode())

    probe = back_off.get("probe_holder") if sees("probe_token") else None
    is_known = cause == "OPERATOR" or sees("from")
    cause_of = {
        field: back_off.get(field, b"").decode() if is_known else ""
        for field in ("job", "host", "user")
    }
    return budget_pb2.BackOff(
        name=str(BackOffName(app, budget_id)),
        scope=_scope(app, back_off),
        cause=budget_pb2.BackOffCause.Value(f"BACK_OFF_CAUSE_{cause}"),
        state=(
            budget_pb2.BACK_OFF_STATE_UNSPECIFIED
            if state == "OVER"
            else budget_pb2.BackOffState.Value(f"BACK_OFF_STATE_{state}")
        ),
        start_time=timestamp(back_off, "since_us"),
        end_time=timestamp(back_off, "until_us"),
        remaining=duration(until_us - now_us) if state != "OVER" and until_us > now_us else None,
        reason=_back_off_words(app, back_off) + _cleared_words(back_off),
        caused_by=lease_pb2.Holder(
            job=cause_of["job"], host=cause_of["host"], user=cause_of["user"]
        ),
        status=int(back_off.get("status", b"0")),
        repeats=int(back_off.get("repeats", b"0")),
        budget=str(BudgetName(app, budget_id)) if cause == "SPENT" else "",
        probe=lease_pb2.Holder.FromString(probe) if probe else None,
    )


_AT_RISK = {
    "clock": "no record is lost, but leases, cooldowns and budgets are measured by a clock that "
    "jumped: they may have ended too early",
    "took over": "what was acknowledged in the last moments before: leases, refreshes, events and "
    "reservations",
    "backup": "every lease, refresh, event and reservation since the backup",
}
"""What a quarantine covers, by a word of its reason."""
_ALL_AT_RISK = (
    "everything: live leases, cooldowns, fencing tokens, events, reservations and back-offs"
)


def quarantine_show(app: str) -> str:
    """The command that says why, and until when, an app is in quarantine."""
    return f"holdoff quarantine show {AppName(app)}"


def quarantine_message(app: str, shard: Record, now_us: int) -> lease_pb2.Quarantine:
    """The quarantine of an app, from its shard; one that is over has nothing remaining."""
    until_us = int(shard.get("quarantine_until_us", b"0"))
    reason = shard.get("quarantine_reason", b"").decode()
    return lease_pb2.Quarantine(
        app=str(AppName(app)),
        start_time=timestamp(shard, "quarantine_since_us"),
        end_time=timestamp(shard, "quarantine_until_us"),
        remaining=duration(until_us - now_us) if until_us > now_us else None,
        reason=reason,
        at_risk=next((risk for word, risk in _AT_RISK.items() if word in reason), _ALL_AT_RISK),
    )


def audit_message(time_us: int, entry: Mapping[bytes, bytes]) -> audit_pb2.AuditEvent:
    """An entry of the audit trail as the API shows it."""
    facts = {key.decode(): value for key, value in entry.items()}
    text = {key: value.decode(errors="replace") for key, value in facts.items() if key != "holder"}
    holder = lease_pb2.Holder.FromString(facts.get("holder", b""))
    for field in ("job", "host", "user"):
        if field in text:
            setattr(holder, field, text[field])
    event = audit_pb2.AuditEvent(
        kind=audit_pb2.AuditKind.Value(f"AUDIT_KIND_{text['kind']}"),
        resource=text["resource"],
        identity=text.get("identity", ""),
        peer=text.get("peer", ""),
        holder=holder,
        reason=_audit_words(text),
        count=int(text.get("count", "0")),
        replica=text.get("replica", ""),
        result=grant_pb2.RefreshResult.Value(f"REFRESH_RESULT_{text.get('result', 'UNSPECIFIED')}"),
        generation=int(text.get("generation", "0")),
    )
    event.time.FromMicroseconds(time_us)
    if "first_us" in text:
        event.first_time.FromMicroseconds(int(text["first_us"]))
    return event


def _audit_words(text: Mapping[str, str]) -> str:
    """Why something happened: in its own words, or by what it is about."""
    app = text["resource"].split("/")[1] if "/" in text["resource"] else ""
    facts: dict[str, bytes] = {
        key: text.get(key, "").encode()
        for key in ("cause", "limit", "status", "reason", "user", "token", "division", "endpoint")
    }
    facts["status"] = facts["status"] or b"0"
    if text["kind"] == "BACK_OFF_BEGAN":
        return _back_off_words(app, facts)
    if facts["endpoint"] or facts["division"]:
        return f"{text.get('reason', '')} ({scope_words(_scope(app, facts))})"
    return text.get("reason", "")


def user_and_host(holder: lease_pb2.Holder) -> str:
    """Who an operator is, as far as it is told: user@host."""
    return "@".join(filter(None, (holder.user, holder.host)))


def back_off_sentence(back_off: budget_pb2.BackOff) -> str:
    """What a back-off asks of everybody, for people."""
    match back_off.state:
        case budget_pb2.BACK_OFF_STATE_PROBING:
            probe = f", {holder_words(back_off.probe)}," if back_off.HasField("probe") else ""
            return f"{back_off.reason}; that is over, and one job{probe} probes first"
        case budget_pb2.BACK_OFF_STATE_REOPENING:
            return f"{back_off.reason}; that is over, and jobs follow one by one"
        case _:
            return back_off.reason


def holder_words(holder: lease_pb2.Holder) -> str:
    """A holder for people."""
    who = f"job {holder.job!r}" if holder.job else f"process {holder.pid}"
    return f"{who} on {holder.host}" if holder.host else who


_ACTIVITY_WORDS = {
    lease_pb2.HOLDER_ACTIVITY_BACKING_OFF: ", which is backing off",
    lease_pb2.HOLDER_ACTIVITY_PAUSED: ", whose command is paused",
    lease_pb2.HOLDER_ACTIVITY_RENEWAL_LATE: ", whose renewal is late",
}


def held_words(lease: lease_pb2.Lease) -> str:
    """By whom a token is held, for people, and what keeps that holder from going on."""
    what = f"held by {holder_words(lease.holder)}{_ACTIVITY_WORDS.get(lease.activity, '')}"
    return f"{what}: {lease.activity_message}" if lease.activity_message else what


def _back_off_words(app: str, back_off: Mapping[str, bytes]) -> str:
    """Why a scope must be quiet, for people."""
    where, reason = scope_words(_scope(app, back_off)), back_off.get("reason", b"").decode()
    match back_off["cause"]:
        case b"SPENT" if reason:
            return f"{reason}: {where} is backing off"
        case b"SPENT":
            return f"the budget {back_off['limit'].decode()!r} of {where} is spent"
        case b"BLOCKED":
            status = back_off.get("status", b"0").decode()
            how = f" with HTTP {status}" if status != "0" else ""
            what = f" ({reason})" if reason else ""
            alone = "; only one of its tokens has reported that" if back_off.get("claim") else ""
            return f"the provider refuses calls of {where}{how}{what}{alone}"
        case _:
            who = back_off.get("user", b"").decode() or "an operator"
            return f"{who} paused {where}: {reason}"


def _cleared_words(back_off: Record) -> str:
    if "cleared_by" not in back_off:
        return ""
    return f"; {back_off['cleared_by'].decode()} cleared it: {back_off['clear_reason'].decode()}"


def scope_words(scope: budget_pb2.Scope) -> str:
    """A scope for people."""
    parts = [scope.token or scope.app]
    if scope.division:
        parts.append(f"division {scope.division}")
    if scope.endpoint:
        parts.append(scope.endpoint)
    return " ".join(parts)


def _scope(app: str, flat: Mapping[str, bytes]) -> budget_pb2.Scope:
    token = flat["token"].decode()
    return budget_pb2.Scope(
        app=str(AppName(app)),
        token=str(TokenName(app, token)) if token else "",
        division=flat["division"].decode(),
        endpoint=(flat.get("spelled") or flat["endpoint"]).decode(),
    )


def reservation_message(
    reservation_id: str, found: Sequence[bytes], now_us: int
) -> budget_pb2.Reservation:
    """A reservation as the API shows it."""
    state, expires_us = found[0].decode().upper(), int(found[1])
    return budget_pb2.Reservation(
        id=reservation_id,
        state=budget_pb2.ReservationState.Value(f"RESERVATION_STATE_{state}"),
        expire_time=timestamp({"expires": b"%d" % expires_us}, "expires"),
        remaining=duration(max(0, expires_us - now_us)) if state == "RESERVED" else None,
    )


def refresh_at_value(word: str) -> token_pb2.RefreshAt.ValueType:
    """Turn END, START or '' into the API's enum."""
    return token_pb2.RefreshAt.Value(f"REFRESH_AT_{word or 'UNSPECIFIED'}")


@dataclass(frozen=True, slots=True)
class Standing:
    """What a request waits for, at one instant of the store's clock."""

    app: str
    reason: str
    """HELD, FULL, COOLING, QUARANTINED, BACKING_OFF, QUEUED, or '' when nothing is in the way."""
    place: int
    queue_length: int
    start_us: int
    """The earliest start; a bound from below."""
    first: bool
    """It need not be told when it may go: it may ask at its earliest start."""
    now_us: int
    blocking_lease: lease_pb2.Lease | None
    back_off: budget_pb2.BackOff | None
    """The back-off that must end first, if one must."""

    @classmethod
    def read(
        cls, app: str, flat: Sequence[Any], now_us: int, lease: lease_pb2.Lease | None
    ) -> Self:
        """Read what `standing()` of leases.lua returned."""
        reason, place, length, start, first, back_off = flat
        return cls(
            app,
            reason.decode(),
            int(place),
            int(length),
            int(start),
            first == b"1",
            now_us,
            lease,
            back_off_message(app, record(back_off), now_us, ANYONE) if back_off else None,
        )

    @property
    def start_in_us(self) -> int:
        """Microseconds from the store's instant to the earliest start."""
        return max(0, self.start_us - self.now_us)

    @property
    def start_after_seconds(self) -> float:
        """When to ask again without being woken; only the first in line has an instant."""
        timed = self.first and self.reason not in ("HELD", "FULL", "")
        return self.start_in_us / 1e6 if timed else math.inf

    @property
    def signature(self) -> tuple[str, int, str, int]:
        """What has to change for the waiter to be told; while held, the start always moves."""
        blocking = self.blocking_lease
        return (
            self.reason,
            self.place,
            f"{_stands(blocking) if blocking else ''} {self._back_off_stands()}",
            self.start_us if self.reason in ("COOLING", "BACKING_OFF") and self.first else 0,
        )

    def _back_off_stands(self) -> str:
        return f"{self.back_off.name} {self.back_off.state}" if self.back_off else ""

    def message(self) -> str:
        """One sentence for people."""
        back_off = back_off_sentence(self.back_off) if self.back_off else ""
        if self.reason == "BACKING_OFF":
            return back_off
        words = _WAIT_WORDS[self.reason]
        if self.blocking_lease and self.reason == "HELD":
            words = held_words(self.blocking_lease)
        elif self.reason == "QUARANTINED":
            words += f": {quarantine_show(self.app)}"
        return words if back_off in words else f"{words}; and {back_off}"

    def to_status(self) -> lease_pb2.WaitStatus:
        """The message for the waiter."""
        start = timestamp({"start": b"%d" % self.start_us}, "start")
        return lease_pb2.WaitStatus(
            reason=_WAIT_REASONS[self.reason],
            place=self.place,
            queue_length=self.queue_length,
            earliest_start_in=duration(self.start_in_us),
            earliest_start_time=start,
            blocking_lease=self.blocking_lease,
            message=self.message(),
            blocking_back_off=self.back_off.name if self.back_off else "",
        )

    def to_failure(self, token: TokenName) -> Failure:
        """The answer at the limit of a wait."""
        blocking = self.blocking_lease or self.back_off
        return Failure(
            _FAILURE_REASONS[self.reason or "QUEUED"],
            f"no lease on {token}: {self.message()}",
            resource=blocking.name if blocking else str(token),
            retry_after_seconds=self.start_in_us / 1e6,
        )


def _stands(lease: lease_pb2.Lease) -> str:
    """What of a lease has to change for those who wait for it to be told."""
    return f"{lease.name} {lease.state} {lease.activity} {lease.activity_message}"

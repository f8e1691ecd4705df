"""From grant records to the API's messages, without anything secret. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
from google.protobuf.timestamp_pb2 import Timestamp

from holdoff.names import GrantName
from holdoff.v1 import grant_pb2
from holdoff_coordinator.custody.rules import LASTING, TAKEOVER_US, Condition
from holdoff_coordinator.failures import Failure

if TYPE_CHECKING:
    from collections.abc import Collection

    from holdoff.names import TokenName
    from holdoff_coordinator.custody.records import Held, Record
    from holdoff_coordinator.policies import Policies

_State = grant_pb2.GrantState

_LASTING = {
    Condition.REAUTHORIZE: (
        _State.GRANT_STATE_REAUTHORIZE,
        "the provider refuses the refresh token",
        "authorize again: holdoff grant authorize {name}",
    ),
    Condition.CONFIGURATION: (
        _State.GRANT_STATE_CONFIGURATION,
        "the provider refuses the client id or its secret",
        "put correct ones: holdoff grant put {name} --replace",
    ),
    Condition.STALE: (
        _State.GRANT_STATE_STALE,
        "the store may have lost a newer refresh token",
        (
            "put the newest one: holdoff grant put {name} --replace; or, if you know that this is "
            "the newest one: holdoff grant trust {name}"
        ),
    ),
}
"""What only an operator can change: the state, why, and what to do."""

HELD_WORDS = {
    "QUARANTINED": "the app is in quarantine: holdoff quarantine show apps/{app}",
    "LEASED": "a lease on the token lives, and its holder may refresh: holdoff watch {name}",
    "LOCKED": "a python-redis-lock user holds the token's lock, and may refresh",
    "COOLING": "the token cools down after the last refresh: holdoff token show {name}",
    "AUTHORIZING": "a person is authorizing the app for it: holdoff grant show {name}",
    "BUDGET_SPENT": "the budget of token requests is spent: holdoff budget list apps/{app}",
    "REFRESHING": "an access token is being requested: holdoff grant show {name}",
    "BACKING_OFF": "a scope of the token backs off: holdoff explain {name}",
}
"""What prevents something, by the reason that the scripts give."""


def held_words(reason: str, name: TokenName) -> str:
    """Say what prevents something, and where to look."""
    return HELD_WORDS[reason].format(name=name, app=name.app)


def shown(held: Held, policies: Policies) -> Held:
    """Return a grant as it is shown to people.

    After a restore it may be stale. That is stored only by the next refresh, which may be far away;
    in quarantine a replica may still have a newer one.
    """
    record = held.record
    is_sure = not held.restored_us or held.reason == "QUARANTINED" or record.under_way
    if is_sure or record.condition is not Condition.READY:
        return held
    try:
        policy = policies.find("the token's policy", held.policy)
    except Failure:
        return held
    if policy.refresh.rotation in LASTING:
        return held
    stale = msgspec.structs.replace(
        record, condition=Condition.STALE, message="", since_us=held.restored_us
    )
    return msgspec.structs.replace(held, record=stale)


def status_of(name: TokenName, held: Held, *, has_key: bool) -> grant_pb2.GrantStatus:
    """Say whether an access token can be had at the instant at which a grant was read.

    Args:
        name: Of the token.
        held: The grant, and what prevents a request.
        has_key: Whether this coordinator has the key of its secrets.
    """
    record = held.record
    if not has_key:
        key_id = record.public.key_id
        why = f"this coordinator does not have the custody key {key_id!r}"
        remedy = f"copy {key_id}.key to the directory of --custody-key-dir, of every replica"
        return _status(_State.GRANT_STATE_KEY_MISSING, why, remedy=remedy)
    if lasting := _LASTING.get(record.condition):
        state, why, remedy = lasting
        remedy = remedy.format(name=name)
        return _status(state, record.message or why, record.since_us, remedy=remedy)
    return _passing(name, held)


def _passing(name: TokenName, held: Held) -> grant_pb2.GrantStatus:
    """The states that end by themselves."""
    record, now_us = held.record, held.now_us
    if record.under_way:
        begun_us = record.attempt_begun_us
        return _status(
            _State.GRANT_STATE_REFRESHING,
            f"replica {record.attempt_replica} requests an access token",
            begun_us,
            begun_us + TAKEOVER_US,
        )
    if now_us < record.expires_us:
        return _status(
            _State.GRANT_STATE_READY,
            "there is an access token",
            record.refreshed_us,
            record.expires_us,
        )
    if held.reason not in {"", "COOLING"}:
        words = held_words(held.reason, name)
        return _status(_State.GRANT_STATE_HELD, words, 0, held.until_us)
    until_us = max(record.not_before_us, held.until_us)
    if now_us < until_us:
        if record.not_sent or record.unproven:
            words = f"the last request failed ({record.attempt_outcome}), and is repeated then"
            return _status(_State.GRANT_STATE_COOLING, words, record.attempt_begun_us, until_us)
        words = held_words("COOLING", name)
        since_us = record.refreshed_us if until_us == record.not_before_us else 0
        return _status(_State.GRANT_STATE_COOLING, words, since_us, until_us)
    return _status(
        _State.GRANT_STATE_READY, "an access token may be requested", record.not_before_us
    )


def grant_message(name: TokenName, held: Held, key_ids: Collection[str]) -> grant_pb2.Grant:
    """A grant as the API shows it, at a coordinator with some keys."""
    record, public = held.record, held.record.public
    return grant_pb2.Grant(
        name=str(GrantName(name.app, name.token)),
        etag=record.etag,
        chain_id=record.chain,
        generation=record.generation,
        client_id=public.client_id,
        token_url=public.token_url,
        api_hosts=public.api_hosts,
        client_authentication=authentication_value(public.client_authentication),
        key_id=public.key_id,
        status=status_of(name, held, has_key=public.key_id in key_ids),
        create_time=time_message(record.created_us),
        refresh_time=time_message(record.refreshed_us),
        expire_time=time_message(record.expires_us if held.now_us < record.expires_us else 0),
        not_before_time=time_message(record.not_before_us),
        idle_expire_time=time_message(record.idle_us),
        last_attempt=attempt_message(record),
    )


def authentication_value(word: str) -> grant_pb2.ClientAuthentication.ValueType:
    """Turn a policy's word into the API's enum."""
    return grant_pb2.ClientAuthentication.Value(f"CLIENT_AUTHENTICATION_{word.upper()}")


def authentication_word(value: grant_pb2.ClientAuthentication.ValueType) -> str:
    """Turn the API's enum into a policy's word; '' for unspecified.

    Raises:
        ValueError: It is none of these.
    """
    word = grant_pb2.ClientAuthentication.Name(value).removeprefix("CLIENT_AUTHENTICATION_")
    return word.lower().replace("unspecified", "")


def attempt_message(record: Record) -> grant_pb2.RefreshAttempt | None:
    """The last request with a grant; None before the first."""
    if not record.attempt:
        return None
    return grant_pb2.RefreshAttempt(
        id=record.attempt,
        replica=record.attempt_replica,
        begin_time=time_message(record.attempt_begun_us),
        step=grant_pb2.RefreshStep.Value(f"REFRESH_STEP_{record.attempt_step}"),
        outcome=record.attempt_outcome,
    )


def _status(
    state: grant_pb2.GrantState.ValueType,
    why: str,
    since_us: int = 0,
    until_us: int = 0,
    remedy: str = "",
) -> grant_pb2.GrantStatus:
    return grant_pb2.GrantStatus(
        state=state,
        since_time=time_message(since_us),
        until_time=time_message(until_us),
        message=f"{why}: {remedy}" if remedy else why,
        remedy=remedy,
    )


def time_message(us: int) -> Timestamp | None:
    """Express an instant of the store's clock; None for none."""
    if not us:
        return None
    message = Timestamp()
    message.FromMicroseconds(us)
    return message
